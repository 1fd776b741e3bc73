"""Tensors of a distributed checkpoint into Hugging Face files: what there is to do, and one unit of it.

The checkpoint may have been written by a conversion or by training, under any layout: a slice of a Hugging Face tensor
is gathered from whatever chunks hold its rows. A unit is a run of tensors of one output file, which has room for them
already; it is described completely (:class:`ExportUnit`), so any process can do it alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from r1_megatron.checkpoint.convert.importing import read_scales
from r1_megatron.checkpoint.convert.values import Buffer, TensorHash, all_finite, bytes_of, first_problem
from r1_megatron.checkpoint.files.dtypes import FP8, TORCH_NAMES, item_size
from r1_megatron.checkpoint.files.safetensors import StoredTensor, TensorFiles
from r1_megatron.checkpoint.files.torch_dist import RowReader, StoredChunk, StoredKey
from r1_megatron.checkpoint.matching import FP8_BLOCK, SCALE_SUFFIX, scale_shape
from r1_megatron.checkpoint.naming import VOCABULARY, Entry, pairs_to_halves

# What one worker does alone, and a killed conversion does again.
UNIT_BYTES = 128 << 20


class Piece(NamedTuple):
    """Rows ``[start, stop)`` of a Hugging Face tensor are rows ``first ...`` of a megatron-core one.

    ``stored`` has only those chunks that can hold them; ``expert``: place on its leading axis.
    """

    start: int
    stop: int
    halves: bool
    stored: StoredKey
    expert: int | None
    first: int


@dataclass(frozen=True)
class ExportTensor:
    """One Hugging Face tensor to be written (or only hashed).

    Attributes:
        dtype: of the output. Where it is e4m3 and the checkpoint is not, the values are quantised.
        parts: its matrices (or vectors) one below the other: one, or a fused tensor's experts; each as pieces in the
            order of its rows.
        scales: the block scales of each part's source, if there are any.
        place: where it is written; ``None``: nowhere.
        scale_place: where its block scales are written.
        sha256: of its bytes, where the checkpoint's manifest says it and nothing is to be converted. They were hashed
            and found finite when the manifest was written; that they still are those, each chunk's CRC-32 tells.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Piece, ...], ...]
    scales: tuple[StoredTensor, ...] = ()
    place: StoredTensor | None = None
    scale_place: StoredTensor | None = None
    sha256: str | None = None

    @property
    def stored(self) -> StoredKey:
        """What its rows, or the first of them, are stored as."""
        return self.parts[0][0].stored

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return math.prod(self.shape) * item_size(self.stored.dtype)

    @property
    def is_quantized(self) -> bool:
        """It is made FP8 here."""
        return self.dtype == FP8 and self.stored.dtype != FP8


