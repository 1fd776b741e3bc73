"""Rotary embeddings of a ``config.json``, in its older and its newer spelling, and back.

What absent fields mean is Transformers' ``modeling_rope_utils.py`` (``_compute_yarn_parameters``,
``_compute_llama3_parameters``) and ``yarn_apply_mscale`` of its ``modeling_deepseek_v3.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from r1_megatron.checkpoint.hugging_face.config_reader import REQUIRED, ConfigReader
from r1_megatron.config.schema import ModelConfig

# Llama 3.1's two wavelength limits, as megatron-core has them built in.
_LLAMA3_FREQUENCY_FACTORS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rotary_from_hf(read: ConfigReader, architecture: str, max_positions: int) -> dict[str, Any]:
    """The rotary fields of ``ModelConfig``; ``read`` notes what is not supported.

    Both spellings, with Transformers' precedence: ``rope_scaling`` (with ``rope_theta`` beside it), then
    ``rope_parameters``.
    """
    rope = read.inside("rope_scaling" if read.config.get("rope_scaling") else "rope_parameters")
    fields: dict[str, Any] = {"rotary_base": rope.number("rope_theta", read.number("rope_theta", 10000.0))}
    for reader in (read, rope):
        reader.only("partial_rotary_factor", (1.0,), "a head's rotary part is rotated whole")
    for name, value in rope.config.items():
        if isinstance(value, Mapping):
            rope.problem(name, "not supported: all layers have the same rotary embedding. Supported: one set of fields")
    kind = rope.config.get("rope_type") or rope.config.get("type") or "default"
    if kind == "default":
        return fields | {"rope_type": "rope"}
    scalings = ("yarn",) if architecture == "deepseek_v3" else ("yarn", "llama3")
    if kind not in scalings:
        name = "rope_type" if "rope_type" in rope.config else "type"
        rope.problem(name, f"not supported with {architecture}. Supported: default, {', '.join(scalings)}")
        return fields
    original = read.integer("original_max_position_embeddings", None)
    original = original or rope.integer("original_max_position_embeddings", max_positions)
    fields |= {
        "rope_type": kind,
        "original_max_position_embeddings": original,
        "rotary_scaling_factor": rope.number(
            "factor", REQUIRED if kind == "llama3" else max_positions / max(original, 1)
        ),
    }
    if kind == "llama3":
        for name, value in _LLAMA3_FREQUENCY_FACTORS.items():
            if rope.number(name) != value:
                rope.problem(name, f"not supported. Supported: {value:g}")
        return fields
    rope.only("truncate", (True,), "the correction range is rounded to whole dimensions")
    return fields | {
        "beta_fast": rope.number("beta_fast", 0.0) or 32.0,
        "beta_slow": rope.number("beta_slow", 0.0) or 1.0,
        **_magnitudes(rope, architecture, fields["rotary_scaling_factor"]),
    }


def _magnitudes(rope: ConfigReader, architecture: str, factor: float) -> dict[str, float]:
    """``mscale`` and ``mscale_all_dim``, which mean here what they mean in Transformers; 0: absent.

    With g(m) = 0.1 m ln(factor) + 1, cosine and sine are scaled by g(mscale) / g(mscale_all_dim), or by g(1) if one of
    the two is 0; and DeepSeek's softmax by g(mscale_all_dim) squared. An ``attention_factor`` replaces the former: it
    becomes the mscale that gives it.
    """
    mscale, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    wanted = rope.number("attention_factor", None)
    if wanted is None:
        return {"mscale": mscale, "mscale_all_dim": all_dim}

    slope = 0.1 * math.log(factor) if factor > 1 else 0.0
    if math.isclose(wanted, 1.0 + slope, rel_tol=1e-12):
        return {"mscale": 0.0, "mscale_all_dim": all_dim}
    if architecture != "deepseek_v3":
        all_dim = 1.0  # it has no other effect there
    solved = (wanted * (1.0 + slope * all_dim) - 1.0) / slope if slope and all_dim else 0.0
    if solved <= 0:
        rope.problem(
            "attention_factor",
            f"cannot be expressed by mscale with factor={factor:g} and mscale_all_dim={all_dim:g}. Leave it out if it "
            f"is the default, 0.1 ln(factor) + 1 = {1.0 + slope:.6g}, or give mscale and mscale_all_dim",
        )
    return {"mscale": solved, "mscale_all_dim": all_dim}


def rope_scaling_of(model: ModelConfig) -> dict[str, Any] | None:
    """``rope_scaling`` of a ``config.json``; ``rope_theta`` stands beside it."""
    if model.rope_type == "rope":
        return None
    scaling: dict[str, Any] = {
        "rope_type": model.rope_type,
        "factor": model.rotary_scaling_factor,
        "original_max_position_embeddings": model.original_max_position_embeddings,
    }
    if model.rope_type == "llama3":
        return scaling | _LLAMA3_FREQUENCY_FACTORS
    scaling["type"] = model.rope_type  # what the models' own code reads
    scaling |= {"beta_fast": model.beta_fast, "beta_slow": model.beta_slow}
    magnitudes = {"mscale": model.mscale, "mscale_all_dim": model.mscale_all_dim}
    return scaling | {name: value for name, value in magnitudes.items() if value}
