"""Everything a run folder says, as far as it can be read."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from r1_megatron.config.load import dump_config
from r1_megatron.config.presets import PRESETS
from r1_megatron.config.schema import ModelConfig, RunConfig
from r1_megatron.telemetry import run_folder
from r1_megatron.telemetry.failures import FAILURES
from r1_megatron.telemetry.report.columns import Columns, Row, read_lines

MAX_SAMPLES = 12
MAX_RANK_ROWS = 200
PLAN, PREFLIGHT = "plan.json", "preflight.json"


@dataclass(frozen=True)
class Start:
    """One start of the run. Times are Unix seconds, NaN where unknown; ``outcome`` is one of ``STATES``."""

    number: int
    began: float
    ended: float
    outcome: str
    what: str
    ranks: int | None
    host: str
    num_redone: int = 0


@dataclass(frozen=True)
class SavedCheckpoint:
    name: str
    step: int | None
    time: float
    num_bytes: int
    can_resume: bool


@dataclass
class RunRecord:
    """A run folder in memory.

    Attributes:
        state: one of "finished", "running", "interrupted", "failed", "lost" (it ended and nobody knows how).
        starts: oldest first; the last one is the one that the folder's own files are of.
        problems: what could not be read, in words.
    """

    folder: Path
    columns: Columns
    config_text: str = ""
    config: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    launched: Row = field(default_factory=dict)
    state: str = "running"
    starts: list[Start] = field(default_factory=list)
    checkpoints: list[SavedCheckpoint] = field(default_factory=list)
    failures: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    ranks: list[Row] = field(default_factory=list)
    rank_rows: list[Row] = field(default_factory=list)
    plan: Row = field(default_factory=dict)
    preflight: Row = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def option(self, name: str, otherwise: Any = None) -> Any:
        """A field of the configuration by its dotted name."""
        value: Any = self.config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return otherwise if value is None else value

    @property
    def name(self) -> str:
        return str(self.option("name", self.folder.resolve().name))

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; ``None``: as many as ``epochs`` makes of its rows."""
        sections = {"sft": "sft", "distill": "sft", "reward_model": "reward_model"}
        section = sections.get(self.option("stage", ""))
        return None if section and self.option(f"{section}.epochs") else self.option("train.steps")

    @property
    def last_time(self) -> float:
        """When the last line of metrics was written."""
        known = [time for time in self.columns.times if math.isfinite(time)]
        return max(known, default=math.nan)


def read_run(folder: Path, columns: Columns) -> RunRecord:
    run = RunRecord(folder, columns)
    if columns.num_bad:
        run.problems.append(f"{run_folder.METRICS}: {_lines(columns.num_bad)} could not be read")
    path = folder / run_folder.CONFIG
    run.config_text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    run.config = _yaml(run)
    run.environment = _json(run, folder / run_folder.ENVIRONMENT)
    run.launched = _json(run, folder / run_folder.LAUNCH)
    run.plan, run.preflight = (_json(run, _newest(folder, name)) for name in (PLAN, PREFLIGHT))
    run.failures = _rows(run, folder / FAILURES)
    run.samples = _rows(run, folder / run_folder.SAMPLES, MAX_SAMPLES)
    _read_ranks(run)
    run.checkpoints = list(_checkpoints(folder))
    run.state = _state(run)
    run.starts = _starts(run)
    return run


def differences(config: Row) -> list[tuple[str, Any, Any]]:
    """The fields of a configuration that are neither the schema's defaults nor the preset's: name, value, default.

    A field that this version does not know has ``...`` as its default.
    """
    section = config.get("model")
    preset = section.get("preset") if isinstance(section, dict) else None
    model = ModelConfig(**PRESETS[preset]) if isinstance(preset, str) and preset in PRESETS else ModelConfig()
    defaults = _flat(yaml.safe_load(dump_config(RunConfig(model=model))))
    found = []
    for name, value in _flat(config).items():
        default = defaults.get(name, ...)
        if value != default and name != "model.preset":
            found.append((name, value, default))
    return found


def _flat(tree: Any, prefix: str = "") -> Row:
    """Dotted names; lists and free mappings (``task_options``) are values."""
    flat: Row = {}
    for name, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict) and not name.endswith("options"):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _yaml(run: RunRecord) -> Row:
    try:
        config = yaml.safe_load(run.config_text) if run.config_text else {}
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        run.problems.append(f"{run_folder.CONFIG} is no configuration")
        return {}
    return config


