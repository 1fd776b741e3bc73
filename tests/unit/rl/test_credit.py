"""Advantages, selection, weights and credit: rewards to training samples."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from r1_megatron.config.schema import RLConfig
from r1_megatron.rl.advantages import group_advantages, has_variance
from r1_megatron.rl.credit import align_response, assign_credit, count_loss
from r1_megatron.rl.select import apply_overlong_penalty, select_groups, soft_overlong_penalty
from r1_megatron.rl.weights import LossCounts, count, token_weights
from r1_megatron.types import GradedGroup, Prompt, Rollout


def rollout(prompt_len=3, num_response=4, finish="stop", request=0, routed=False):
    n = prompt_len + num_response
    rng = np.random.default_rng(request)
    return Rollout(
        request=request,
        tokens=rng.integers(1, 50, n),
        prompt_len=prompt_len,
        logprobs=-rng.random(num_response).astype(np.float32) - 0.1,
        routed_experts=rng.integers(0, 8, (n - 1, 2, 4)).astype(np.uint8) if routed else None,
        finish=finish,
        policy_version=0,
    )


def group(rewards, rollouts=None, index=0):
    rollouts = rollouts or [rollout(request=10 * index + i) for i in range(len(rewards))]
    prompt = Prompt(index=index, text="", tokens=tuple(range(rollouts[0].prompt_len)))
    return GradedGroup(prompt=prompt, rollouts=tuple(rollouts), rewards=np.array(rewards, dtype=np.float64))


# ----- advantages


@pytest.mark.parametrize("size", [2, 3, 16])
def test_advantages_against_the_statistics_module(size):
    rewards = np.random.default_rng(size).normal(size=size)
    mean, std = statistics.mean(rewards), statistics.stdev(rewards)  # stdev: the sample's, n - 1
    np.testing.assert_allclose(group_advantages(rewards, "std", 1e-6), (rewards - mean) / (std + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(group_advantages(rewards, "none"), rewards - mean, rtol=1e-12, atol=1e-15)
    assert abs(group_advantages(rewards).sum()) < 1e-12


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 1e9 / 7])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("normalization", ["std", "none"])
def test_equal_rewards_give_exactly_zero(value, size, normalization):
    """Even where the mean of equal floats is not that float, and with an epsilon of zero."""
    advantages = group_advantages(np.full(size, value), normalization, 0.0)
    assert (advantages == 0).all() and not has_variance(np.full(size, value))


def test_rounding_differences_are_not_blown_up():
    """0.1 + 0.2 and 0.3 differ in the last bit: epsilon keeps that from becoming an advantage of one."""
    assert np.abs(group_advantages(np.array([0.1 + 0.2, 0.3, 0.3]), "std", 1e-6)).max() < 1e-9


def test_rewards_must_be_finite():
    with pytest.raises(AssertionError, match="finite"):
        group_advantages(np.array([1.0, np.nan]))


# ----- selection


def test_zero_variance_groups():
    groups = [group([0, 1, 0]), group([1, 1, 1]), group([0.5]), group([0, 0.25])]
    kept, dropped = select_groups(groups, RLConfig(zero_variance_groups="drop"))
    assert kept == [groups[0], groups[3]] and dropped == [groups[1], groups[2]]
    assert select_groups(groups, RLConfig(zero_variance_groups="keep")) == (groups, [])


def test_soft_overlong_penalty_follows_the_paper():
    """DAPO, eq. 13, case by case: L_max = 20, L_cache = 5."""

    def paper(length, maximum=20, cache=5):
        if length <= maximum - cache:
            return 0
        return ((maximum - cache) - length) / cache if length <= maximum else -1

    lengths = np.arange(30)
    np.testing.assert_allclose(soft_overlong_penalty(lengths, 20, 5), [paper(n) for n in lengths], rtol=1e-15)
    assert (soft_overlong_penalty(np.arange(21), 20, 0) == 0).all()


def test_overlong_penalty_changes_rewards_and_can_make_variance():
    rollouts = [rollout(num_response=n, request=n) for n in (10, 18, 20)]
    before = group([1, 1, 1], rollouts)
    cfg = RLConfig(overlong="penalty", overlong_buffer_tokens=4, overlong_penalty=0.5, zero_variance_groups="drop")
    (after,) = apply_overlong_penalty([before], cfg, max_new_tokens=20)
    np.testing.assert_allclose(after.rewards, [1, 1 - 0.25, 1 - 0.5])
    np.testing.assert_allclose(after.components["overlong"], [0, -0.5, -1])
    assert (before.rewards == 1).all() and before.components == {}  # the input is untouched
    assert select_groups([after], cfg)[0] == [after]
    assert apply_overlong_penalty([before], RLConfig(overlong="keep"), max_new_tokens=20) == [before]


# ----- weights


@pytest.fixture
def masks():
    """Three ranks' worth of sequences, one of them without loss."""
    rng = np.random.default_rng(0)
    masks = [rng.random(n) > 0.4 for n in (5, 9, 14, 7, 3, 22)]
    masks[3][:] = False
    return masks