@dataclass(frozen=True)
class ExportUnit:
    """Tensors that one process writes one after the other."""

    tensors: tuple[ExportTensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def computes(self) -> bool:
        """Whether more is done than moving bytes."""
        return any(tensor.dtype != tensor.stored.dtype for tensor in self.tensors)

    @property
    def outputs(self) -> list[str]:
        """The files that are written, that of its first tensor first; none, if it is only hashed."""
        return list(dict.fromkeys(place.file for place in self.places.values()))

    @property
    def places(self) -> dict[str, StoredTensor]:
        """Where its tensors and their scales are written, by name."""
        places = ((tensor.place, tensor.scale_place) for tensor in self.tensors)
        return {place.name: place for pair in places for place in pair if place is not None}

    @property
    def sources(self) -> list[str]:
        """The files that are read."""
        pieces = (piece for tensor in self.tensors for part in tensor.parts for piece in part)
        return sorted({chunk.file for piece in pieces for chunk in piece.stored.chunks})


# ----------------------------------------------------------------------------------------------------------- planning


def pieces_by_name(table: Iterable[Entry], keys: Mapping[str, StoredKey]) -> dict[str, tuple[Piece, ...]]:
    """For every Hugging Face tensor of the table, each expert's by itself, where the checkpoint has its rows.

    Raises:
        ValueError: tensors that the checkpoint lacks or has in another shape; all of them named.
    """
    found: dict[str, list[Piece]] = {}
    problems: dict[str, None] = {}
    by_expert: dict[str, dict[int, list[StoredChunk]]] = {}
    experts: dict[str, int] = {}
    table = list(table)
    for entry in table:
        if entry.expert is not None:
            experts[entry.key] = max(experts.get(entry.key, 0), entry.expert + 1)
    for entry in table:
        stored = keys.get(entry.key)
        shape = entry.shape if entry.expert is None else (experts[entry.key], *entry.shape)
        if stored is None:
            problems[f"{entry.key}: missing"] = None
            continue
        padded = entry.name in VOCABULARY and stored.shape[0] > shape[0]
        if stored.shape != ((stored.shape[0], *shape[1:]) if padded else shape):
            problems[f"{entry.key}: shape {list(stored.shape)}, expected {list(shape)}"] = None
            continue
        if entry.expert is not None:
            if entry.key not in by_expert:
                by_expert[entry.key] = _chunks_by_expert(stored)
            stored = replace(stored, chunks=tuple(by_expert[entry.key][entry.expert]))
        first = 0
        for rows in entry.rows:
            piece = Piece(rows.start, rows.stop, rows.halves, stored, entry.expert, first)
            found.setdefault(rows.name, []).append(piece)
            first += rows.stop - rows.start
    if problems:
        shown = [*problems][:40]
        raise ValueError("the checkpoint does not hold this model:\n  " + "\n  ".join(shown))
    return {name: tuple(sorted(pieces, key=lambda piece: piece.start)) for name, pieces in found.items()}


def _chunks_by_expert(stored: StoredKey) -> dict[int, list[StoredChunk]]:
    found: dict[int, list[StoredChunk]] = {expert: [] for expert in range(stored.shape[0])}
    for chunk in stored.chunks:
        for expert in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
            found[expert].append(chunk)
    return found


def group_units(tensors: Sequence[ExportTensor]) -> list[ExportUnit]:
    """Consecutive tensors, until there is enough for a unit."""
    units, group, size = [], [], 0
    for tensor in tensors:
        group.append(tensor)
        size += tensor.num_bytes
        if size >= UNIT_BYTES:
            units.append(ExportUnit(tuple(group)))
            group, size = [], 0
    return units + ([ExportUnit(tuple(group))] if group else [])


# -------------------------------------------------------------------------------------------------------------- doing


@dataclass
class _Written:
    """What has been made of a tensor so far."""

    num_bytes: int = 0
    digest: TensorHash = field(default_factory=TensorHash)
    scales: list[np.ndarray] = field(default_factory=list)


class ExportWorker:
    """Does units, one after the other, with the same memory for all of them.

    Args:
        max_elements: of a slice that is to be quantised.
        block_bytes: what else is read, checked and written at a time.
    """

    def __init__(self, max_elements: int, block_bytes: int, progress: Callable[[int], None]) -> None:
        self._max_elements, self._block_bytes = max_elements, block_bytes
        self._progress = progress
        self._slice, self._head = Buffer(), Buffer()

    def run(self, unit: ExportUnit) -> dict[str, Any]:
        """Write the unit's tensors into their places; answers the manifest's lines of them.

        Raises:
            ValueError: NaN or infinite weights, damaged or truncated chunks; file and tensor are named.
            OSError: something could not be read or written.
        """
        files, reader = TensorFiles(), RowReader()
        lines = []
        try:
            for tensor in unit.tensors:
                lines += self._tensor(files, reader, tensor)
            reader.close()
        finally:
            reader.abandon()
            files.close()
        return {"tensors": lines}

    def _tensor(self, files: TensorFiles, reader: RowReader, tensor: ExportTensor) -> list[dict[str, Any]]:
        written = _Written()
        scales = None
        # A caller that wants the hash alone compares it: no CRC is needed.
        check = tensor.place is not None
        for number, part in enumerate(tensor.parts):
            if tensor.scales:
                scales = read_scales(files, tensor.scales[number])
            height = part[-1].stop
            width = math.prod(tensor.shape[1:] if len(tensor.parts) == 1 else tensor.shape[2:])
            row_bytes = width * item_size(tensor.stored.dtype)
            step = max(1, self._block_bytes // max(1, row_bytes))
            if tensor.is_quantized:
                step = max(FP8_BLOCK, self._max_elements // width // FP8_BLOCK * FP8_BLOCK)
            for start in range(0, height, step):
                values = self._slice.rows(min(step, height - start), row_bytes)
                self._gather(reader, part, start, values, check)
                if tensor.sha256 is None:
                    self._check(tensor, part, values, start)
                self._write(files, tensor, self._converted(tensor, values, scales, start, written), written)
                self._progress(values.nbytes)
        return self._lines(files, tensor, scales, written)

    def _gather(self, reader: RowReader, part: Sequence[Piece], first: int, values: np.ndarray, check: bool) -> None:
        """Rows ``first ...`` of a part, as many as ``values`` has, from wherever they are."""
        stop = first + len(values)
        for piece in part:
            low, high = max(first, piece.start), min(stop, piece.stop)
            if low >= high:
                continue
            target = values[low - first : high - first]
            if not piece.halves:
                reader.read(piece.stored, piece.expert, piece.first + low - piece.start, target, check)
                continue
            # Its pairs can only be told apart when all of them are there.
            head = self._head.rows(piece.stop - piece.start, values.shape[1])
            reader.read(piece.stored, piece.expert, piece.first, head, check)
            target[:] = pairs_to_halves(head)[low - piece.start : high - piece.start]

    def _check(self, tensor: ExportTensor, part: Sequence[Piece], values: np.ndarray, first: int) -> None:
        if not all_finite(values, tensor.stored.dtype):
            problem = first_problem(values, tensor.stored.dtype, first)
            raise ValueError(
                f"{_files_of([part])}: {part[0].stored.key} ({tensor.name}): {problem}. Weights have to be finite; "
                "export an earlier checkpoint."
            )

    def _converted(
        self, tensor: ExportTensor, values: np.ndarray, scales: np.ndarray | None, first: int, written: _Written
    ) -> np.ndarray:
        """A slice as it is to be written."""
        there = tensor.stored.dtype
        if tensor.dtype == there:
            return values
        from r1_megatron.checkpoint.convert.arithmetic import cast, quantize_rows

        if tensor.is_quantized:
            blocks = slice(first // FP8_BLOCK, -(-(first + len(values)) // FP8_BLOCK))
            codes, new = quantize_rows(values, there, None if scales is None else scales[blocks])
            written.scales.append(new)
            return codes
        output = cast(values, there, tensor.dtype, scales if there == FP8 else None, first)
        if not all_finite(output, tensor.dtype):
            problem = first_problem(output, tensor.dtype, first)
            raise ValueError(f"{tensor.name}: as {TORCH_NAMES[tensor.dtype]}, {problem}: out of its range.")
        return output

    def _write(self, files: TensorFiles, tensor: ExportTensor, output: np.ndarray, written: _Written) -> None:
        data = bytes_of(output)
        if tensor.place is not None:
            files.write(tensor.place, written.num_bytes, data)
        written.num_bytes += len(data)
        if tensor.sha256 is None:
            written.digest.update(data)

    def _lines(
        self, files: TensorFiles, tensor: ExportTensor, scales: np.ndarray | None, written: _Written
    ) -> list[dict[str, Any]]:
        stored = tensor.stored
        source = {
            "key": stored.key,
            "expert": tensor.parts[0][0].expert if len(tensor.parts) == 1 else None,
            "dtype": TORCH_NAMES[stored.dtype],
            "files": _files_of(tensor.parts).split(", "),
        }

        def line(
            name: str, dtype: str, shape: Sequence[int], digest: str, place: StoredTensor | None
        ) -> dict[str, Any]:
            file = os.path.basename(place.file) if place else None
            told = {"name": name, "shape": list(shape), "dtype": dtype, "sha256": digest, "file": file}
            return {**told, "source": source}

        sha256 = tensor.sha256 or written.digest.hexdigest()
        lines = [line(tensor.name, tensor.dtype, tensor.shape, sha256, tensor.place)]
        if written.scales:
            scales = np.concatenate(written.scales)
        if tensor.dtype == FP8 and scales is not None:
            assert tuple(scales.shape) == scale_shape(tensor.shape)
            digest = TensorHash()
            digest.update(bytes_of(scales))
            if tensor.scale_place is not None:
                files.write(tensor.scale_place, 0, bytes_of(scales))
            name = tensor.name + SCALE_SUFFIX
            lines.append(line(name, "F32", scales.shape, digest.hexdigest(), tensor.scale_place))
        return lines


def _files_of(parts: Sequence[Sequence[Piece]]) -> str:
    """The files that can hold rows of these parts."""
    names = {os.path.basename(chunk.file) for part in parts for piece in part for chunk in piece.stored.chunks}
    return ", ".join(sorted(names))
