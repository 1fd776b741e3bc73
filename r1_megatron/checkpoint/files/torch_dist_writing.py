"""Writing a distributed checkpoint (``torch_dist``) without torch.distributed: part files, and what describes them.

The format and its sources are those of ``torch_dist.py``.
"""

from __future__ import annotations

import importlib
import json
import pickle
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch

from r1_megatron.checkpoint.files.safetensors import CALL_BYTES
from r1_megatron.checkpoint.files.torch_dist import METADATA, StoredChunk, StoredKey


class PartWriter:
    """One ``*.distcp`` file, chunk after chunk, with its CRC-32 taken on the way."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed in close)
        self._crc = 0
        self.num_bytes = 0

    def add(self, key: str, offsets: tuple[int, ...], tensor: torch.Tensor) -> StoredChunk:
        """Append a chunk: ``tensor`` is the block of ``key`` at ``offsets``, and has its storage to itself."""
        start = self.num_bytes
        torch.save(tensor, self)
        return StoredChunk(offsets, tuple(tensor.shape), self.path.name, start, self.num_bytes - start)

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        self._crc = zlib.crc32(view, self._crc)
        done = 0
        while done < len(view):
            done += self._file.write(view[done : done + CALL_BYTES])
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """For torch.save; nothing is held back."""

    def close(self) -> tuple[int, str]:
        """Answers the file's bytes and CRC-32 (hexadecimal)."""
        self._file.close()
        return self.num_bytes, f"{self._crc:08x}"

    def abandon(self) -> None:
        """Let go of the file as it is."""
        self._file.close()


def import_metadata_classes() -> None:
    """Half a second of imports that :func:`write_metadata` needs; for whoever has time before."""
    importlib.import_module("torch.distributed.checkpoint.filesystem")


def write_metadata(folder: str | Path, keys: Iterable[StoredKey]) -> None:
    """``.metadata``, ``metadata.json`` and an empty ``common.pt``: what makes part files a checkpoint."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors, places = {}, {}
    for stored in keys:
        chunks = []
        for number, chunk in enumerate(stored.chunks):
            chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
            index = MetadataIndex(stored.key, torch.Size(chunk.offsets), number)
            places[index] = _StorageInfo(chunk.file, chunk.start, chunk.length)
        tensors[stored.key] = TensorStorageMetadata(
            TensorProperties(dtype=stored.dtype), torch.Size(stored.shape), chunks
        )
    folder = Path(folder)
    with open(folder / METADATA, "wb") as file:
        pickle.dump(Metadata(tensors, storage_data=places, version="1.0.0"), file)
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))
    torch.save({}, folder / "common.pt")
