"""Packing: sequences of any length end to end into microbatches, no padding between them.

A plan (`data/balance.py`) says which sequences share a microbatch; here it is turned into tensors. What a finished
:class:`MicroBatch` keeps:

1. every sample is in it once, whole, in the order given, and the real tokens come first;
2. ``T = sum(lengths)`` is a multiple of the tensor-parallel size; padding is less than one such multiple (an empty
   microbatch is nothing but padding);
3. ``labels[t]`` is the next token of the same sequence, 0 at its last token and on padding;
4. ``position_ids`` count from 0 in every sequence and every piece of padding;
5. weights and all other arrays are zero on padding; the weight of a sequence's last token is zero, for nothing of that
   sequence follows. (Multi-token prediction shifts labels and weights once more, inside each sequence, and so keeps
   this.)
6. no piece of padding is longer than the longest real sequence, so ``max(lengths) < T`` as soon as there are two
   pieces. megatron-core's rotary embedding takes a table of exactly ``T`` rows for absolute positions of the whole
   pack instead of positions within a sequence; with this the two cannot be confused, and padding never costs more
   attention than a real sequence;
7. on every row without a recorded routing (a sequence's last token, which was never fed to the sampler, and padding)
   the experts are ``0 ... topk - 1``: distinct, as a router's are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from r1_megatron.data.balance import Plan
from r1_megatron.types import MicroBatch, StepBatch, TrainSample

# The token-aligned arrays of a TrainSample that travel in MicroBatch.arrays.
ARRAYS = ("loss_mask", "advantages", "behaviour_logprobs", "old_logprobs", "reference_logprobs", "stale")


def build_microbatch(
    samples: Sequence[TrainSample],
    *,
    multiple: int = 1,
    routing_shape: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> MicroBatch:
    """Pack samples end to end, in order (the invariants are listed above).

    Args:
        samples: none: a dummy microbatch of zero weight, the shortest there is (but two tokens at least).
        multiple: the tensor-parallel size.
        routing_shape: ``(num_local_moe_layers, topk)`` to replay recorded routing, which every sample then must have;
            ``None``: no replay, whatever the samples recorded.
        device: where the tensors go.

    ``arrays`` holds each of ``ARRAYS`` that the samples have (all of them or none: a mixture is an error) and, in a
    dummy, every one of them, all zero.
    """
    lengths = [len(sample.tokens) for sample in samples]
    num_tokens = sum(lengths)
    total = -(-max(num_tokens, 1 if samples else 2) // multiple) * multiple
    pieces = lengths + _padding_pieces(total - num_tokens, max(lengths, default=total))

    arrays = {}
    for name in ARRAYS:
        present = [getattr(sample, name) is not None for sample in samples]
        assert all(present) or not any(present), f"{name}: present in {sum(present)} of {len(samples)} samples"
        if all(present):
            arrays[name] = _packed([getattr(sample, name) for sample in samples], total, np.float32)
    for sample in samples:
        assert sample.weights[-1] == 0, "the last token of a sequence predicts nothing: its weight must be zero"
    tensors = {
        "tokens": _packed([sample.tokens for sample in samples], total, np.int64),
        "labels": _packed([np.append(sample.tokens[1:], 0) for sample in samples], total, np.int64),
        "position_ids": np.concatenate([np.arange(length) for length in pieces])[None],
        "weights": _packed([sample.weights for sample in samples], total, np.float32),
        "cu_seqlens": np.cumsum([0, *pieces], dtype=np.int32),
    }
    routed_experts = None
    if routing_shape is not None:
        routed_experts = _on_device(_packed_routing(samples, total, routing_shape), device)
    return MicroBatch(
        **{name: _on_device(array, device) for name, array in tensors.items()},
        lengths=tuple(pieces),
        num_tokens=num_tokens,
        num_sequences=len(samples),
        arrays={name: _on_device(array, device) for name, array in arrays.items()},
        routed_experts=routed_experts,
    )


def pack_step(
    samples: Sequence[TrainSample],
    plan: Plan,
    *,
    num_tokens: int,
    multiple: int = 1,
    routing_shape: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
) -> StepBatch:
    """The microbatches of ``plan`` over ``samples``; ``num_tokens`` counts the loss tokens of the step on all ranks."""
    microbatches = tuple(
        build_microbatch([samples[i] for i in indices], multiple=multiple, routing_shape=routing_shape, device=device)
        for indices in plan
    )
    return StepBatch(microbatches=microbatches, num_tokens=num_tokens)


def unpack(values: torch.Tensor, batch: MicroBatch) -> list[np.ndarray]:
    """A token-aligned result ``[1, T]`` back to one array per real sequence, in the order they were packed."""
    sequences = torch.split(values[0, : batch.num_tokens].detach().cpu(), batch.lengths[: batch.num_sequences])
    return [sequence.numpy().copy() for sequence in sequences]


def _on_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The array as a tensor there; the host does not wait until it has arrived."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _padding_pieces(padding: int, longest: int) -> list[int]:
    """``padding`` tokens in pieces of ``longest`` and a rest."""
    whole, rest = divmod(padding, longest)
    return [longest] * whole + ([rest] if rest else [])


def _packed(parts: Sequence[np.ndarray], total: int, dtype: type) -> np.ndarray:
    """``[1, total]``: the parts end to end, then zeros."""
    packed = np.zeros((1, total), dtype=dtype)
    if parts:
        joined = np.concatenate(parts)
        packed[0, : len(joined)] = joined
    return packed


def _packed_routing(samples: Sequence[TrainSample], total: int, shape: tuple[int, int]) -> np.ndarray:
    """Int64 ``[total, num_local_moe_layers, topk]``: recorded experts, and ``0 ... topk - 1`` where there are none."""
    routing = np.broadcast_to(np.arange(shape[1], dtype=np.int64), (total, *shape)).copy()
    start = 0
    for sample in samples:
        recorded, rows = sample.routed_experts, len(sample.tokens) - 1
        assert recorded is not None and recorded.shape == (rows, *shape), (
            f"routed_experts: expected {(rows, *shape)}, got {None if recorded is None else recorded.shape}"
        )
        routing[start : start + rows] = recorded
        start += rows + 1
    return routing
