"""Writing a distributed checkpoint (``torch_dist``) without torch.distributed: part files, and what describes them.

The format and its sources are those of ``torch_dist.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from r1_megatron.checkpoint.files.archives import write_object, write_tensor
from r1_megatron.checkpoint.files.dtypes import TORCH_NAMES
from r1_megatron.checkpoint.files.pickles import Named, dump_named
from r1_megatron.checkpoint.files.safetensors import CALL_BYTES
from r1_megatron.checkpoint.files.torch_dist import METADATA, StoredChunk, StoredKey

_CLASSES = "torch.distributed.checkpoint.metadata"


class PartWriter:
    """One ``*.distcp`` file, chunk after chunk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed in close)
        self.num_bytes = 0

    def add(
        self, dtype: str, offsets: tuple[int, ...], sizes: tuple[int, ...], blocks: Iterable[memoryview]
    ) -> StoredChunk:
        """Append a chunk: the block of its key at ``offsets``, whose bytes come in order."""
        start = self.num_bytes
        write_tensor(self, dtype, sizes, blocks)
        return StoredChunk(offsets, sizes, self.path.name, start, self.num_bytes - start)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._file.write(view[done : done + CALL_BYTES])
        self.num_bytes += len(view)
        return len(view)

    def close(self) -> None:
        """No more chunks."""
        self._file.close()


def write_metadata(folder: str | Path, keys: Iterable[StoredKey]) -> None:
    """``.metadata``, ``metadata.json`` and an empty ``common.pt``: what makes part files a checkpoint.

    The classes of ``.metadata`` are only named: their package takes longer to import than a small model to convert.
    """

    def size(numbers: tuple[int, ...]) -> Named:
        return Named("torch", "Size", (numbers,))

    def instance(name: str, **fields: Any) -> Named:
        return Named(_CLASSES, name, state=fields)

    tensors, places = {}, {}
    strided = Named("torch.serialization", "_get_layout", ("torch.strided",))
    contiguous = Named(_CLASSES, "_MEM_FORMAT_ENCODING", (0,))
    for stored in keys:
        chunks = []
        for number, chunk in enumerate(stored.chunks):
            offsets = size(chunk.offsets)
            chunks.append(instance("ChunkStorageMetadata", offsets=offsets, sizes=size(chunk.sizes)))
            place = {"relative_path": chunk.file, "offset": chunk.start, "length": chunk.length}
            index = instance("MetadataIndex", fqn=stored.key, offset=offsets, index=number)
            places[index] = Named("torch.distributed.checkpoint.filesystem", "_StorageInfo", state=place)
        # Dtype, layout, requires_grad, memory format, pin_memory: a state of its own kind.
        dtype = Named("torch", TORCH_NAMES[stored.dtype], None)
        properties = Named(_CLASSES, "TensorProperties", state=(dtype, strided, False, contiguous, False))
        tensors[stored.key] = instance(
            "TensorStorageMetadata", properties=properties, size=size(stored.shape), chunks=chunks
        )
    metadata = instance(
        "Metadata",
        state_dict_metadata=tensors,
        planner_data=None,
        storage_data=places,
        storage_meta=None,
        version="1.0.0",
    )
    folder = Path(folder)
    with open(folder / METADATA, "wb") as file:
        dump_named(metadata, file)
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backends |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(backends))
    with open(folder / "common.pt", "wb") as file:
        write_object(file, {})
