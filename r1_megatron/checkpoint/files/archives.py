"""torch.save archives, written without torch: the bytes of a tensor come in blocks and pass through.

An archive is an uncompressed zip file: ``data.pkl`` (the tensor's shape, strides and storage), ``data/0`` (its
elements, at a multiple of 64 bytes), ``byteorder`` and two version numbers; every record has its CRC-32.
``torch.load`` reads it with and without ``weights_only``. Source: ``torch/serialization.py`` (torch 2.13).
"""

from __future__ import annotations

import io
import math
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from r1_megatron.checkpoint.files.dtypes import TORCH_NAMES, item_size
from r1_megatron.checkpoint.files.pickles import Named, PersistentId, dump_named

ALIGNMENT = 64
# Dtypes that torch.save names by a storage class; it writes every other beside an untyped storage.
STORAGE_CLASSES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "C64": "ComplexFloatStorage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}
_ROOT = "archive"
_LOCAL_HEADER_BYTES = 30
_ZIP64_BYTES = 20
_FILLER = b"FB"  # torch's own mark of the filler before a record


class Sink(Protocol):
    """What an archive is written to, front to back."""

    def write(self, data: Any, /) -> int: ...

    def flush(self) -> None: ...


def write_tensor(sink: Sink, dtype: str, shape: Sequence[int], blocks: Iterable[memoryview]) -> None:
    """The archive of one contiguous tensor, whose bytes ``blocks`` yields in order."""
    num_bytes = math.prod(shape) * item_size(dtype)
    with zipfile.ZipFile(_WriteOnly(sink), "w", zipfile.ZIP_STORED) as archive:
        _write_head(archive, _tensor_head(dtype, shape))
        record = zipfile.ZipInfo(f"{_ROOT}/data/0")
        record.file_size = num_bytes
        is_large = num_bytes * 1.05 > zipfile.ZIP64_LIMIT
        start = archive.start_dir + _LOCAL_HEADER_BYTES + len(record.filename) + is_large * _ZIP64_BYTES
        filler = -(start + 4) % ALIGNMENT
        record.extra = _FILLER + filler.to_bytes(2, "little") + b"Z" * filler
        with archive.open(record, "w") as file:
            written = sum(file.write(block) for block in blocks)
        assert written == num_bytes, f"{written} bytes for {dtype} {tuple(shape)}"
        _write_version(archive)


def write_object(sink: Sink, value: Any) -> None:
    """The archive of plain data: dictionaries, lists, numbers, text."""
    with zipfile.ZipFile(_WriteOnly(sink), "w", zipfile.ZIP_STORED) as archive:
        _write_head(archive, value)
        _write_version(archive)


def _write_head(archive: zipfile.ZipFile, value: Any) -> None:
    head = io.BytesIO()
    dump_named(value, head)
    archive.writestr(zipfile.ZipInfo(f"{_ROOT}/data.pkl"), head.getvalue())
    archive.writestr(zipfile.ZipInfo(f"{_ROOT}/.format_version"), b"1")
    archive.writestr(zipfile.ZipInfo(f"{_ROOT}/.storage_alignment"), str(ALIGNMENT).encode())
    archive.writestr(zipfile.ZipInfo(f"{_ROOT}/byteorder"), b"little")


def _write_version(archive: zipfile.ZipFile) -> None:
    archive.writestr(zipfile.ZipInfo(f"{_ROOT}/version"), b"3\n")


def _tensor_head(dtype: str, shape: Sequence[int]) -> Named:
    """What ``data.pkl`` says: the call that rebuilds the tensor over storage ``0``."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    typed = STORAGE_CLASSES.get(dtype)
    storage = Named("torch", typed, None) if typed else Named("torch.storage", "UntypedStorage", None)
    count = math.prod(shape) * (1 if typed else item_size(dtype))
    place = PersistentId(("storage", storage, "0", "cpu", count))
    arguments = (place, 0, tuple(shape), strides, False, OrderedDict())
    if typed:
        return Named("torch._utils", "_rebuild_tensor_v2", arguments)
    return Named("torch._utils", "_rebuild_tensor_v3", (*arguments, Named("torch", TORCH_NAMES[dtype], None)))


class _WriteOnly:
    """A sink without a position of its own: an archive counts from where it begins, and leaves the sink open."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, data: Any, /) -> int:
        return self._sink.write(data)

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        pass
