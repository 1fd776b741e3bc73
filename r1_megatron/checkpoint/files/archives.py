"""torch.save archives, written without torch: the bytes of a tensor come in blocks and pass through.

An archive is an uncompressed zip file: ``data.pkl`` (the tensor's shape, strides and storage), ``data/0`` (its
elements, at a multiple of 64 bytes), ``byteorder`` and two version numbers; every record has its CRC-32.
``torch.load`` reads it with and without ``weights_only``. Sources: ``torch/serialization.py`` (torch 2.13); PKWARE's
APPNOTE.TXT 6.3.10, sections 4.3.7 to 4.3.16 and 4.4.

Python's own zip files would do, but for their CRC-32: zlib's is nine times slower than zlib-ng's.
"""

from __future__ import annotations

import io
import math
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from zlib_ng.zlib_ng import crc32

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
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_DESCRIPTOR = struct.Struct("<4s3L")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_VERSION, _CRC_FOLLOWS, _STORED, _TIME, _DATE = 20, 1 << 3, 0, 0, 0x21  # the first day that zip files know
_LARGEST = (1 << 32) - 1
_FILLER = b"FB"  # torch's own mark of the filler before a record


class Sink(Protocol):
    """What an archive is written to, front to back."""

    def write(self, data: Any, /) -> int: ...


def write_tensor(sink: Sink, dtype: str, shape: Sequence[int], blocks: Iterable[memoryview]) -> None:
    """The archive of one contiguous tensor of less than 4 GiB, whose bytes ``blocks`` yields in order."""
    num_bytes = math.prod(shape) * item_size(dtype)
    archive = _Archive(sink, _tensor_head(dtype, shape))
    written = archive.record("data/0", blocks, num_bytes)
    assert written == num_bytes, f"{written} bytes for {dtype} {tuple(shape)}"
    archive.close()


def write_object(sink: Sink, value: Any) -> None:
    """The archive of plain data: dictionaries, lists, numbers, text."""
    _Archive(sink, value).close()


class _Archive:
    """A zip file of stored records, written front to back: a record's CRC-32 follows its bytes."""

    def __init__(self, sink: Sink, head: Any) -> None:
        self._sink, self._position, self._directory = sink, 0, b""
        self._num_records = 0
        pickled = io.BytesIO()
        dump_named(head, pickled)
        self._small("data.pkl", pickled.getvalue())
        self._small(".format_version", b"1")
        self._small(".storage_alignment", str(ALIGNMENT).encode())
        self._small("byteorder", b"little")

    def record(self, name: str, blocks: Iterable[memoryview], num_bytes: int) -> int:
        """One record, its bytes aligned; answers how many there were."""
        assert num_bytes <= _LARGEST, f"{num_bytes} bytes are too many for one chunk"
        path, start = f"archive/{name}".encode(), self._position
        filler = -(start + _LOCAL_HEADER.size + len(path) + 4) % ALIGNMENT
        extra = _FILLER + filler.to_bytes(2, "little") + b"Z" * filler
        times = (_VERSION, _CRC_FOLLOWS, _STORED, _TIME, _DATE)
        self._write(_LOCAL_HEADER.pack(b"PK\3\4", *times, 0, 0, 0, len(path), len(extra)) + path + extra)
        crc, first = 0, self._position
        for block in blocks:
            crc = crc32(block, crc)
            self._write(block)
        size = self._position - first
        self._write(_DESCRIPTOR.pack(b"PK\7\10", crc, size, size))
        self._directory += _ENTRY.pack(b"PK\1\2", _VERSION, *times, crc, size, size, len(path), 0, 0, 0, 0, 0, start)
        self._directory += path
        self._num_records += 1
        return size

    def close(self) -> None:
        """The end, which says where everything is."""
        self._small("version", b"3\n")
        count, size, start = self._num_records, len(self._directory), self._position
        self._write(self._directory + _END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0))

    def _small(self, name: str, data: bytes) -> None:
        self.record(name, [memoryview(data)], len(data))

    def _write(self, data: bytes | memoryview) -> None:
        self._sink.write(data)
        self._position += len(data)


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
