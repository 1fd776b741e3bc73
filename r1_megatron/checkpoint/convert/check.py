"""Hashing what is there: whole files, and tensors of safetensors files."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from r1_megatron.checkpoint.convert.values import Buffer, hash_tensor
from r1_megatron.checkpoint.files.safetensors import StoredTensor, TensorFiles
from r1_megatron.checkpoint.integrity import hash_file


@dataclass(frozen=True)
class CheckUnit:
    """Files, by absolute path, and tensors to hash."""

    files: tuple[str, ...] = ()
    tensors: tuple[StoredTensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return sum(os.path.getsize(file) for file in self.files) + sum(tensor.num_bytes for tensor in self.tensors)


def group_checks(files: list[str], tensors: list[StoredTensor], unit_bytes: int = 256 << 20) -> list[CheckUnit]:
    """Units of about ``unit_bytes``; a file is one piece of work."""
    units = [CheckUnit(files=(file,)) for file in files]
    group: list[StoredTensor] = []
    for tensor in tensors:
        group.append(tensor)
        if sum(each.num_bytes for each in group) >= unit_bytes:
            units.append(CheckUnit(tensors=tuple(group)))
            group = []
    return units + ([CheckUnit(tensors=tuple(group))] if group else [])


class CheckWorker:
    """Does units, one after the other."""

    def __init__(self, progress: Callable[[int], None]) -> None:
        self._progress = progress
        self._buffer = Buffer()

    def run(self, unit: CheckUnit) -> dict[str, Any]:
        """``{"files": {path: sha256}, "tensors": {name: sha256}}``."""
        open_files = TensorFiles()
        try:
            tensors = {t.name: hash_tensor(open_files, t, self._buffer, self._progress) for t in unit.tensors}
        finally:
            open_files.close()
        files = {}
        for file in unit.files:
            hashed = hash_file(file)
            files[file] = hashed["sha256"]
            self._progress(hashed["bytes"])
        return {"files": files, "tensors": tensors}
