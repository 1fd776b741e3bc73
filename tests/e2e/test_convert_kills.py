"""Conversions that are killed, out of room or in another's way: nothing is lost, nothing half-written looks whole.

Kills come after a random number of finished units and a random moment more, into the converter or into a worker.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from r1_megatron.checkpoint.convert import ExportOptions, ImportOptions, Resources, from_hugging_face, to_hugging_face
from r1_megatron.checkpoint.convert.journal import Partial
from r1_megatron.checkpoint.convert.work import check_room, parse_size
from tests.e2e.test_convert import FP8_MODEL, QUIET, files_of
from tools.make_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "tests.e2e.convert_in_small_pieces"]
TIMEOUT_S = 120


def start(*arguments: str | Path, **options) -> subprocess.Popen[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def small_pieces(patch: pytest.MonkeyPatch) -> None:
    """In this process what ``COMMAND`` does in its own."""
    patch.setattr("r1_megatron.checkpoint.convert.importing.PART_BYTES", 50_000)
    patch.setattr("r1_megatron.checkpoint.convert.exporting.UNIT_BYTES", 30_000)
    patch.setattr("r1_megatron.checkpoint.convert.work._MAX_ELEMENTS", 2000)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out + err


def journal(target: Path) -> list[str]:
    """Names of the units that the journal has."""
    path = target.with_name(target.name + ".partial") / "journal.jsonl"
    lines = path.read_text().split("\n")[1:-1] if path.exists() else []
    return [json.loads(line)["unit"] for line in lines]


def wait_for_units(process: subprocess.Popen[str], target: Path, count: int) -> None:
    give_up = time.monotonic() + TIMEOUT_S
    while len(journal(target)) < count and process.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.002)


def written(target: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every part file of a partial output."""
    content = target.with_name(target.name + ".partial") / "content"
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in content.glob("*.distcp")}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("kills") / "source", FP8_MODEL, "fp8", max_shard_size=300_000)


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch)
        from_hugging_face(source, folder, ImportOptions(), QUIET)
    return folder


