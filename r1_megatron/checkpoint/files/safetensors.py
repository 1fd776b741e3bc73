"""Safetensors files and folders of them: read with suspicion, written in place.

A file is 8 bytes (little-endian length of the header), the header (JSON: for each tensor its dtype, shape and
``data_offsets`` within what follows), and the tensors' bytes end to end. Source: "Format" in the README of
github.com/huggingface/safetensors. A folder with several files has ``model.safetensors.index.json``, whose
``weight_map`` says which file holds which tensor.

Nothing here maps or holds a tensor: a :class:`StoredTensor` says where the bytes are, and readers take rows of it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1_megatron.checkpoint.files.dtypes import ITEM_SIZES, item_size

# Bytes of one read or write. Writes of 8 MiB took three times the processor time in the kernel (Linux 6, ext4).
CALL_BYTES = 1 << 20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are: row-major, from byte ``start`` of ``file`` on. ``dtype`` is the format's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, or of one element of a vector."""
        return math.prod(self.shape[1:]) * item_size(self.dtype)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * item_size(self.dtype)


@dataclass(frozen=True)
class Header:
    """One file's tensors in the order of their bytes, its text metadata, and where the bytes begin."""

    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]
    data_start: int


@dataclass(frozen=True)
class WeightFolder:
    """All safetensors files of a folder.

    Attributes:
        tensors: by name, over all files.
        headers: by file name, in the files' order.
        index_metadata: the index's own ``metadata``; ``None`` without an index.
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    headers: Mapping[str, Header]
    index_metadata: dict[str, Any] | None = field(default=None)


# ------------------------------------------------------------------------------------------------------------ reading


def read_header(path: str | Path) -> Header:
    """The header of one file, fully checked: whatever it says, no reader can be led outside the file.

    Raises:
        ValueError: no safetensors file, truncated, or a header that contradicts itself; the file is named.
        OSError: it cannot be read.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path}: no safetensors file, or a truncated one: {size} bytes, of which the header claims {length}. "
                "Fetch the file again."
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its safetensors header cannot be read: {error!s:.200}. Fetch it again.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its safetensors header is no JSON object. Fetch the file again.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ of its safetensors header is no map of text to text.")
    data_start = 8 + length
    tensors = sorted(
        (_checked_tensor(path, name, entry, data_start) for name, entry in header.items()),
        key=lambda tensor: (tensor.start, tensor.num_bytes),
    )
    end = data_start
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
            raise ValueError(f"{path}: {tensor.name} begins at byte {tensor.start}, not {end}: it {what}.")
        end += tensor.num_bytes
    if end != size:
        raise ValueError(
            f"{path}: {'truncated' if size < end else 'too long'}: {size} bytes, its header describes {end}. "
            "Fetch the file again."
        )
    return Header(tuple(tensors), metadata, data_start)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return result


def _checked_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    def is_sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)

    if not isinstance(entry, dict) or not is_sizes(entry.get("shape")) or not is_sizes(entry.get("data_offsets")):
        raise ValueError(
            f"{path}: {name}: shape and data_offsets have to be lists of whole numbers, got {entry!s:.200}"
        )
    dtype, shape, offsets = entry.get("dtype"), tuple(entry["shape"]), entry["data_offsets"]
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{path}: {name}: dtype {dtype!r} is not known; known are {', '.join(ITEM_SIZES)}")
    num_bytes = math.prod(shape) * item_size(dtype)
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise ValueError(f"{path}: {name}: {dtype} {list(shape)} has {num_bytes} bytes, but data_offsets are {offsets}")
    return StoredTensor(name, dtype, shape, str(path), data_start + offsets[0])


