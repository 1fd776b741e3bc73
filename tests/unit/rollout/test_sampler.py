"""The sampler follows the exact law on any vocabulary shards, and agrees with Hugging Face on what is cut off."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch
from scipy import stats

from r1_megatron.config.schema import SamplingConfig
from r1_megatron.rollout import sampler
from r1_megatron.rollout.sampler import Draw, group_gather, position_keys, request_key, sample_tokens

WHOLE = group_gather(None)


def keys_for(num_rows: int, seed: int = 3) -> torch.Tensor:
    """One key per row: rows are requests, each at its own position."""
    requests = torch.tensor([request_key(seed, row) for row in range(num_rows)])
    return position_keys(requests, torch.arange(num_rows) % 7)


def draw(
    logits_BV: torch.Tensor, sampling: SamplingConfig, keys_B: torch.Tensor, vocab_size: int | None = None
) -> Draw:
    return sample_tokens(
        logits_BV,
        vocab_start=0,
        vocab_size=vocab_size or logits_BV.shape[1],
        keys_B=keys_B,
        sampling=sampling,
        gather=WHOLE,
    )


def draw_sharded(
    logits_BV: torch.Tensor, sampling: SamplingConfig, keys_B: torch.Tensor, num_shards: int, vocab_size: int
) -> list[Draw]:
    """Every shard in its own thread; the gather meets at a barrier, as ranks do."""
    barrier, slots, draws = threading.Barrier(num_shards, timeout=30), [None] * num_shards, [None] * num_shards
    width = logits_BV.shape[1] // num_shards

    def shard(rank: int) -> None:
        def gather(x: torch.Tensor) -> torch.Tensor:
            slots[rank] = x
            barrier.wait()
            joined = torch.stack(slots)
            barrier.wait()
            return joined

        draws[rank] = sample_tokens(
            logits_BV[:, rank * width : (rank + 1) * width],
            vocab_start=rank * width,
            vocab_size=vocab_size,
            keys_B=keys_B,
            sampling=sampling,
            gather=gather,
        )

    threads = [threading.Thread(target=shard, args=(rank,)) for rank in range(num_shards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return draws


def reference_law(logits_V: np.ndarray, sampling: SamplingConfig) -> np.ndarray:
    """float64 probabilities by the definition of each option, in Hugging Face's order."""
    z = logits_V.astype(np.float64) / sampling.temperature
    order = np.lexsort((np.arange(len(z)), -z))
    kept = order
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    if sampling.top_p < 1:
        p = np.exp(z[kept] - z.max())
        p /= p.sum()
        kept = kept[np.cumsum(p) - p < sampling.top_p]
    if sampling.min_p:
        kept = kept[np.exp(z[kept] - z.max()) >= sampling.min_p]
    law = np.zeros(len(z))
    law[kept] = np.exp(z[kept] - z.max())
    return law / law.sum()


LAWS = {
    "plain": SamplingConfig(),
    "temperature": SamplingConfig(temperature=0.6),
    "hot": SamplingConfig(temperature=1.7),
    "top_k": SamplingConfig(top_k=7),
    "top_p": SamplingConfig(top_p=0.8),
    "min_p": SamplingConfig(min_p=0.15),
    "all": SamplingConfig(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05),
}


@pytest.mark.parametrize("name", LAWS)
def test_draws_follow_the_exact_law(name: str) -> None:
    """Chi-square of 40 000 draws against the float64 law; log-probabilities are that law's."""
    sampling, num_draws = LAWS[name], 40_000
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(5)) * 1.5
    law = reference_law(logits_V.numpy(), sampling)
    result = draw(logits_V.expand(num_draws, -1), sampling, keys_for(num_draws))

    counts = np.bincount(result.tokens_B.numpy(), minlength=len(law))
    assert counts[law == 0].sum() == 0, "a token outside the kept set was drawn"
    common = law * num_draws >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(law[common], law[~common].sum()) * num_draws
    nonzero = expected > 0
    assert stats.chisquare(observed[nonzero], expected[nonzero]).pvalue > 1e-4

    full = torch.log_softmax(logits_V.double() / sampling.temperature, -1)
    np.testing.assert_allclose(result.logprobs_B, full[result.tokens_B], atol=2e-6)
    np.testing.assert_allclose(result.truncated_logprobs_B, np.log(law[result.tokens_B]), atol=2e-6)