def test_a_killed_import_is_gone_on_with(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    target, draw = tmp_path / "checkpoint", random.Random(11)
    done: list[str] = []
    for _ in range(2):
        process = start("from-hf", source, target, "--workers", "2")
        wait_for_units(process, target, len(done) + draw.randint(1, 4))
        time.sleep(draw.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not target.exists()
        assert journal(target)[: len(done)] == done
        done = journal(target)
    before = {name: stamp for name, stamp in written(target).items() if name in done}
    assert len(before) == len(done) > 0
    code, told = finish(start("from-hf", source, target, "--workers", "2", "--verify"))
    assert code == 0, told
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in target.glob("*.distcp")}
    assert {name: after[name] for name in before} == before  # not done again
    assert len(after) > len(before)
    assert files_of(target) == files_of(checkpoint)
    assert not target.with_name("checkpoint.partial").exists()


def test_a_killed_export_is_gone_on_with(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    target, draw = tmp_path / "back", random.Random(12)
    process = start("to-hf", checkpoint, target, "--workers", "2")
    wait_for_units(process, target, draw.randint(2, 6))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists() and journal(target)
    code, told = finish(start("to-hf", checkpoint, target, "--workers", "2", "--verify"))
    assert code == 0, told
    assert files_of(target) == files_of(source)


def test_a_killed_worker_ends_the_conversion_with_its_reason(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    process = start("from-hf", source, target, "--workers", "1")
    wait_for_units(process, target, 1)
    family = psutil.Process(process.pid).children(recursive=True)
    # Forked from the converter itself, which has one thread and has finished its imports.
    worker = [child for child in family if child.ppid() == process.pid]
    assert len(worker) == len(family) == 1
    worker[0].kill()
    code, told = finish(process)
    assert code == 1 and re.search(r"error: the worker that did __\d+_0\.distcp died \(exit code -9", told), told
    assert not target.exists() and journal(target)
    assert finish(start("from-hf", source, target))[0] == 0
    assert files_of(target) == files_of(checkpoint)


@pytest.mark.parametrize("damage", [False, True])
def test_after_a_restart_of_the_machine_outputs_are_hashed(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bool
) -> None:
    """The journal of another boot: what is whole on the disk is kept, what was lost with the memory is done again."""
    small_pieces(monkeypatch)
    for kind, convert in (
        ("from-hf", lambda: from_hugging_face(source, tmp_path / "from-hf", ImportOptions(), QUIET)),
        ("to-hf", lambda: to_hugging_face(checkpoint, tmp_path / "to-hf", ExportOptions(), QUIET)),
    ):
        target = tmp_path / kind
        process = start(kind, source if kind == "from-hf" else checkpoint, target, "--workers", "1")
        wait_for_units(process, target, 3)
        process.kill()
        process.communicate()
        kept = journal(target)
        content = target.with_name(kind + ".partial") / "content"
        if damage:
            lost = content / kept[0] if kind == "from-hf" else sorted(content.glob("*.safetensors"))[0]
            data = lost.read_bytes()
            head = 8 + int.from_bytes(data[:8], "little") if kind == "to-hf" else 0
            lost.write_bytes(data[:head] + bytes(len(data) - head))
        adopted: list[str] = []
        adopt = Partial.adopt

        def spy(self: Partial, unit: str, *rest: Any, adopt: Any = adopt, adopted: list[str] = adopted) -> bool:
            found = adopt(self, unit, *rest)
            adopted.extend([unit] * found)
            return found

        with monkeypatch.context() as patch:
            patch.setattr("r1_megatron.checkpoint.convert.journal._boot", lambda: "another one")
            patch.setattr(Partial, "adopt", spy)
            convert()
        assert set(adopted) <= set(kept)
        assert (len(adopted) == len(kept)) == (not damage)
    assert files_of(tmp_path / "from-hf") == files_of(checkpoint)
    assert files_of(tmp_path / "to-hf") == files_of(source)


def test_no_room(source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files makes writes fail in the middle, as a full disk does."""
    target = tmp_path / "checkpoint"
    limited = ["bash", "-c", f"ulimit -f 40; exec {' '.join(COMMAND)} from-hf {source} {target} --quiet"]
    process = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert re.search(r"error: .*checkpoint could not be converted .*File too large.* the same command", process.stderr)
    assert not target.exists()
    assert finish(start("from-hf", source, target))[0] == 0
    assert files_of(target) == files_of(checkpoint)
    with pytest.raises(OSError, match=r"needs 1000000\.00 GB more, but .* GB are free\. Make room"):
        check_room(tmp_path, 10**15)
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: full)
    with pytest.raises(OSError, match=r"GB more, but 0\.00 GB are free"):
        to_hugging_face(checkpoint, tmp_path / "back", ExportOptions(), QUIET)
    assert not (tmp_path / "back").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "sealed").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="sealed is no folder, or read-only"):
        from_hugging_face(source, tmp_path / "sealed" / "out", ImportOptions(), QUIET)


def test_places_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "out", Path("/proc/r1-megatron/out")):
        with pytest.raises(OSError, match="out cannot be written: "):
            from_hugging_face(source, target, ImportOptions(), QUIET)


def test_only_the_same_conversion_goes_on(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    process = start("from-hf", source, target, "--workers", "1")
    wait_for_units(process, target, 2)
    process.send_signal(signal.SIGSTOP)  # still there, and writing
    with pytest.raises(FileExistsError, match=r"checkpoint\.partial is being written by another process"):
        from_hugging_face(source, target, ImportOptions(), QUIET)
    process.kill()
    process.communicate()
    with pytest.raises(FileExistsError, match=r'left by another conversion \(options: .*"keep".*--restart') as refusal:
        from_hugging_face(source, target, ImportOptions(fp8="dequantize"), QUIET)
    assert "plan" in str(refusal.value)
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    with pytest.raises(FileExistsError, match=r"left by another conversion \(source: "):
        from_hugging_face(moved, target, ImportOptions(), QUIET)
    from_hugging_face(moved, target, ImportOptions(restart=True), QUIET)
    back = to_hugging_face(target, tmp_path / "back", ExportOptions(), QUIET)
    assert files_of(back.folder) == files_of(source)


def test_a_unit_whose_source_changed_is_done_again(tmp_path: Path) -> None:
    """The journal by itself: torn lines, changed sources, lost outputs."""
    there = tmp_path / "source"
    there.write_text("one")
    identity = {"plan": "x"}
    first = Partial(tmp_path / "target", identity)
    first.record("a", [str(there)], {"n": 1})
    first.record("b", [], {"n": 2})
    first.close()
    with open(first.folder / "journal.jsonl", "a") as file:
        file.write('{"unit": "c", "sou')
    second = Partial(tmp_path / "target", identity)
    assert second.adopt("a", [str(there)], lambda result: result == {"n": 1})
    assert second.adopt("b", [], lambda result: True) and not second.adopt("c", [], lambda result: True)
    assert not second.adopt("b", [], lambda result: False)
    there.write_text("two and more")
    assert not second.adopt("a", [str(there)], lambda result: True)
    second.record("c", [], {"n": 3})
    second.close()
    third = Partial(tmp_path / "target", identity)
    assert third.adopt("c", [], lambda result: result == {"n": 3})
    (third.content / "file").write_text("whole")
    third.finish()
    assert (tmp_path / "target" / "file").read_text() == "whole" and not third.folder.exists()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        Partial(tmp_path / "target", identity)


def test_sizes_and_memory() -> None:
    assert parse_size("2GB") == 2 * 10**9 and parse_size("1.5 GiB") == 3 * 2**29 and parse_size("300") == 300
    assert parse_size("500mb") == 5 * 10**8
    for text in ("", "GB", "2 parsecs", "-1GB", "1i"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(text)
    assert Resources(2, 2 * 10**9).slice_elements(1000) == 8 << 20
    some = Resources(4, 10**9).slice_elements(100_000)
    assert 4 * some * 32 + 100_000 * 4096 <= 10**9 < 4 * (some + 1) * 32 + 100_000 * 4096
    with pytest.raises(ValueError, match="--max-memory 100MB is too little for 4 workers and 10 tensors: 302MB"):
        Resources(4, 10**8).slice_elements(10)
