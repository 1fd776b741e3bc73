"""DeepSeek-V3 (arXiv 2412.19437) in megatron-core's terms: our configuration to a config object and a layer spec.

Facts that took care (checked against Transformers' DeepseekV3 in float64):

* The router's sigmoid scores choose with the selection bias and weigh without it; megatron-core always renormalises
  the chosen scores, then applies the scaling factor.
* megatron-core's MLA de-interleaves the rotary dimensions itself, so Hugging Face weights load unpermuted.
* The local spec's default makes the down projections column-parallel; from tensor parallelism 2 on their gradients
  are silently wrong (relative error 0.55 in 139 tensors). They are replicated here, as Transformer Engine's spec does.
* The loss is a sum of weighted tokens (`calculate_per_token_loss`); nothing downstream divides it again.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Literal

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.post_training.modelopt.layers import Linear as ReplicatedLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig

from r1_megatron.config.schema import ModelConfig, ParallelConfig, TrainConfig
from r1_megatron.model.attention import CausalAttention
from r1_megatron.model.experts import GroupedExperts
from r1_megatron.model.latent_attention import LatentAttention
from r1_megatron.model.multi_token import PackedMultiTokenPredictionLayer
from r1_megatron.model.norm import RMSNorm
from r1_megatron.model.routing import PackedRouter
from r1_megatron.topology import Topology

Experts = Literal["grouped", "sequential", "transformer_engine"]


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


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of the tensor-parallel size; the added columns are masked everywhere."""
    return -(-vocab_size // tp) * tp


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    transformer_engine: bool = False,
    experts: Experts = "grouped",
) -> MLATransformerConfig:
    """megatron-core's configuration of one rank's model."""
    dtype = torch.bfloat16 if train.bf16 else torch.float32
    vpp = parallel.virtual_pipeline_model_parallel_size
    vpp = vpp if vpp and vpp > 1 else None
    dense = model.first_k_dense_replace
    yarn = {}
    if model.rope_type == "yarn":
        yarn = {
            "rotary_scaling_factor": model.rotary_scaling_factor,
            "original_max_position_embeddings": model.original_max_position_embeddings,
            "beta_fast": model.beta_fast,
            "beta_slow": model.beta_slow,
            "mscale": model.mscale,
            "mscale_all_dim": model.mscale_all_dim,
        }
    recompute = {}
    if train.recompute_granularity == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": train.recompute_method,
            "recompute_num_layers": train.recompute_num_layers,
        }
    elif train.recompute_granularity == "selective":
        modules = list(train.recompute_modules)
        if experts == "grouped" and "moe_act" in modules:
            modules.remove("moe_act")  # they never keep it
        if modules:
            recompute = {"recompute_granularity": "selective", "recompute_modules": modules}
    stages = {}
    if parallel.pipeline_model_parallel_layout is not None:
        stages["pipeline_model_parallel_layout"] = parallel.pipeline_model_parallel_layout
    else:
        stages["num_layers_in_first_pipeline_stage"] = parallel.num_layers_in_first_pipeline_stage
        stages["num_layers_in_last_pipeline_stage"] = parallel.num_layers_in_last_pipeline_stage
    return MLATransformerConfig(
        # shape
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        kv_channels=model.v_head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        qk_layernorm=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        # multi-head latent attention
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_head_dim,
        qk_pos_emb_head_dim=model.qk_pos_emb_head_dim,
        v_head_dim=model.v_head_dim,
        rope_type=model.rope_type,
        rotary_base=model.rotary_base,
        apply_rope_fusion=False,
        attention_softmax_in_fp32=True,
        **yarn,
        # mixture of experts
        num_moe_experts=model.num_moe_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size or None,
        moe_layer_freq=[0] * dense + [1] * (model.num_layers - dense),
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
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=experts == "transformer_engine",
        # multi-token prediction
        mtp_num_layers=model.mtp_num_layers or None,
        mtp_loss_scaling_factor=model.mtp_loss_scaling_factor if model.mtp_num_layers else None,
        # parallel layout
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        sequence_parallel=parallel.tensor_model_parallel_size > 1,
        variable_seq_lengths=True,
        batch_p2p_comm=False,
        # Interleaving with variable lengths aborts without it; a layout string can imply interleaving.
        overlap_p2p_comm=Topology.from_config(parallel).vpp > 1,
        **stages,
        # numerics
        bf16=train.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=transformer_engine,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **recompute,
    )


def layer_specs(config: MLATransformerConfig, transformer_engine: bool, experts: Experts, vp_stage: int | None):
    """The decoder block's spec for one chunk, and the multi-token-prediction block's where the chunk holds it."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    block.layer_specs = [_our_layer(spec, transformer_engine, experts) for spec in block.layer_specs]
    if not transformer_engine:
        block.layer_norm = RMSNorm
    mtp = None
    if config.mtp_num_layers:
        last = get_gpt_decoder_layer_specs(config, transformer_engine, normalization="RMSNorm")[-1]
        last = _our_layer(last, transformer_engine, experts)
        mtp = get_gpt_mtp_block_spec(config, last, use_transformer_engine=transformer_engine, vp_stage=vp_stage)
        for layer in [] if mtp is None else mtp.layer_specs:
            layer.module = PackedMultiTokenPredictionLayer
            if not transformer_engine:
                layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = RMSNorm
    return block, mtp


def _our_layer(spec, transformer_engine: bool, experts: Experts):
    """One transformer layer's spec with our attention, router, experts, norm and replicated down projections."""
    spec = deepcopy(spec)
    layer = spec.submodules
    layer.self_attention.module = LatentAttention
    if hasattr(layer.mlp.submodules, "router"):
        layer.mlp.submodules.router = PackedRouter
        if experts == "grouped":
            layer.mlp.submodules.experts = ModuleSpec(module=GroupedExperts)
    if not transformer_engine:
        attention = layer.self_attention.submodules
        attention.core_attention = CausalAttention
        attention.linear_q_down_proj = attention.linear_kv_down_proj = ReplicatedLinear
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    return spec
