"""An output folder that exists whole or not at all, and work on it that a kill only interrupts.

Everything is written under ``TARGET.partial/content``; ``TARGET.partial/journal.jsonl`` says for which conversion, and
has one line for every finished unit. The end is one rename, after everything has reached the disk. Whoever finds a
``TARGET`` finds a complete one; whoever finds a ``TARGET.partial`` goes on with it, if it is the same conversion of the
same files.

What a killed process wrote is safe with the kernel, so no unit waits for the disk; a thread brings finished ones there
meanwhile, and only the end waits for it. A journal from before a restart of the machine, or from another machine, is
believed after the unit's output was hashed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

_LOCK_PATIENCE_S = 30.0


class Partial:
    """The unfinished output of one conversion.

    Attributes:
        content: the folder to write into; it becomes the target.
        lock: a file that every process which writes holds a shared lock on (see :func:`hold`).
        done: results of finished units, by name.
    """

    def __init__(self, target: str | Path, identity: Mapping[str, Any], restart: bool = False) -> None:
        """Begin, or go on with what an earlier process left.

        Args:
            identity: what makes it this conversion (program, source, options, plan); plain JSON.
            restart: throw away what is there.

        Raises:
            FileExistsError: the target exists; or the partial one is another conversion's, or is being written.
            OSError: it cannot be written there.
        """
        self.target = Path(target)
        self.folder = self.target.with_name(self.target.name + ".partial")
        self.content = self.folder / "content"
        self.lock = self.folder / "lock"
        self.done: dict[str, Any] = {}
        self._units: dict[str, dict[str, Any]] = {}
        self._disk: ThreadPoolExecutor | None = None
        self._flushes: list[Future[None]] = []
        self._identity = json.loads(json.dumps(identity))
        refuse_existing(self.target)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"{target} cannot be written: {error}. Choose another target") from error
        self._alone = os.open(self.folder / "owner", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock_out_others()
            self._journal = self._begin(self.folder / "journal.jsonl", restart)
        except BaseException:
            os.close(self._alone)
            raise

    def _begin(self, path: Path, restart: bool) -> TextIO:
        """The journal, read, or begun."""
        if restart or not self.content.is_dir() or not path.is_file() or path.stat().st_size == 0:
            if self.content.exists():
                shutil.rmtree(self.content)
            self.content.mkdir()
            journal = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed in close)
            _append(journal, {"identity": self._identity})
            return journal
        self._read(path)
        return open(path, "a", encoding="utf-8")

    def _lock_out_others(self) -> None:
        """One conversion at a time. Workers of a killed one may be about to notice it: wait for them."""
        busy = f"{self.folder} is being written by another process. Wait for it, or choose another target."
        try:
            fcntl.lockf(self._alone, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: workers do not inherit it
        except OSError as error:
            raise FileExistsError(busy) from error
        workers = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        give_up = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(workers, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > give_up:
                    raise FileExistsError(busy) from error
                time.sleep(0.05)
        os.close(workers)

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").split("\n")
        # A line without its end was being written when the process was killed: as if it were not there.
        whole = "\n".join(lines[:-1]) + "\n"
        if lines[-1]:
            os.truncate(path, len(whole.encode()))
        entries = [json.loads(line) for line in lines[:-1]]
        there = entries[0]["identity"] if entries else {}
        differing = [name for name in self._identity if there.get(name) != self._identity[name]]
        if differing:
            told = "; ".join(
                f"{name}: {_short(there.get(name))}, now {_short(self._identity[name])}" for name in differing
            )
            raise FileExistsError(
                f"{self.folder} was left by another conversion ({told}). Finish that one, choose another target, or "
                "throw it away with --restart."
            )
        self._units = {entry["unit"]: entry for entry in entries[1:]}

    def adopt(
        self,
        unit: str,
        sources: list[str],
        is_there: Callable[[Any], bool],
        is_intact: Callable[[Any], bool] = lambda result: False,
    ) -> bool:
        """Whether a unit is finished: it is in the journal, its sources have not changed, its output is there.

        Args:
            is_there: of a unit's result, by the looks of its files.
            is_intact: of a unit's result, by their bytes; asked where the kernel that took them is gone.
        """
        entry = self._units.get(unit)
        if entry is None or entry["sources"] != _stamps(sources) or not is_there(entry["result"]):
            return False
        if entry["boot"] != _boot() and not is_intact(entry["result"]):
            return False
        self.done[unit] = entry["result"]
        return True

    def record(self, unit: str, sources: list[str], result: Any, outputs: Iterable[str] = ()) -> None:
        """A unit is finished; ``outputs`` are written: paths, or plain names of files in ``content``."""
        self.done[unit] = result
        # Not before there is something to flush: threads would keep workers from being forked.
        self._disk = self._disk or ThreadPoolExecutor(1, "flush")
        paths = [Path(output) if os.path.dirname(output) else self.content / output for output in outputs]
        self._flushes += [self._disk.submit(_sync, path) for path in paths]
        _append(self._journal, {"unit": unit, "boot": _boot(), "sources": _stamps(sources), "result": result})

    def finish(self) -> None:
        """The content becomes the target.

        Raises:
            FileExistsError: somebody has made the target meanwhile.
            OSError: not everything could be brought to the disk.
        """
        for flush in self._flushes:
            flush.result()
        for path in sorted(self.content.rglob("*")):
            _sync(path)
        _sync(self.content)
        refuse_existing(self.target)
        os.rename(self.content, self.target)
        _sync(self.target.parent)
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Leave it as it is; the same conversion can go on with it."""
        if self._disk is not None:
            self._disk.shutdown(cancel_futures=True)
            self._disk = None
        if not self._journal.closed:
            self._journal.close()
            os.close(self._alone)


def refuse_existing(target: str | Path) -> None:
    """Raises FileExistsError if there is something in the target's place."""
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists already; nothing is overwritten. Remove it or choose another target.")


def hold(lock: str | Path) -> int:
    """Say that this process writes, as long as it lives; answers the open file."""
    descriptor = os.open(lock, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _append(journal: TextIO, entry: dict[str, Any]) -> None:
    journal.write(json.dumps(entry, separators=(",", ":")) + "\n")
    journal.flush()


def _boot() -> str:
    """Changes with every start of the machine, and from machine to machine."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else uuid.uuid4().hex


def _stamps(files: list[str]) -> dict[str, list[int]]:
    stamps = {}
    for file in files:
        status = os.stat(file)
        stamps[os.path.basename(file)] = [status.st_size, status.st_mtime_ns]
    return stamps


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:97] + "..."


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
