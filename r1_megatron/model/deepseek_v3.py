"""DeepSeek-V3 (arXiv 2412.19437) in megatron-core's terms: our configuration to a config object and a layer spec.

Facts that took care (checked against Transformers' DeepseekV3 in float64):

* The router's sigmoid scores choose with the selection bias and weigh without it; megatron-core always renormalises
  the chosen scores, then applies the scaling factor.
* megatron-core's MLA de-interleaves the rotary dimensions itself, so Hugging Face weights load unpermuted.
* The local spec's default makes the down projections column-parallel; from tensor parallelism 2 on their gradients
  are silently wrong (relative error 0.55 in 139 tensors). They are replicated here, as Transformer Engine's spec does.
* The norms of the low-rank query and of the latent have an epsilon of 1e-6, whatever the model's own is.
* The loss is a sum of weighted tokens (`calculate_per_token_loss`); nothing downstream divides it again.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.post_training.modelopt.layers import Linear as ReplicatedLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig

from r1_megatron.config.schema import ModelConfig, ParallelConfig, TrainConfig
from r1_megatron.model.experts import GroupedExperts
from r1_megatron.model.latent_attention import LatentAttention
from r1_megatron.model.multi_token import PackedMultiTokenPredictionLayer
from r1_megatron.model.norm import RMSNorm
from r1_megatron.model.routing import PackedRouter
from r1_megatron.model.transformer import Experts, shared_fields, use_our_modules, yarn_mscale


def chosen_experts(train: TrainConfig, device: str, transformer_engine: bool) -> Experts:
    """The implementation behind ``train.moe_experts``, whose "auto" takes what has been run on this kind of device.

    Raises:
        ValueError: what only this machine knows: its layers are not Transformer Engine's, or "auto" has become
            sequential experts, which cannot recompute their activation.
    """
    experts = train.moe_experts
    if experts == "auto":
        experts = "transformer_engine" if transformer_engine else "grouped" if device == "cpu" else "sequential"
    if experts == "transformer_engine" and not transformer_engine:
        raise ValueError(
            f"train.moe_experts=transformer_engine: this run on {device} has no Transformer Engine layers (they need "
            "CUDA, train.bf16=true and the package). Use grouped or auto."
        )
    if experts == "sequential" and "moe_act" in train.recompute_modules:
        raise ValueError(
            f"train.recompute_modules: moe_act does not go with the sequential experts that train.moe_experts="
            f"{train.moe_experts} means on {device} here. Recompute moe instead, or set train.moe_experts=grouped."
        )
    return experts


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    transformer_engine: bool = False,
    experts: Experts = "grouped",
) -> MLATransformerConfig:
    """megatron-core's configuration of one rank's model."""
    yarn = {}
    if model.rope_type == "yarn":
        yarn = {
            "rotary_scaling_factor": model.rotary_scaling_factor,
            "original_max_position_embeddings": model.original_max_position_embeddings,
            "beta_fast": model.beta_fast,
            "beta_slow": model.beta_slow,
            "mscale": yarn_mscale(model),
            "mscale_all_dim": model.mscale_all_dim,
        }
    return MLATransformerConfig(
        **shared_fields(model, parallel, train, transformer_engine, experts),
        # multi-head latent attention
        kv_channels=model.v_head_dim,
        qk_layernorm=True,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_head_dim,
        qk_pos_emb_head_dim=model.qk_pos_emb_head_dim,
        v_head_dim=model.v_head_dim,
        rope_type=model.rope_type,
        rotary_base=model.rotary_base,
        **yarn,
        **(_experts(model, experts) if model.num_moe_layers else {}),
        # multi-token prediction
        mtp_num_layers=model.mtp_num_layers or None,
        mtp_loss_scaling_factor=model.mtp_loss_scaling_factor if model.mtp_num_layers else None,
    )


def _experts(model: ModelConfig, experts: Experts) -> dict[str, Any]:
    """The fields about mixture of experts."""
    return dict(
        num_moe_experts=model.num_moe_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size or None,
        moe_layer_freq=[0] * model.num_dense_layers + [1] * model.num_moe_layers,
        moe_router_topk=model.moe_router_topk,
        moe_router_score_function="sigmoid",
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=model.moe_router_bias_update_rate,
        moe_router_num_groups=model.moe_router_num_groups,
        moe_router_group_topk=model.moe_router_group_topk,
        moe_router_topk_scaling_factor=model.moe_router_topk_scaling_factor,
        moe_router_load_balancing_type="seq_aux_loss" if model.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_grouped_gemm=experts == "transformer_engine",
    )


def layer_specs(
    model: ModelConfig,
    config: MLATransformerConfig,
    transformer_engine: bool,
    experts: Experts,
    vp_stage: int | None,
):
    """The decoder block's spec for one chunk, and the multi-token-prediction block's where the chunk holds it."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    block.layer_specs = [_our_layer(spec, model, transformer_engine, experts) for spec in block.layer_specs]
    if not transformer_engine:
        block.layer_norm = RMSNorm
    mtp = None
    if config.mtp_num_layers:
        last = get_gpt_decoder_layer_specs(config, transformer_engine, normalization="RMSNorm")[-1]
        last = _our_layer(last, model, transformer_engine, experts)
        mtp = get_gpt_mtp_block_spec(config, last, use_transformer_engine=transformer_engine, vp_stage=vp_stage)
        for layer in [] if mtp is None else mtp.layer_specs:
            layer.module = PackedMultiTokenPredictionLayer
            if not transformer_engine:
                layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = RMSNorm
    return block, mtp


def _our_layer(spec: ModuleSpec, model: ModelConfig, transformer_engine: bool, experts: Experts) -> ModuleSpec:
    """One transformer layer's spec with our attention, router, experts, norm and replicated down projections."""
    spec = deepcopy(spec)
    layer = spec.submodules
    attention = layer.self_attention
    attention.module = LatentAttention
    attention.params = {**attention.params, "attention_bias": model.attention_bias}
    if hasattr(layer.mlp.submodules, "router"):
        layer.mlp.submodules.router = PackedRouter
        if experts == "grouped":
            layer.mlp.submodules.experts = ModuleSpec(module=GroupedExperts)
    use_our_modules(layer, transformer_engine)
    if not transformer_engine:
        attention.submodules.linear_q_down_proj = attention.submodules.linear_kv_down_proj = ReplicatedLinear
        attention.submodules.q_layernorm = attention.submodules.kv_layernorm = RMSNorm
    return spec
