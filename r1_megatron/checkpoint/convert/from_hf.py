"""A Hugging Face folder into a distributed checkpoint that loads under every layout.

    r1-megatron convert from-hf DeepSeek-V3 checkpoints/deepseek-v3 --max-memory 2GB

Names, shapes, dtypes, files, room on the disk and the configuration are all checked before a weight is read; then the
tensors stream through a few processes, some megabytes at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from r1_megatron.checkpoint.convert.importing import ImportUnit, plan_units
from r1_megatron.checkpoint.convert.journal import Partial
from r1_megatron.checkpoint.convert.manifest import MANIFEST, read_manifest, verify, write_manifest
from r1_megatron.checkpoint.convert.work import DTYPES, Resources, check_room, check_target, do_units, tensors_are
from r1_megatron.checkpoint.files.dtypes import FP8, TORCH_NAMES, item_size
from r1_megatron.checkpoint.files.safetensors import (
    INDEX,
    Header,
    StoredTensor,
    WeightFolder,
    create_file,
    plan_file,
    read_folder,
    read_header,
)
from r1_megatron.checkpoint.files.torch_dist import StoredChunk, StoredKey
from r1_megatron.checkpoint.files.torch_dist_writing import write_metadata
from r1_megatron.checkpoint.hugging_face.config import is_fp8, model_from_hf
from r1_megatron.checkpoint.hugging_face.origin import ORIGIN, SCALES, collect_origin, read_config, write_origin
from r1_megatron.checkpoint.integrity import files_in, hash_file, is_whole
from r1_megatron.checkpoint.matching import Match, match_tensors
from r1_megatron.checkpoint.naming import Entry, entries
from r1_megatron.config.schema import ModelConfig
from r1_megatron.telemetry.run_folder import CHECKPOINT


@dataclass(frozen=True)
class ImportOptions:
    """``dtype``: ``keep`` every tensor's, or cast to this one (selection biases stay fp32). ``fp8``: ``keep`` codes and
    scales, or ``dequantize``: to bf16 as the released cast does, or to ``dtype``."""

    dtype: Literal["keep", "bf16", "fp16", "fp32"] = "keep"
    fp8: Literal["keep", "dequantize"] = "keep"
    verify: bool = False
    restart: bool = False


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    num_tensors: int
    num_bytes: int
    seconds: float

    def text(self) -> str:
        """One line for the user."""
        return f"{self.folder}: {self.num_tensors} tensors, {self.num_bytes / 1e9:.2f} GB in {self.seconds:.0f} s"


def from_hugging_face(
    source: str | Path, target: str | Path, options: ImportOptions | None = None, resources: Resources | None = None
) -> Converted:
    """Convert a Hugging Face folder. A killed conversion is gone on with by the same call.

    Raises:
        ValueError: what is there is no model that is supported, or damaged; files, fields and tensors are named.
        OSError: something cannot be read or written, is there already, or does not fit on the disk.
    """
    source, target = Path(source).resolve(), Path(target)
    options, resources = options or ImportOptions(), resources or Resources()
    check_target(target)
    weights = read_folder(source)
    config = read_config(source)
    model = model_from_hf(config, set(weights.tensors))
    match = _match(weights, model, source)
    table = entries(model, rope_interleave=config.get("rope_interleave", True) is True)
    _check_fp8(weights, config, options)
    dtype_of = _dtype_rule(options)

    scales = sorted(match.scales)
    content = target.with_name(target.name + ".partial") / "content"
    layout = [(name, weights.tensors[name].dtype, weights.tensors[name].shape) for name in scales]
    scale_file = content / ORIGIN / SCALES
    places = {tensor.name: tensor for tensor in plan_file(scale_file, layout, {}).tensors}
    copies = [(weights.tensors[name], weights.tensors[same]) for name, same in match.aliases.items()]
    units = {unit.part: unit for unit in plan_units(table, weights.tensors, dtype_of, copies, places)}
    identity = {
        "conversion": "from-hf",
        "source": str(source),
        "options": {"dtype": options.dtype, "fp8": options.fp8},
        "plan": plan_digest(units.values()),
    }
    partial = Partial(target, identity, options.restart)
    try:
        (content / ORIGIN).mkdir(exist_ok=True)
        fresh = ensure_file(scale_file, layout, {}) if layout else False

        def is_there(part: str, result: Any) -> bool:
            path = content / part
            is_whole = path.is_file() and path.stat().st_size == result["file"]["bytes"]
            return is_whole and not (fresh and units[part].scale_places)

        def is_intact(part: str, result: Any) -> bool:
            chunks = [(start, length) for _, _, _, start, length in result["chunks"]]
            is_part_whole = all(is_whole(content / part, start, length) for start, length in chunks)
            return is_part_whole and tensors_are(units[part].scale_places, result["tensors"])

        written = sum(path.stat().st_size for path in content.rglob("*") if path.is_file())
        check_room(partial.folder, output_bytes(units.values()) - written)
        progress = do_units(partial, units, is_there, is_intact, resources, len(weights.tensors))
        results = {part: partial.done[part] for part in units}
        lines = [line for result in results.values() for line in result["tensors"]]
        _check_against_manifest(source, lines)
        write_side(source, weights, content / ORIGIN)
        (content / "model.yaml").write_text(yaml.safe_dump({"model": asdict(model)}, sort_keys=False))
        write_metadata(content, stored_keys(table, units.values(), results))
        head = {"conversion": "from-hf", "source": str(source), "options": identity["options"]}
        write_manifest(content, head, lines)
        _write_description(content, model, lines, options, results)
        partial.finish()
    finally:
        partial.close()
    num_bytes = sum(result["file"]["bytes"] for result in results.values())
    if options.verify:
        verify(target, resources).check()
    return Converted(target, len(lines), num_bytes, progress.seconds)


# ---------------------------------------------------------------------------------------------------- before anything


def _match(weights: WeightFolder, model: ModelConfig, source: Path) -> Match:
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    match = match_tensors(shapes, model, [name for name, tensor in weights.tensors.items() if tensor.dtype == FP8])
    match.check(str(source))
    wrong = [f"{name} {weights.tensors[name].dtype}" for name in match.scales if weights.tensors[name].dtype != "F32"]
    if wrong:
        raise ValueError(f"{source}: block scales have to be F32: {', '.join(sorted(wrong)[:10])}")
    return match


def _check_fp8(weights: WeightFolder, config: Mapping[str, Any], options: ImportOptions) -> None:
    has_fp8 = any(tensor.dtype == FP8 for tensor in weights.tensors.values())
    if has_fp8 != is_fp8(config):
        told = "quantization_config says FP8, but no tensor is" if is_fp8(config) else "its tensors are FP8, but"
        told += "" if is_fp8(config) else " quantization_config is missing"
        raise ValueError(f"{weights.folder / 'config.json'}: {told}. Take configuration and weights from one place.")
    if has_fp8 and options.fp8 == "keep" and options.dtype != "keep":
        raise ValueError(f"--dtype {options.dtype}: the source is FP8, which is kept as it is; add --fp8 dequantize")
    if has_fp8 and options.fp8 == "keep" and config.get("rope_interleave", True) is not True:
        raise ValueError(
            "--fp8 keep: with rope_interleave=false rotary rows are reordered, across the blocks that share a scale; "
            "use --fp8 dequantize"
        )


def _dtype_rule(options: ImportOptions):
    """What an entry is stored as, of the entry and its dtype in the source."""

    def dtype_of(entry: Entry, there: str) -> str:
        if entry.dtype is not None:
            return entry.dtype
        if options.dtype != "keep":
            return DTYPES[options.dtype]
        return "BF16" if there == FP8 and options.fp8 == "dequantize" else there

    return dtype_of


# ------------------------------------------------------------------------------------------------------------- shared


def ensure_file(path: Path, layout: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bool:
    """A safetensors file with room for these tensors; answers whether it had to be made."""
    try:
        there: Header | None = read_header(path)
    except (OSError, ValueError):
        there = None
    if there is not None and [(t.name, t.dtype, t.shape) for t in there.tensors] == [
        (n, d, tuple(s)) for n, d, s in layout
    ]:
        return False
    create_file(path, layout, metadata)
    return True


def plan_digest(units: Iterable[Any]) -> str:
    """Changes when anything about the units does."""
    digest = hashlib.sha256()
    for unit in units:
        digest.update(repr(unit).encode())
    return digest.hexdigest()


def output_bytes(units: Iterable[ImportUnit]) -> int:
    """What part files will take, without their heads."""
    total = 0
    for tensor in (tensor for unit in units for tensor in unit.tensors):
        elements = 1
        for size in tensor.entry.shape:
            elements *= size
        total += elements * item_size(tensor.dtype)
    return total


# ------------------------------------------------------------------------------------------------------------- ending


def _check_against_manifest(source: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """A folder that the converter wrote says what its tensors were."""
    if not (source / MANIFEST).is_file():
        return
    written = {line["name"]: line["sha256"] for line in read_manifest(source)[1] if "name" in line}
    for line in lines:
        if line["source"]["sha256"] != written.get(line["name"], line["source"]["sha256"]):
            raise ValueError(
                f"{source / line['source']['file']}: {line['name']} is not what {MANIFEST} says (sha256). Fetch the "
                f"file again; if it was changed on purpose, remove {MANIFEST}."
            )


def stored_keys(
    table: Iterable[Entry], units: Iterable[ImportUnit], results: Mapping[str, Mapping[str, Any]]
) -> list[StoredKey]:
    """Every key of the new checkpoint with its chunks."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes = {tensor.entry.key: tensor.dtype for unit in units for tensor in unit.tensors}
    for entry in table:
        lead = () if entry.expert is None else (max(entry.expert + 1, shapes.get(entry.key, (0,))[0]),)
        shapes[entry.key] = (*lead, *entry.shape)
    chunks: dict[str, list[StoredChunk]] = {key: [] for key in shapes}
    for part, result in results.items():
        for key, offsets, sizes, start, length in result["chunks"]:
            chunks[key].append(StoredChunk(tuple(offsets), tuple(sizes), part, start, length))
    return [StoredKey(key, dtypes[key], shape, tuple(chunks[key])) for key, shape in shapes.items()]


