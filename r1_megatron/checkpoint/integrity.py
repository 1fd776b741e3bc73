"""Checksums of a checkpoint's files: written when it is made, compared when it is read."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from r1_megatron.checkpoint.files.torch_dist import read_metadata

_BLOCK = 1 << 22


def hash_file(path: str | Path) -> dict[str, Any]:
    """``{"bytes": size, "sha256": hexadecimal digest}``, as ``checkpoint.json`` lists a file."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def files_in(folder: str | Path) -> Iterator[str]:
    """All files of a folder and the folders in it, by their relative POSIX path, sorted."""
    folder = Path(folder)
    yield from sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def file_problems(
    folder: str | Path,
    files: Mapping[str, Mapping[str, Any]],
    names: Iterable[str] | None = None,
    contents: bool = True,
) -> list[str]:
    """What is wrong with the files of a checkpoint, one sentence each; empty: nothing.

    A part of a conversion is listed without a checksum: it consists of archives that each have their own, and every
    tensor's sha256 is in the manifest.

    Args:
        files: ``checkpoint.json``'s list.
        names: the files to look at, by default all of the list.
        contents: without it only presence and size are looked at, which takes no time.
    """
    problems, parts = [], []
    for name in files if names is None else names:
        path, listed = Path(folder) / name, files[name]
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != listed["bytes"]:
            problems.append(f"{name} has {size} bytes, written were {listed['bytes']}")
        elif contents and "sha256" not in listed:
            parts.append(name)
        elif contents and hash_file(path)["sha256"] != listed["sha256"]:
            where = _in_tensors(damaged_tensors(folder, [name]).get(name, []))
            problems.append(f"{name} was changed or is damaged{where}: its sha256 is not the one written")
    for name, damaged in damaged_tensors(folder, parts).items():
        problems.append(f"{name} was changed or is damaged{_in_tensors(damaged)}: its crc32 is not the one written")
    return problems


def _in_tensors(damaged: list[str]) -> str:
    if not damaged:
        return ""
    more = f" and {len(damaged) - 3} more tensors" if len(damaged) > 3 else ""
    return f" in {', '.join(damaged[:3])}{more}"


def damaged_tensors(folder: str | Path, names: Iterable[str]) -> dict[str, list[str]]:
    """Of these files the damaged ``*.distcp``, with the tensors whose checksum, torch.save's own, is not theirs."""
    wanted, found = set(names), {}
    if not any(name.endswith(".distcp") for name in wanted):
        return {}
    try:
        stored = read_metadata(folder).values()
    except (ValueError, OSError):
        return {}  # the index is damaged as well, and has a sha256 of its own
    for tensor in stored:
        for chunk in tensor.chunks:
            name = Path(chunk.file).name
            if name in wanted and not is_whole(chunk.file, chunk.start, chunk.length):
                found.setdefault(name, set()).add(tensor.key)
    return {name: sorted(keys) for name, keys in found.items()}


def is_whole(path: str | Path, start: int, length: int) -> bool:
    """Whether a torch.save archive, these bytes of a file, has in all its parts the CRC-32 that was written."""
    with open(path, "rb") as file:
        file.seek(start)
        archive = file.read(length)
    try:
        return zipfile.ZipFile(io.BytesIO(archive)).testzip() is None
    except Exception:  # a damaged archive fails in any way
        return False


def flush(path: str | Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
