"""Write a Hugging Face checkpoint of random weights, of any size, a few megabytes at a time.

    python tools/make_checkpoint.py /data/v3-slice                        # 6 GB: DeepSeek-V3's width, FP8, few layers
    python tools/make_checkpoint.py /tmp/tiny --preset tiny --dtype bf16 --max-shard-size 200KB

For tests and measurements of the converter: names, shapes, dtypes, shards, index, block scales and duplicates are those
of the released checkpoints; the values mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

from r1_megatron.checkpoint.convert.work import parse_size
from r1_megatron.checkpoint.files.dtypes import item_size
from r1_megatron.checkpoint.files.safetensors import (
    INDEX,
    SINGLE,
    StoredTensor,
    TensorFiles,
    build_index,
    create_file,
)
from r1_megatron.checkpoint.hugging_face.config import hf_from_model
from r1_megatron.checkpoint.matching import SCALE_SUFFIX, scale_shape
from r1_megatron.checkpoint.naming import aliases, entries, fused_expert_name, hugging_face_shapes
from r1_megatron.config.presets import PRESETS
from r1_megatron.config.schema import ModelConfig

DTYPES = {"fp8": "F8_E4M3", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
NUMPY = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F16": np.uint16, "F32": np.float32}
QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_PIECE = 4 << 20
# One dense layer, one with experts and MTP, with fewer experts and a quarter of the vocabulary: 6.5 GB in FP8.
V3_SLICE = {"num_layers": 2, "first_k_dense_replace": 1, "num_moe_experts": 48, "vocab_size": 32320}


def make_checkpoint(
    folder: str | Path,
    model: ModelConfig,
    dtype: str = "bf16",
    max_shard_size: int = 5 * 10**9,
    fused: bool = False,
    repeats: bool = True,
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write it.

    Args:
        dtype: ``fp8`` (linear layers with block scales, the rest bf16), ``bf16``, ``fp16`` or ``fp32``.
        fused: a layer's experts in two tensors, as Transformers has them in memory.
        repeats: with the tensors that repeat others (an MTP layer's embedding and head, a tied head).
        config: fields of ``config.json`` to set; ``rope_interleave`` among them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    shapes = hugging_face_shapes(entries(model))
    same = aliases(model) if repeats else {}
    shapes |= {name: shapes[other] for name, other in same.items()}
    layout = list(_layout(shapes, dtype, fused))
    shards = list(_shards(layout, max_shard_size))
    headers, places = {}, {}
    for number, tensors in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):06}.safetensors"
        headers[name] = create_file(folder / name, tensors, {"format": "pt"})
        places |= {tensor.name: tensor for tensor in headers[name].tensors}
    files = TensorFiles()
    for name, place in places.items():
        _fill(files, place, np.random.default_rng([seed, *same.get(name, name).encode()]))
    files.close()
    if len(shards) > 1:
        (folder / INDEX).write_text(build_index(headers))
    told = hf_from_model(model) | dict(config or {})
    if dtype == "fp8":
        told["quantization_config"] = QUANTIZATION
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.6}) + "\n")
    return folder


def is_quantized(name: str) -> bool:
    """Whether DeepSeek-V3 keeps this tensor in FP8: the projections of attention and of every MLP."""
    is_projection = name.endswith(("_proj.weight", "_proj_with_mqa.weight"))
    return is_projection and (".self_attn." in name or ".mlp." in name)


def _layout(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, fused: bool
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    done = set()
    for name, shape in shapes.items():
        stacked = fused_expert_name(name) if fused else None
        if stacked is not None:
            whole, _, part = stacked
            experts = sum(1 for other in shapes if (fused_expert_name(other) or ("", 0, ""))[::2] == (whole, part))
            if whole not in done:
                done.add(whole)
                yield whole, DTYPES[dtype], (experts, shape[0] * (1 if part == "down" else 2), shape[1])
            continue
        if name.endswith("e_score_correction_bias"):
            yield name, "F32", shape
        elif dtype == "fp8" and is_quantized(name):
            yield name, "F8_E4M3", shape
            yield name + SCALE_SUFFIX, "F32", scale_shape(shape)
        else:
            yield name, "BF16" if dtype == "fp8" else DTYPES[dtype], shape


def _shards(layout: list[tuple[str, str, tuple[int, ...]]], max_shard_size: int) -> Iterator[list]:
    shard: list[tuple[str, str, tuple[int, ...]]] = []
    size = 0
    for tensor in layout:
        num_bytes = math.prod(tensor[2]) * item_size(tensor[1])
        if shard and size + num_bytes > max_shard_size:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += num_bytes
    yield shard


def _fill(files: TensorFiles, place: StoredTensor, random: np.random.Generator) -> None:
    for start in range(0, place.num_bytes, _PIECE):
        count = min(_PIECE, place.num_bytes - start) // item_size(place.dtype)
        files.write(place, start, _values(place, count, random).data.cast("B"))


def _values(place: StoredTensor, count: int, random: np.random.Generator) -> np.ndarray:
    """Finite numbers of about a weight's size, every bit of precision in use."""
    if place.name.endswith(SCALE_SUFFIX):
        return random.uniform(1e-5, 3e-4, count).astype(np.float32)
    bits = np.frombuffer(random.bytes(count * item_size(place.dtype)), NUMPY[place.dtype]).copy()
    if place.dtype == "F8_E4M3":
        bits[(bits & 0x7F) == 0x7F] = 0x38
    elif place.dtype == "BF16":  # magnitudes from 2^-7 to 2^-5
        bits = (bits & 0x80FF) | 0x3C00
    elif place.dtype == "F16":
        bits = (bits & 0x87FF) | 0x2000
    else:
        bits = random.standard_normal(count, np.float32) * np.float32(0.02)
    return bits


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="deepseek_v3_671b", choices=PRESETS)
    parser.add_argument("--dtype", default="fp8", choices=DTYPES)
    parser.add_argument("--fused", action="store_true", help="experts in two tensors a layer")
    parser.add_argument("--no-repeats", action="store_true", help="without an MTP layer's copies of embedding and head")
    parser.add_argument("--max-shard-size", default="5GB", type=parse_size)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("field", nargs="*", metavar="field=value", help="of the model, e.g. num_layers=2")
    arguments = parser.parse_intermixed_args()
    model = ModelConfig(**PRESETS[arguments.preset])
    if arguments.preset == "deepseek_v3_671b":
        model = replace(model, **V3_SLICE)
    model = replace(model, **{name: json.loads(value) for name, value in (f.split("=", 1) for f in arguments.field)})
    folder = make_checkpoint(
        arguments.folder,
        model,
        arguments.dtype,
        arguments.max_shard_size,
        arguments.fused,
        not arguments.no_repeats,
        seed=arguments.seed,
    )
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
