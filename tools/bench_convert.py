"""How fast the converter is against ``cp`` of the same bytes, and how much memory all its processes take together.

    python tools/bench_convert.py                     # 6 GB: DeepSeek-V3's width in FP8, few layers; 20 GB of disk
    python tools/bench_convert.py --rounds 1 -- --preset tiny num_layers=4

In turn, on one disk: copy the source, convert it, copy the checkpoint, convert it back. The first round is for memory
and not timed: watching takes time, and a virtual machine's memory may have to be fetched from its host by whoever comes
first. Of the others the medians count. A conversion is timed from the start of its process to its end, with its files
on the disk. ``cp`` leaves its in the page cache, so it is also timed with the ``sync`` that makes it equal. ``ratio``
is cp's seconds divided by ours. At the end the files that came back are compared with the source.

Memory is the largest sum, over all processes of a conversion, of their proportional set sizes (Linux's PSS, which
counts shared pages once), less that of one bare interpreter. torch is not counted as the interpreter's own: bytes that
stay as they are pass through without it.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import psutil

from r1_megatron.checkpoint.convert.work import Resources
from tools.measure import cpu_name, table
from tools.memory_watch import MemoryWatch

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def bare_interpreter() -> int:
    """PSS of a Python that has imported nothing."""
    code = "import sys; print('there', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return psutil.Process(process.pid).memory_full_info().pss


def timed(command: list[str], watch: bool = False) -> tuple[float, int]:
    """Seconds and, if watched, peak memory. The disk has nothing to do when it begins."""
    os.sync()
    began = time.perf_counter()
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT)
    watcher = MemoryWatch(process.pid)
    if watch:
        watcher.start()
    if process.wait() != 0:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - began, watcher.peak


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of ``cp``, and with the sync behind it. The copy is removed."""
    seconds, _ = timed(["cp", "-r", str(source), str(target)])
    began = time.perf_counter()
    os.sync()
    with_sync = seconds + time.perf_counter() - began
    shutil.rmtree(target)
    return seconds, with_sync


def num_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def same_files(left: Path, right: Path) -> bool:
    """Whether every file of ``left`` is in ``right``, byte by byte."""
    names = [path.relative_to(left).as_posix() for path in left.rglob("*") if path.is_file()]
    return filecmp.cmpfiles(left, right, names, shallow=False)[0] == names


def main() -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/bench_convert"), help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-memory", default="2GB")
    parser.add_argument("--workers", default=str(Resources().num_workers))
    parser.add_argument("--keep", action="store_true", help="the generated checkpoint, for the next time")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("make", nargs="*", help="after --: options of tools/make_checkpoint.py")
    arguments = parser.parse_args()
    folder = arguments.folder
    source, checkpoint, back, copied = (folder / name for name in ("source", "checkpoint", "back", "copied"))
    folder.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        make = [
            sys.executable,
            str(ROOT / "tools" / "make_checkpoint.py"),
            str(source),
            *(arguments.make or ["--no-repeats"]),
        ]
        subprocess.run(make, check=True, env=ENVIRONMENT)
    bare = bare_interpreter()
    options = ["--quiet", "--workers", arguments.workers, "--max-memory", arguments.max_memory]
    found: dict[str, dict[str, list[float]]] = {}
    memory: dict[str, int] = {}
    for number in range(arguments.rounds + 1):
        shutil.rmtree(back, ignore_errors=True)  # the page cache should have room for what is being measured
        for kind, here, there in (("from-hf", source, checkpoint), ("to-hf", checkpoint, back)):
            shutil.rmtree(there, ignore_errors=True)
            cp, cp_sync = copy(here, copied)
            convert = [sys.executable, "-m", "r1_megatron.cli", "convert", kind, str(here), str(there), *options]
            seconds, peak = timed(convert, watch=number == 0)
            if number == 0:
                memory[kind] = max(0, peak - bare)
                continue
            for name, value in (("cp", cp), ("cp_sync", cp_sync), ("seconds", seconds)):
                found.setdefault(kind, {}).setdefault(name, []).append(value)
            print(f"round {number} {kind}: cp {cp:.2f} s, with sync {cp_sync:.2f} s, convert {seconds:.2f} s")
    alike = same_files(source, back)
    rows, figures = [], {}
    for kind, values in found.items():
        middle = {name: statistics.median(each) for name, each in values.items()}
        size = num_bytes(source if kind == "from-hf" else checkpoint)
        figures[kind] = {**middle, "bytes": size, "memory": memory[kind]}
        figures[kind] |= {
            "ratio": middle["cp"] / middle["seconds"],
            "ratio_sync": middle["cp_sync"] / middle["seconds"],
        }
        rows.append(
            [
                kind,
                f"{size / 1e9:.2f} GB",
                f"{middle['cp']:.2f} s",
                f"{middle['cp_sync']:.2f} s",
                f"{middle['seconds']:.2f} s",
                f"{size / middle['seconds'] / 1e6:.0f} MB/s",
                f"{figures[kind]['ratio']:.2f}",
                f"{figures[kind]['ratio_sync']:.2f}",
                f"{figures[kind]['memory'] / 1e6:.0f} MB",
            ]
        )
    print(
        f"{cpu_name()}, {arguments.workers} workers, --max-memory {arguments.max_memory}, load {os.getloadavg()[0]:.1f}"
    )
    head = ["", "bytes", "cp", "cp + sync", "convert", "", "ratio", "ratio + sync", "memory"]
    print(table(head, rows))
    print(f"bare interpreter: {bare / 1e6:.0f} MB; files that came back are the source's: {alike}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    for path in (checkpoint, back, *([] if arguments.keep else [source])):
        shutil.rmtree(path)
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())
