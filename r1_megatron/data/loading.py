"""All rows of some files, examined once, then held in memory or read again when they are needed.

Both ways make the same rows in the same order. Held in memory every rank reads everything. Streamed
(``data.streaming``), each rank examines a part of the bytes, what they found is exchanged, and what stays in memory is
where the rows begin and what tells equal ones: 20 bytes a row.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar, overload

import numpy as np

from r1_megatron.config.schema import DataConfig
from r1_megatron.data.rows import (
    MAX_PROBLEMS_SHOWN,
    PARQUET,
    WHOLE,
    Part,
    Row,
    find_files,
    parse_row,
    raise_problems,
    read_rows,
)

T = TypeVar("T")
TOO_LONG = "too long"
DUPLICATES = "duplicates"


class LeftOut(Exception):
    """This row is good, but not wanted; the reason is counted."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Decoded(NamedTuple):
    """What a row is. ``key``: rows of the same one are duplicates ("": not asked). ``labelled`` where all rows have to
    have a label or none of them."""

    item: Any
    key: str = ""
    labelled: bool | None = None


Decode = Callable[[Row], Decoded]


@dataclass(frozen=True)
class Share:
    """This rank's part of the work on streamed files, and how the ranks exchange what they found (collective)."""

    part: Part = WHOLE
    gather: Callable[[Any], list[Any]] = lambda found: [found]


ALONE = Share()


@dataclass
class Found:
    """What one reader found. ``places`` int64 ``[rows, 2]`` (file, offset), ``keys`` uint64 ``[rows]``."""

    places: np.ndarray = field(default_factory=lambda: np.empty((0, 2), dtype=np.int64))
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    where: list[str] = field(default_factory=list)  # empty where rows are streamed
    items: list[Any] = field(default_factory=list)  # likewise
    problems: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    num_labelled: int = 0
    unlabelled: list[str] = field(default_factory=list)  # the first of them
    files: list[tuple[str, int]] = field(default_factory=list)  # names and sizes
    failure: str = ""


@dataclass(frozen=True)
class Rows(Sequence[T], Generic[T]):
    """The rows that are used, in the order of the files; ``left_out`` counts the others by reason. ``keys`` uint64
    ``[rows]``: rows of the same prompt have the same one."""

    items: Sequence[T]
    left_out: Mapping[str, int] = field(default_factory=dict)
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...

    def __getitem__(self, index):
        return self.items[index]

    def subset(self, rows: np.ndarray) -> Rows[T]:
        """The rows of these numbers, in this order."""
        if isinstance(self.items, StreamedRows):
            return Rows(self.items.subset(rows), self.left_out, self.keys[rows])
        return Rows([self.items[i] for i in rows], self.left_out, self.keys[rows])


def load_rows(
    pattern: str,
    option: str,
    decode: Decode,
    *,
    streaming: bool = False,
    share: Share = ALONE,
    on_duplicate: str = "error",
) -> Rows[Any]:
    """Examine every row, with ``decode``, and give those that are used.

    Args:
        pattern: a file or a pattern; ``option`` names it in messages.
        decode: makes an item of a row; raises ValueError where the row is bad and :class:`LeftOut` where it is not
            wanted. Streamed rows are decoded again each time they are read: the same row has to give the same item.
        share: who else examines them, where rows are streamed.
        on_duplicate: what becomes of a row whose key was there before: "error", "skip" or "keep".

    Raises:
        ValueError: names every bad row (the first 20 of them) with what is wrong. On all ranks of ``share``.
    """
    share = share if streaming else ALONE
    mine, files = _examine_files(pattern, option, decode, share.part, streaming)
    found = share.gather(mine)
    if failures := [one.failure for one in found if one.failure]:
        raise ValueError(failures[0])
    if any(one.files != mine.files for one in found):
        raise ValueError(
            f"{option}: {pattern} is not the same on all nodes (names or sizes). Put it where all read it."
        )
    places = np.concatenate([one.places for one in found])

    def name_of(index: int) -> str:
        return f"{files[places[index, 0]].name} byte {places[index, 1]}"

    kept, left_out, keys = _settle(pattern, found, on_duplicate, name_of if streaming else None)
    if streaming:
        return Rows(StreamedRows(files, places[kept], decode), left_out, keys)
    items = found[0].items
    return Rows([items[i] for i in kept], left_out, keys)


def made_rows(name: str, noun: str, rows: Iterable[T], decode: Callable[[T], Decoded], on_duplicate: str) -> Rows[Any]:
    """The same for rows that are made and not read; ``noun`` is what one of them is called in messages."""
    found = Found()
    _examine(((f"{noun} {number}", 0, number, row) for number, row in enumerate(rows)), decode, found, keep=True)
    kept, left_out, keys = _settle(name, [found], on_duplicate, None)
    return Rows([found.items[i] for i in kept], left_out, keys)


