"""The small models of the multi-process tests: everything DeepSeek-V3 has, in 0.4 million parameters."""

from __future__ import annotations

from dataclasses import replace

from r1_megatron.config.schema import ModelConfig

# Four layers (one dense), MLA with low-rank queries, 8 experts in 4 groups, YaRN. The vocabulary is odd, so that
# tensor parallelism has to pad it.
TINY = ModelConfig(
    vocab_size=259,
    rope_type="yarn",
    max_position_embeddings=2560,
    original_max_position_embeddings=64,
    moe_router_bias_update_rate=0.0,
)
TINY_ROPE = replace(TINY, rope_type="rope")
TINY_FULL_RANK_QUERY = replace(TINY, q_lora_rank=None)
TINY_MTP = replace(TINY, mtp_num_layers=1, mtp_loss_scaling_factor=0.3)
TINY_AUX = replace(TINY, moe_aux_loss_coeff=0.5)
TINY_TIED = replace(TINY, share_embeddings_and_output_weights=True)

# What checkpoints of this family also are: each variant brings several things at once that the models above have not.
STUDENT = ModelConfig(
    architecture="qwen2",
    vocab_size=259,
    num_query_groups=2,
    max_position_embeddings=2560,
    rotary_base=1e6,
)
VARIANTS = {
    # Attention biases; YaRN whose magnitude is not divided; norms of model and latents with different epsilons.
    "biases": replace(TINY, attention_bias=True, mscale=0.707, mscale_all_dim=0.0, layernorm_epsilon=1e-2),
    # Experts in every layer and no shared one; 3 experts of 2 groups.
    "only_experts": replace(
        TINY, first_k_dense_replace=0, moe_shared_expert_intermediate_size=0, moe_router_topk=3, mscale_all_dim=0.707
    ),
    # A group is worth its best two, of which one expert is taken; biases without a low-rank query.
    "few_experts": replace(
        TINY, moe_router_topk=2, q_lora_rank=None, attention_bias=True, mscale=0.0, mscale_all_dim=0.5
    ),
    # The one gate is always the scaling factor.
    "one_expert": replace(TINY, moe_router_topk=1, moe_router_num_groups=None, moe_router_group_topk=None),
    "no_experts": replace(TINY, first_k_dense_replace=4, mtp_num_layers=1, attention_bias=True),
    "tied_mtp": replace(TINY_MTP, share_embeddings_and_output_weights=True),
    "qwen2": replace(STUDENT, share_embeddings_and_output_weights=True),
    "qwen3": replace(STUDENT, architecture="qwen3", head_dim=24, layernorm_epsilon=1e-2),
    "llama": replace(
        STUDENT,
        architecture="llama",
        attention_bias=True,
        rotary_base=500.0,
        rope_type="llama3",
        rotary_scaling_factor=8.0,
        original_max_position_embeddings=32,
    ),
    "long_qwen3": replace(
        STUDENT,
        architecture="qwen3",
        attention_bias=True,
        num_query_groups=None,
        rope_type="yarn",
        rotary_scaling_factor=4.0,
        original_max_position_embeddings=32,
        mscale=0.0,
        mscale_all_dim=0.0,
    ),
}
