"""What an export's files will hold: which tensors, in which dtypes, in which file, from which rows of the checkpoint.

An unchanged model gets the files of its source back; where that cannot be (other dtypes, another layout of experts, no
source at all), tensors follow each other in the source's order, or the model's, and files are cut by size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1_megatron.checkpoint.convert.exporting import ExportTensor, Piece
from r1_megatron.checkpoint.convert.work import DTYPES
from r1_megatron.checkpoint.files.dtypes import FP8, WEIGHTS, item_size
from r1_megatron.checkpoint.files.safetensors import SINGLE, Header, StoredTensor
from r1_megatron.checkpoint.hugging_face.origin import ORIGIN, SCALES
from r1_megatron.checkpoint.matching import SCALE_SUFFIX, scale_shape
from r1_megatron.checkpoint.naming import aliases, fused_expert_name
from r1_megatron.config.schema import ModelConfig

_PROJECTION = re.compile(r"\.(self_attn|mlp)\.(.*\.)?\w+_proj(_with_mqa)?\.weight$")

Tensor = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape


@dataclass(frozen=True)
class ExportOptions:
    """How the folder is to look.

    Attributes:
        dtype: ``source``: every tensor as in the Hugging Face source, or as stored, where there was none.
        fp8: ``source``: FP8 where the source had it; ``quantize``: every projection; ``dequantize``: nothing.
        experts: ``per-expert`` tensors, or ``fused`` ones as Transformers has them in memory.
        max_shard_size: bytes of a file; only where it cannot be as in the source.
    """

    dtype: Literal["source", "bf16", "fp16", "fp32"] = "source"
    fp8: Literal["source", "dequantize", "quantize"] = "source"
    experts: Literal["source", "per-expert", "fused"] = "source"
    max_shard_size: int = 5 * 10**9
    verify: bool = False
    restart: bool = False


@dataclass(frozen=True)
class Source:
    """What is known of the Hugging Face source (``source.json``): its files with their tensors and text metadata."""

    shards: Mapping[str, tuple[Tensor, ...]]
    metadata: Mapping[str, Mapping[str, str]]


def read_source(checkpoint: Path) -> Source | None:
    """``source.json``; ``None`` for a model that was born here. Raises ValueError if it is damaged."""
    path = checkpoint / ORIGIN / "source.json"
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        shards = {
            shard["file"]: tuple((name, dtype, tuple(shape)) for name, dtype, shape in shard["tensors"])
            for shard in told["shards"]
        }
        metadata = {shard["file"]: shard["metadata"] for shard in told["shards"]}
        if told["format"] != 1 or any(name != Path(name).name for name in shards):
            raise ValueError("format or file names are unknown")
        return Source(shards, metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: damaged: {error!s:.200}") from error


def plan_shards(
    model: ModelConfig,
    pieces: Mapping[str, tuple[Piece, ...]],
    source: Source | None,
    scales: Mapping[str, StoredTensor],
    options: ExportOptions,
) -> dict[str, tuple[Tensor, ...]]:
    """Which file gets which tensors: the source's own partition, where the tensors are the same ones.

    Raises:
        ValueError: FP8 is asked for where it cannot be.
    """
    there = {
        name: (dtype, shape) for shard in (source.shards.values() if source else ()) for name, dtype, shape in shard
    }
    wanted: dict[str, Tensor] = {}
    names = _names(model, pieces, there, options)
    for name, parts in names.items():
        dtype = _dtype(name, pieces[parts[0]][0].stored.dtype, there, scales, options)
        shape = _shape(parts, pieces)
        wanted[name] = (name, dtype, shape)
        becomes_fp8 = options.fp8 == "quantize" or (options.fp8 == "source" and _is_fp8(parts[0], pieces, there))
        if len(parts) > 1 and becomes_fp8:
            raise ValueError(
                f"{name}: --experts fused: fused experts have no block scales; take --fp8 dequantize or "
                "--experts per-expert"
            )
        if dtype == FP8:
            wanted[name + SCALE_SUFFIX] = (name + SCALE_SUFFIX, "F32", scale_shape(shape))
    if source is not None:
        same = {
            file: tuple(wanted[name] for name, _, _ in shard if name in wanted) for file, shard in source.shards.items()
        }
        placed = {tensor[0] for shard in same.values() for tensor in shard}
        if placed == set(wanted) and (options.dtype, options.fp8) == ("source", "source"):
            return {file: shard for file, shard in same.items() if shard}
        # In the source's order, as far as it goes.
        order = {name: number for number, name in enumerate(there)}
        wanted = dict(
            sorted(wanted.items(), key=lambda item: order.get(item[0], order.get(_weight(item[0]), len(order))))
        )
    return _cut(wanted.values(), options.max_shard_size)


def _is_fp8(name: str, pieces: Mapping[str, tuple[Piece, ...]], there: Mapping[str, tuple[str, Any]]) -> bool:
    """Whether an expert is FP8, here or in the source."""
    return pieces[name][0].stored.dtype == FP8 or (name in there and there[name][0] == FP8)


def _names(
    model: ModelConfig, pieces: Mapping[str, tuple[Piece, ...]], there: Mapping[str, Any], options: ExportOptions
) -> dict[str, tuple[str, ...]]:
    """Every tensor to write, and the table's names whose rows it is."""
    fused: dict[str, list[str]] = {}
    names: dict[str, tuple[str, ...]] = {}
    for name in pieces:
        known = fused_expert_name(name)
        as_source = options.experts == "source" and known is not None and known[0] in there
        if known is not None and (options.experts == "fused" or as_source):
            fused.setdefault(known[0], []).append(name)
            names[known[0]] = ()
        else:
            names[name] = (name,)
    for name, parts in fused.items():
        names[name] = tuple(parts)
    for name, same in aliases(model).items():
        if name in there:
            names[name] = (same,)
    return names


