"""Loading a checkpoint that keeps FP8: its codes are in the model already, here each shard gets its scales.

megatron-core reads the e4m3 codes into parameters of the model's dtype, which holds every one of them exactly. What is
left is a product with the scale of the 128 x 128 block that an element lies in, under whatever cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from r1_megatron.checkpoint.fp8 import dequantize_shard_
from r1_megatron.checkpoint.hugging_face.origin import ORIGIN, SCALES, read_config
from r1_megatron.checkpoint.matching import SCALE_SUFFIX
from r1_megatron.checkpoint.naming import entries_by_name
from r1_megatron.config.schema import ModelConfig
from r1_megatron.model.parameters import GlobalParameter, global_parameters
from r1_megatron.parallel.groups import ProcessGroups


def keeps_fp8(description: dict[str, Any]) -> bool:
    """Whether a checkpoint, by its ``checkpoint.json``, holds codes and not values."""
    return description.get("weights", {}).get("fp8") == "kept"


def scale_weights(
    folder: str | Path, model: ModelConfig, chunks: Iterable[torch.nn.Module], groups: ProcessGroups
) -> None:
    """Turn the codes in the model's parameters into values, in place: products in fp32, rounded once."""
    origin = Path(folder) / ORIGIN
    table = entries_by_name(model, read_config(origin).get("rope_interleave", True))
    with safe_open(origin / SCALES, framework="pt") as file:
        there = set(file.keys())
        for chunk in chunks:
            for parameter in global_parameters(chunk, groups):
                entry = table[parameter.name]
                names = {rows.name for rows in entry.rows if rows.name + SCALE_SUFFIX in there}
                scales = {name: file.get_tensor(name + SCALE_SUFFIX) for name in names}
                if scales:
                    rows, first_column = _place(parameter)
                    dequantize_shard_(parameter.tensor.data, entry, scales, rows, first_column)


def _place(parameter: GlobalParameter) -> tuple[list[tuple[int, int]], int]:
    """Which rows of the whole tensor this rank's shard is, and its first column."""
    height, width = parameter.global_shape
    if parameter.shard_axis is None or parameter.shards == 1:
        return [(0, height)], 0
    if parameter.shard_axis == 1:
        return [(0, height)], parameter.shard * (width // parameter.shards)
    if parameter.gated:
        half, part = height // 2, height // 2 // parameter.shards
        start = parameter.shard * part
        return [(start, start + part), (half + start, half + start + part)], 0
    part = height // parameter.shards
    return [(parameter.shard * part, (parameter.shard + 1) * part)], 0
