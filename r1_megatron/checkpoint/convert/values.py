"""What a converter does to numbers: check, hash, cast, multiply by block scales. Rows in, rows out, no files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from r1_megatron.checkpoint.files.safetensors import StoredTensor, TensorFiles
from r1_megatron.checkpoint.fp8 import dequantize

_HASH_BYTES = 4 << 20


def all_finite(values: torch.Tensor) -> bool:
    """No NaN and no infinity in it; e4m3 included, whose NaN are 0x7f and 0xff."""
    if values.numel() == 0:
        return True
    if values.dtype == torch.float8_e4m3fn:
        return values.view(torch.int8).amax().item() != 127 and values.view(torch.uint8).amax().item() != 255
    # A sum is many times faster than a look at every element, and finite only if all of them are.
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def first_problem(values: torch.Tensor, first_row: int) -> str:
    """Where the first NaN or infinity is and how many there are, in words."""
    bad = ~torch.isfinite(values.float())
    index = bad.nonzero()[0].tolist()
    index[0] += first_row
    return f"{int(bad.sum())} of these values are NaN or infinite, the first at {index}"


def cast(values: torch.Tensor, dtype: torch.dtype, scales: torch.Tensor | None, first_row: int) -> torch.Tensor:
    """``values`` in ``dtype``, rounded once. ``scales``: of their whole matrix, if they are e4m3 codes."""
    if scales is not None:
        return dequantize(values, scales, dtype, first_row)
    return values.to(dtype)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's own bytes."""
    return tensor.view(-1).view(torch.uint8).numpy().data.cast("B")


def rows_of(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor's own bytes by row, uint8 ``[rows, bytes of a row]``."""
    return tensor.view(len(tensor), -1).view(torch.uint8).numpy()


class TensorHash:
    """sha256 of one tensor whose bytes come slice by slice, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def update(self, data: memoryview) -> None:
        self._hash.update(data)
        self.num_bytes += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Buffer:
    """Memory that is used again for every slice: fresh pages cost more than the copy into them."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def tensor(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor in this memory, valid until the next call; its storage is exactly its own elements."""
        count = 1
        for size in shape:
            count *= size
        if count * dtype.itemsize > len(self._bytes):
            self._bytes = bytearray(count * dtype.itemsize)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count).view(shape)


def hash_tensor(files: TensorFiles, tensor: StoredTensor, buffer: Buffer, progress: Callable[[int], None]) -> str:
    """sha256 of a stored tensor's bytes."""
    digest = TensorHash()
    for start in range(0, tensor.num_bytes, _HASH_BYTES):
        part = bytes_of(buffer.tensor(torch.uint8, min(_HASH_BYTES, tensor.num_bytes - start)))
        files.read(tensor, start, part)
        digest.update(part)
        progress(len(part))
    return digest.hexdigest()
