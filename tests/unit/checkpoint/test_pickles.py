"""What lies in a checkpoint as a pickle is looked through before anything unpickles it."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from r1_megatron.checkpoint.files.pickles import check_pickle, load_restricted

METADATA = Metadata(
    {
        "w": TensorStorageMetadata(
            TensorProperties(torch.bfloat16),
            torch.Size([2, 3]),
            [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))],
        )
    },
    storage_data=None,
)


def naming(module: str, name: str) -> bytes:
    """A pickle that does nothing but name ``module.name`` and call it: STACK_GLOBAL, EMPTY_TUPLE, REDUCE, STOP."""
    strings = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + strings + b"\x93)R."


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_what_torch_writes_passes(tmp_path: Path) -> None:
    path = write(tmp_path / ".metadata", pickle.dumps(METADATA))
    check_pickle(path)
    with open(path, "rb") as file:
        read = load_restricted(file)
    assert tuple(read.get("state_dict_metadata")["w"].get("size")) == (2, 3)


class Evil:
    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, open, getattr, __import__], ids=lambda f: f.__name__)
def test_functions_are_refused_and_not_called(tmp_path: Path, function: Any) -> None:
    path = write(tmp_path / ".metadata", pickle.dumps(Evil(function, f"touch {tmp_path}/called")))
    with pytest.raises(pickle.UnpicklingError, match="it names"):
        check_pickle(path)
    with pytest.raises(pickle.UnpicklingError, match="it names"):
        load_restricted(io.BytesIO(path.read_bytes()))
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    "module, name",
    [
        ("torch.distributed.checkpoint.filesystem", "os.system"),  # a way through a module that imports os
        ("torch.distributed.checkpoint.filesystem", "os"),
        ("torch.distributed.checkpoint.state_dict_loader", "load"),
        ("torch.distributed.checkpoint.metadata", "no_such_class"),
    ],
)
def test_names_inside_trusted_modules_that_are_no_classes_of_theirs(tmp_path: Path, module: str, name: str) -> None:
    path = write(tmp_path / ".metadata", naming(module, name))
    with pytest.raises(pickle.UnpicklingError, match="is no class"):
        check_pickle(path)


def test_a_cut_pickle_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(pickle.UnpicklingError):
        check_pickle(write(tmp_path / ".metadata", pickle.dumps(METADATA)[:-9]))
