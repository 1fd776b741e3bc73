"""Whether two model sections describe the same function of the weights, however they spell it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from r1_megatron.config.schema import ModelConfig

# What training may change, or only initial weights and room for positions follow from.
_TRAINING_ONLY = (
    "preset",
    "init_method_std",
    "max_position_embeddings",
    "moe_aux_loss_coeff",
    "moe_router_bias_update_rate",
    "mtp_loss_scaling_factor",
)
_LATENT_ATTENTION = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_EXPERTS = (
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
)
_GROUPED_ATTENTION = ("num_query_groups", "head_dim")
_SCALED_ROTARY = ("rotary_scaling_factor", "original_max_position_embeddings")
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")


def check_same_model(folder: str | Path, model: ModelConfig, written: dict[str, Any], field: str) -> None:
    """Raises ValueError if a checkpoint's description tells of another model; every field that differs is named.

    Without this, a model with fewer layers would be filled from the first ones and never say so.
    """
    if not written:
        return  # a checkpoint of an early version
    names = {item.name for item in fields(ModelConfig)}
    theirs = _what_counts(ModelConfig(**{name: value for name, value in written.items() if name in names}))
    ours = _what_counts(model)
    differing = [
        f"model.{name}={json.dumps(asdict(model)[name])}, there {json.dumps(written.get(name))}"
        for name in asdict(model)
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise ValueError(
            f"{field}: {folder} holds another model: {'; '.join(differing)}. "
            "Give both stages the same model section, or load another checkpoint."
        )


def _what_counts(model: ModelConfig) -> dict[str, Any]:
    """The fields that the model's function follows from, with defaults filled in."""
    unused = set(_TRAINING_ONLY)
    values = asdict(model)
    if model.is_dense_student:
        unused |= {*_LATENT_ATTENTION, *_EXPERTS, "first_k_dense_replace", "mtp_num_layers"}
        values["num_query_groups"] = model.num_query_groups or model.num_attention_heads
        values["head_dim"] = model.channels_per_head
        if model.architecture == "qwen2":
            unused.add("attention_bias")
    else:
        unused |= set(_GROUPED_ATTENTION)
        if model.first_k_dense_replace == model.num_layers:
            unused |= set(_EXPERTS)
        if (model.moe_router_num_groups or 1) == (model.moe_router_group_topk or 1):  # every group is chosen
            unused |= {"moe_router_num_groups", "moe_router_group_topk"}
    if model.rope_type == "rope":
        unused |= set(_SCALED_ROTARY)
    if model.rope_type != "yarn":
        unused |= set(_YARN)
    return {name: value for name, value in values.items() if name not in unused}
