"""What attention needs to run a step of generation, whatever it keeps of a past token: the step, its prompts, scores.

Legend: T rows (tokens) of one forward, D of them decode, U prompt tokens, H heads of this rank, L cached positions
read, W numbers that a layer keeps of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class StepContext:
    """What all layers need to know about one forward of generation; built once per step.

    Rows are tokens of different sequences: ``num_decode`` decode tokens, one a sequence, whose cache slots are
    ``[first_slot, first_slot + num_decode)`` in this order; then the prompts, packed; then padding up to ``num_rows``,
    which is a multiple of the tensor-parallel size.

    Attributes:
        cache: what each layer keeps of past tokens, by global layer number, ``[slots, max_len, W]``.
        cache_rows: int64 ``[D + U]``, the row ``slot * max_len + position`` that each token is kept in.
        num_cached: L, positions that decode tokens look back on, their own included (the longest of them).
        decode_bias: float32 ``[D, 1, L]``, zero where a decode token may look and -inf behind its position.
        cos, sin: ``[T, 1, P / 2]`` in the model's dtype, by position, the YaRN factor included, for P rotary channels.
        prompts: the packed prompts, or ``None``.
    """

    num_rows: int
    num_decode: int
    num_prompt_tokens: int
    first_slot: int
    num_cached: int
    cache: dict[int, torch.Tensor]
    cache_rows: torch.Tensor
    decode_bias: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    prompts: PackedSeqParams | None

    # The questions megatron-core's layers may ask an inference context.
    def is_static_batching(self) -> bool:
        return False

    def is_dynamic_batching(self) -> bool:
        return True

    def is_decode_only(self) -> bool:
        return self.prompts is None

    def using_cuda_graph_this_step(self) -> bool:
        return False


def pack_prompts(lengths: tuple[int, ...], device: torch.device) -> PackedSeqParams | None:
    """Packed-sequence parameters of prompts of these lengths; ``None`` without prompts."""
    if not lengths:
        return None
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    packed.lengths = lengths  # saves the core attention a wait for the device, see model/attention.py
    return packed


def rotary_tables(
    rotary: RotaryEmbedding, max_len: int, channels: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each ``[max_len, 1, channels / 2]``, rounded as the training forward rounds them."""
    answer = rotary(max_len, packed_seq=True)  # packed: not sliced over context-parallel ranks
    angles, factor = answer if isinstance(answer, tuple) else (answer, 1.0)
    angles = angles[:, 0, :, : channels // 2]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def scores_float32(q_DHW, k_DLW, scale: float, bias_D1L) -> torch.Tensor:
    """``scale * q . k + bias`` in float32, ``[D, H, L]``, whatever the inputs' dtype.

    Rounding the scores to bfloat16 would move a probability by percents, which the fused training attention does not.
    """
    k_DWL = k_DLW.transpose(1, 2)
    if q_DHW.dtype == torch.float32:
        return torch.baddbmm(bias_D1L, q_DHW, k_DWL, alpha=scale)
    if q_DHW.is_cuda:
        return torch.bmm(q_DHW, k_DWL, out_dtype=torch.float32).mul_(scale).add_(bias_D1L)
    return torch.baddbmm(bias_D1L, q_DHW.float(), k_DWL.float(), alpha=scale)


def gather_rows(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """All ranks' rows, in rank order: the inverse of sequence parallelism's scatter."""
    output = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(output, x.contiguous(), group=group)
    return output