def write_side(source: Path, weights: WeightFolder, folder: Path) -> None:
    """Everything of the Hugging Face side but the weights; ``source.json`` says how those were stored."""
    shards = [
        {
            "file": name,
            "metadata": header.metadata,
            "tensors": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in header.tensors],
        }
        for name, header in weights.headers.items()
    ]
    told = {"format": 1, "shards": shards}
    files = collect_origin(source) | {"source.json": (json.dumps(told, ensure_ascii=False) + "\n").encode()}
    if (source / INDEX).is_file():
        files[INDEX] = source / INDEX
    write_origin(folder, files)


def _write_description(
    content: Path,
    model: ModelConfig,
    lines: Iterable[Mapping[str, Any]],
    options: ImportOptions,
    results: Mapping[str, Mapping[str, Any]],
) -> None:
    by_dtype: dict[str, int] = {}
    for line in (line for line in lines if "key" in line):
        size = StoredTensor(line["name"], line["dtype"], tuple(line["shape"]), "", 0).num_bytes
        by_dtype[line["dtype"]] = by_dtype.get(line["dtype"], 0) + size
    main = max(by_dtype, key=lambda dtype: by_dtype[dtype])
    has_scales = (content / ORIGIN / SCALES).exists()
    files = {part: result["file"] for part, result in results.items()}
    files |= {name: hash_file(content / name) for name in files_in(content) if name not in files}
    description = {
        "format": 1,
        "stage": "convert",
        "step": 0,
        "policy_version": 0,
        "model": asdict(model),
        "weights": {
            "dtype": TORCH_NAMES[main],
            "fp8": {"keep": "kept", "dequantize": "dequantized"}[options.fp8] if has_scales else None,
        },
        "files": files,
    }
    (content / CHECKPOINT).write_text(json.dumps(description, indent=2) + "\n")
