"""Hugging Face tensors into the part files of a distributed checkpoint: what there is to do, and one unit of it.

A unit is one part file with the megatron-core tensors in it. It is described completely (:class:`ImportUnit`), so any
process can do it alone, and its result is all that anyone else needs to know of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from r1_megatron.checkpoint.convert.values import Buffer, TensorHash, all_finite, bytes_of, first_problem
from r1_megatron.checkpoint.files.dtypes import TORCH_NAMES, WEIGHTS
from r1_megatron.checkpoint.files.safetensors import CALL_BYTES, StoredTensor, TensorFiles
from r1_megatron.checkpoint.files.torch_dist import StoredChunk
from r1_megatron.checkpoint.files.torch_dist_writing import PartWriter
from r1_megatron.checkpoint.matching import SCALE_SUFFIX
from r1_megatron.checkpoint.naming import Entry, Rows, fused_expert_name, halves_to_pairs

# A part file is about this long. It is what a killed conversion does again, and what one worker does alone.
PART_BYTES = 256 << 20


@dataclass(frozen=True)
class ImportTensor:
    """One megatron-core tensor: its row in the naming table, where its Hugging Face rows are, what it is stored as.

    ``sources`` and ``scales`` are by the table's names; an expert in a fused tensor is a view into that tensor, and
    has its name. ``scales`` are of a source in FP8.
    """

    entry: Entry
    dtype: str
    sources: Mapping[str, StoredTensor]
    scales: Mapping[str, StoredTensor]

    @property
    def is_cast(self) -> bool:
        """Its bytes do not stay as they are."""
        return any(source.dtype != self.dtype for source in self.sources.values())


@dataclass(frozen=True)
class ImportUnit:
    """One part file.

    Attributes:
        wholes: all Hugging Face tensors that are read here, whole, by name.
        copies: tensors that have to repeat others, and those.
        scale_places: where the block scales are to be copied to, by name.
    """

    part: str
    tensors: tuple[ImportTensor, ...]
    wholes: Mapping[str, StoredTensor]
    copies: tuple[tuple[StoredTensor, StoredTensor], ...] = ()
    scale_places: Mapping[str, StoredTensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes to read."""
        tensors = [*self.wholes.values(), *(tensor for pair in self.copies for tensor in pair)]
        return sum(tensor.num_bytes for tensor in tensors)

    @property
    def computes(self) -> bool:
        """Whether more is done than moving bytes."""
        return any(tensor.is_cast for tensor in self.tensors)

    @property
    def outputs(self) -> list[str]:
        """The files that are written: the part by its name, others by their paths."""
        return [self.part, *sorted({place.file for place in self.scale_places.values()})]

    @property
    def sources(self) -> list[str]:
        """The files that are read."""
        tensors = [*self.wholes.values(), *(tensor for pair in self.copies for tensor in pair)]
        return sorted({tensor.file for tensor in tensors})


# ----------------------------------------------------------------------------------------------------------- planning


