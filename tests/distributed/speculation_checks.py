"""What the tests of speculative decoding ask ranks to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from r1_megatron.config.schema import ModelConfig, ParallelConfig, RolloutConfig, SamplingConfig
from r1_megatron.data.tokenizers import build_tokenizer
from r1_megatron.model.build import build_model
from r1_megatron.model.parameters import global_parameters
from r1_megatron.parallel.groups import build_process_groups
from r1_megatron.rollout import speculation
from r1_megatron.rollout.cache import PAGE_SIZE
from r1_megatron.rollout.engine import Engine, build_engine
from r1_megatron.train.objectives import annotation
from r1_megatron.train.policy import Policy
from r1_megatron.types import Rollout
from tests.distributed import rollout_checks as checks
from tests.distributed.rollout_checks import SAMPLING, SEED

MODEL = replace(checks.MODEL, mtp_num_layers=1)
# What the engine says of drafts, and only if there are any.
ACCEPTANCE, PER_DRAW = "rollout/draft_acceptance", "rollout/tokens_per_draw"


def engines(
    parallel: ParallelConfig, model: ModelConfig, sampling: SamplingConfig, page_size: int, **rollout: Any
) -> tuple[Policy, Engine, Engine]:
    """One policy, an engine without drafts and one with them. ``rollout``: options of both."""
    cfg = checks.run_config(parallel, model, sampling=sampling)
    cfg = replace(cfg, rollout=replace(cfg.rollout, **rollout))
    with mock.patch.dict(PAGE_SIZE, cpu=page_size):
        groups, policy, plain = checks.setup(cfg)
        cfg = replace(cfg, rollout=replace(cfg.rollout, speculative_tokens=1))
        return policy, plain, build_engine(cfg, policy.chunks, groups, plain.tokenizer)


def check_same_samples(
    parallel: ParallelConfig,
    model: ModelConfig = MODEL,
    sampling: SamplingConfig = SAMPLING,
    page_size: int = 16,
    uneven: bool = False,
    **rollout: Any,
) -> dict[str, Any]:
    """Sample with and without drafts.

    Answers how many requests were ``differing`` in anything but rounding, the largest ``diff`` of a log-probability,
    ``metrics`` and ``forwards`` of the engines without and with drafts.
    """
    _, plain, drafting = engines(parallel, model, sampling, page_size, **rollout)
    prompts = checks.share(checks.some_prompts(5, model.vocab_size), plain.groups, uneven)
    before, after = (
        [rollout for group in engine.generate(prompts, 3, sampling, seed=SEED) for rollout in group]
        for engine in (plain, drafting)
    )
    assert not {ACCEPTANCE, PER_DRAW} & plain.metrics.keys()
    pairs = list(zip(before, after, strict=True))
    return {
        "differing": [a.request for a, b in pairs if not same(a, b)],
        "diff": max((float(np.abs(a.logprobs - b.logprobs).max()) for a, b in pairs if same(a, b)), default=0.0),
        "num_stopped": sum(rollout.finish == "stop" for rollout in after),
        "metrics": (plain.metrics, drafting.metrics),
    }


def same(one: Rollout, two: Rollout) -> bool:
    return (
        one.tokens.tolist() == two.tokens.tolist()
        and (one.finish, one.text) == (two.finish, two.text)
        and np.array_equal(one.routed_experts, two.routed_experts)
    )


@torch.no_grad()
def repeat_the_trunk(policy: Policy) -> None:
    """Weights with which the next token depends on the last one alone, and the drafting layer says what the trunk will.

    No layer adds anything to the residual stream, and the drafting layer's stream is the embedding of the token behind.
    """
    for chunk in policy.chunks:
        for parameter in global_parameters(chunk, policy.groups):
            if "linear_proj" in parameter.name or "linear_fc2" in parameter.name:
                parameter.tensor.zero_()
            if "eh_proj" in parameter.name:
                parameter.tensor.copy_(parameter.shard_of(torch.eye(*parameter.global_shape)))


def check_perfect_drafts(parallel: ParallelConfig, temperature: float) -> dict[str, Any]:
    """The metrics of a model whose drafts cannot be wrong; no stop tokens."""
    sampling = SamplingConfig(max_new_tokens=16, temperature=temperature)
    policy, plain, drafting = engines(parallel, MODEL, sampling, page_size=4)
    drafting.tokenizer.eos_id, plain.tokenizer.eos_id = -1, -1
    repeat_the_trunk(policy)
    prompts = checks.share(checks.some_prompts(6), plain.groups, uneven=False)
    before, after = (
        [rollout for group in engine.generate(prompts, 2, sampling, seed=SEED) for rollout in group]
        for engine in (plain, drafting)
    )
    return {
        **drafting.metrics,
        "differing": [a.request for a, b in zip(before, after, strict=True) if not same(a, b)],
        "plain_forwards": plain.metrics["rollout/num_forwards"],
    }


def check_refused() -> dict[str, str]:
    """On one rank: what a user is told, by case."""
    cfg = checks.run_config(ParallelConfig(device="cpu"), rollout=RolloutConfig(speculative_tokens=1))
    groups = build_process_groups(cfg.parallel)
    told = {}
    for case, can_walk in (("no layer", True), ("modules", False)):
        with mock.patch.object(speculation, "can_walk", lambda chunk, answer=can_walk: answer):
            try:
                build_engine(cfg, build_model(cfg, groups), groups, build_tokenizer(cfg.tokenizer))
            except ValueError as error:
                told[case] = str(error)
    return told


def check_draft_logits(temperature: float) -> tuple[float, int, int]:
    """On one rank: drafts against megatron-core's own multi-token prediction of the finished sequences.

    Answers (largest difference of a logit, drafts compared, drafts that the training forward's logits would not draw).
    """
    sampling = replace(SAMPLING, temperature=temperature)
    policy, _, engine = engines(ParallelConfig(device="cpu"), MODEL, sampling, page_size=4, max_prefill_tokens=8)
    noted: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}
    with mock.patch.object(speculation.Drafting, "draft", noting(policy, noted)):
        rollouts = [r for group in engine.generate(checks.some_prompts(5), 3, sampling, seed=SEED) for r in group]
    worst, wrong, compared = 0.0, 0, 0
    for rollout in rollouts:
        logits_NV = training_logits(policy, rollout.tokens)
        key = checks.sampler.request_key(SEED, rollout.request)
        for position in range(rollout.prompt_len + 1, len(rollout.tokens)):
            if (key, position) not in noted:
                continue
            drafted_V, token = noted[key, position]
            expected_V = logits_NV[position - 2]  # the draft of a position is made two tokens before it
            worst = max(worst, float((drafted_V - expected_V).abs().max()))
            drawn = checks.sampler.sample_tokens(
                expected_V[None],
                vocab_start=0,
                vocab_size=MODEL.vocab_size,
                keys_B=checks.sampler.position_keys(torch.tensor([key]), torch.tensor([position])),
                sampling=sampling,
                gather=checks.sampler.group_gather(None),
            )
            wrong += int(drawn.tokens_B) != token
            compared += 1
    return worst, compared, wrong


def noting(policy: Policy, noted: dict[tuple[int, int], tuple[torch.Tensor, int]]) -> Callable[..., Any]:
    """A `Drafting.draft` that notes (request key, position) -> (logits, token) of every draft that may be fed.

    Those are not the ones behind a wrong draft, nor those that a sample which begins on another's row has of that row.
    """
    draft, weight = speculation.Drafting.draft, policy.chunks[0].output_layer.weight

    def draft_and_note(self, hidden, step, plan, drawn):
        seen: list[torch.Tensor] = []
        sample = self._sample
        self._sample = lambda rows, keys, positions: (seen.append(rows), sample(rows, keys, positions))[1]
        answer = draft(self, hidden, step, plan, drawn)
        self._sample = sample
        if drawn is not None:
            rows = plan.sampled_rows.tolist()
            right = drawn[:, 0].numpy()[plan.draft_of] == plan.tokens[rows[plan.num_sampled :]]
            for i, row in enumerate(rows):
                if rows.index(row) == i and (i < plan.num_sampled or right[i - plan.num_sampled]):
                    place = int(plan.keys[i]), int(plan.sample_positions[i]) + 1
                    noted[place] = seen[0][i] @ weight.T, int(answer[i, 2])
        return answer

    return draft_and_note


def training_logits(policy: Policy, tokens: np.ndarray) -> torch.Tensor:
    """``[N, V]`` of the multi-token-prediction layer in the training forward; row t is about token t + 2."""
    chunk, outputs = policy.chunks[0], []
    hook = chunk.mtp.register_forward_hook(lambda module, args, output: outputs.append(output))
    tokens_1N = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        labels, positions = tokens_1N.roll(-1, 1), torch.arange(len(tokens))[None]
        chunk(tokens_1N, positions, None, labels=labels, head=annotation(1.0))
    hook.remove()
    _, hidden_N1H = outputs[0].chunk(2)
    return (hidden_N1H[:, 0] @ chunk.output_layer.weight.T).detach()
