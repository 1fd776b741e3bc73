"""Checksums of a checkpoint's files: written when it is made, compared when it is read."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
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


def changed_checksum(path: str | Path, listed: Mapping[str, Any]) -> str | None:
    """The name of a file's listed checksum, if the file has another one.

    ``sha256``, or ``crc32`` (hexadecimal): a conversion's parts have sha256 for every tensor in its manifest, and the
    much faster one for the file.
    """
    if "sha256" in listed:
        return "sha256" if hash_file(path)["sha256"] != listed["sha256"] else None
    found = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            found = zlib.crc32(block, found)
    return "crc32" if f"{found:08x}" != listed["crc32"] else None


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

    Args:
        files: ``checkpoint.json``'s list.
        names: the files to look at, by default all of the list.
        contents: without it only presence and size are looked at, which takes no time.
    """
    problems = []
    for name in files if names is None else names:
        path, listed = Path(folder) / name, files[name]
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != listed["bytes"]:
            problems.append(f"{name} has {size} bytes, written were {listed['bytes']}")
        elif contents and (kind := changed_checksum(path, listed)):
            where = f" in {', '.join(bad[:3])}" if (bad := damaged_tensors(folder, name)) else ""
            more = f" and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
            problems.append(f"{name} was changed or is damaged{where}{more}: its {kind} is not the one written")
    return problems


def damaged_tensors(folder: str | Path, name: str) -> list[str]:
    """The tensors in a ``.distcp`` file whose checksum, torch.save's own for every one of them, is not theirs."""
    path = Path(folder) / name
    bad = set()
    try:
        stored = read_metadata(folder).values() if path.suffix == ".distcp" else ()
    except (ValueError, OSError):
        return []  # the index is damaged as well
    for tensor in stored:
        for chunk in tensor.chunks:
            if Path(chunk.file).name == name and not _is_whole(path, chunk.start, chunk.length):
                bad.add(tensor.key)
    return sorted(bad)


def _is_whole(path: Path, start: int, length: int) -> bool:
    with open(path, "rb") as file:
        file.seek(start)
        try:
            return zipfile.ZipFile(io.BytesIO(file.read(length))).testzip() is None
        except zipfile.BadZipFile:
            return False


def flush(path: str | Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
