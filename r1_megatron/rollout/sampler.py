"""Draw the next token of many sequences from vocabulary-sharded logits, independent of how the job is laid out.

Drawing is Gumbel-max: ``argmax_v(z_v + G_v)`` with independent Gumbel noise ``G`` follows ``softmax(z)`` exactly. The
noise is not taken from a generator's state but hashed from (seed, request, position, vocabulary id). Whoever holds
vocabulary id ``v`` computes the same ``G_v``: no tensor-, pipeline- or data-parallel layout changes a sample, and a
request can be drawn again alone. Without truncation one all-gather of seven numbers a row finishes a step.

Truncation follows the order of Hugging Face's logits warpers: temperature, top-k, top-p (on the law renormalised over
the top-k), min-p. Each of them keeps a prefix of the tokens sorted by (logit descending, id ascending), so the kept
set is the shortest of the prefixes and one sort key describes it on every shard.

Shapes: B rows (sequences), V this rank's vocabulary columns, C candidates, S vocabulary shards (the TP size).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from r1_megatron.config.schema import SamplingConfig
from r1_megatron.kernels.decode import draw_tokens

# Gathers a tensor over the vocabulary shards: [...] -> [S, ...], shard order.
Gather = Callable[[torch.Tensor], torch.Tensor]

_MASK64 = (1 << 64) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15
_MIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_GOLDEN32 = 0x9E3779B1
_MIX32 = ((16, 0x7FEB352D), (15, 0x846CA68B))
_INITIAL_CANDIDATES = 64


class Draw(NamedTuple):
    """One token per row.

    Attributes:
        tokens_B: int64.
        logprobs_B: float32, natural log, under the whole softmax at the temperature (greedy: at temperature 1).
        truncated_logprobs_B: float32, under the law that was drawn from, after top-k, top-p and min-p (greedy: 0).
    """

    tokens_B: torch.Tensor
    logprobs_B: torch.Tensor
    truncated_logprobs_B: torch.Tensor


def check_sampling(sampling: SamplingConfig) -> None:
    """Raise ``ValueError`` naming every option of ``sampling`` that has no meaning."""
    rules = (
        (math.isfinite(sampling.temperature) and sampling.temperature >= 0, "temperature", "a finite number >= 0"),
        (sampling.top_k >= 0, "top_k", "an integer >= 0 (0: off)"),
        (0 < sampling.top_p <= 1, "top_p", "in (0, 1] (1: off)"),
        (0 <= sampling.min_p <= 1, "min_p", "in [0, 1] (0: off)"),
        (sampling.max_new_tokens >= 1, "max_new_tokens", "an integer >= 1"),
        (all(sampling.stop), "stop", "strings that are not empty"),
    )
    problems = [
        f"sampling.{name}={getattr(sampling, name)!r} must be {remedy}" for right, name, remedy in rules if not right
    ]
    if problems:
        raise ValueError("; ".join(problems))


def draws_at_once(sampling: SamplingConfig) -> bool:
    """Whether :func:`sample_tokens` never waits for the device: top-p alone looks at how much mass it has found."""
    return sampling.temperature == 0 or sampling.top_k > 0 or sampling.top_p >= 1


def request_key(seed: int, request: int) -> int:
    """The signed 64-bit random-stream key of one request. Any integers; they count modulo 2**64."""
    key = _mix64(_mix64(seed & _MASK64) ^ (request & _MASK64))
    return key - (1 << 64) if key >> 63 else key


def position_keys(request_keys_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
    """int64 keys of the tokens at ``positions_B`` of the requests: a splitmix64 stream per request (Steele, 2014)."""
    x = request_keys_B + (positions_B + 1) * _signed(_GOLDEN64, 64)
    for shift, factor in _MIX64:
        x = (x ^ _shift_right(x, shift, 64)) * _signed(factor, 64)
    return x ^ _shift_right(x, 31, 64)


def uniform_bits(keys_B: torch.Tensor, ids_V: torch.Tensor) -> torch.Tensor:
    """int32 ``[B, V]``: 32 hashed bits for every (row key, vocabulary id).

    Two rounds of a 32-bit finaliser (prospector's "lowbias32" constants), each keyed by one half of the row's key.
    Integer arithmetic wraps alike on every device.
    """
    low_B1 = ((keys_B << 32) >> 32).to(torch.int32)[:, None]
    high_B1 = (keys_B >> 32).to(torch.int32)[:, None]
    x = (ids_V.to(torch.int32) * _signed(_GOLDEN32, 32))[None] ^ low_B1
    x = _mix32(x) + high_B1
    return _mix32(x)


def gumbel_from_bits(bits: torch.Tensor) -> torch.Tensor:
    """float32 Gumbel noise from 32 uniform bits, always finite: within [-2.82, 22.88].

    The uniform is ``(bits + 1/2) / 2**32``, converted by way of int64: as a float32 it keeps its full relative
    resolution near zero, which is the side that yields large noise, and is never zero; near one it is held at
    ``1 - 2**-24``.
    """
    uniform = ((bits.to(torch.int64) & 0xFFFFFFFF).to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp_(max=1 - 2.0**-24)))


def group_gather(group: dist.ProcessGroup | None) -> Gather:
    """Gather over a process group (``None`` or one rank: the tensor itself with a leading axis of one)."""
    if group is None or group.size() == 1:
        return lambda x: x[None]

    def gather(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(group.size() * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out.view(group.size(), *x.shape)

    return gather


def sample_tokens(
    logits_BV: torch.Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    keys_B: torch.Tensor,
    sampling: SamplingConfig,
    gather: Gather,
) -> Draw:
    """Draw one token a row; every vocabulary shard returns the same.

    Args:
        logits_BV: this shard's columns, vocabulary ids ``[vocab_start, vocab_start + V)``, any float type.
        vocab_size: real vocabulary; columns of higher ids are padding and are never drawn.
        keys_B: int64 from :func:`position_keys`.
        sampling: ``temperature`` (0: the largest logit, the lowest id among equals), ``top_k``, ``top_p``, ``min_p``.
        gather: joins the shards, see :func:`group_gather`.

    A row with NaN or infinite logits gives a NaN log-probability; the caller raises, it knows the request's name.
    """
    greedy = sampling.temperature == 0
    truncates = not greedy and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
    # What each shard tells the others: its winner and its parts of the two normalisers.
    if truncates:
        told_BN = _draw_truncated(logits_BV, vocab_start, vocab_size, keys_B, sampling, gather)
    else:
        told_BN = draw_tokens(logits_BV.contiguous(), keys_B, vocab_start, vocab_size, sampling.temperature)
    shards_SBN = gather(told_BN)

    shard_B = shards_SBN[..., 0].argmax(0)  # the first among equals is the lowest vocabulary id
    winner_BN = shards_SBN.gather(0, shard_B[None, :, None].expand(1, -1, shards_SBN.shape[-1]))[0]
    token_B, logit_B = winner_BN[:, 1].long(), winner_BN[:, 2]
    logprob_B = logit_B - _combine(shards_SBN[..., 3], shards_SBN[..., 4])
    if truncates:
        truncated_B = logit_B - _combine(shards_SBN[..., 5], shards_SBN[..., 6])
    else:
        truncated_B = logprob_B * 0 if greedy else logprob_B
    return Draw(token_B, logprob_B.float(), truncated_B.float())


def _draw_truncated(
    logits_BV: torch.Tensor,
    vocab_start: int,
    vocab_size: int,
    keys_B: torch.Tensor,
    sampling: SamplingConfig,
    gather: Gather,
) -> torch.Tensor:
    """What :func:`draw_tokens` answers, under a truncated law, and the parts of that law's normaliser: ``[B, 7]``."""
    ids_V = torch.arange(vocab_start, vocab_start + logits_BV.shape[1], device=logits_BV.device)
    z_BV = logits_BV.float() / sampling.temperature
    if vocab_start + logits_BV.shape[1] > vocab_size:
        z_BV = z_BV.masked_fill(ids_V >= vocab_size, -math.inf)
    kept_BV = z_BV.masked_fill(~kept_tokens(z_BV, ids_V, sampling, gather), -math.inf)
    best_B, winner_B = (kept_BV + gumbel_from_bits(uniform_bits(keys_B, ids_V))).max(-1)
    winner_logit_B = z_BV.gather(1, winner_B[:, None])[:, 0]
    columns = [best_B, winner_B + vocab_start, winner_logit_B, *_max_and_sum(z_BV), *_max_and_sum(kept_BV)]
    return torch.stack([column.double() for column in columns], -1)


def kept_tokens(z_BV: torch.Tensor, ids_V: torch.Tensor, sampling: SamplingConfig, gather: Gather) -> torch.Tensor:
    """bool ``[B, V]``: the tokens that top-k, top-p and min-p leave over. ``z_BV`` is already at the temperature.

    At least one token a row stays. Equal logits are told apart by their id (lower first), so exactly ``top_k`` stay
    where Hugging Face keeps every token that ties with the last.
    """
    keep_BV = torch.ones_like(z_BV, dtype=torch.bool)
    if sampling.min_p > 0:
        top_B1 = gather(z_BV.amax(-1, keepdim=True)).amax(0)
        keep_BV = z_BV >= top_B1 + math.log(sampling.min_p)
    if sampling.top_k > 0 or sampling.top_p < 1:
        rank_BV = sort_keys(z_BV, ids_V)
        keep_BV &= rank_BV >= _last_kept(z_BV, rank_BV, sampling.top_k, sampling.top_p, gather)
    return keep_BV


def sort_keys(z_BV: torch.Tensor, ids_V: torch.Tensor) -> torch.Tensor:
    """int64 ``[B, V]``, all different in a row: larger means a larger logit, or the lower id among equal logits."""
    bits_BV = (z_BV + 0.0).view(torch.int32)  # + 0.0: minus zero equals zero
    ordered_BV = bits_BV ^ ((bits_BV >> 31) & 0x7FFFFFFF)  # IEEE 754 floats in the order of signed integers
    return (ordered_BV.to(torch.int64) << 32) | (0xFFFFFFFF - ids_V)


def _logits_of(keys: torch.Tensor) -> torch.Tensor:
    """float64 logits back from :func:`sort_keys`."""
    ordered = (keys >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32).double()


def _last_kept(z_BV: torch.Tensor, rank_BV: torch.Tensor, top_k: int, top_p: float, gather: Gather) -> torch.Tensor:
    """int64 ``[B, 1]``: the sort key of the last token within top-k and top-p.

    Every shard offers its best candidates. Their union, sorted, is right as far as one shard's offer reaches; top-p
    alone asks for longer offers until that much holds the mass.
    """
    num_rows, num_columns = z_BV.shape
    num_candidates = top_k or _INITIAL_CANDIDATES
    if top_k == 0:
        max_SB, sum_SB = gather(torch.stack(_max_and_sum(z_BV.double()))).unbind(1)
        normaliser_B1 = _combine(max_SB, sum_SB)[:, None]
    while True:
        take = min(num_candidates, num_columns)
        offers_SBC = gather(rank_BV.topk(take, -1).values)
        rank_BC = offers_SBC.transpose(0, 1).reshape(num_rows, -1).sort(-1, descending=True).values
        if top_k:
            rank_BC = rank_BC[:, :top_k]
        logit_BC = _logits_of(rank_BC)
        if top_k:
            normaliser_B1 = torch.logsumexp(logit_BC, -1, keepdim=True)
        prob_BC = torch.exp(logit_BC - normaliser_B1)
        before_BC = prob_BC.cumsum(-1) - prob_BC  # mass of the tokens that sort before
        if top_k or take == num_columns or bool((before_BC[:, take - 1] >= top_p).all()):
            break
        num_candidates *= 8
    # The first token always stays. A row of NaN keeps it too and is reported by its log-probability.
    inside_BC = before_BC < top_p if top_p < 1 else torch.ones_like(before_BC, dtype=torch.bool)
    return rank_BC.gather(1, (inside_BC.sum(-1, keepdim=True) - 1).clamp_(min=0))


def _max_and_sum(z_BV: torch.Tensor) -> list[torch.Tensor]:
    """[max, sum(exp(z - max))] per row; a row of -inf gives [-inf, 0]."""
    max_B = z_BV.amax(-1)
    return [max_B, torch.exp(z_BV - max_B.clamp(min=torch.finfo(z_BV.dtype).min)[:, None]).sum(-1)]


def _combine(max_SB: torch.Tensor, sum_SB: torch.Tensor) -> torch.Tensor:
    """log-sum-exp per row from the shards' :func:`_max_and_sum`."""
    return torch.logsumexp(max_SB + sum_SB.log(), 0)


def _mix64(x: int) -> int:
    x = (x + _GOLDEN64) & _MASK64
    for shift, factor in _MIX64:
        x = ((x ^ (x >> shift)) * factor) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    for shift, factor in _MIX32:
        x = (x ^ _shift_right(x, shift, 32)) * _signed(factor, 32)
    return x ^ _shift_right(x, 16, 32)


def _shift_right(x: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Logical shift of a signed tensor."""
    return (x >> count) & ((1 << (bits - count)) - 1)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value