def _shape(parts: tuple[str, ...], pieces: Mapping[str, tuple[Piece, ...]]) -> tuple[int, ...]:
    last = pieces[parts[0]][-1]
    stored = last.stored.shape if last.expert is None else last.stored.shape[1:]
    if len(parts) == 1:
        return (last.stop, *stored[1:])
    experts = 1 + max((fused_expert_name(part) or ("", 0, ""))[1] for part in parts)
    return (experts, last.stop * (len(parts) // experts), *stored[1:])


def _dtype(
    name: str,
    stored: str,
    there: Mapping[str, tuple[str, Any]],
    scales: Mapping[str, StoredTensor],
    options: ExportOptions,
) -> str:
    """The dtype of a tensor in the output."""
    if name.endswith("e_score_correction_bias") and options.dtype != "source":
        return "F32"  # adds up over all of training: never rounded
    before = there[name][0] if name in there and there[name][0] in WEIGHTS else None
    plain = DTYPES.get(options.dtype) or (before if before not in (None, FP8) else None)
    plain = plain or ("BF16" if stored == FP8 or before == FP8 else stored)
    if options.fp8 == "dequantize":
        return plain
    if options.fp8 == "quantize" and is_projection(name):
        return FP8
    if options.fp8 == "source" and (before == FP8 or (before is None and stored == FP8 and name in scales)):
        return FP8
    return plain


def is_projection(name: str) -> bool:
    """What DeepSeek-V3 has in FP8: the projections of attention and of every MLP, each expert's by itself."""
    return _PROJECTION.search(name) is not None


def _weight(name: str) -> str:
    """A scale is sorted with its weight, an expert with the fused tensor it came from or went to."""
    plain = name.removesuffix(SCALE_SUFFIX)
    known = fused_expert_name(plain)
    return known[0] if known else plain


def _cut(tensors: Iterable[Tensor], max_shard_size: int) -> dict[str, tuple[Tensor, ...]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        num_bytes = math.prod(tensor[2]) * item_size(tensor[1])
        if shards[-1] and size + num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += num_bytes
    if len(shards) == 1:
        return {SINGLE: tuple(shards[0])}
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    return {name: tuple(shard) for name, shard in zip(names, shards)}


def export_tensors(
    model: ModelConfig,
    pieces: Mapping[str, tuple[Piece, ...]],
    scales: Mapping[str, StoredTensor],
    headers: Mapping[str, Header],
    hashes: Mapping[str, tuple[str, str]],
) -> list[ExportTensor]:
    """What has to be written where, in the order of the files.

    ``hashes``: dtype and sha256 of Hugging Face tensors as they lie in the checkpoint.

    Raises:
        ValueError: FP8 in the checkpoint whose scales are not there.
    """
    places = {tensor.name: tensor for header in headers.values() for tensor in header.tensors}
    fused: dict[str, list[str]] = {}
    for name in pieces:
        if known := fused_expert_name(name):
            fused.setdefault(known[0], []).append(name)
    same = aliases(model)
    tensors, problems = [], []
    for name, place in places.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        plain = same.get(name, name)
        names = [plain] if plain in pieces else fused[name]
        parts = tuple(pieces[part] for part in names)
        own_scales = tuple(scales[part] for part in names if part in scales)
        if parts[0][0].stored.dtype == FP8 and len(own_scales) < len(parts):
            problems.append(f"{name}: FP8 without block scales in {ORIGIN}/{SCALES}")
        tensors.append(
            ExportTensor(
                name,
                place.dtype,
                place.shape,
                parts,
                own_scales,
                place,
                places.get(name + SCALE_SUFFIX),
                hashes[plain][1] if plain in hashes and hashes[plain][0] == place.dtype else None,
            )
        )
    if problems:
        raise ValueError("these tensors cannot be exported:\n  " + "\n  ".join(problems[:40]))
    return tensors
