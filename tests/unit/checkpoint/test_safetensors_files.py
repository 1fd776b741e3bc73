"""Safetensors headers and folders against the safetensors library, and everything a hostile one may try."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from r1_megatron.checkpoint.files.dtypes import FROM_TORCH
from r1_megatron.checkpoint.files.safetensors import (
    INDEX,
    SINGLE,
    build_header,
    build_index,
    create_file,
    read_folder,
    read_header,
)

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.weight": torch.arange(6).bfloat16(),
    "ü": torch.arange(8).to(torch.float8_e4m3fn).view(2, 2, 2),
    "half": torch.ones(1, 3, dtype=torch.float16),
}


def test_headers_are_those_of_the_library(tmp_path: Path) -> None:
    """Places, dtypes and shapes as the library reads them; written again, the file is the same to the byte."""
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header = read_header(path)
    data = path.read_bytes()
    for stored in header.tensors:
        there = data[stored.start : stored.start + stored.num_bytes]
        expected = TENSORS[stored.name]
        assert there == expected.contiguous().view(torch.uint8).numpy().tobytes()
        assert (stored.shape, stored.dtype) == (
            tuple(expected.shape),
            FROM_TORCH[str(expected.dtype).removeprefix("torch.")],
        )
        assert stored.row_bytes * stored.shape[0] == stored.num_bytes
    layout = [(stored.name, stored.dtype, stored.shape) for stored in header.tensors]
    assert data.startswith(build_header(layout, header.metadata))
    created = create_file(tmp_path / "again.safetensors", layout, header.metadata)
    with open(tmp_path / "again.safetensors", "r+b") as file:
        for stored, place in zip(header.tensors, created.tensors):
            file.seek(place.start)
            file.write(data[stored.start : stored.start + stored.num_bytes])
    assert (tmp_path / "again.safetensors").read_bytes() == data
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert set(file.keys()) == set(TENSORS)
    assert torch.equal(load_file(tmp_path / "again.safetensors")["b.weight"], TENSORS["b.weight"])


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", 10**9, "no safetensors file, or a truncated one"),
        (b"{}", b"", 2**63, "no safetensors file, or a truncated one"),
        (b"{", b"", None, "header cannot be read"),
        (b"\xff\xfe", b"", None, "header cannot be read"),
        (b"[" * 100_000, b"", None, "header cannot be read"),
        ([1], b"", None, "no JSON object"),
        (b'{"a": {"dtype": "F32"}, "a": {}}', b"", None, "'a' is there twice"),
        ({"a": entry("F33")}, b"1234", None, "a: dtype 'F33' is not known"),
        ({"a": entry(shape=[-1])}, b"1234", None, "a: shape and data_offsets"),
        ({"a": entry(shape=[True])}, b"1234", None, "a: shape and data_offsets"),
        ({"a": entry(shape=[2**62, 2**62])}, b"1234", None, "a: F32 .* but data_offsets are"),
        ({"a": entry(offsets=[0, 8])}, b"12345678", None, "a: F32 \\[1\\] has 4 bytes, but data_offsets are"),
        ({"a": entry(offsets=[4, 8])}, b"12345678", None, "leaves a hole before it"),
        ({"a": entry(), "b": entry()}, b"1234", None, "b begins at byte .* overlaps"),
        ({"a": entry()}, b"123", None, "truncated: .* bytes, its header describes"),
        ({"a": entry()}, b"12345", None, "too long: "),
        ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, header: Any, data: bytes, length: int | None, message: str) -> None:
    path = write_raw(tmp_path / "bad.safetensors", header, data, length)
    with pytest.raises(ValueError, match=message) as refusal:
        read_header(path)
    assert "bad.safetensors" in str(refusal.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and an index."""
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "one.safetensors")
    save_file({"c": torch.zeros(4)}, tmp_path / "two.safetensors")
    headers = {name: read_header(tmp_path / name) for name in ("one.safetensors", "two.safetensors")}
    (tmp_path / INDEX).write_text(build_index(headers))
    return tmp_path


def test_a_folder_with_an_index(folder: Path) -> None:
    weights = read_folder(folder)
    assert {name: tensor.shape for name, tensor in weights.tensors.items()} == {"a": (2,), "b": (3,), "c": (4,)}
    assert list(weights.headers) == ["one.safetensors", "two.safetensors"]
    assert weights.index_metadata == {"total_size": 36}


def test_a_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / SINGLE)
    weights = read_folder(tmp_path)
    assert list(weights.tensors) == ["a"] and weights.index_metadata is None


@pytest.mark.parametrize("name", ["../one.safetensors", "/etc/one.safetensors", "sub/one.safetensors", "one.bin", 7])
def test_an_index_that_points_elsewhere(folder: Path, name: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match=f"{INDEX}: a lies in .*; only plain names"):
        read_folder(folder)


def test_an_index_and_files_that_disagree(folder: Path) -> None:
    index = {"weight_map": {"a": "two.safetensors", "b": "one.safetensors", "d": "two.safetensors"}}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError) as refusal:
        read_folder(folder)
    for expected in (
        "a: not in two",
        "d: not in two",
        "a: in one.safetensors, but not listed",
        "c: in two.safetensors",
    ):
        assert expected in str(refusal.value)


def test_a_missing_file_and_a_bad_index(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"two\.safetensors: .* missing"):
        read_folder(folder)
    for text in ("", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}'):
        (folder / INDEX).write_text(text)
        with pytest.raises(ValueError, match=INDEX):
            read_folder(folder)


def test_pickles_from_outside_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has neither"):
        read_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin.*save_pretrained"):
        read_folder(tmp_path)
    (tmp_path / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has extra\.safetensors but no"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_folder(tmp_path / "nowhere")
