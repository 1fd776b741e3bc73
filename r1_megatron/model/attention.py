"""Core attention for the local layers: causal, packed sequences, keys and values of different width, grouped queries.

Legend: T packed tokens, S tokens of one sequence, B sequences, N query heads of this rank, K query/key width, V value
width. Keys and values may have fewer heads (G, a divisor of N): each serves N / G query heads in a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig


def causal_attention(q_BNSK: torch.Tensor, k_BGSK: torch.Tensor, v_BGSV: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled dot-product attention under a causal mask; answers ``[B, N, S, V]``.

    PyTorch's flash kernel wants one width for keys and values: narrower values are padded with zeros and cut again,
    which is still half the time of the general kernel (forward and backward, CPU).
    """
    value_width, key_width = v_BGSV.shape[-1], q_BNSK.shape[-1]
    if value_width < key_width:
        v_BGSV = F.pad(v_BGSV, (0, key_width - value_width))
    grouped = q_BNSK.shape[1] != k_BGSK.shape[1]
    output = F.scaled_dot_product_attention(q_BNSK, k_BGSK, v_BGSV, is_causal=True, scale=scale, enable_gqa=grouped)
    return output[..., :value_width]


def packed_causal_attention(q_TNK, k_TGK, v_TGV, lengths: tuple[int, ...], scale: float) -> torch.Tensor:
    """Each sequence of the pack attends to itself; answers ``[T, N, V]``. ``sum(lengths) == T``."""
    outputs = [
        causal_attention(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale)[0]
        for q, k, v in zip(q_TNK.split(lengths), k_TGK.split(lengths), v_TGV.split(lengths))
    ]
    return torch.cat([output.transpose(0, 1) for output in outputs])


def packed_lengths(packed: PackedSeqParams) -> tuple[int, ...]:
    """Sequence lengths of a pack; our packs carry them as Python integers, so no layer waits for the device."""
    lengths = getattr(packed, "lengths", None)
    if lengths is None:
        lengths = tuple((packed.cu_seqlens_q[1:] - packed.cu_seqlens_q[:-1]).tolist())
    return lengths


class CausalAttention(torch.nn.Module):
    """megatron-core's ``core_attention`` interface over the functions above; it has no parameters and keeps no mask.

    Packed queries are ``[T, N, K]``, the answer ``[T, N * V]``; unpacked ``[S, B, N, K]`` and ``[S, B, N * V]``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ):
        super().__init__()
        assert config.context_parallel_size == 1, "this attention does not split sequences"
        assert not (attention_dropout or config.attention_dropout), "reinforcement learning runs without dropout"
        # megatron-core builds this module twice and knows MLA's scale the second time.
        self.softmax_scale = softmax_scale if softmax_scale is not None else 1.0 / config.kv_channels**0.5

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params: PackedSeqParams | None = None,
    ):
        if packed_seq_params is not None:
            lengths = packed_lengths(packed_seq_params)
            return packed_causal_attention(query, key, value, lengths, self.softmax_scale).flatten(1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        return causal_attention(q, k, v, self.softmax_scale).permute(2, 0, 1, 3).flatten(2)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        return {}
