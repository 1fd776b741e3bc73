"""Every algorithm of `config/algorithms.py`, rewards to gradient, against float64 written from its paper.

The policy is a table of logits, one row per response token (`tests/distributed/paper_checks.py` has a model). The
references are those of `tests/paper_oracle.py`. Ours stores advantages, weights and old log-probabilities in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from r1_megatron.config.algorithms import ALGORITHMS
from r1_megatron.config.load import load_config
from r1_megatron.config.schema import RLConfig
from r1_megatron.rl.credit import assign_credit, charge_kl, count_loss, learned_advantages, whiten_samples
from r1_megatron.rl.loss import policy_loss
from r1_megatron.rl.select import apply_overlong_penalty, select_groups
from r1_megatron.types import GradedGroup, Prompt, Rollout
from tests.paper_oracle import (
    L_MAX,
    LENGTHS,
    PAPERS,
    REWARDS,
    Output,
    Questions,
    Rewards,
    r1,
    reinforce_plus_plus,
    rloo,
    rloo_advantages,
)

VOCAB, PROMPT = 7, 3


class Problem:
    """Logits ``[N, VOCAB]`` of all response tokens, and the same outputs in both forms."""

    def __init__(self, lengths=LENGTHS, rewards=REWARDS, moved: float = 0.25):
        generator = torch.Generator().manual_seed(4)

        def noise(scale: float) -> Tensor:
            values = scale * torch.randn(sum(map(sum, lengths)), generator=generator, dtype=torch.float64)
            return values.float().double()  # what ours can store

        total = sum(map(sum, lengths))
        self.logits = torch.randn(total, VOCAB, generator=generator, dtype=torch.float64)
        self.chosen = torch.randint(0, VOCAB, (total,), generator=generator)
        now = self.logprobs(self.logits)
        self.old = (now + noise(moved)).float().double()
        self.reference = (now + noise(0.4)).float().double()
        self.lengths, self.rewards = lengths, [np.array(values) for values in rewards]

    def logprobs(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(1, self.chosen[:, None])[:, 0]

    def questions(self, logits: Tensor) -> list[list[Output]]:
        sizes = [length for group in self.lengths for length in group]
        parts = [values.split(sizes) for values in (self.logprobs(logits), self.old, self.reference)]
        outputs = iter(map(Output, *parts))
        return [[next(outputs) for _ in group] for group in self.lengths]

    def groups(self) -> list[GradedGroup]:
        groups = []
        for question, (lengths, rewards) in enumerate(zip(self.lengths, self.rewards)):
            rollouts = tuple(
                Rollout(
                    request=question * 100 + number,
                    tokens=np.arange(PROMPT + length),
                    prompt_len=PROMPT,
                    logprobs=np.zeros(length, np.float32),
                    routed_experts=None,
                    finish="length" if length == L_MAX else "stop",
                    policy_version=0,
                )
                for number, length in enumerate(lengths)
            )
            groups.append(GradedGroup(Prompt(question, "", (0,) * PROMPT), rollouts, rewards))
        return groups


def ours(problem: Problem, cfg: RLConfig, logits: Tensor) -> Tensor:
    """The loss by the functions of `rl/`, in the order of `stages/grpo.py`."""
    groups = apply_overlong_penalty(problem.groups(), cfg, max_new_tokens=L_MAX)
    kept, _ = select_groups(groups, cfg)
    samples = assign_credit(kept, cfg, count_loss(kept, cfg), max_new_tokens=L_MAX)
    questions = problem.questions(logits)
    outputs = [output for group in kept for output in questions[group.prompt.index]]

    def aligned(values: Tensor) -> np.ndarray:
        return np.concatenate([np.full(PROMPT - 1, -3.0), values.detach().numpy(), [-9.0]]).astype(np.float32)

    samples = [
        replace(sample, old_logprobs=aligned(output.old), reference_logprobs=aligned(output.reference))
        for sample, output in zip(samples, outputs)
    ]
    if cfg.kl_in == "reward" and cfg.kl_coef:
        samples = charge_kl(kept, samples, cfg)
    if cfg.advantage_normalization == "batch":
        flat = np.concatenate(list(learned_advantages(samples)))
        samples = whiten_samples(samples, flat.mean(), flat.std(ddof=1), cfg)
    names = ("loss_mask", "advantages", "behaviour_logprobs", "old_logprobs", "reference_logprobs")
    arrays = {n: torch.tensor(np.concatenate([getattr(s, n) for s in samples])).double() for n in names}
    pad = logits.new_full((PROMPT - 1,), -1.0), logits.new_full((1,), -2.0)
    l = torch.cat([part for output in outputs for part in (pad[0], output.l, pad[1])])
    ends = np.cumsum([0, *(len(sample.tokens) for sample in samples)])
    losses, _ = policy_loss(l, None, arrays, cfg, torch.tensor(ends, dtype=torch.int32))
    return (losses * torch.tensor(np.concatenate([sample.weights for sample in samples])).double()).sum()


def configured(tmp_path: Path, *overrides: str) -> RLConfig:
    path = tmp_path / "run.yaml"
    path.write_text("")
    return load_config(path, overrides).rl


def assert_same(problem: Problem, cfg: RLConfig, paper: Callable[[Questions, Rewards], Tensor]) -> Tensor:
    mine, theirs = (problem.logits.clone().requires_grad_() for _ in range(2))
    loss, expected = ours(problem, cfg, mine), paper(problem.questions(theirs), problem.rewards)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    loss.backward()
    expected.backward()
    assert mine.grad is not None and theirs.grad is not None
    scale = theirs.grad.abs().max().item()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6 * scale)
    assert scale > 1e-4
    return mine.grad


@pytest.mark.parametrize("moved", [0.25, 0.0], ids=["several updates", "one update"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_is_its_paper(name: str, moved: float, tmp_path: Path):
    """After some updates, ratios on both sides of the clips; and before the first."""
    assert_same(Problem(moved=moved), configured(tmp_path, f"rl.algorithm={name}"), PAPERS[name])


def test_r1_writes_the_ratio_of_a_sequence(tmp_path: Path):
    overrides = "rl.algorithm=grpo", "rl.ratio_level=sequence", "rl.clip_ratio_low=10", "rl.clip_ratio_high=10"
    assert_same(Problem(moved=0.8), configured(tmp_path, *overrides), r1)


def test_rloo_is_reinforce_where_the_policy_has_not_moved(tmp_path: Path):
    """Eq. 6: the gradient of A log pi(y), nothing clipped, and the KL has no gradient of its own."""
    problem = Problem(moved=0.0)

    def reinforce(q: Questions, R: Rewards) -> Tensor:
        return -torch.stack([A * o.l.sum() for o, A in rloo_advantages(q, R)]).mean()

    gradient = assert_same(problem, configured(tmp_path, "rl.algorithm=rloo"), rloo)
    logits = problem.logits.clone().requires_grad_()
    reinforce(problem.questions(logits), problem.rewards).backward()
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-5, atol=1e-7)


def test_reinforce_plus_plus_needs_one_sample_only(tmp_path: Path):
    alone = Problem([(4,), (9,), (20,), (7,)], [(1.0,), (0.0,), (1.0,), (0.5,)])
    assert_same(alone, configured(tmp_path, "rl.algorithm=reinforce_plus_plus"), reinforce_plus_plus)


def test_every_algorithm_sets_the_same_fields():
    """So that none of them leaves in place what another one has set."""
    assert len({tuple(sorted(fields)) for fields in ALGORITHMS.values()}) == 1 and ALGORITHMS.keys() == PAPERS.keys()
    for fields in ALGORITHMS.values():
        RLConfig(**fields)
