"""Distributed checkpoints without torch.distributed, against torch's own reader, writer and zip files."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save

from r1_megatron.checkpoint.files.archives import write_object, write_tensor
from r1_megatron.checkpoint.files.dtypes import FROM_TORCH, TORCH_NAMES, item_size
from r1_megatron.checkpoint.files.pickles import load_restricted
from r1_megatron.checkpoint.files.torch_dist import RowReader, StoredChunk, StoredKey, read_metadata
from r1_megatron.checkpoint.files.torch_dist_writing import PartWriter, write_metadata

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def numbered(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Bytes that differ from place to place, as a tensor."""
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.randint(0, 100, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def name_of(dtype: torch.dtype) -> str:
    """safetensors' name of it."""
    return FROM_TORCH[str(dtype).removeprefix("torch.")]


def add(writer: PartWriter, offsets: tuple[int, ...], tensor: torch.Tensor) -> StoredChunk:
    """A chunk in two uneven blocks."""
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return writer.add(name_of(tensor.dtype), offsets, tuple(tensor.shape), [data[:5], data[5:]])


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(len(tensor), -1).view(torch.uint8).numpy()


def read_rows(stored: StoredKey, first: int, stop: int, expert: int | None = None) -> np.ndarray:
    """Rows of a key by a reader that also checks their chunks."""
    shape = stored.shape if expert is None else stored.shape[1:]
    out = np.full((stop - first, int(np.prod(shape[1:])) * item_size(stored.dtype)), 0xEE, np.uint8)
    reader = RowReader()
    reader.read(stored, expert, first, out)
    reader.close()
    return out


@pytest.fixture
def checkpoint(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Written by torch.distributed.checkpoint."""
    tensors = {f"m.{dtype}": numbered(dtype, 33, 7) for dtype in DTYPES}
    tensors |= {"v": numbered(torch.float32, 5), "experts": numbered(torch.bfloat16, 3, 4, 6)}
    save(dict(tensors), storage_writer=FileSystemWriter(tmp_path / "there"), no_dist=True)
    return tensors


def test_rows_of_what_torch_wrote(tmp_path: Path, checkpoint: dict[str, torch.Tensor]) -> None:
    keys = read_metadata(tmp_path / "there")
    assert {key: (stored.dtype, stored.shape) for key, stored in keys.items()} == {
        name: (name_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in checkpoint.items()
    }
    for dtype in DTYPES:
        whole = as_bytes(checkpoint[f"m.{dtype}"])
        for first, stop in [(0, 33), (4, 9), (32, 33)]:
            assert np.array_equal(read_rows(keys[f"m.{dtype}"], first, stop), whole[first:stop])
    assert np.array_equal(read_rows(keys["v"], 1, 4), as_bytes(checkpoint["v"])[1:4])
    assert np.array_equal(read_rows(keys["experts"], 1, 3, expert=2), as_bytes(checkpoint["experts"][2])[1:3])


def test_torch_reads_what_is_written(tmp_path: Path) -> None:
    """Chunks over two files, of stacked experts and of rows, for each dtype."""
    tensors = {f"m.{dtype}": numbered(dtype, 30, 7) for dtype in DTYPES}
    experts = numbered(torch.bfloat16, 3, 4, 6)
    writers = [PartWriter(tmp_path / f"__0_{n}.distcp") for n in range(2)]
    keys = []
    for name, tensor in tensors.items():
        chunks = [add(writers[0], (0, 0), tensor[:11]), add(writers[1], (11, 0), tensor[11:])]
        keys.append(StoredKey(name, name_of(tensor.dtype), tuple(tensor.shape), tuple(chunks)))
    chunks = [add(writers[e % 2], (e, 0, 0), experts[e : e + 1]) for e in range(3)]
    keys.append(StoredKey("e", "BF16", (3, 4, 6), tuple(chunks)))
    for writer in writers:
        writer.close()
        assert writer.num_bytes == os.path.getsize(writer.path)
    write_metadata(tmp_path, keys)

    found = {name: torch.zeros_like(tensor) for name, tensor in {**tensors, "e": experts}.items()}
    load(found, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    for name, tensor in {**tensors, "e": experts}.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    again = read_metadata(tmp_path)
    assert list(again) == [stored.key for stored in keys]
    for name, tensor in tensors.items():
        assert np.array_equal(read_rows(again[name], 9, 20), as_bytes(tensor)[9:20])


@pytest.mark.parametrize("name", sorted(TORCH_NAMES))
@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (0, 4)])
def test_an_archive_is_torch_saves(name: str, shape: tuple[int, ...]) -> None:
    """torch.load takes it, the pickle is the one that torch.save writes, and the elements are aligned as there."""
    dtype = getattr(torch, TORCH_NAMES[name])
    data = torch.randint(0, 2, (int(np.prod(shape)) * item_size(name),), dtype=torch.uint8)
    tensor = data.view(dtype).view(shape)
    ours, theirs = io.BytesIO(), io.BytesIO()
    write_tensor(ours, name, shape, [data.numpy().data])
    torch.save(tensor, theirs)
    for buffer in (ours, theirs):
        buffer.seek(0)
        found = torch.load(buffer, weights_only=True)
        assert (found.dtype, found.shape) == (dtype, shape)
        assert torch.equal(found.reshape(-1).view(torch.uint8), data)
    with zipfile.ZipFile(ours) as archive, zipfile.ZipFile(theirs) as reference:
        assert archive.testzip() is None
        records = [name for name in reference.namelist() if not name.endswith(("serialization_id", "data.pkl"))]
        assert [name for name in archive.namelist() if not name.endswith("data.pkl")] == records
        assert all(archive.read(record) == reference.read(record) for record in records)
        heads = [pickled_calls(each.read("archive/data.pkl")) for each in (archive, reference)]
        assert heads[0] == heads[1]
        start = archive.getinfo("archive/data/0").header_offset
        lengths = [int.from_bytes(ours.getvalue()[start + at : start + at + 2], "little") for at in (26, 28)]
        assert (start + 30 + sum(lengths)) % 64 == 0


def pickled_calls(data: bytes) -> list[tuple[str, object]]:
    """A pickle's operations without those that only number its objects."""
    return [(code.name, value) for code, value, _ in pickletools.genops(data) if code.name not in ("BINPUT", "BINGET")]


def test_an_archive_of_plain_data() -> None:
    buffer = io.BytesIO()
    write_object(buffer, {"a": [1, 2.5], "b": "text"})
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == {"a": [1, 2.5], "b": "text"}


def write_grid(folder: Path, tensor: torch.Tensor, rows: list[int], columns: list[int]) -> StoredKey:
    """One file with the chunks between these cuts."""
    writer, chunks = PartWriter(folder / "part.distcp"), []
    for top, bottom in itertools.pairwise(rows):
        for left, right in itertools.pairwise(columns):
            chunks.append(add(writer, (top, left), tensor[top:bottom, left:right]))
    writer.close()
    write_metadata(folder, [StoredKey("w", name_of(tensor.dtype), tuple(tensor.shape), tuple(chunks))])
    return read_metadata(folder)["w"]


def test_rows_over_any_cut(tmp_path: Path) -> None:
    tensor = numbered(torch.bfloat16, 40, 9)
    stored = write_grid(tmp_path, tensor, [0, 7, 8, 30, 40], [0, 4, 9])
    for first, stop in [(0, 40), (6, 9), (7, 8), (25, 33)]:
        assert np.array_equal(read_rows(stored, first, stop), as_bytes(tensor)[first:stop])
    reader = RowReader()
    with pytest.raises(ValueError, match="w: the checkpoint lacks a part of rows 38 to 42"):
        reader.read(stored, None, 38, np.zeros((4, 18), np.uint8))


@pytest.mark.parametrize("rows", [[(0, 40)], [(0, 9), (9, 40)], [(0, 3)], [(20, 40), (0, 20)]])
def test_a_flipped_bit_is_named_however_the_chunk_is_read(tmp_path: Path, rows: list[tuple[int, int]]) -> None:
    tensor = numbered(torch.bfloat16, 40, 900)
    stored = write_grid(tmp_path, tensor, [0, 40], [0, 900])
    path = tmp_path / "part.distcp"
    data = bytearray(path.read_bytes())
    at = data.find(as_bytes(tensor)[2].tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    reader = RowReader()
    for first, stop in rows:
        reader.read(stored, None, first, np.zeros((stop - first, 1800), np.uint8))
    with pytest.raises(ValueError, match=r"part\.distcp: w: damaged: CRC-32"):
        reader.close()


def test_a_chunk_without_checksums_is_refused(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        save({"w": numbered(torch.bfloat16, 4, 6)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(ValueError, match=r"distcp: w at byte 0: .*CRC-32"):
        RowReader().read(read_metadata(tmp_path)["w"], None, 0, np.zeros((4, 12), np.uint8))


def test_every_damaged_byte_outside_the_tensor_is_harmless_or_named(tmp_path: Path) -> None:
    """Heads and tails of the archive: the tensor comes back as it was, or a ValueError names the file."""
    tensor = numbered(torch.float32, 3, 5)
    stored = write_grid(tmp_path, tensor, [0, 3], [0, 5])
    path = tmp_path / "part.distcp"
    whole = path.read_bytes()
    named = 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            assert np.array_equal(read_rows(stored, 0, 3), as_bytes(tensor)), at
        except ValueError as error:
            named += 1
            assert "part.distcp" in str(error), at
    assert named > 50


def test_truncated_and_missing_files_are_named(tmp_path: Path) -> None:
    write_grid(tmp_path, numbered(torch.float32, 4, 4), [0, 4], [0, 4])
    path = tmp_path / "part.distcp"
    os.truncate(path, os.path.getsize(path) - 1)
    with pytest.raises(ValueError, match=r"part\.distcp: truncated: "):
        read_metadata(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"part\.distcp: .*missing"):
        read_metadata(tmp_path)
    (tmp_path / ".metadata").write_bytes((tmp_path / ".metadata").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"\.metadata: damaged"):
        read_metadata(tmp_path)
    with pytest.raises(FileNotFoundError, match="no distributed checkpoint"):
        read_metadata(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "place", [("../part.distcp", (0,), (4,)), ("part.distcp", (1,), (4,)), ("part.distcp", (0,), (3,))]
)
def test_a_description_that_lies(tmp_path: Path, place: tuple[str, tuple[int, ...], tuple[int, ...]]) -> None:
    """A file elsewhere, a chunk outside of its tensor, a tensor that is not covered."""
    (tmp_path / "part.distcp").write_bytes(bytes(100))
    file, offsets, sizes = place
    write_metadata(tmp_path, [StoredKey("w", "F32", (4,), (StoredChunk(offsets, sizes, file, 0, 100),))])
    with pytest.raises(ValueError, match=r"\.metadata: .*w"):
        read_metadata(tmp_path)


class Trap:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("trap-was-sprung",)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    for number, trap in enumerate([Trap(), torch.nn.Linear, print, torch.load]):
        path = tmp_path / f"{number}.pkl"
        path.write_bytes(pickle.dumps({"a": trap}))
        with open(path, "rb") as file, pytest.raises(pickle.UnpicklingError, match="it names"):
            load_restricted(file)
    assert not Path("trap-was-sprung").exists()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"\.metadata: .* .*mkdir"):
        read_metadata(tmp_path)
