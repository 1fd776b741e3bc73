"""A distributed checkpoint read by PyTorch alone, for comparisons."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def tensors_of(folder: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor by its key, whole. The files are trusted: a test has written them."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process: that is what is wanted
        load(state, checkpoint_id=str(folder))
    return state
