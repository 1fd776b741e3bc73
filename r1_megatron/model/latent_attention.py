"""Multi-head latent attention that trains as megatron-core's and also decodes from a cache of latents.

MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1) needs only ``c = norm(W_dkv x)`` and the rotated key of a past token
to attend to it: ``kv_lora_rank + qk_pos_emb_head_dim`` numbers for all heads together. With the up-projection's rows
split per head, ``W_uk`` and ``W_uv``, a decode step never expands the past::

    q_nope . k_nope = q_nope . (W_uk c) = (W_uk^T q_nope) . c          sum_t p_t v_t = W_uv (sum_t p_t c_t)

These "absorbed" products read views of the training weight; nothing is copied and nothing has to be refreshed after an
optimizer step. Prompts take the ordinary way, expanded keys and values through the layer's own core attention.

Legend: T rows (tokens) of one forward, D of them decode, U prompt tokens, H heads of this rank, R ``kv_lora_rank``,
P ``qk_pos_emb_head_dim``, N ``qk_head_dim``, V ``v_head_dim``, L cached positions read, W = R + P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


@dataclass(frozen=True)
class StepContext:
    """What all layers need to know about one forward of generation; built once per step.

    Rows are tokens of different sequences: ``num_decode`` decode tokens, one a sequence, whose cache slots are
    ``[first_slot, first_slot + num_decode)`` in this order; then the prompts, packed; then padding up to ``num_rows``,
    which is a multiple of the tensor-parallel size.

    Attributes:
        latents: the cache by global layer number, each ``[slots, max_len, R + P]``.
        cache_rows: int64 ``[D + U]``, the row ``slot * max_len + position`` that each token's latent is written to.
        num_cached: L, positions that decode tokens look back on, their own included (the longest of them).
        decode_bias: float32 ``[D, 1, L]``, zero where a decode token may look and -inf behind its position.
        cos, sin: ``[T, 1, P / 2]`` in the model's dtype, by position, the YaRN factor included.
        prompts: the packed prompts, or ``None``.
    """

    num_rows: int
    num_decode: int
    num_prompt_tokens: int
    first_slot: int
    num_cached: int
    latents: dict[int, torch.Tensor]
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


class LatentAttention(MLASelfAttention):
    """megatron-core's MLA, unchanged for training; with a :class:`StepContext` it runs one step of generation."""

    def rotary_tables(self, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each ``[max_len, 1, P / 2]``, in the model's dtype as the training forward rounds them."""
        answer = self.rotary_pos_emb(max_len, packed_seq=True)  # packed: not sliced over context-parallel ranks
        angles, factor = answer if isinstance(answer, tuple) else (answer, 1.0)
        angles = angles[:, 0, :, : self.config.qk_pos_emb_head_dim // 2]
        dtype = self.linear_proj.weight.dtype
        return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)

    def forward(self, hidden_states, attention_mask, key_value_states=None, inference_context=None, **kwargs):
        if isinstance(inference_context, StepContext):
            return self._generate_step(hidden_states, inference_context)
        return super().forward(hidden_states, attention_mask, key_value_states, inference_context, **kwargs)

    def _generate_step(self, hidden_states: torch.Tensor, step: StepContext):
        """``[T, 1, hidden]`` (``[T / tp, 1, hidden]`` under sequence parallelism) to the same shape."""
        cfg, decode, tokens = self.config, step.num_decode, step.num_decode + step.num_prompt_tokens
        rank, nope, heads = cfg.kv_lora_rank, cfg.qk_head_dim, self.num_attention_heads_per_partition
        query_TE, latent_TW = self._project_down(hidden_states[:, 0])

        q_up = self.linear_q_proj if cfg.q_lora_rank is None else self.linear_q_up_proj
        q_THK = F.linear(query_TE, q_up.weight).view(step.num_rows, heads, self.q_head_dim)
        # The key's rotary part is one more head, so that one rotation does for all.
        rotated = rotate(torch.cat([q_THK[..., nope:], latent_TW[:, None, rank:]], 1), step.cos, step.sin)
        latent_TW = torch.cat([self._norm_latent(latent_TW[:, :rank]), rotated[:, heads]], -1)
        q_nope_THN, q_rope_THP = q_THK[..., :nope], rotated[:, :heads]

        cache = step.latents[self.layer_number]
        cache.view(-1, cache.shape[-1]).index_copy_(0, step.cache_rows, latent_TW[:tokens])
        parts = []
        if decode:
            parts.append(self._decode(q_nope_THN[:decode], q_rope_THP[:decode], cache, step))
        if step.prompts is not None:
            rows = slice(decode, tokens)
            parts.append(self._prefill(q_nope_THN[rows], q_rope_THP[rows], latent_TW[rows], step.prompts))
        if tokens < step.num_rows:
            parts.append(latent_TW.new_zeros(step.num_rows - tokens, heads * cfg.v_head_dim))
        return self.linear_proj((parts[0] if len(parts) == 1 else torch.cat(parts))[:, None])

    def _project_down(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(input of the query's last projection, latent before its norm and rotary part), all T rows.

        Under sequence parallelism one all-gather brings both of them together.
        """
        cfg = self.config
        sequence_parallel = cfg.sequence_parallel and self.tp_group.size() > 1
        if cfg.q_lora_rank is None:
            query = gather_rows(hidden, self.tp_group) if sequence_parallel else hidden
            return query, F.linear(query, self.linear_kv_down_proj.weight)
        query = F.linear(hidden, self.linear_q_down_proj.weight)
        latent = F.linear(hidden, self.linear_kv_down_proj.weight)
        assert query.shape[-1] == cfg.q_lora_rank, "generation needs replicated down-projections"
        query = norm_before(self.linear_q_up_proj, self.q_layernorm, query, cfg)
        if sequence_parallel:
            both = gather_rows(torch.cat([query, latent], -1), self.tp_group)
            query, latent = both.split([query.shape[-1], latent.shape[-1]], -1)
        return query, latent

    def _norm_latent(self, latent: torch.Tensor) -> torch.Tensor:
        return norm_before(self.linear_kv_up_proj, self.kv_layernorm, latent, self.config)

    def _up_projection(self) -> torch.Tensor:
        """``[H, N + V, R]``: a view of the live training weight."""
        cfg = self.config
        return self.linear_kv_up_proj.weight.view(-1, cfg.qk_head_dim + cfg.v_head_dim, cfg.kv_lora_rank)

    def _decode(self, q_nope_DHN, q_rope_DHP, cache, step: StepContext) -> torch.Tensor:
        """Absorbed attention of one token a sequence over its cached latents; answers ``[D, H * V]``."""
        nope, rank = self.config.qk_head_dim, self.config.kv_lora_rank
        up_HAR = self._up_projection()
        past_DLW = cache[step.first_slot : step.first_slot + step.num_decode, : step.num_cached]
        q_latent_DHR = torch.bmm(q_nope_DHN.transpose(0, 1), up_HAR[:, :nope]).transpose(0, 1)
        q_DHW = torch.cat([q_latent_DHR, q_rope_DHP], -1)
        scores_DHL = scores_float32(q_DHW, past_DLW, self.softmax_scale, step.decode_bias)
        weights_DHL = scores_DHL.softmax(-1).to(q_DHW.dtype)
        mixed_DHR = torch.bmm(weights_DHL, past_DLW[..., :rank])
        return torch.bmm(mixed_DHR.transpose(0, 1), up_HAR[:, nope:].transpose(1, 2)).transpose(0, 1).flatten(1)

    def _prefill(self, q_nope_UHN, q_rope_UHP, latent_UW, prompts: PackedSeqParams) -> torch.Tensor:
        """Ordinary causal attention within each packed prompt; answers ``[U, H * V]``."""
        cfg, heads = self.config, self.num_attention_heads_per_partition
        latent_UR, rope_UP = latent_UW.split([cfg.kv_lora_rank, cfg.qk_pos_emb_head_dim], -1)
        expanded_UHA = F.linear(latent_UR, self.linear_kv_up_proj.weight).view(len(latent_UR), heads, -1)
        k_nope_UHN, v_UHV = expanded_UHA.split([cfg.qk_head_dim, cfg.v_head_dim], -1)
        query = torch.cat([q_nope_UHN, q_rope_UHP], -1)
        key = torch.cat([k_nope_UHN, rope_UP[:, None].expand(-1, heads, -1)], -1)
        output = self.core_attention(
            query,
            key,
            v_UHV.contiguous(),
            None,
            packed_seq_params=prompts,
            attn_mask_type=AttnMaskType.padding_causal,
        )
        return output.reshape(len(latent_UR), -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[T, heads, P]``: pairs (2i, 2i + 1) in, halves out, as in megatron-core's MLA."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)


def norm_before(projection, norm, x: torch.Tensor, config) -> torch.Tensor:
    """The RMSNorm in front of an up-projection. Transformer Engine fuses it into the projection (and ``norm`` is the
    identity); its weight is then ``projection.layer_norm_weight``."""
    weight = getattr(projection, "layer_norm_weight", None)
    if weight is None:
        return norm(x)
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    return F.rms_norm(x, (x.shape[-1],), weight, config.layernorm_epsilon)


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