def _examine_files(
    pattern: str, option: str, decode: Decode, part: Part, streaming: bool
) -> tuple[Found, Sequence[Path]]:
    """One reader's pass over its part; an error is kept, for all readers to raise."""
    found, files = Found(), []
    try:
        files = find_files(pattern, option)
        if streaming and any(file.suffix == PARQUET for file in files):
            raise ValueError(
                f"{option}: data.streaming=true reads JSONL only, and {pattern} is parquet, whose rows cannot be read "
                "one by one. Make JSONL of it: r1-megatron data import."
            )
        found.files = [(file.name, file.stat().st_size) for file in files]
        rows = ((row.where, row.file, row.offset, row) for row in read_rows(files, found.problems, part))
        _examine(rows, decode, found, keep=not streaming)
    except (ValueError, OSError) as error:
        found.failure = str(error)
    return found, files


def _examine(rows: Iterable[tuple[str, int, int, T]], decode: Callable[[T], Decoded], found: Found, keep: bool) -> None:
    places, keys = array("q"), array("Q")
    for where, file, offset, row in rows:
        try:
            decoded = decode(row)
        except LeftOut as reason:
            found.left_out[reason.reason] += 1
            continue
        except ValueError as error:
            found.problems.append(f"{where}: {error}")
            continue
        places.extend((file, offset))
        keys.append(_hash(decoded.key))
        if decoded.labelled is not None:
            found.num_labelled += decoded.labelled
            if not decoded.labelled and len(found.unlabelled) <= MAX_PROBLEMS_SHOWN:
                found.unlabelled.append(where)
        if keep:
            found.where.append(where)
            found.items.append(decoded.item)
    found.places = np.frombuffer(places, dtype=np.int64).reshape(-1, 2)
    found.keys = np.frombuffer(keys, dtype=np.uint64)


def _settle(
    name: str, found: Sequence[Found], on_duplicate: str, name_of: Callable[[int], str] | None
) -> tuple[np.ndarray, dict[str, int], np.ndarray]:
    """(rows that stay, how many were left out and why, keys of those that stay), or one error for all that is wrong."""
    problems = [problem for one in found for problem in one.problems]
    left_out = sum((one.left_out for one in found), Counter[str]())
    if any(one.num_labelled for one in found):
        problems += [f"{where}: no label, but other rows have one" for one in found for where in one.unlabelled]
    keys = np.concatenate([one.keys for one in found])
    rows = np.arange(len(keys))
    first = rows if on_duplicate == "keep" else _first_of_same(keys)
    copies = rows[first != rows]
    if len(copies) and on_duplicate == "error":
        name_of = name_of or found[0].where.__getitem__
        problems += [
            f"{name_of(i)}: same prompt as {name_of(int(first[i]))}. Remove it, or set data.on_duplicate_prompt=skip"
            for i in copies.tolist()
        ]
    raise_problems(name, problems)
    if len(copies):
        left_out[DUPLICATES] += len(copies)
    kept = rows[first == rows]
    return kept, dict(left_out), keys[kept]


def counted(left_out: Mapping[str, int]) -> str:
    """``3 too long, 1 duplicates``."""
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items())


def _hash(key: str) -> int:
    if not key:
        return 0
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") or 1


def _first_of_same(keys: np.ndarray) -> np.ndarray:
    """For every row the first row of the same key; rows of key 0 have no equals."""
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return np.where(keys == 0, np.arange(len(keys)), first[group])


def check_length(num_tokens: int, max_tokens: int, cfg: DataConfig) -> None:
    """Raises ValueError, or LeftOut with ``data.on_long_prompt=skip``, for a row that the model has no room for."""
    if num_tokens <= max_tokens:
        return
    if cfg.on_long_prompt == "skip":
        raise LeftOut(TOO_LONG)
    raise ValueError(
        f"{num_tokens} tokens, but the limit is {max_tokens} (model.max_position_embeddings, or "
        "max_tokens of sft or reward_model, where that is less). Shorten it, or set data.on_long_prompt=skip"
    )


class StreamedRows(Sequence[Any]):
    """Rows of JSONL files by their number, read and decoded when they are asked for.

    Raises:
        ValueError: a file is not what it was when its rows were found.
    """

    def __init__(self, files: Sequence[Path], places: np.ndarray, decode: Decode):
        self._files, self._decode = files, decode
        self._file_of, self._offsets = places[:, 0].astype(np.int32), places[:, 1].copy()
        self._sizes = [file.stat().st_size for file in files]
        self._open: dict[int, BinaryIO] = {}

    def subset(self, rows: np.ndarray) -> StreamedRows:
        places = np.stack([self._file_of[rows].astype(np.int64), self._offsets[rows]], axis=1)
        return StreamedRows(self._files, places, self._decode)

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Any]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file, offset = int(self._file_of[index]), int(self._offsets[index])
        path, where = self._files[file], f"byte {offset}"
        if file not in self._open:
            self._open[file] = path.open("rb")
        if path.stat().st_size != self._sizes[file]:
            raise ValueError(f"{path} has been changed since the run began: start the run again.")
        self._open[file].seek(offset)
        fields, problem = parse_row(self._open[file].readline(), offset)
        if fields is None:
            raise ValueError(f"{path} has been changed since the run began ({where}: {problem}): start the run again.")
        return self._decode(Row(where, fields, file, offset)).item
