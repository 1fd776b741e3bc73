"""The dense students (Qwen2, Qwen3, Llama) in megatron-core's terms: our configuration to a config object and a spec.

DeepSeek-R1's distilled models (arXiv 2501.12948, section 2.4) are Qwen2.5 and Llama 3 models: grouped-query attention
and a SwiGLU MLP in every layer. They differ in the biases and norms of attention:

=======  ==============================================  ==================  ==============
         biases on query, key, value                     on the output       norms per head
=======  ==============================================  ==================  ==============
qwen2    always                                          never               none
qwen3    ``attention_bias``                              ``attention_bias``  query and key
llama    ``attention_bias``                              ``attention_bias``  none
=======  ==============================================  ==================  ==============

Checked against Transformers' Qwen2ForCausalLM, Qwen3ForCausalLM and LlamaForCausalLM in float64. The rotary dimensions
are two halves on both sides, so nothing is permuted.
"""

from __future__ import annotations

from copy import deepcopy

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from r1_megatron.config.schema import ModelConfig, ParallelConfig, TrainConfig
from r1_megatron.model.dense_attention import DenseAttention
from r1_megatron.model.norm import RMSNorm
from r1_megatron.model.transformer import Experts, shared_fields, use_our_modules, yarn_mscale


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    transformer_engine: bool = False,
    experts: Experts = "grouped",
) -> TransformerConfig:
    """megatron-core's configuration of one rank's model."""
    config = TransformerConfig(
        **shared_fields(model, parallel, train, transformer_engine, experts),
        kv_channels=model.channels_per_head,
        num_query_groups=model.query_groups,
        qk_layernorm=model.architecture == "qwen3",
        add_qkv_bias=model.architecture == "qwen2" or model.attention_bias,
    )
    if model.rope_type == "yarn":
        # megatron-core looks for these names on any configuration object; none of its own has them as a field.
        config.yarn_rotary_scaling_factor = model.rotary_scaling_factor
        config.yarn_mscale, config.yarn_mscale_all_dim = yarn_mscale(model), model.mscale_all_dim
    return config


def layer_specs(
    model: ModelConfig, config: TransformerConfig, transformer_engine: bool, experts: Experts, vp_stage: int | None
):
    """The decoder block's spec for one chunk; the second place is the multi-token-prediction block's, which is none."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    block.layer_specs = [_our_layer(spec, model, transformer_engine) for spec in block.layer_specs]
    if not transformer_engine:
        block.layer_norm = RMSNorm
    return block, None


def _our_layer(spec: ModuleSpec, model: ModelConfig, transformer_engine: bool) -> ModuleSpec:
    spec = deepcopy(spec)
    layer = spec.submodules
    attention = layer.self_attention
    attention.module = DenseAttention
    attention.params = {**attention.params, "model": model}
    use_our_modules(layer, transformer_engine)
    if not transformer_engine and model.architecture == "qwen3":
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = RMSNorm
    return spec
