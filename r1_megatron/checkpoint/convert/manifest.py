"""The audit manifest of a converted folder, and the check of a folder against it.

``manifest.jsonl`` is JSON, a line each. The first says what was converted, how, and the format. Every other is

* a tensor: ``name``, ``shape`` and ``dtype`` (safetensors' names) in Hugging Face's terms; ``sha256``: of the tensor's
  bytes, row-major little-endian in Hugging Face's row order, in that dtype, as this folder holds it; ``file``: where
  that is; ``source``: the file or files it came from, their dtype and, where it was converted from Hugging Face, the
  ``sha256`` of the bytes there. In a distributed checkpoint ``key`` and ``expert`` say what it became.
* in a Hugging Face folder also a file: ``file`` and ``bytes`` with the ``sha256`` of all of it, or of a safetensors
  file the ``header_sha256`` of what precedes its tensors (those have lines of their own).

The other files of a distributed checkpoint have their sha256 in ``checkpoint.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1_megatron.checkpoint.convert.check import CheckUnit, group_checks
from r1_megatron.checkpoint.convert.exporting import ExportTensor, ExportUnit, group_units, pieces_by_name
from r1_megatron.checkpoint.convert.work import Resources, do_checks
from r1_megatron.checkpoint.files.safetensors import StoredTensor, read_folder, read_header
from r1_megatron.checkpoint.files.torch_dist import read_metadata
from r1_megatron.checkpoint.hugging_face.origin import ORIGIN, SCALES, read_config
from r1_megatron.checkpoint.integrity import file_problems, files_in, hash_file
from r1_megatron.checkpoint.naming import entries, fused_expert_name
from r1_megatron.config.schema import ModelConfig
from r1_megatron.telemetry.run_folder import CHECKPOINT

MANIFEST = "manifest.jsonl"


def write_manifest(folder: Path, head: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    """``manifest.jsonl`` of a folder that is not final yet."""
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        for line in [{"format": 1, **head}, *lines]:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line, and all others.

    Raises:
        FileNotFoundError: no manifest there. ValueError: damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}: it was not written by r1-megatron convert")
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        head = lines[0]
        if not all(isinstance(line, dict) for line in lines) or head.get("format") != 1:
            raise ValueError("no manifest of format 1")
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: damaged: {error!s:.200}") from error
    return head, lines[1:]


def file_lines(folder: Path) -> list[dict[str, Any]]:
    """Manifest lines of all files of a Hugging Face folder."""
    lines = []
    for name in files_in(folder):
        if name == MANIFEST:
            continue
        path = folder / name
        if path.suffix == ".safetensors":
            lines.append({"file": name, "bytes": path.stat().st_size, "header_sha256": _hash_header(path)})
        else:
            lines.append({"file": name, **hash_file(path)})
    return lines


def _hash_header(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(read_header(path).data_start)).hexdigest()


# ---------------------------------------------------------------------------------------------------------- verifying


@dataclass
class Verification:
    """What a check found. ``problems`` name the file and, where it can be told, the tensor."""

    folder: Path
    num_files: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises ValueError that names everything that differs."""
        if self.problems:
            shown = [*self.problems[:40], *(["..."] if len(self.problems) > 40 else [])]
            raise ValueError(f"{self.folder} is not what was written:\n  " + "\n  ".join(shown))

    def text(self) -> str:
        """One line for the user."""
        return (
            f"{self.folder}: {self.num_tensors} tensors ({self.num_bytes / 1e9:.2f} GB) and {self.num_files} files are "
            "what was written"
        )


def verify(folder: str | Path, resources: Resources | None = None) -> Verification:
    """Read a checkpoint or a Hugging Face folder again and compare it with its hashes.

    A checkpoint that training wrote has no manifest; its files are compared with ``checkpoint.json``.

    Raises:
        FileNotFoundError: nothing there to compare. ValueError: its description is damaged.
    """
    folder, resources = Path(folder), resources or Resources()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / CHECKPOINT).is_file():
        return _verify_checkpoint(folder, resources)
    return _verify_hugging_face(folder, resources)


def _verify_hugging_face(folder: Path, resources: Resources) -> Verification:
    _, lines = read_manifest(folder)
    found = Verification(folder)
    tensors = {line["name"]: line for line in lines if "name" in line}
    files = {line["file"]: line for line in lines if "name" not in line}
    weights = [name for name in files if "header_sha256" in files[name]]
    found.num_files = len(files)
    found.problems += file_problems(folder, files, [name for name in files if name not in weights])
    found.problems += file_problems(folder, files, weights, contents=False)
    if found.problems:
        return found
    changed = [name for name in weights if _hash_header(folder / name) != files[name]["header_sha256"]]
    if changed:
        found.problems += [f"{name}: its header was changed" for name in changed]
        return found
    stored = read_folder(folder).tensors
    _compare(found, tensors, _hashes(group_checks([], [stored[name] for name in tensors]), resources, len(tensors)))
    return found


