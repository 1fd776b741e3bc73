"""Files of a distributed checkpoint (``torch_dist``), one range of rows at a time, without torch.distributed.

``.metadata`` lists every tensor's chunks and where each lies: a byte range of a ``*.distcp`` file that holds one
torch.save archive. torch.save archives are uncompressed zip files, so a chunk's rows can be read in place, and each
record's CRC-32, which torch writes but does not check, tells damage.

Sources: torch/distributed/checkpoint/metadata.py and filesystem.py (torch 2.13); megatron-core 0.16.1's
dist_checkpointing/core.py and strategies/torch.py.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from r1_megatron.checkpoint.files.archives import STORAGE_CLASSES
from r1_megatron.checkpoint.files.dtypes import item_size
from r1_megatron.checkpoint.files.pickles import Record, load_restricted
from r1_megatron.checkpoint.files.safetensors import read_exactly

METADATA = ".metadata"
_READ_AGAIN_BYTES = 4 << 20


@dataclass(frozen=True)
class StoredChunk:
    """A block of a tensor, and the byte range of the file that holds its torch.save archive."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class StoredKey:
    """One tensor of a checkpoint under its key; the chunks cover it exactly once. ``dtype`` is safetensors' name."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


# ------------------------------------------------------------------------------------------------------------ reading


def read_metadata(folder: str | Path) -> dict[str, StoredKey]:
    """Every tensor of a checkpoint by key. No weight is read.

    Raises:
        FileNotFoundError: no such checkpoint, or a file of it is missing.
        ValueError: ``.metadata`` is damaged, or a file is shorter than it says; the file is named.
    """
    folder = Path(folder)
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no distributed checkpoint, it has no {METADATA} file")
    try:
        with open(path, "rb") as file:
            metadata = load_restricted(file)
        places = {
            (index.get("fqn"), tuple(index.get("offset"))): info
            for index, info in metadata.get("storage_data").items()
            if index.get("offset") is not None
        }
        keys = {
            key: _stored_key(folder, key, tensor, places)
            for key, tensor in metadata.get("state_dict_metadata").items()
            if type(tensor).__name__ == "TensorStorageMetadata"
        }
    except (pickle.UnpicklingError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: damaged or written by another program: {error!s:.300}") from error
    _check_sizes(folder, keys)
    return keys


def _stored_key(folder: Path, key: str, tensor: Record, places: Mapping[tuple, Record]) -> StoredKey:
    shape, dtype = tuple(tensor.get("size")), tensor.get("properties").state[0]
    chunks = []
    for chunk in tensor.get("chunks"):
        offsets, sizes = tuple(chunk.get("offsets")), tuple(chunk.get("sizes"))
        info = places[(key, offsets)]
        name = info.get("relative_path")
        if name != os.path.basename(name) or info.get("transform_descriptors"):
            raise ValueError(f"{folder / METADATA}: {key} lies in {name!r}; only plain files of the folder are read")
        if len(sizes) != len(shape) or any(o < 0 or o + n > s for o, n, s in zip(offsets, sizes, shape)):
            raise ValueError(f"{folder / METADATA}: {key}: a chunk of {sizes} at {offsets} is outside of {shape}")
        chunks.append(StoredChunk(offsets, sizes, str(folder / name), info.get("offset"), info.get("length")))
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(shape) or len({chunk.offsets for chunk in chunks}) != len(chunks):
        raise ValueError(f"{folder / METADATA}: the chunks of {key} have {covered} elements, not those of {shape}")
    return StoredKey(key, dtype, shape, tuple(chunks))


def _check_sizes(folder: Path, keys: Mapping[str, StoredKey]) -> None:
    ends: dict[str, int] = {}
    for stored in keys.values():
        for chunk in stored.chunks:
            if chunk.start < 0 or chunk.length <= 0:
                raise ValueError(
                    f"{folder / METADATA}: {stored.key}: bytes {chunk.start} + {chunk.length} are no range"
                )
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
    for file, end in ends.items():
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: {METADATA} names it, but it is missing")
        if (size := os.path.getsize(file)) < end:
            raise ValueError(f"{file}: truncated: {size} bytes, {METADATA} knows of {end}")


@dataclass
class _Record:
    """The tensor's bytes within a chunk's archive, and how much of them was read front to back, with its CRC."""

    start: int
    num_bytes: int
    crc: int
    position: int = 0
    running_crc: int = 0


class RowReader:
    """Reads rows of stored tensors into a caller's memory; ``close`` checks the CRC-32 of every chunk it began.

    A chunk that was read front to back is checked on the way. Any other is read once more, by the reader that read
    its first byte.
    """

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._records: dict[tuple[str, int], tuple[str, _Record]] = {}

    def read(self, stored: StoredKey, expert: int | None, first: int, out: np.ndarray, check: bool = True) -> None:
        """Rows ``first ...`` of a tensor into ``out``, uint8 ``[rows, bytes of a row]``.

        Args:
            expert: place on the leading axis, if the key stacks experts.
            check: by CRC-32; not needed where the caller compares the tensor's sha256.

        Raises:
            ValueError: damaged; the file and the key are named.
        """
        item = item_size(stored.dtype)
        filled = 0
        for chunk in stored.chunks:
            lead, skipped = 0, 0 if expert is None else 1
            if expert is not None:
                lead = expert - chunk.offsets[0]
                if not 0 <= lead < chunk.sizes[0]:
                    continue
            offsets, sizes = list(chunk.offsets)[skipped:], list(chunk.sizes)[skipped:]
            low, high = max(first, offsets[0]), min(first + len(out), offsets[0] + sizes[0])
            if low >= high:
                continue
            # Beyond two axes, only a whole tensor is ever cut along the rows.
            column, width = (offsets[1], sizes[1]) if len(sizes) > 1 else (0, 1)
            start = (lead * sizes[0] + low - offsets[0]) * width * item
            target = out[low - first : high - first]
            if width * item == target.shape[1]:
                self._read_bytes(stored, chunk, start, target.data.cast("B"), check)
            else:
                part = np.empty((high - low, width * item), np.uint8)
                self._read_bytes(stored, chunk, start, part.data.cast("B"), check)
                target[:, column * item : (column + width) * item] = part
            filled += (high - low) * width
        if filled * item != out.size:
            raise ValueError(f"{stored.key}: the checkpoint lacks a part of rows {first} to {first + len(out)}")

    def _read_bytes(self, stored: StoredKey, chunk: StoredChunk, start: int, into: memoryview, check: bool) -> None:
        name = (chunk.file, chunk.start)
        if name not in self._records:
            self._records[name] = (stored.key, self._locate(stored, chunk))
        record = self._records[name][1]
        self._pread(chunk.file, record.start + start, into, stored.key)
        if check and start == record.position:
            record.running_crc = crc32(into, record.running_crc)
            record.position += len(into)

    def _pread(self, file: str, start: int, into: memoryview, key: str) -> None:
        if file not in self._files:
            self._files[file] = os.open(file, os.O_RDONLY)
        read_exactly(self._files[file], start, into, f"{file}: {key}")

    def _locate(self, stored: StoredKey, chunk: StoredChunk) -> _Record:
        """The tensor's bytes inside a chunk's archive; nothing but the archive's small records is read."""
        where = f"{chunk.file}: {stored.key} at byte {chunk.start}"
        try:
            with open(chunk.file, "rb", buffering=0) as file:
                archive = zipfile.ZipFile(io.BufferedReader(_Range(file, chunk.start, chunk.length), 4096))
                (head,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                tensor = load_restricted(io.BytesIO(archive.read(head)))
                storage, first, sizes, strides = tensor.args[:4]
                _, kind, number, _, _ = storage
                info = archive.getinfo(head.replace("data.pkl", f"data/{number}"))
                file.seek(chunk.start + info.header_offset)
                local = file.read(30)
        except OSError:
            raise
        except Exception as error:  # a damaged archive fails in any way
            raise ValueError(f"{where}: damaged: {error!s:.200}") from error
        num_bytes = math.prod(chunk.sizes) * item_size(stored.dtype)
        if tuple(sizes) != chunk.sizes or first != 0 or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{where}: damaged: holds {tuple(sizes)}, {METADATA} says {chunk.sizes}")
        row_major = [math.prod(chunk.sizes[axis + 1 :]) for axis in range(len(chunk.sizes))]
        if any(size > 1 and there != here for size, there, here in zip(chunk.sizes, strides, row_major)):
            raise ValueError(f"{where}: strides {tuple(strides)} are not row-major; save contiguous tensors")
        if _storage_dtype(kind.__name__, tensor.args) != stored.dtype or info.file_size != num_bytes:
            raise ValueError(f"{where}: damaged: {info.file_size} bytes of {kind.__name__}, not {stored.dtype}")
        name_length, extra_length = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
        start = chunk.start + info.header_offset + 30 + name_length + extra_length
        if local[:4] != b"PK\x03\x04" or start + num_bytes > chunk.start + chunk.length:
            raise ValueError(f"{where}: damaged: its record of {num_bytes} bytes does not fit")
        return _Record(start, num_bytes, info.CRC)

    def close(self) -> None:
        """Check every chunk whose first byte was read, and let go of the files.

        Raises:
            ValueError: damaged; the file and the key are named.
        """
        try:
            for (file, _), (key, record) in self._records.items():
                self._check(file, key, record)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of the files without a check."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()
        self._records.clear()

    def _check(self, file: str, key: str, record: _Record) -> None:
        if record.position == 0:
            return
        buffer = memoryview(bytearray(min(_READ_AGAIN_BYTES, max(1, record.num_bytes - record.position))))
        while record.position < record.num_bytes:
            part = buffer[: record.num_bytes - record.position]
            self._pread(file, record.start + record.position, part, key)
            record.running_crc = crc32(part, record.running_crc)
            record.position += len(part)
        if record.running_crc != record.crc:
            raise ValueError(
                f"{file}: {key}: damaged: CRC-32 of its bytes is {record.running_crc:08x}, {record.crc:08x} was "
                "written. Fetch the file again, or take an earlier checkpoint."
            )


def _storage_dtype(kind: str, args: tuple) -> str | None:
    if kind == "UntypedStorage":  # newer dtypes are told beside the storage
        return next((arg for arg in args[4:] if isinstance(arg, str)), None)
    return next((dtype for dtype, name in STORAGE_CLASSES.items() if name == kind), None)


class _Range(io.RawIOBase):
    """A byte range of a file, as a file."""

    def __init__(self, file: io.FileIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("before the first byte")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._file.fileno(), [view], self._start + self._at) if len(view) else 0
        self._at += count
        return count
