"""A distributed checkpoint into a Hugging Face folder: of any layout, from a conversion or from training.

    r1-megatron convert to-hf runs/zero/checkpoints/final exported

What a checkpoint came from lies beside its weights (``hugging_face/``): configuration, tokenizer, block scales, and how
the source's files were cut. An unchanged model comes back as the very files it was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from r1_megatron.checkpoint.convert_export import ExportTensor, Piece, group_units, pieces_by_name
from r1_megatron.checkpoint.convert_from_hf import DTYPES, Converted, ensure_file, plan_digest
from r1_megatron.checkpoint.convert_journal import Partial
from r1_megatron.checkpoint.convert_manifest import (
    SCALES,
    file_lines,
    model_of,
    read_description,
    rope_interleave,
    scale_tensors,
    verify,
    write_manifest,
)
from r1_megatron.checkpoint.convert_run import Resources, check_room, check_target, do_units
from r1_megatron.checkpoint.hf_config import hf_from_model
from r1_megatron.checkpoint.integrity import file_problems, files_in
from r1_megatron.checkpoint.matching import SCALE_SUFFIX, scale_shape
from r1_megatron.checkpoint.naming import aliases, entries, fused_expert_name
from r1_megatron.checkpoint.origin import ORIGIN, exported_config, read_config, write_origin
from r1_megatron.checkpoint.safetensors_files import (
    DTYPE_NAMES,
    INDEX,
    SINGLE,
    TORCH_DTYPES,
    Header,
    StoredTensor,
    build_index,
    item_size,
    plan_file,
)
from r1_megatron.checkpoint.torch_dist_files import read_metadata
from r1_megatron.config.schema import ModelConfig

FP8 = torch.float8_e4m3fn
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


def to_hugging_face(
    checkpoint: str | Path, target: str | Path, options: ExportOptions | None = None, resources: Resources | None = None
) -> Converted:
    """Convert a checkpoint. A killed conversion is gone on with by the same call.

    Raises:
        ValueError: the checkpoint is damaged, or not what its description says; files and tensors are named.
        OSError: something cannot be read or written, is there already, or does not fit on the disk.
    """
    checkpoint, target = Path(checkpoint).resolve(), Path(target)
    options, resources = options or ExportOptions(), resources or Resources()
    check_target(target)
    description = read_description(checkpoint)
    check_small_files(checkpoint, description)
    model = model_of(description, checkpoint)
    pieces = pieces_by_name(entries(model, rope_interleave(checkpoint)), read_metadata(checkpoint))
    source = read_source(checkpoint)
    scales = scale_tensors(checkpoint)
    config = _config(checkpoint, model)
    shards = plan_shards(model, pieces, source, scales, options)

    content = target.with_name(target.name + ".partial") / "content"
    metadata = {name: dict(source.metadata.get(name, {})) if source else {"format": "pt"} for name in shards}
    headers = {name: plan_file(content / name, tensors, metadata[name]) for name, tensors in shards.items()}
    tensors = export_tensors(model, pieces, scales, headers)
    units = {f"tensors {number}": unit for number, unit in enumerate(group_units(tensors))}
    identity = {
        "conversion": "to-hf",
        "source": str(checkpoint),
        "options": {"dtype": options.dtype, "fp8": options.fp8, "experts": options.experts},
        "plan": plan_digest(units.values()),
    }
    partial = Partial(target, identity, options.restart)
    try:
        written = sum(path.stat().st_size for path in content.rglob("*") if path.is_file())
        check_room(partial.folder, sum(tensor.num_bytes for h in headers.values() for tensor in h.tensors) - written)
        fresh = {
            str(content / name)
            for name, tensors in shards.items()
            if ensure_file(content / name, tensors, metadata[name])
        }

        def is_there(name: str, result: Any) -> bool:
            places = [place for tensor in units[name].tensors for place in (tensor.place, tensor.scale_place) if place]
            return not any(place.file in fresh for place in places)

        progress = do_units(partial, units, is_there, resources, len(tensors), "converting")
        _write_small_files(checkpoint, content, config, headers, source, shards)
        lines = [line for name in units for line in partial.done[name]["tensors"]]
        head = {"conversion": "to-hf", "source": str(checkpoint), "options": identity["options"]}
        write_manifest(content, head, [*lines, *file_lines(content)])
        partial.finish()
    finally:
        partial.close()
    if options.verify:
        verify(target, resources).check()
    num_bytes = sum(tensor.num_bytes for header in headers.values() for tensor in header.tensors)
    return Converted(target, len(lines), num_bytes, progress.seconds)


# ---------------------------------------------------------------------------------------------------- before anything


def check_small_files(checkpoint: Path, description: Mapping[str, Any]) -> None:
    """All but the weights against ``checkpoint.json``: sha256 of the small files, sizes of the parts.

    The parts' bytes are checked while they are read, by the CRC-32 of every chunk.
    """
    files = description.get("files") or {}
    parts = [name for name in files if name.endswith(".distcp")]
    problems = file_problems(checkpoint, files, parts, contents=False)
    problems += file_problems(checkpoint, files, [name for name in files if name not in parts])
    if problems:
        raise ValueError(
            f"{checkpoint} is damaged: {'; '.join(problems)}. Fetch these files again, or take another checkpoint."
        )


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


def _config(checkpoint: Path, model: ModelConfig) -> dict[str, Any]:
    origin = checkpoint / ORIGIN
    return read_config(origin) if (origin / "config.json").is_file() else hf_from_model(model)


# ----------------------------------------------------------------------------------------------------------- planning


def plan_shards(
    model: ModelConfig,
    pieces: Mapping[str, tuple[Piece, ...]],
    source: Source | None,
    scales: Mapping[str, StoredTensor],
    options: ExportOptions,
) -> dict[str, tuple[Tensor, ...]]:
    """Which file gets which tensors: the source's own partition, where the tensors are the same ones."""
    there = {
        name: (dtype, shape) for shard in (source.shards.values() if source else ()) for name, dtype, shape in shard
    }
    wanted: dict[str, Tensor] = {}
    names = _names(model, pieces, there, options)
    for name, parts in names.items():
        dtype = _dtype(name, pieces[parts[0]][0].stored.dtype, there, scales, options)
        shape = _shape(parts, pieces)
        wanted[name] = (name, DTYPE_NAMES[dtype], shape)
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
    stored: torch.dtype,
    there: Mapping[str, tuple[str, Any]],
    scales: Mapping[str, StoredTensor],
    options: ExportOptions,
) -> torch.dtype:
    """The dtype of a tensor in the output."""
    if name.endswith("e_score_correction_bias") and options.dtype != "source":
        return torch.float32  # adds up over all of training: never rounded
    before = TORCH_DTYPES.get(there[name][0]) if name in there else None
    plain = DTYPES.get(options.dtype) or (before if before not in (None, FP8) else None)
    plain = plain or (torch.bfloat16 if stored == FP8 or before == FP8 else stored)
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
) -> list[ExportTensor]:
    """What has to be written where, in the order of the files.

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
        parts = tuple(pieces[part] for part in ([plain] if plain in pieces else fused[name]))
        own_scales = scales.get(plain)
        if parts[0][0].stored.dtype == FP8 and own_scales is None:
            problems.append(f"{name}: FP8 without block scales in {ORIGIN}/{SCALES}")
        tensors.append(
            ExportTensor(
                name,
                TORCH_DTYPES[place.dtype],
                place.shape,
                parts,
                own_scales,
                place,
                places.get(name + SCALE_SUFFIX),
            )
        )
    if problems:
        raise ValueError("these tensors cannot be exported:\n  " + "\n  ".join(problems[:40]))
    return tensors


# ------------------------------------------------------------------------------------------------------------- ending


def _write_small_files(
    checkpoint: Path,
    content: Path,
    config: dict[str, Any],
    headers: Mapping[str, Header],
    source: Source | None,
    shards: Mapping[str, tuple[Tensor, ...]],
) -> None:
    origin = checkpoint / ORIGIN
    ours = ("config.json", "source.json", SCALES, INDEX)
    names = [name for name in files_in(origin) if name not in ours] if origin.is_dir() else []
    files: dict[str, bytes | Path] = {name: origin / name for name in names}
    if source is not None and dict(shards) == dict(source.shards):  # an unchanged model, to the byte
        files |= {name: origin / name for name in ("config.json", INDEX) if (origin / name).is_file()}
    else:
        files["config.json"] = (json.dumps(_config_for(config, shards), indent=2) + "\n").encode()
        if SINGLE not in headers:
            files[INDEX] = build_index(headers).encode()
    write_origin(content, files)


def _config_for(config: dict[str, Any], shards: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Any]:
    """``config.json`` for weights in other dtypes than it was written for."""
    sizes: dict[str, int] = {}
    for _, dtype, shape in (tensor for shard in shards.values() for tensor in shard):
        sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape) * item_size(dtype)
    fp8 = sizes.pop("F8_E4M3", 0) > 0
    most = max(sizes, key=lambda dtype: sizes[dtype])
    return exported_config(config, str(TORCH_DTYPES[most]).removeprefix("torch."), fp8)
