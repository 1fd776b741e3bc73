"""The folder of a run: claimed once, never overwritten, readable by itself years later.

::

    config.yaml        the resolved configuration; its presence is the claim
    environment.json   machine, versions, command
    launch.json        written when the run ended: exit code, seconds, peak memory of all ranks
    metrics.jsonl      one line per step            samples.jsonl   sampled rollouts
    tensorboard/       the same metrics             logs/           stderr of every rank
    checkpoints/       weights                      report.html     the run on one page
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
LAUNCH = "launch.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
LOGS = "logs"
CHECKPOINTS = "checkpoints"

# Where the remains of starts that failed before their first result go: failed_starts/1, failed_starts/2, ...
FAILED_STARTS = "failed_starts"


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def claim(path: str | Path, config_yaml: str, environment: dict[str, Any]) -> Path:
    """Make ``path`` the folder of a new run and return it.

    A folder that is absent or empty is taken. So is one whose run failed before it produced anything (no step, no
    sample, no checkpoint), so that a corrected start needs no cleaning up: what that run left is moved to
    ``failed_starts/1``, ``failed_starts/2``, ... Anything else is refused.

    Raises:
        ValueError: the folder holds another run or other files.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir: {folder} is a file. Set output_dir to a folder that does not exist yet.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if _failed_before_any_result(folder):
            _set_aside(folder)
        found = sorted(entry.name for entry in folder.iterdir() if entry.name != FAILED_STARTS)
        if found:
            raise ValueError(_refusal(folder, found))
        # Whoever creates the file owns the folder: two launches at once cannot both succeed.
        with open(folder / CONFIG, "x", encoding="utf-8") as file:
            file.write(config_yaml)
    except FileExistsError:
        raise ValueError(_refusal(folder, [CONFIG])) from None
    except OSError as error:
        raise ValueError(f"output_dir: cannot write to {folder}: {error.strerror}. Set another output_dir.") from error
    write_json(folder / ENVIRONMENT, environment)
    (folder / LOGS).mkdir(exist_ok=True)
    return folder


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run. A checkpoint gets its ``checkpoint.json`` and its name when it is whole."""
    whole = (path for path in Path(folder, CHECKPOINTS).glob("*/checkpoint.json") if path.parent.suffix != ".partial")
    newest = max(whole, key=lambda path: path.stat().st_mtime_ns, default=None)
    return newest.parent if newest else None


def _refusal(folder: Path, found: list[str]) -> str:
    if CONFIG in found or METRICS in found:
        num_steps = _num_lines(folder / METRICS)
        what = f"holds another run ({num_steps} lines in {METRICS}" if num_steps else "holds another run ("
        what += f"{', ' if num_steps else ''}{', '.join(found[:8])}{', ...' if len(found) > 8 else ''})"
    else:
        what = f"is not empty ({', '.join(found[:8])}{', ...' if len(found) > 8 else ''})"
        return f"output_dir: {folder} {what}. Nothing was written. Choose another folder (output_dir=runs/another)."
    return (
        f"output_dir: {folder} {what}. Nothing was written. "
        f"Choose another folder (output_dir=runs/another), or remove this one (rm -r {folder})."
    )


def _failed_before_any_result(folder: Path) -> bool:
    """A run of ours that is over (``launch.json`` is written last), failed, and has nothing that one could miss."""
    try:
        failed = json.loads((folder / LAUNCH).read_text())["exit_code"] != 0
    except (OSError, ValueError, KeyError):
        return False
    results = (folder / METRICS, folder / SAMPLES)
    empty = not any(path.exists() and path.stat().st_size > 0 for path in results)
    return failed and empty and not (folder / CHECKPOINTS).exists() and (folder / CONFIG).is_file()


def _set_aside(folder: Path) -> None:
    aside = folder / FAILED_STARTS
    number = 1 + sum(1 for _ in aside.iterdir()) if aside.is_dir() else 1
    target = aside / str(number)
    target.mkdir(parents=True)
    for entry in list(folder.iterdir()):
        if entry != aside:
            entry.rename(target / entry.name)


def _num_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _umask() -> int:
    """This process's file creation mask (it can only be read by setting it)."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