def _verify_checkpoint(folder: Path, resources: Resources) -> Verification:
    found = Verification(folder)
    description = read_description(folder)
    files = description.get("files") or {}
    found.num_files = len(files)
    found.problems += file_problems(folder, files, contents=False)
    if found.problems:
        return found
    hashed = [str(folder / name) for name in files if "sha256" in files[name]]
    for result in do_checks([*group_checks(hashed, [])], resources, len(files), "checking files"):
        for path, sha256 in result["files"].items():
            name = os.path.relpath(path, folder)
            if sha256 != files[name]["sha256"]:
                found.problems.append(f"{name}: its bytes differ (sha256)")
    if found.problems:
        return found
    if not (folder / MANIFEST).is_file():
        found.problems += file_problems(folder, files, [name for name in files if "sha256" not in files[name]])
        return found
    _, lines = read_manifest(folder)
    tensors = {line["name"]: line for line in lines}
    try:
        hashes = _hashes(_checkpoint_units(folder, description, tensors), resources, len(tensors))
    except ValueError as error:  # damaged beyond being read
        found.problems.append(str(error))
        return found
    _compare(found, tensors, hashes)
    return found


def _checkpoint_units(
    folder: Path, description: Mapping[str, Any], tensors: Mapping[str, Any]
) -> list[CheckUnit | ExportUnit]:
    """Every tensor of the manifest, to be put together again and hashed."""
    table = entries(model_of(description, folder), rope_interleave=rope_interleave(folder))
    pieces = pieces_by_name(table, read_metadata(folder))
    scales = {tensor.name: tensor for tensor in scale_tensors(folder).values()}
    fused: dict[str, list[str]] = {}
    for name in pieces:
        if known := fused_expert_name(name):
            fused.setdefault(known[0], []).append(name)
    exported, plain = [], []
    for name, line in tensors.items():
        if name in scales:
            plain.append(scales[name])
            continue
        parts = tuple(pieces[part] for part in ([name] if name in pieces else fused[name]))
        exported.append(ExportTensor(name, parts[0][0].stored.dtype, tuple(line["shape"]), parts))
    return [*group_units(exported), *group_checks([], plain)]


def _hashes(units: Iterable[CheckUnit | ExportUnit], resources: Resources, num_tensors: int) -> dict[str, tuple]:
    """sha256 and dtype (where it is known) of every tensor of these units."""
    found: dict[str, tuple] = {}
    for result in do_checks(list(units), resources, num_tensors, "checking tensors"):
        if isinstance(result["tensors"], dict):
            found |= {name: (sha256, None) for name, sha256 in result["tensors"].items()}
        else:
            found |= {line["name"]: (line["sha256"], line["dtype"]) for line in result["tensors"]}
    return found


def _compare(found: Verification, tensors: Mapping[str, Any], hashes: Mapping[str, tuple]) -> None:
    for name, line in tensors.items():
        sha256, dtype = hashes.get(name, (None, None))
        found.num_tensors += 1
        found.num_bytes += _num_bytes(line)
        if sha256 != line["sha256"] or (dtype is not None and dtype != line["dtype"]):
            found.problems.append(f"{line['file']}: {name}: its bytes differ (sha256)")


def _num_bytes(line: Mapping[str, Any]) -> int:
    return StoredTensor(line["name"], line["dtype"], tuple(line["shape"]), "", 0).num_bytes


# ------------------------------------------------------------------------------------------- what a checkpoint says


def read_description(folder: Path) -> dict[str, Any]:
    """``checkpoint.json`` of a whole checkpoint.

    Raises:
        FileNotFoundError: none there. ValueError: damaged.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        partial = folder.with_name(folder.name + ".partial")
        why = f"{partial.name} was never finished" if partial.exists() else f"it has no {CHECKPOINT}"
        raise FileNotFoundError(f"{folder} is no whole checkpoint: {why}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged: {error!s:.200}") from error
    if not isinstance(description, dict) or not isinstance(description.get("model"), dict):
        raise ValueError(f"{path}: damaged: it describes no model")
    return description


def model_of(description: Mapping[str, Any], folder: Path) -> ModelConfig:
    """The model of a checkpoint. Raises ValueError on fields that this version does not know."""
    try:
        return ModelConfig(**description["model"])
    except TypeError as error:
        raise ValueError(f"{folder / CHECKPOINT}: model: {error}") from error


def rope_interleave(folder: Path) -> bool:
    """How the Hugging Face side of this checkpoint orders its rotary rows; pairs where nothing is said."""
    origin = folder / ORIGIN
    return not (origin / "config.json").is_file() or read_config(origin).get("rope_interleave", True) is True


def scale_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The block scales of the FP8 source that a checkpoint came from, by the weights' names; often none."""
    path = folder / ORIGIN / SCALES
    if not path.is_file():
        return {}
    return {tensor.name.removesuffix("_scale_inv"): tensor for tensor in read_header(path).tensors}