def test_draws_of_different_positions_and_requests_are_independent() -> None:
    """A contingency test: the token at one position says nothing about the next, nor one request about another."""
    logits_V, num = torch.zeros(8), 20_000
    requests = torch.tensor([request_key(0, row) for row in range(num)])
    here = draw(logits_V.expand(num, -1), SamplingConfig(), position_keys(requests, torch.full((num,), 4))).tokens_B
    there = draw(logits_V.expand(num, -1), SamplingConfig(), position_keys(requests, torch.full((num,), 5))).tokens_B
    for a, b in ((here, there), (here[:-1], here[1:])):
        table = np.zeros((8, 8))
        np.add.at(table, (a.numpy(), b.numpy()), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_draw_the_same_tokens(name: str, num_shards: int) -> None:
    logits_BV = torch.randn(200, 264, generator=torch.Generator().manual_seed(6)) * 2
    keys_B = keys_for(200)
    whole = draw(logits_BV, LAWS[name], keys_B, vocab_size=260)
    for shard in draw_sharded(logits_BV, LAWS[name], keys_B, num_shards, vocab_size=260):
        assert torch.equal(shard.tokens_B, whole.tokens_B)
        torch.testing.assert_close(shard.logprobs_B, whole.logprobs_B, atol=1e-6, rtol=0)
        torch.testing.assert_close(shard.truncated_logprobs_B, whole.truncated_logprobs_B, atol=1e-6, rtol=0)


def test_top_p_asks_for_more_candidates_when_the_law_is_flat() -> None:
    """A flat law over 2048 ids needs about 0.9 x 2048 candidates, far beyond the first offer of 64."""
    logits_BV = torch.randn(3, 2048, generator=torch.Generator().manual_seed(7)) * 0.01
    sampling = SamplingConfig(top_p=0.9)
    keep_BV = sampler.kept_tokens(logits_BV, torch.arange(2048), sampling, WHOLE)
    law = np.stack([reference_law(row.numpy(), sampling) for row in logits_BV])
    assert np.array_equal(keep_BV.numpy(), law > 0)
    keys_B = keys_for(3)
    whole = draw(logits_BV, sampling, keys_B)
    for shard in draw_sharded(logits_BV, sampling, keys_B, 4, vocab_size=2048):
        assert torch.equal(shard.tokens_B, whole.tokens_B)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(top_k=5),
        SamplingConfig(top_k=500),
        SamplingConfig(top_p=0.5),
        SamplingConfig(top_p=0.99),
        SamplingConfig(min_p=0.1),
        SamplingConfig(temperature=0.7, top_k=12, top_p=0.9, min_p=0.02),
        SamplingConfig(temperature=2.0, top_k=30, top_p=0.6),
    ],
    ids=str,
)
def test_kept_set_is_that_of_hugging_face(sampling: SamplingConfig) -> None:
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits_BV = torch.randn(64, 100, generator=torch.Generator().manual_seed(8)) * 2
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits_BV)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    keep_BV = sampler.kept_tokens(logits_BV / sampling.temperature, torch.arange(100), sampling, WHOLE)
    assert torch.equal(keep_BV, scores > -math.inf)


def test_greedy_takes_the_lowest_id_among_equal_logits() -> None:
    logits_BV = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0], [-9.0, -9.0, -9.0, -1.0]])
    result = draw(logits_BV, SamplingConfig(temperature=0.0), keys_for(3))
    assert result.tokens_B.tolist() == [1, 0, 3]
    torch.testing.assert_close(result.logprobs_B, logits_BV.log_softmax(-1)[[0, 1, 2], [1, 0, 3]])
    assert result.truncated_logprobs_B.tolist() == [0, 0, 0]
    for shard in draw_sharded(logits_BV, SamplingConfig(temperature=0.0), keys_for(3), 2, vocab_size=4):
        assert shard.tokens_B.tolist() == [1, 0, 3]


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_ties_are_cut_by_id(num_shards: int) -> None:
    """All logits equal: top-k keeps exactly the k lowest ids, on any number of shards; minus zero equals zero."""
    logits_BV = torch.zeros(500, 16)
    logits_BV[:, ::3] = -0.0
    for shard in draw_sharded(logits_BV, SamplingConfig(top_k=5), keys_for(500), num_shards, vocab_size=16):
        assert sorted(set(shard.tokens_B.tolist())) == [0, 1, 2, 3, 4]
        torch.testing.assert_close(shard.truncated_logprobs_B, torch.full((500,), -math.log(5.0)))


