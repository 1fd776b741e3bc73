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
