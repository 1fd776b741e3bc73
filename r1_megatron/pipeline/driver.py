"""The driver: one node after the other, each in a process of its own, from wherever the pipeline is.

What it promises:

1. A node that is done is never run again; one that was interrupted goes on inside its stage, whatever was killed: a
   rank, the stage, this process, the machine.
2. There is one driver at a time. The lock is held by the stage's process too, so that a driver that was killed is not
   followed by another one while its stage is still at work; that process is told to end, with a checkpoint.
3. A node that fails ends the pipeline, named with its log.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from r1_megatron.pipeline.findings import claims_text, evaluations_of, findings
from r1_megatron.pipeline.page import write_page
from r1_megatron.pipeline.read import Pipeline
from r1_megatron.pipeline.state import Progress, read_state
from r1_megatron.pipeline.store import Job, Provenance, Store
from r1_megatron.telemetry.run_folder import hold
from r1_megatron.telemetry.writers import duration

LOCK_WAIT_S = 60.0
_POLL_S = 0.1
_TAIL_LINES = 15
_PR_SET_PDEATHSIG = 1


def train_command(job: Job) -> Sequence[str]:
    """What runs a node on this machine."""
    return [sys.executable, "-m", "r1_megatron.cli", "train", str(job.config_file)]


def run(
    pipeline: Pipeline,
    command: Callable[[Job], Sequence[str]] = train_command,
    lock_wait_s: float = LOCK_WAIT_S,
) -> int:
    """All nodes that are not done. Answers the exit code of the one that ended otherwise than well, else 0."""
    pipeline.output_dir.mkdir(parents=True, exist_ok=True)
    lock = hold(pipeline.output_dir, lock_wait_s)
    try:
        return _run(pipeline, command, lock)
    finally:
        os.close(lock)


def _run(pipeline: Pipeline, command: Callable[[Job], Sequence[str]], lock: int) -> int:
    store, progress = Store(pipeline), Progress(pipeline.output_dir)
    made: dict[str, Provenance] = {}
    for number, node in enumerate(pipeline.nodes.values(), 1):
        job = store.job(node, made)
        found = store.made(job)
        if found is None:
            _say(f"{node.name}: node {number} of {len(pipeline.nodes)}, stage {node.stage}, in {job.folder}")
            store.begin(job)
            begun = time.monotonic()
            progress.begun(job)
            code = _run_job(command(job), job.log_file, lock)
            if code:
                progress.ended(job, code)
                write_page(pipeline)
                return _tell_end(job, code)
            found = store.settle(job)
            progress.ended(job, 0)
            _say(f"{node.name}: done in {duration(time.monotonic() - begun)}")
        made[node.name] = found
    store.save()
    _say(f"{pipeline.name}: all {len(pipeline.nodes)} nodes are done; {write_page(pipeline)}")
    if pipeline.claims:
        state = read_state(pipeline)
        print("\n".join(claims_text(state, findings(state, evaluations_of(state)))), flush=True)
    return 0


def next_job(pipeline: Pipeline) -> Job | None:
    """The first node that is not done, its configuration written; ``None``: all are."""
    store = Store(pipeline)
    made: dict[str, Provenance] = {}
    for node in pipeline.nodes.values():
        job = store.job(node, made)
        found = store.made(job)
        if found is None:
            pipeline.output_dir.mkdir(parents=True, exist_ok=True)
            store.begin(job)
            store.save()
            return job
        made[node.name] = found
    write_page(pipeline)
    return None


def settle_next(pipeline: Pipeline, name: str) -> None:
    """The first node that is not done has ended well, in a job that a batch script has run.

    Raises:
        ValueError: that is another one, or an artefact is missing.
    """
    job = next_job(pipeline)
    if job is None or job.node.name != name:
        raise ValueError(f"node {name} is not the next one: {job.node.name if job else 'all are done'}.")
    Store(pipeline).settle(job)


def _run_job(command: Sequence[str], log: Path, lock: int) -> int:
    """The exit code of a command; what it says goes to its log and to our output.

    It writes to the log by itself: it must not fail with us. Signals that ask for an end are handed on to it.
    """
    with open(log, "ab") as sink:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C in the terminal reaches us only
            preexec_fn=_end_with_parent(os.getpid()),
        )
        start = sink.tell()
    with _handing_on(process), open(log, "rb") as said:
        said.seek(start)
        while process.poll() is None:
            _pass_on(said.read())
            time.sleep(_POLL_S)
        _pass_on(said.read())
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _pass_on(text: bytes) -> None:
    if text:
        sys.stdout.write(text.decode("utf-8", "replace"))
        sys.stdout.flush()


def _end_with_parent(parent: int) -> Callable[[], None]:
    """In the child: asked to end (SIGTERM, on which a run saves) when the driver is gone, however that was killed."""

    def ask() -> None:
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask


@contextlib.contextmanager
def _handing_on(process: subprocess.Popen) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

    def hand_on(number: int, _frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell_end(job: Job, code: int) -> int:
    what = f"node {job.node.name} (stage {job.node.stage})"
    again = "The same command goes on from there."
    if code in (75, 130, 143, 128 + signal.SIGHUP, 128 + signal.SIGUSR1):
        _say(f"{what} was asked to end (exit code {code}); its log is {job.log_file}. {again}")
        return code
    lines = job.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    tail = "".join(f"\n  | {line}" for line in lines)
    print(f"error: {what} failed with exit code {code}; its log is {job.log_file}:{tail}\n{again}", file=sys.stderr)
    return code


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