def _json(run: RunRecord, path: Path) -> Row:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    run.problems.append(f"{path.relative_to(run.folder)} could not be read")
    return {}


def _newest(folder: Path, name: str) -> Path:
    """The run folder's own, or the last one that a batch job has left under ``jobs/``."""
    found = [path for path in (folder / name, *folder.glob(f"jobs/**/{name}")) if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=folder / name)


def _rows(run: RunRecord, path: Path, most: int | None = None, always: bytes = b"") -> list[Row]:
    rows, num_bad = read_lines(path, most, always)
    if num_bad:
        run.problems.append(f"{path.name}: {_lines(num_bad)} could not be read")
    return rows


def _lines(count: int) -> str:
    return f"{count} line{'s' if count > 1 else ''}"


def _read_ranks(run: RunRecord) -> None:
    """The rows behind the last list of ranks: a run may go on under another layout."""
    rows = _rows(run, run.folder / run_folder.RANKS, MAX_RANK_ROWS, always=b'{"ranks"')
    for row in rows:
        if isinstance(row.get("ranks"), list):
            run.ranks, run.rank_rows = row["ranks"], []
        elif "step" in row:
            run.rank_rows.append(row)
    num_ranks = len(run.ranks)
    run.rank_rows = [
        row for row in run.rank_rows if all(len(v) == num_ranks for v in row.values() if isinstance(v, list))
    ]


def _checkpoints(folder: Path):
    for path in sorted((folder / run_folder.CHECKPOINTS).glob(f"*/{run_folder.CHECKPOINT}")):
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            num_bytes = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
            yield SavedCheckpoint(
                path.parent.name, described.get("step"), path.stat().st_mtime, num_bytes, "state" in described
            )
        except (OSError, ValueError, AttributeError):
            continue  # being removed, or not ours


def _state(run: RunRecord) -> str:
    if run.launched:
        return _outcome(run.launched)
    steps = run.total_steps
    if any(checkpoint.name == "final" and steps in (None, checkpoint.step) for checkpoint in run.checkpoints):
        return "finished"
    return "running" if run_folder.is_locked(run.folder) else "lost"


def _outcome(launched: Row) -> str:
    if launched.get("interrupted_by") or launched.get("exit_code") == 75:
        return "interrupted"
    return "failed" if launched.get("failure") or launched.get("exit_code") else "finished"


def _starts(run: RunRecord) -> list[Start]:
    folders = [path for path in (run.folder / run_folder.STARTS).glob("*") if path.name.isdigit()]
    earlier = sorted(folders, key=lambda path: int(path.name))
    answer = []
    for number, folder in enumerate(earlier, 1):
        launched = _json(run, folder / run_folder.LAUNCH)
        redone, _ = read_lines(folder / run_folder.METRICS)
        steps = {row.get("step") for row in redone if "train/updates" in row}
        outcome = _outcome(launched) if launched else "lost"
        answer.append(
            _start(number, folder, _json(run, folder / run_folder.ENVIRONMENT), launched, outcome, len(steps))
        )
    answer.append(_start(len(answer) + 1, run.folder, run.environment, run.launched, run.state, 0))
    # A start of which nobody wrote the end was over when the next one began.
    for i, (start, after) in enumerate(pairwise(answer)):
        if math.isnan(start.ended):
            written = [t for t in run.columns.times if start.began <= t < after.began]
            answer[i] = Start(**{**vars(start), "ended": max(written, default=start.began)})
    if math.isnan(answer[-1].ended):
        ended = time.time() if run.state == "running" else run.last_time
        answer[-1] = Start(**{**vars(answer[-1]), "ended": ended})
    return answer


def _start(number: int, folder: Path, environment: Row, launched: Row, outcome: str, num_redone: int) -> Start:
    try:
        began = datetime.strptime(str(environment.get("started")), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        began = math.nan
    seconds = launched.get("seconds")
    ended = began + seconds if isinstance(seconds, (int, float)) else math.nan
    if launched and math.isnan(ended):
        ended = (folder / run_folder.LAUNCH).stat().st_mtime
    what = launched.get("failure") or (f"ended by {by}" if (by := launched.get("interrupted_by")) else "")
    return Start(
        number,
        began,
        ended,
        outcome,
        str(what),
        launched.get("ranks"),
        str(environment.get("hostname", "")),
        num_redone,
    )
