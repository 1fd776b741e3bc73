"""Small models of every kind that Hugging Face checkpoints come in, and Transformers' own model of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from r1_megatron.config.schema import ModelConfig

DEEPSEEK = ModelConfig(num_layers=3, hidden_size=24, ffn_hidden_size=40, moe_ffn_hidden_size=16, vocab_size=67)
DEEPSEEK = replace(DEEPSEEK, moe_shared_expert_intermediate_size=32)
DENSE = ModelConfig(
    num_layers=2, hidden_size=24, ffn_hidden_size=40, num_attention_heads=6, num_query_groups=2, vocab_size=67
)
MODELS = {
    "deepseek_v3": DEEPSEEK,
    "full_rank_query": replace(DEEPSEEK, q_lora_rank=None),
    "attention_bias": replace(DEEPSEEK, attention_bias=True),
    "full_rank_query_bias": replace(DEEPSEEK, q_lora_rank=None, attention_bias=True),
    "tied": replace(DEEPSEEK, share_embeddings_and_output_weights=True),
    "no_experts": replace(DEEPSEEK, first_k_dense_replace=3),
    "all_experts": replace(DEEPSEEK, first_k_dense_replace=0),
    "qwen2": replace(DENSE, architecture="qwen2"),
    "qwen2_tied": replace(DENSE, architecture="qwen2", share_embeddings_and_output_weights=True),
    "qwen3": replace(DENSE, architecture="qwen3", head_dim=10),
    "qwen3_bias": replace(DENSE, architecture="qwen3", attention_bias=True),
    "llama": replace(DENSE, architecture="llama"),
    "llama_bias": replace(DENSE, architecture="llama", head_dim=10, attention_bias=True, num_query_groups=None),
}

# Matrices of more than one block, in no direction a whole number of them.
FP8_MODEL = ModelConfig(
    num_layers=2,
    hidden_size=136,
    ffn_hidden_size=300,
    moe_ffn_hidden_size=130,
    moe_shared_expert_intermediate_size=130,
    num_attention_heads=2,
    q_lora_rank=140,
    kv_lora_rank=48,
    num_moe_experts=4,
    moe_router_num_groups=2,
    moe_router_group_topk=1,
    moe_router_topk=2,
    vocab_size=67,
    mtp_num_layers=1,
)


def transformers_model(model: ModelConfig, **options: Any) -> PreTrainedModel:
    """Transformers' model of this shape, in words of its own, on the device that is current."""
    config: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "pad_token_id": None,
        **options,
    }
    if model.architecture == "deepseek_v3":
        deepseek = DeepseekV3Config(
            **config,
            moe_intermediate_size=model.moe_ffn_hidden_size,
            n_shared_experts=model.moe_shared_expert_intermediate_size // model.moe_ffn_hidden_size,
            n_routed_experts=model.num_moe_experts,
            num_key_value_heads=model.num_attention_heads,
            kv_lora_rank=model.kv_lora_rank,
            q_lora_rank=model.q_lora_rank,
            qk_rope_head_dim=model.qk_pos_emb_head_dim,
            qk_nope_head_dim=model.qk_head_dim,
            v_head_dim=model.v_head_dim,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=4,
            first_k_dense_replace=model.first_k_dense_replace,
            attention_bias=model.attention_bias,
            num_mtp_layers=0,
            experts_implementation="eager",
        )
        return DeepseekV3ForCausalLM(deepseek)
    config["num_key_value_heads"] = model.num_query_groups
    if model.head_dim is not None:
        config["head_dim"] = model.head_dim
    if model.architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**config))
    if model.architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**config, attention_bias=model.attention_bias))
    width = {"head_dim": model.channels_per_head} | config
    return Qwen3ForCausalLM(Qwen3Config(**width, attention_bias=model.attention_bias))
