"""From graded groups to training samples: who gets which advantage, and how much each token counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from r1_megatron.config.schema import RLConfig
from r1_megatron.rl.advantages import group_advantages
from r1_megatron.rl.select import is_learned
from r1_megatron.rl.weights import LossCounts, count, token_weights
from r1_megatron.types import GradedGroup, Rollout, TrainSample


def count_loss(groups: Iterable[GradedGroup], cfg: RLConfig) -> LossCounts:
    """What :func:`assign_credit` will learn from. Sum it over the data-parallel ranks, then pass it there."""
    return count(loss_mask(rollout, cfg) for group in groups for rollout in group.rollouts)


def assign_credit(
    groups: Sequence[GradedGroup], cfg: RLConfig, counts: LossCounts, *, max_new_tokens: int
) -> list[TrainSample]:
    """One sample per completion, in order, every response token with its group-relative advantage.

    ``groups`` are this rank's share of one minibatch, ``counts`` describe the whole minibatch on all ranks. A
    completion that is not learned from (see ``select.is_learned``) stays, without loss, so the order is the rollouts'.
    Old and reference log-probabilities are not known yet: annotating adds them.
    """
    samples = []
    for group in groups:
        advantages = group_advantages(group.rewards, cfg.advantage_normalization, cfg.advantage_epsilon)
        assert len(advantages) == len(group.rollouts), f"{len(group.rollouts)} rollouts, {len(advantages)} rewards"
        for rollout, advantage in zip(group.rollouts, advantages):
            mask = loss_mask(rollout, cfg)
            samples.append(
                TrainSample(
                    tokens=np.asarray(rollout.tokens, dtype=np.int64),
                    loss_mask=mask,
                    advantages=np.where(mask, np.float32(advantage), np.float32(0)),
                    weights=token_weights(mask, cfg.aggregation, counts, max_new_tokens=max_new_tokens),
                    behaviour_logprobs=align_response(rollout, rollout.logprobs),
                    routed_experts=rollout.routed_experts,
                    stale=stale_tokens(rollout),
                    prompt_len=rollout.prompt_len,
                )
            )
    return samples


def loss_mask(rollout: Rollout, cfg: RLConfig) -> np.ndarray:
    """Bool ``[num_tokens]``: true where the next token is a response token that is learned from."""
    return align_response(rollout, np.full(rollout.num_response, is_learned(rollout, cfg))).astype(bool)


def stale_tokens(rollout: Rollout) -> np.ndarray | None:
    """`TrainSample.stale`: where earlier versions of the policy drew the next token."""
    return None if rollout.versions is None else align_response(rollout, rollout.versions < rollout.policy_version)


def align_response(rollout: Rollout, values: np.ndarray) -> np.ndarray:
    """Response-aligned to token-aligned, float32 ``[num_tokens]``.

    The first response token is predicted at the last prompt token, so entry ``j`` goes to ``prompt_len - 1 + j``; the
    rest, the last entry always among it, is zero.
    """
    assert rollout.prompt_len >= 1, "a prompt needs one token at least: something must predict the first response token"
    assert len(values) == rollout.num_response, f"{len(values)} values for {rollout.num_response} response tokens"
    aligned = np.zeros(len(rollout.tokens), dtype=np.float32)
    aligned[rollout.prompt_len - 1 : len(rollout.tokens) - 1] = values
    return aligned