def test_extreme_logits() -> None:
    sampling = SamplingConfig(top_k=3, top_p=0.95, min_p=0.01)
    row = torch.full((16,), -math.inf)
    row[9] = 2.0
    for options in (SamplingConfig(), sampling):
        result = draw(
            torch.stack([row, row * 1, torch.full((16,), -3e38).index_fill(0, torch.tensor(4), 3e38)]),
            options,
            keys_for(3),
        )
        assert result.tokens_B.tolist() == [9, 9, 4]
        assert result.logprobs_B.tolist() == [0, 0, 0]
        # A shard that holds nothing but -inf takes part without disturbing the others.
        for shard in draw_sharded(row[None], options, keys_for(1), 4, vocab_size=16):
            assert (shard.tokens_B.item(), shard.logprobs_B.item()) == (9, 0.0)
    # float32 adds noise to large logits without losing the winner; half precision input is widened first.
    large = torch.full((4, 8), 1e4)
    assert set(draw(large.bfloat16(), SamplingConfig(), keys_for(4)).tokens_B.tolist()) <= set(range(8))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_give_nan_logprobs(bad: float) -> None:
    logits_BV = torch.zeros(2, 12)
    logits_BV[1, 5] = bad
    for options in (
        SamplingConfig(),
        SamplingConfig(top_p=0.9),
        SamplingConfig(top_k=2),
        SamplingConfig(temperature=0),
    ):
        finite = draw(logits_BV, options, keys_for(2)).logprobs_B.isfinite().tolist()
        assert finite == [True, False]


def test_padding_columns_are_never_drawn() -> None:
    logits_BV = torch.zeros(2000, 12)
    logits_BV[:, 10:] = 50.0
    result = draw(logits_BV, SamplingConfig(), keys_for(2000), vocab_size=10)
    assert result.tokens_B.max() == 9
    torch.testing.assert_close(result.logprobs_B, torch.full((2000,), -math.log(10)))


def test_noise_is_finite_for_every_hash_value_that_matters() -> None:
    """Both ends and every power of two of the 32-bit range, and a dense sweep; monotone in the bits."""
    edges = (
        [0, 1, 2, 3] + [(1 << k) + d for k in range(2, 32) for d in (-1, 0, 1)] + [(1 << 32) - k for k in range(1, 600)]
    )
    sweep = list(range(0, 1 << 32, 65_537))
    values = torch.tensor(sorted({*edges, *sweep}), dtype=torch.int64)
    noise = sampler.gumbel_from_bits(torch.where(values >= 1 << 31, values - (1 << 32), values).to(torch.int32))
    assert noise.isfinite().all()
    assert (noise.diff() <= 0).all()
    assert noise.min() > -2.83 and 22.8 < noise.max() < 22.9
    exact = -np.log(-np.log1p(-(values.double().numpy() + 0.5) / 2**32))
    inner = values.numpy() < (1 << 32) - 4096
    np.testing.assert_allclose(noise.numpy()[inner], exact[inner], rtol=1e-3, atol=1e-3)


def test_keys_take_any_seed_and_64_bit_requests() -> None:
    keys = {request_key(seed, request) for seed in (-1, 0, 1, 2**70 + 7) for request in (0, 1, 2**40, 2**63 - 1)}
    assert len(keys) == 16 and all(-(1 << 63) <= key < 1 << 63 for key in keys)
    assert request_key(-1, 5) == request_key((1 << 64) - 1, 5)
    rows = position_keys(torch.tensor(sorted(keys)), torch.full((16,), 2**31))
    assert len(set(rows.tolist())) == 16
    # The torch stream is splitmix64, whose first outputs from state 1234567 are published.
    first = position_keys(torch.tensor([1234567, 1234567]), torch.tensor([0, 1]))
    assert [x % 2**64 for x in first.tolist()] == [6457827717110365317, 3203168211198807973]


def test_hashed_bits_look_uniform() -> None:
    bits = sampler.uniform_bits(keys_for(64), torch.arange(4096)).to(torch.int64) & 0xFFFFFFFF
    assert stats.kstest(bits.flatten().double().numpy() / 2**32, "uniform").pvalue > 1e-4
    ones = torch.stack([(bits >> k) & 1 for k in range(32)]).double().mean((1, 2))
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(bits.numel())


def test_sampling_options_are_checked_together() -> None:
    sampler.check_sampling(SamplingConfig())
    with pytest.raises(ValueError) as error:
        sampler.check_sampling(SamplingConfig(temperature=-1, top_k=-2, top_p=0, min_p=2, max_new_tokens=0, stop=("",)))
    for name in ("temperature=-1", "top_k=-2", "top_p=0", "min_p=2", "max_new_tokens=0", "stop="):
        assert name in str(error.value)