def test_weights_reproduce_the_averages(masks):
    """sum w * loss is each aggregation's own definition, written with means."""
    rng = np.random.default_rng(1)
    losses = [rng.normal(size=len(m)) for m in masks]
    counts = count(masks)
    assert counts == LossCounts(num_sequences=5, num_tokens=sum(int(m.sum()) for m in masks))

    def weighted(aggregation):
        return sum((token_weights(m, aggregation, counts, max_new_tokens=32) * x).sum() for m, x in zip(masks, losses))

    learned = [x[m] for m, x in zip(masks, losses) if m.any()]
    assert weighted("token_mean") == pytest.approx(np.concatenate(learned).mean(), rel=1e-6)
    assert weighted("sequence_mean") == pytest.approx(np.mean([x.mean() for x in learned]), rel=1e-6)
    assert weighted("dr_grpo") == pytest.approx(np.mean([x.sum() / 32 for x in learned]), rel=1e-6)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
def test_weights_invariants(masks, aggregation):
    ranks = [count(masks[:2]), count(masks[2:3]), count(masks[3:])]
    counts = ranks[0] + ranks[1] + ranks[2]
    assert counts == count(masks)  # counting is additive over ranks
    weights = [token_weights(m, aggregation, counts, max_new_tokens=32) for m in masks]
    for m, w in zip(masks, weights):
        assert w.dtype == np.float32 and w.shape == m.shape
        assert (w[~m] == 0).all() and (w[m] > 0).all()
    if aggregation != "dr_grpo":
        assert sum(w.sum() for w in weights) == pytest.approx(1, rel=1e-6)


def test_weights_reject_unknown_names_and_wrong_counts(masks):
    with pytest.raises(ValueError, match=r"rl\.aggregation='mean'"):
        token_weights(masks[0], "mean", count(masks), max_new_tokens=1)
    with pytest.raises(AssertionError):
        token_weights(np.ones(5, bool), "token_mean", LossCounts(1, 2), max_new_tokens=1)


# ----- credit


def test_alignment_speaks_about_the_next_token():
    r = rollout(prompt_len=3, num_response=4)
    aligned = align_response(r, np.array([10, 11, 12, 13]))
    assert aligned.tolist() == [0, 0, 10, 11, 12, 13, 0]
    for t, value in enumerate(aligned):
        if value:  # the value belongs to response token t + 1 - prompt_len
            assert value == 10 + (t + 1 - r.prompt_len)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
def test_credit(aggregation):
    cfg = RLConfig(aggregation=aggregation, advantage_normalization="std")
    rollouts = [rollout(2, n, request=n, routed=True) for n in (1, 5, 3)]
    groups = [group([0, 1, 0.5], rollouts), group([1, 1], index=1)]
    counts = count_loss(groups, cfg)
    assert counts == LossCounts(num_sequences=5, num_tokens=1 + 5 + 3 + 4 + 4)
    samples = assign_credit(groups, cfg, counts, max_new_tokens=8)
    flat = [(g, r, a) for g in groups for r, a in zip(g.rollouts, group_advantages(g.rewards))]
    assert len(samples) == len(flat)
    for sample, (_, r, advantage) in zip(samples, flat):
        n, p = len(r.tokens), r.prompt_len
        inside = np.arange(p - 1, n - 1)
        expected = np.zeros(n, bool)
        expected[inside] = True
        assert np.array_equal(sample.tokens, r.tokens) and sample.tokens.dtype == np.int64
        assert np.array_equal(sample.loss_mask, expected) and sample.loss_mask.dtype == bool
        assert (sample.advantages[expected] == np.float32(advantage)).all() and (
            sample.advantages[~expected] == 0
        ).all()
        assert np.array_equal(sample.behaviour_logprobs[inside], r.logprobs)
        assert (sample.behaviour_logprobs[~expected] == 0).all()
        assert (sample.weights[~expected] == 0).all() and (sample.weights[expected] > 0).all()
        assert sample.weights[-1] == 0 and not sample.loss_mask[-1]
        assert sample.advantages.dtype == sample.weights.dtype == sample.behaviour_logprobs.dtype == np.float32
        assert sample.old_logprobs is None and sample.reference_logprobs is None
        assert sample.routed_experts is r.routed_experts and sample.prompt_len == r.prompt_len
    if aggregation != "dr_grpo":
        assert sum(s.weights.sum() for s in samples) == pytest.approx(1, rel=1e-6)


def test_overlong_completions_can_be_masked():
    rollouts = [rollout(num_response=4, request=1), rollout(num_response=6, finish="length", request=2)]
    groups = [group([1, 0], rollouts)]
    cfg = RLConfig(overlong="mask", advantage_normalization="none")
    counts = count_loss(groups, cfg)
    assert counts == LossCounts(1, 4)
    kept, masked = assign_credit(groups, cfg, counts, max_new_tokens=6)
    assert kept.weights.sum() == pytest.approx(1)
    assert (kept.advantages[kept.loss_mask] == 0.5).all()  # the masked reward still counts in the mean
    assert not masked.loss_mask.any() and (masked.weights == 0).all() and (masked.advantages == 0).all()
    assert count_loss(groups, RLConfig(overlong="keep")) == LossCounts(2, 10)


def test_no_groups_and_no_loss():
    assert assign_credit([], RLConfig(), LossCounts(), max_new_tokens=8) == []
    groups = [group([1, 0], [rollout(finish="length", request=i) for i in range(2)])]
    cfg = RLConfig(overlong="mask")
    samples = assign_credit(groups, cfg, count_loss(groups, cfg), max_new_tokens=8)
    assert all((s.weights == 0).all() for s in samples)


def test_empty_response():
    groups = [group([1, 0], [rollout(num_response=0), rollout(num_response=2, request=1)])]
    samples = assign_credit(groups, RLConfig(), count_loss(groups, RLConfig()), max_new_tokens=8)
    assert not samples[0].loss_mask.any() and samples[1].loss_mask.sum() == 2