def plan_units(
    table: Iterable[Entry],
    tensors: Mapping[str, StoredTensor],
    dtype_of: Callable[[Entry, str], str],
    copies: Iterable[tuple[StoredTensor, StoredTensor]] = (),
    scale_places: Mapping[str, StoredTensor] | None = None,
) -> list[ImportUnit]:
    """Split a model into units, in the table's order; a source's tensors stay together with all that reads them.

    Args:
        table: every megatron-core tensor.
        tensors: the source's, by name; known to fit the table.
        dtype_of: the dtype to store an entry in, of the entry and its (common) dtype in the source.
        copies: tensors that have to repeat others, and those.
        scale_places: room for a copy of every scale.

    Raises:
        ValueError: parts of one tensor have different dtypes, or one that holds no weights; all of them named.
    """
    planned, problems = [], []
    stored_dtypes: dict[str, str] = {}
    for entry in table:
        try:
            tensor = _import_tensor(entry, tensors, dtype_of)
            if stored_dtypes.setdefault(entry.key, tensor.dtype) != tensor.dtype:
                raise ValueError(
                    f"{entry.rows[0].name}: would be {tensor.dtype}, other experts of its layer are "
                    f"{stored_dtypes[entry.key]}. Give all of them one dtype (--dtype, --fp8 dequantize)."
                )
            planned.append(tensor)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("these tensors cannot be converted:\n  " + "\n  ".join(problems[:40]))
    units, group, size = [], [], 0
    open_fused: set[str] = set()
    for position, tensor in enumerate(planned):
        group.append(tensor)
        size += sum(source.num_bytes for source in tensor.sources.values())
        open_fused = {source.name for name, source in tensor.sources.items() if source.name != name}
        following = planned[position + 1].sources.items() if position + 1 < len(planned) else ()
        # A layer's fused experts are read front to back by one worker.
        stays_open = open_fused and any(source.name != name for name, source in following)
        if size >= PART_BYTES and not stays_open:
            units.append(_unit(len(units), group, tensors, scale_places or {}))
            group, size = [], 0
    if group:
        units.append(_unit(len(units), group, tensors, scale_places or {}))
    for number, copy in enumerate(copies):
        units[number % len(units)] = replace(
            units[number % len(units)], copies=(*units[number % len(units)].copies, copy)
        )
    return units


def _import_tensor(
    entry: Entry, tensors: Mapping[str, StoredTensor], dtype_of: Callable[[Entry, str], str]
) -> ImportTensor:
    sources = {rows.name: source_of(rows.name, tensors) for rows in entry.rows}
    scales = {name: tensors[name + SCALE_SUFFIX] for name in sources if name + SCALE_SUFFIX in tensors}
    dtypes = {source.dtype for source in sources.values()}
    if len(dtypes) > 1 or not dtypes <= set(WEIGHTS):
        told = ", ".join(f"{source.name} {source.dtype}" for source in sources.values())
        raise ValueError(f"{told}: has to be one of {', '.join(WEIGHTS)} for all")
    return ImportTensor(entry, dtype_of(entry, dtypes.pop()), sources, scales)


