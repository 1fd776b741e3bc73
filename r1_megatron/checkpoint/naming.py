"""The one table between megatron-core's parameter names and Hugging Face's, read in both directions.

A row says: this megatron-core tensor is made of these Hugging Face tensors, stacked along the rows where there are
two (gate and up projection). ``{l}`` is the layer, ``{e}`` the expert; both count from 0 over the whole model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    megatron: str
    hugging_face: tuple[str, ...]


_MODEL = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Row("output_layer.weight", ("lm_head.weight",)),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
)
_LAYER = (
    Row("input_layernorm.weight", ("input_layernorm.weight",)),
    Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    Row("self_attention.linear_q_proj.weight", ("self_attn.q_proj.weight",)),
    Row("self_attention.linear_q_down_proj.weight", ("self_attn.q_a_proj.weight",)),
    Row("self_attention.q_layernorm.weight", ("self_attn.q_a_layernorm.weight",)),
    Row("self_attention.linear_q_up_proj.weight", ("self_attn.q_b_proj.weight",)),
    Row("self_attention.linear_kv_down_proj.weight", ("self_attn.kv_a_proj_with_mqa.weight",)),
    Row("self_attention.kv_layernorm.weight", ("self_attn.kv_a_layernorm.weight",)),
    Row("self_attention.linear_kv_up_proj.weight", ("self_attn.kv_b_proj.weight",)),
    Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",)),
    Row("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",)),
    Row("mlp.router.weight", ("mlp.gate.weight",)),
    Row("mlp.router.expert_bias", ("mlp.gate.e_score_correction_bias",)),
    Row(
        "mlp.experts.local_experts.{e}.linear_fc1.weight",
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
    ),
    Row("mlp.experts.local_experts.{e}.linear_fc2.weight", ("mlp.experts.{e}.down_proj.weight",)),
    Row(
        "mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    ),
    Row("mlp.shared_experts.linear_fc2.weight", ("mlp.shared_experts.down_proj.weight",)),
)
# The multi-token-prediction module sits behind the last layer in the released checkpoints: layer number num_layers.
_MTP = (
    Row("enorm.weight", ("enorm.weight",)),
    Row("hnorm.weight", ("hnorm.weight",)),
    Row("eh_proj.weight", ("eh_proj.weight",)),
    Row("final_layernorm.weight", ("shared_head.norm.weight",)),
)
_EXPERT_WEIGHT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Source:
    """Where one megatron-core tensor comes from: Hugging Face names, stacked along axis 0 in this order."""

    names: tuple[str, ...]
    pads_vocabulary: bool = False


def hugging_face_source(megatron_name: str, num_layers: int) -> Source:
    """The Hugging Face tensors behind a global megatron-core name. Raises ``KeyError`` on a name not in the table."""
    for row in _MODEL:
        if row.megatron == megatron_name:
            return Source(row.hugging_face, pads_vocabulary="norm" not in megatron_name)
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", megatron_name)
    if match:
        return Source(_layer_names(match[2], int(match[1]), _LAYER, megatron_name))
    match = re.match(r"mtp\.layers\.(\d+)\.(transformer_layer\.)?(.*)", megatron_name)
    if match:
        rows = _LAYER if match[2] else _MTP
        return Source(_layer_names(match[3], num_layers + int(match[1]), rows, megatron_name))
    raise KeyError(f"no Hugging Face name is known for {megatron_name!r}")


def fused_expert_name(hugging_face_name: str) -> tuple[str, int, str] | None:
    """Transformers keeps a layer's experts in one tensor; answers (its name, expert, "gate" | "up" | "down")."""
    match = _EXPERT_WEIGHT.fullmatch(hugging_face_name)
    if match is None:
        return None
    fused = "down_proj" if match[3] == "down" else "gate_up_proj"
    return f"model.layers.{match[1]}.mlp.experts.{fused}", int(match[2]), match[3]


def _layer_names(rest: str, layer: int, rows: tuple[Row, ...], whole: str) -> tuple[str, ...]:
    expert = re.search(r"local_experts\.(\d+)\.", rest)
    pattern = re.sub(r"local_experts\.\d+\.", "local_experts.{e}.", rest)
    for row in rows:
        if row.megatron == pattern:
            number = expert[1] if expert else ""
            return tuple(f"model.layers.{layer}." + name.replace("{e}", number) for name in row.hugging_face)
    raise KeyError(f"no Hugging Face name is known for {whole!r}")
