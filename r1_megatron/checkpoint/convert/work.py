"""What both directions share: how much memory a slice may take, room on the disk, units through workers."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1_megatron.checkpoint.convert.check import CheckUnit
from r1_megatron.checkpoint.convert.exporting import ExportUnit
from r1_megatron.checkpoint.convert.importing import ImportUnit
from r1_megatron.checkpoint.convert.journal import Partial
from r1_megatron.checkpoint.convert.progress import Progress
from r1_megatron.checkpoint.convert.values import Buffer, hash_tensor
from r1_megatron.checkpoint.convert.workers import WorkerSetup, run_units
from r1_megatron.checkpoint.files.safetensors import StoredTensor, TensorFiles

# Dtypes by the command line's words.
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
# The most that an element of a slice takes while it is worked on: requantising fp32, with all intermediate results.
BYTES_PER_ELEMENT = 32
# The plan, the journal and the manifest in the parent, and what a worker keeps of its unit.
BYTES_PER_TENSOR = 4096
# Of a chunk, and of a slice to be quantised.
_MAX_ELEMENTS = 8 << 20
# From one end of the converter to the other within a core's own cache.
_BLOCK_BYTES = 1 << 20
# A slice that is to be quantised has at least 128 rows; 18432 is the widest matrix of DeepSeek-V3.
_MIN_ELEMENTS = 128 * 18432
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Resources:
    """What a conversion may use, and whether it tells how far it is.

    Attributes:
        workers: processes; ``None``: one more than cores, as each waits for the disk now and then, at most 8.
        max_memory: bytes of all processes together, beyond what Python and torch take by themselves.
    """

    workers: int | None = None
    max_memory: int = 2 * 10**9
    quiet: bool = False

    @property
    def num_workers(self) -> int:
        if self.workers is not None:
            return self.workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(8, cores + 1)

    def slice_elements(self, num_tensors: int) -> int:
        """Elements that a worker may hold at a time.

        Raises:
            ValueError: the memory does not do for this many workers; says what would.
        """
        if self.num_workers < 1:
            raise ValueError(f"--workers {self.num_workers}: at least 1")
        rest = self.max_memory - num_tensors * BYTES_PER_TENSOR
        elements = rest // self.num_workers // BYTES_PER_ELEMENT
        if elements < _MIN_ELEMENTS:
            needed = num_tensors * BYTES_PER_TENSOR + self.num_workers * BYTES_PER_ELEMENT * _MIN_ELEMENTS
            raise ValueError(
                f"--max-memory {self.max_memory / 1e6:.0f}MB is too little for {self.num_workers} workers and "
                f"{num_tensors} tensors: {needed / 1e6:.0f}MB are needed. Give more, or fewer --workers."
            )
        return min(elements, _MAX_ELEMENTS)


def parse_size(text: str) -> int:
    """Bytes of ``2GB``, ``500 MB``, ``1.5GiB`` or a number. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(i?)B?)?\s*", text, re.IGNORECASE)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is no size; write 2GB, 500MB or 1.5GiB")
    units = _BINARY_UNITS if match[3] else _UNITS
    return int(float(match[1]) * units[(match[2] or "").upper()])


def check_room(folder: Path, num_bytes: int) -> None:
    """Raises OSError if the disk has no room for so many bytes more."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC, f"{folder} needs {num_bytes / 1e9:.2f} GB more, but {free / 1e9:.2f} GB are free. Make room"
        )


def check_target(target: Path) -> None:
    """Raises OSError if nothing can be written in the target's place, or something is there."""
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK) or _is_read_only(parent):
        raise PermissionError(
            f"{target} cannot be written: {parent} is no folder, or read-only. Choose another target."
        )


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def do_units(
    partial: Partial,
    units: Mapping[str, ImportUnit | ExportUnit],
    is_there: Callable[[str, Any], bool],
    is_intact: Callable[[str, Any], bool],
    resources: Resources,
    num_tensors: int,
) -> Progress:
    """All units that are not finished yet; results are in ``partial.done``.

    Args:
        is_there: whether the output of a unit (by name, of this result) is there, by the looks of it.
        is_intact: the same, by its bytes; asked after a restart of the machine.

    Raises:
        ValueError, OSError: what a unit met. What is finished is kept.
    """
    elements = resources.slice_elements(num_tensors)
    todo = [
        (name, unit)
        for name, unit in units.items()
        if not partial.adopt(name, unit.sources, functools.partial(is_there, name), functools.partial(is_intact, name))
    ]
    total = sum(unit.num_bytes for unit in units.values())
    left = sum(unit.num_bytes for _, unit in todo)
    progress = Progress("converting", total, total - left, resources.quiet)
    todo = _in_turn(todo)
    setup = WorkerSetup(
        str(partial.content), elements, _BLOCK_BYTES, any(unit.computes for _, unit in todo), str(partial.lock)
    )
    try:
        for name, result in run_units(todo, resources.num_workers, setup, progress.update):
            partial.record(name, units[name].sources, result, units[name].outputs)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{partial.target} could not be converted ({error}). What is finished is kept in {partial.folder}: when "
            "the cause is gone, the same command goes on with it",
        ) from error
    finally:
        progress.close()
    return progress


def tensors_are(places: Mapping[str, StoredTensor], lines: Iterable[Mapping[str, Any]]) -> bool:
    """Whether every tensor has the bytes that its line of the manifest tells, in its place."""
    files, buffer = TensorFiles(), Buffer()
    hashes = {line["name"]: line["sha256"] for line in lines}
    try:
        return all(hash_tensor(files, place, buffer, lambda _: None) == hashes[name] for name, place in places.items())
    except ValueError:  # too short
        return False
    finally:
        files.close()


def _in_turn(todo: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Units of different output files one after the other: writers of one file wait for each other in the kernel."""
    by_file: dict[str, list[tuple[str, Any]]] = {}
    for name, unit in todo:
        by_file.setdefault(unit.outputs[0], []).append((name, unit))
    rounds = itertools.zip_longest(*by_file.values())
    return [item for group in rounds for item in group if item is not None]


def do_checks(units: list[CheckUnit | ExportUnit], resources: Resources, num_tensors: int, what: str) -> list[Any]:
    """Units that only read; their results."""
    progress = Progress(what, sum(unit.num_bytes for unit in units), 0, resources.quiet)
    setup = WorkerSetup("", resources.slice_elements(num_tensors), _BLOCK_BYTES, computes=False)
    named = [(f"check {number}", unit) for number, unit in enumerate(units)]
    try:
        return [result for _, result in run_units(named, resources.num_workers, setup, progress.update)]
    finally:
        progress.close()
