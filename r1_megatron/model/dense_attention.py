"""Grouped-query attention that trains as megatron-core's and also decodes from a cache of keys and values.

A layer keeps the rotated key and the value of every past token for the key-value heads of this rank: ``2 * G * C``
numbers. Prompts take the ordinary way, through the layer's own core attention; later chunks of a long prompt look back
on the cache as decode tokens do.

Legend: T rows (tokens) of one forward, D of them decode, U prompt tokens, N query heads of this rank, G its key-value
heads (each serves N / G query heads in a row), C channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from r1_megatron.config.schema import ModelConfig
from r1_megatron.kernels import paged_attention
from r1_megatron.model.generation import StepContext, rotary_tables
from r1_megatron.model.transformer import output_projection_with_bias, yarn_mscale


class DenseAttention(SelfAttention):
    """megatron-core's attention, the same function in training; with a :class:`StepContext` one step of generation.

    It makes its own rotary angles, as megatron-core's latent attention does, so that both kinds of layer are built and
    called alike.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        model: ModelConfig,
        **kwargs: Any,
    ):
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.rotary_pos_emb = rotary_embedding(model, self.pg_collection.cp)
        if model.attention_bias and model.architecture != "qwen2":
            self.linear_proj = output_projection_with_bias(self, submodules.linear_proj)

    @property
    def cache_width(self) -> int:
        """Numbers kept of a token on this rank: ``2 * G * C``, keys first."""
        return 2 * self.num_query_groups_per_partition * self.hidden_size_per_attention_head

    def rotary_tables(self, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin), each ``[max_len, 1, C / 2]``, in the model's dtype."""
        return rotary_tables(
            self.rotary_pos_emb, max_len, self.hidden_size_per_attention_head, self.linear_proj.weight.dtype
        )

    def forward(
        self,
        hidden_states,
        attention_mask,
        key_value_states=None,
        inference_context=None,
        rotary_pos_emb=None,
        packed_seq_params=None,
        **kwargs,
    ):
        if isinstance(inference_context, StepContext):
            return self._generate_step(hidden_states, inference_context)
        assert rotary_pos_emb is None, "the model has position_embedding_type none"
        packed = packed_seq_params is not None
        longest = self.rotary_pos_emb.get_rotary_seq_len(None, None, hidden_states, self.config, packed_seq_params)
        answer = self.rotary_pos_emb(longest, packed_seq=packed)
        angles = answer[0] if isinstance(answer, tuple) else answer
        return super().forward(
            hidden_states,
            attention_mask,
            key_value_states,
            inference_context,
            angles,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )

    def _generate_step(self, hidden_states: torch.Tensor, step: StepContext):
        """``[T, 1, hidden]`` (``[T / tp, 1, hidden]`` under sequence parallelism) to the same shape."""
        decode, tokens = step.num_decode, step.num_decode + step.num_prompt_tokens
        q_TNC, k_TGC, v_TGC = (x[:, 0] for x in self.get_query_key_value_tensors(hidden_states))
        q_TNC, k_TGC = rotate_halves(q_TNC, step.cos, step.sin), rotate_halves(k_TGC, step.cos, step.sin)
        cache = step.cache[self.layer_number]
        kept = torch.cat([k_TGC.flatten(1), v_TGC.flatten(1)], -1)[:tokens]
        cache.view(-1, self.cache_width).index_copy_(0, step.cache_rows, kept)
        parts = []
        if decode:
            parts.append(self._decode(q_TNC[:decode], cache, step))
        if step.prompts is not None:
            rows = slice(decode, tokens)
            prompts = self.core_attention(
                q_TNC[rows],
                k_TGC[rows],
                v_TGC[rows].contiguous(),
                None,
                packed_seq_params=step.prompts,
                attn_mask_type=AttnMaskType.padding_causal,
            )
            parts.append(prompts.reshape(step.num_prompt_tokens, -1))
        if tokens < step.num_rows:
            parts.append(q_TNC.new_zeros(step.num_rows - tokens, q_TNC[0].numel()))
        return self.linear_proj((parts[0] if len(parts) == 1 else torch.cat(parts))[:, None])

    def _decode(self, q_DNC: torch.Tensor, cache: torch.Tensor, step: StepContext) -> torch.Tensor:
        """Attention of single tokens over the cached keys and values of their sequences; answers ``[D, N * C]``."""
        groups, channels = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        return paged_attention(
            q_DNC.contiguous(),
            cache,
            step.page_table,
            step.lengths,
            num_groups=groups,
            value_start=groups * channels,
            value_width=channels,
            scale=channels**-0.5,
            schedule=step.schedule,
        ).flatten(1)


def rotary_embedding(model: ModelConfig, cp_group: Any) -> RotaryEmbedding:
    """megatron-core's rotary angles of all channels of a head, scaled as ``model.rope_type`` says."""
    if model.rope_type == "yarn":
        return YarnRotaryEmbedding(
            model.channels_per_head,
            rotary_base=model.rotary_base,
            scaling_factor=model.rotary_scaling_factor,
            original_max_position_embeddings=model.original_max_position_embeddings,
            beta_fast=model.beta_fast,
            beta_slow=model.beta_slow,
            mscale=yarn_mscale(model),
            mscale_all_dim=model.mscale_all_dim,
            cp_group=cp_group,
        )
    rotary = RotaryEmbedding(
        model.channels_per_head,
        rotary_percent=1.0,
        rotary_base=model.rotary_base,  # type: ignore[arg-type] (a power of it is taken: any number will do)
        cp_group=cp_group,
    )
    if model.rope_type == "llama3":  # its constructor does this too, for 8192 original positions only
        rotary.inv_freq = rotary._apply_scaling(
            rotary.inv_freq,
            factor=model.rotary_scaling_factor,  # type: ignore[arg-type]
            original_max_position_embeddings=model.original_max_position_embeddings,
        )
    return rotary


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of ``[T, heads, C]``: channel i turns with channel i + C / 2."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