def read_folder(folder: str | Path) -> WeightFolder:
    """The tensors of a Hugging Face folder: of its index's files, or of ``model.safetensors``. No weight is read.

    Raises:
        FileNotFoundError: no such folder, or a file that the index names is missing.
        ValueError: no safetensors there, an index that points elsewhere or disagrees with the files, a bad header.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(_why_no_weights(folder))
        header = read_header(folder / SINGLE)
        return WeightFolder(folder, {tensor.name: tensor for tensor in header.tensors}, {SINGLE: header})
    weight_map, metadata = _read_index(index)
    headers = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: {INDEX} names it, but it is missing. Fetch it again.")
        headers[name] = read_header(folder / name)
    tensors = {tensor.name: tensor for header in headers.values() for tensor in header.tensors}
    problems = [
        f"{name}: not in {file}, where {INDEX} sees it"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != str(folder / file)
    ]
    for file, header in headers.items():
        problems += [
            f"{tensor.name}: in {file}, but not listed there by {INDEX}"
            for tensor in header.tensors
            if weight_map.get(tensor.name) != file
        ]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{folder}: the index and the files disagree:\n  {shown}")
    return WeightFolder(folder, tensors, headers, metadata)


def _read_index(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        index = json.loads(path.read_text("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error!s:.200}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: has no weight_map (tensor name to file name)")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or file != os.path.basename(file):
            raise ValueError(
                f"{path}: {name} lies in {file!r}; only plain names of .safetensors files in the same folder are read"
            )
    metadata = index.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: metadata is no JSON object")
    return weight_map, metadata


def _why_no_weights(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return (
            f"{folder}: has {', '.join(others[:5])} but no {INDEX}: which of them make the model is not said. Add the "
            f"index, or name a single file {SINGLE}."
        )
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder}: has no safetensors, only {', '.join(pickles[:5])}. Such files are pickles, which can run code, "
            "and are not read: load them with Transformers where you trust them, and save with save_pretrained()."
        )
    return f"{folder}: has neither {SINGLE} nor {INDEX}"


class TensorFiles:
    """Opened files, for rows of stored tensors to be read from and written to them in place."""

    def __init__(self) -> None:
        self._reading: dict[str, int] = {}
        self._writing: dict[str, int] = {}

    def read(self, tensor: StoredTensor, start: int, into: memoryview) -> None:
        """Fill ``into`` from byte ``start`` of a tensor on. Raises ValueError if the file ends before."""
        if tensor.file not in self._reading:
            self._reading[tensor.file] = os.open(tensor.file, os.O_RDONLY)
        read_exactly(self._reading[tensor.file], tensor.start + start, into, f"{tensor.file}: {tensor.name}")

    def write(self, tensor: StoredTensor, start: int, data: memoryview) -> None:
        """``data`` to byte ``start`` of a tensor whose file has room for it."""
        assert start + len(data) <= tensor.num_bytes
        if tensor.file not in self._writing:
            self._writing[tensor.file] = os.open(tensor.file, os.O_WRONLY)
        done = 0
        while done < len(data):
            part = data[done : done + CALL_BYTES]
            done += os.pwrite(self._writing[tensor.file], part, tensor.start + start + done)

    def close(self) -> None:
        """Let go of all files."""
        for descriptor in (*self._reading.values(), *self._writing.values()):
            os.close(descriptor)
        self._reading.clear()
        self._writing.clear()


def read_exactly(descriptor: int, start: int, into: memoryview, where: str) -> None:
    """Fill ``into`` from byte ``start`` of an open file. Raises ValueError, with ``where``, if the file ends before."""
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done : done + CALL_BYTES]], start + done)
        if count == 0:
            raise ValueError(f"{where}: truncated: no byte {start + done}")
        done += count


# ------------------------------------------------------------------------------------------------------------ writing


def build_header(tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The head of a file whose tensors (name, dtype, shape) lie in this order; as the safetensors library writes it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, dtype, shape in tensors:
        stop = start + math.prod(shape) * item_size(dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def plan_file(
    path: str | Path, tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
) -> Header:
    """Where the tensors of a file will be that holds these, in this order."""
    head = build_header(tensors, metadata)
    stored, start = [], len(head)
    for name, dtype, shape in tensors:
        stored.append(StoredTensor(name, dtype, tuple(shape), str(path), start))
        start += stored[-1].num_bytes
    return Header(tuple(stored), dict(metadata), len(head))


def create_file(
    path: str | Path, tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
) -> Header:
    """A file with its header and with room for its tensors, to be filled by anyone at the offsets of the answer.

    Raises:
        OSError: it cannot be written, or the disk has no room for all of it.
    """
    head, header = build_header(tensors, metadata), plan_file(path, tensors, metadata)
    size = len(head) + sum(tensor.num_bytes for tensor in header.tensors)
    with open(path, "wb") as file:
        file.write(head)
        file.flush()
        if size > len(head):
            os.posix_fallocate(file.fileno(), 0, size)
    return header


def build_index(headers: Mapping[str, Header], metadata: Mapping[str, Any] | None = None) -> str:
    """Text of the index over these files, as Transformers writes it."""
    tensors = {tensor.name: name for name, header in headers.items() for tensor in header.tensors}
    total = sum(tensor.num_bytes for header in headers.values() for tensor in header.tensors)
    index = {"metadata": metadata or {"total_size": total}, "weight_map": dict(sorted(tensors.items()))}
    return json.dumps(index, indent=2) + "\n"