def source_of(name: str, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    """The tensor of this name, or the part of a fused tensor that it is (under the fused tensor's name)."""
    if name in tensors:
        return tensors[name]
    fused, expert, part = fused_expert_name(name) or ("", 0, "")
    whole = tensors[fused]
    _, height, width = whole.shape
    item = whole.row_bytes // (height * width)
    rows = height if part == "down" else height // 2
    start = whole.start + (expert * height + (rows if part == "up" else 0)) * width * item
    return replace(whole, shape=(rows, width), start=start)


def _unit(
    number: int,
    tensors: list[ImportTensor],
    all_tensors: Mapping[str, StoredTensor],
    scale_places: Mapping[str, StoredTensor],
) -> ImportUnit:
    names = dict.fromkeys(source.name for tensor in tensors for source in tensor.sources.values())
    names |= dict.fromkeys(source.name for tensor in tensors for source in tensor.scales.values())
    places = {name: scale_places[name] for name in names if name in scale_places}
    return ImportUnit(f"__{number}_0.distcp", tuple(tensors), {name: all_tensors[name] for name in names}, (), places)


def chunks_of(entry: Entry, max_elements: int) -> Iterator[tuple[int, list[Rows]]]:
    """Cut a tensor into chunks of at most ``max_elements`` (or one row): first row, and the Hugging Face rows in it.

    Rows that have to be taken as a whole are not cut.
    """
    width = entry.shape[1] if len(entry.shape) > 1 else 1
    most = max(1, max_elements // width)
    first, pieces, height = 0, [], 0
    for rows in entry.rows:
        # Of equal height, as far as possible, instead of full ones and a rest.
        count = 1 if rows.halves else -(-(rows.stop - rows.start) // most)
        step = -(-(rows.stop - rows.start) // count)
        for start in range(rows.start, rows.stop, step):
            piece = rows._replace(start=start, stop=min(start + step, rows.stop))
            size = piece.stop - piece.start
            if pieces and height + size > most:
                yield first, pieces
                first, pieces, height = first + height, [], 0
            pieces.append(piece)
            height += size
    if pieces:
        yield first, pieces


# -------------------------------------------------------------------------------------------------------------- doing


class ImportWorker:
    """Does units, one after the other, with the same memory for all of them.

    Args:
        max_elements: of a chunk, which is what a rank that loads the checkpoint reads at a time.
        block_bytes: what is read, checked and written at a time.
    """

    def __init__(
        self, folder: str | Path, max_elements: int, block_bytes: int, progress: Callable[[int], None]
    ) -> None:
        self._folder = Path(folder)
        self._max_elements, self._block_bytes = max_elements, block_bytes
        self._progress = progress
        self._read, self._original = Buffer(), Buffer()

    def run(self, unit: ImportUnit) -> dict[str, Any]:
        """Write the unit's part file; answers its chunks, bytes, hashes and the manifest's lines of its tensors.

        Raises:
            ValueError: NaN or infinite weights or scales, a truncated source, a copy that is none; file and tensor are
                named.
            OSError: something could not be read or written.
        """
        files = TensorFiles()
        writer = PartWriter(self._folder / unit.part)
        read: dict[str, TensorHash] = {}
        stored: dict[str, TensorHash] = {}
        lines: dict[str, dict[str, Any]] = {}
        chunks: list[list[Any]] = []
        try:
            for tensor in unit.tensors:
                scales = {name: self._scales(files, place, unit, read) for name, place in tensor.scales.items()}
                for chunk in self._tensor(files, writer, tensor, scales, read, stored):
                    chunks.append([tensor.entry.key, chunk.offsets, chunk.sizes, chunk.start, chunk.length])
                for name, source in tensor.sources.items():
                    lines.setdefault(source.name, self._line(unit, tensor, name))
            for name, line in lines.items():
                whole = unit.wholes[name]
                assert read[name].num_bytes == whole.num_bytes, f"{name} was not read completely"
                line["sha256"] = stored[name].hexdigest() if name in stored else read[name].hexdigest()
                line["source"] = {"file": os.path.basename(whole.file), "dtype": whole.dtype}
                line["source"]["sha256"] = read[name].hexdigest()
            for copy, original in unit.copies:
                self._compare(files, copy, original)
        finally:
            writer.close()
            files.close()
        return {
            "chunks": chunks,
            "file": {"bytes": writer.num_bytes},
            "tensors": [*lines.values(), *self._scale_lines(unit, read)],
        }

    def _tensor(
        self,
        files: TensorFiles,
        writer: PartWriter,
        tensor: ImportTensor,
        scales: Mapping[str, np.ndarray],
        read: dict[str, TensorHash],
        stored: dict[str, TensorHash],
    ) -> Iterator[StoredChunk]:
        """Read, check, convert and write one megatron-core tensor, chunk by chunk."""
        entry = tensor.entry
        for first, pieces in chunks_of(entry, self._max_elements):
            height = sum(rows.stop - rows.start for rows in pieces)
            offsets, sizes = (first, *(0 for _ in entry.shape[1:])), (height, *entry.shape[1:])
            if entry.expert is not None:
                offsets, sizes = (entry.expert, *offsets), (1, *sizes)
            blocks = (
                block
                for rows in pieces
                for block in self._rows(files, tensor, rows, scales.get(rows.name), read, stored)
            )
            yield writer.add(tensor.dtype, offsets, sizes, blocks)

    def _rows(
        self,
        files: TensorFiles,
        tensor: ImportTensor,
        rows: Rows,
        scales: np.ndarray | None,
        read: dict[str, TensorHash],
        stored: dict[str, TensorHash],
    ) -> Iterator[memoryview]:
        """One run of Hugging Face rows as it is to be stored, block by block."""
        source = tensor.sources[rows.name]
        where = f"{source.file}: {rows.name}"
        # Rotary rows are reordered among themselves.
        step = rows.stop - rows.start if rows.halves else max(1, self._block_bytes // source.row_bytes)
        for start in range(rows.start, rows.stop, step):
            values = self._read.rows(min(step, rows.stop - start), source.row_bytes)
            files.read(source, start * source.row_bytes, bytes_of(values))
            if not all_finite(values, source.dtype):
                raise ValueError(f"{where}: {first_problem(values, source.dtype, start)}. Weights have to be finite.")
            read.setdefault(source.name, TensorHash()).update(bytes_of(values))
            num_bytes = values.nbytes
            if tensor.is_cast:
                from r1_megatron.checkpoint.convert.arithmetic import cast

                values = cast(values, source.dtype, tensor.dtype, scales, start)
                if not all_finite(values, tensor.dtype):
                    problem = first_problem(values, tensor.dtype, start)
                    raise ValueError(f"{where}: as {TORCH_NAMES[tensor.dtype]}, {problem}: out of its range.")
                stored.setdefault(source.name, TensorHash()).update(bytes_of(values))
            yield bytes_of(halves_to_pairs(values) if rows.halves else values)
            self._progress(num_bytes)

    def _scales(
        self, files: TensorFiles, place: StoredTensor, unit: ImportUnit, read: dict[str, TensorHash]
    ) -> np.ndarray:
        scales = read_scales(files, place)
        read[place.name] = TensorHash()
        read[place.name].update(bytes_of(scales))
        files.write(unit.scale_places[place.name], 0, bytes_of(scales))
        self._progress(scales.nbytes)
        return scales

    def _compare(self, files: TensorFiles, copy: StoredTensor, original: StoredTensor) -> None:
        for start in range(0, copy.num_bytes, CALL_BYTES):
            count = min(CALL_BYTES, copy.num_bytes - start)
            left, right = self._read.rows(1, count), self._original.rows(1, count)
            files.read(copy, start, bytes_of(left))
            files.read(original, start, bytes_of(right))
            if not np.array_equal(left, right):
                raise ValueError(
                    f"{copy.file}: {copy.name} should repeat {original.name}, but its values differ: a model with "
                    "separate ones is not supported"
                )
            self._progress(2 * count)

    def _line(self, unit: ImportUnit, tensor: ImportTensor, name: str) -> dict[str, Any]:
        whole = unit.wholes[tensor.sources[name].name]
        return {
            "name": whole.name,
            "shape": list(whole.shape),
            "dtype": tensor.dtype,
            "sha256": "",
            "file": unit.part,
            "key": tensor.entry.key,
            "expert": tensor.entry.expert if whole.name == name else None,
        }

    def _scale_lines(self, unit: ImportUnit, read: Mapping[str, TensorHash]) -> Iterator[dict[str, Any]]:
        for name, place in unit.scale_places.items():
            digest, source = read[name].hexdigest(), unit.wholes[name]
            yield {
                "name": name,
                "shape": list(place.shape),
                "dtype": place.dtype,
                "sha256": digest,
                "file": os.path.relpath(place.file, self._folder),
                "source": {"file": os.path.basename(source.file), "dtype": source.dtype, "sha256": digest},
            }


def read_scales(files: TensorFiles, place: StoredTensor) -> np.ndarray:
    """Block scales, fp32 ``[block rows, block columns]``. Raises ValueError if they are not finite."""
    scales = np.empty(place.shape, np.float32)
    files.read(place, 0, bytes_of(scales))
    if not all_finite(scales.view(np.uint8), place.dtype):
        problem = first_problem(scales.view(np.uint8), place.dtype, 0)
        raise ValueError(f"{place.file}: {place.name}: {problem}. Scales have to be finite.")
    return scales
