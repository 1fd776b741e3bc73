"""The fused head under tensor parallelism: TP 2 and TP 4 give the loss and the gradients of TP 1."""

from __future__ import annotations

import pytest
import torch

from r1_megatron.kernels.vocab_parallel import token_statistics, vocab_parallel_cross_entropy
from r1_megatron.rl.loss import policy_loss
from r1_megatron.train.objectives import PolicyObjective
from tests.distributed.head_checks import HIDDEN, LENGTHS, OBJECTIVES, microbatch
from tests.rank_pool import RankPool

FUSED_HEAD = "tests.distributed.head_checks:fused_head"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_head_is_its_objective_on_whole_logits(name: str) -> None:
    objective, generator = OBJECTIVES[name], torch.Generator().manual_seed(11)
    batch = microbatch(37, generator)
    hidden = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(37, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    loss, metrics = objective.head(batch)(hidden, weight, batch.labels[0])
    found = torch.autograd.grad(loss, (hidden, weight))
    logits, weights = hidden @ weight.T, batch.weights.double()
    if isinstance(objective, PolicyObjective):
        logprobs, entropy = token_statistics(logits, batch.labels[0], temperature=0.7)
        boundaries = torch.tensor([0, 20, 29, 30, 60, 63], dtype=torch.int32)
        losses, expected_metrics = policy_loss(logprobs[None], entropy[None], batch.arrays, objective.rl, boundaries)
    else:
        losses = vocab_parallel_cross_entropy(logits, batch.labels[0])[None]
        learned = weights != 0
        expected_metrics = {"num_tokens": learned.sum().double(), "sft/loss": losses[learned].sum().detach()}
    expected = (losses * weights).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics, expected_metrics, rtol=1e-12, atol=1e-12)
    for gradient, goal in zip(found, torch.autograd.grad(expected, (hidden, weight))):
        torch.testing.assert_close(gradient, goal, rtol=1e-12, atol=1e-12)


# 37 tokens on 4 ranks of 10 rows: the last has 3 rows of padding. 18 tokens: one rank has no token at all.
@pytest.mark.parametrize(("vocab", "width"), [(37, 40), (18, 24)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_ranks_agree_with_one(ranks: RankPool, vocab: int, width: int, dtype: torch.dtype, tolerance: float) -> None:
    (alone,) = ranks.run(FUSED_HEAD, 1, vocab=vocab, width=width, dtype=dtype)
    for tp in (2, 4):
        shards = ranks.run(FUSED_HEAD, tp, vocab=vocab, width=width // tp, dtype=dtype)
        for name in OBJECTIVES:
            expected, found = alone[name], [shard[name] for shard in shards]
            weight = torch.cat([part["weight"] for part in found])
            assert expected["weight"].shape == (width, HIDDEN) and (weight[vocab:] == 0).all()
            for part in found:
                assert torch.equal(part["loss"], found[0]["loss"])
                assert all(torch.equal(part["metrics"][key], value) for key, value in found[0]["metrics"].items())
            assert found[0]["metrics"].keys() == expected["metrics"].keys()
            for key, value in expected["metrics"].items():
                metric = found[0]["metrics"][key]
                torch.testing.assert_close(metric, value, rtol=tolerance, atol=10 * tolerance, msg=key)
            torch.testing.assert_close(found[0]["loss"], expected["loss"], rtol=tolerance, atol=tolerance)
            for gradient, goal in ((found[0]["hidden"], expected["hidden"]), (weight, expected["weight"])):
                assert goal.norm() > 0.01
                assert ((gradient - goal).norm() / goal.norm()).item() <= tolerance, (tp, name)
        assert all(torch.equal(shard["logprobs"], shards[0]["logprobs"]) for shard in shards)
        torch.testing.assert_close(shards[0]["logprobs"], alone["logprobs"], rtol=tolerance, atol=tolerance)
