"""Whatever bit of a checkpoint's file is damaged: the file is named, and the tensor where its own checksum tells."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save

from r1_megatron.checkpoint.files.torch_dist import read_metadata
from r1_megatron.checkpoint.integrity import file_problems, hash_file

FILE = "__0_0.distcp"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one process: that is what is wanted
        save({"first": torch.arange(6.0), "second": torch.arange(6.0) + 10.0}, checkpoint_id=str(tmp_path))
    return tmp_path


def test_any_flipped_bit_is_a_damaged_file(checkpoint: Path) -> None:
    """Also one in the archives' own records, which make Python's zipfile fail in many ways."""
    path = checkpoint / FILE
    files, whole = {FILE: hash_file(path)}, path.read_bytes()
    assert file_problems(checkpoint, files) == []
    for place in range(0, len(whole), 7):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            (problem,) = file_problems(checkpoint, files)
            assert problem.startswith(f"{FILE} was changed or is damaged"), (place, bit)


@pytest.mark.parametrize("key", ["first", "second"])
def test_a_flipped_bit_of_a_tensor_names_the_tensor(checkpoint: Path, key: str) -> None:
    path = checkpoint / FILE
    files, damaged = {FILE: hash_file(path)}, bytearray(path.read_bytes())
    (chunk,) = read_metadata(checkpoint)[key].chunks
    values = (torch.arange(6.0) + (10.0 if key == "second" else 0.0)).numpy().tobytes()
    damaged[damaged.index(values, chunk.start) + 5] ^= 4
    path.write_bytes(damaged)
    assert file_problems(checkpoint, files) == [
        f"{FILE} was changed or is damaged in {key}: its sha256 is not the one written"
    ]
