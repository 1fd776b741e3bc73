"""The few numbers of a node's run folder that say how it went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1_megatron.telemetry.run_folder import METRICS

# Of the last step that has it.
_OF_STEPS = {
    "train/loss": "loss",
    "critic/score/mean": "reward",
    "response_length/mean": "length",
}
_OF_EVALUATIONS = {
    "eval/loss": "held-out loss",
    "eval/accuracy": "held-out accuracy",
    "eval/sampled_accuracy": "held-out accuracy",
}


@dataclass(frozen=True)
class Figure:
    """``low`` and ``high``: its 95% confidence interval, where there is one; ``benchmark``: which one it is of."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    benchmark: str = ""

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.name} {self.value:,.0f}" if self.value.is_integer() else f"{self.name} {self.value:.3g}"
        return f"{self.name} {100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Figures:
    """``flops``: model FLOPs of training and sampling so far, where the stage counts them."""

    steps: int | None = None
    figures: list[Figure] = field(default_factory=list)
    flops: float = 0.0

    def brief(self) -> str:
        """In one line: of an evaluation the first figure of each benchmark."""
        seen = set()
        shown = []
        for figure in self.figures:
            if figure.benchmark not in seen:
                shown.append(f"{figure.benchmark} {figure}".strip())
            if figure.benchmark:
                seen.add(figure.benchmark)
        return ", ".join(shown)

    def by_benchmark(self) -> dict[str, str]:
        """All figures of each benchmark."""
        found: dict[str, list[str]] = {}
        for figure in self.figures:
            if figure.benchmark:
                found.setdefault(figure.benchmark, []).append(str(figure))
        return {benchmark: ", ".join(shown) for benchmark, shown in found.items()}


def read_figures(folder: Path, stage: str) -> Figures:
    """Of a run that is done or not; what is not there yet is left out."""
    rows = _rows(folder / METRICS)
    if stage == "evaluate":
        return Figures(None, evaluation_figures(folder / "evaluation.json"))
    if stage == "reject":
        return Figures(None, _kept(folder / "manifest.json"), _flops(rows))
    steps = [row for row in rows if "train/updates" in row]
    names = {**_OF_STEPS, **_OF_EVALUATIONS}
    found = []
    for name, shown in names.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found.append(Figure(shown, float(values[-1])))
    return Figures(steps[-1]["step"] if steps else 0, found, _flops(rows))


def _flops(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row.get("perf/train_flops", 0.0) + row.get("perf/rollout_flops", 0.0) for row in rows)


def evaluation_figures(path: Path) -> list[Figure]:
    """Every benchmark's figures."""
    found = []
    for entry in benchmarks_in(path):
        for name, figure in entry["figures"].items():
            found.append(Figure(name, figure["value"], figure["low"], figure["high"], entry["name"]))
    return found


def benchmarks_in(path: Path) -> list[Mapping[str, Any]]:
    """The entries of an ``evaluation.json``; none where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _kept(path: Path) -> list[Figure]:
    """What rejection sampling has drawn and kept, of its ``manifest.json``."""
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))["counts"]["all"]
        return [Figure(name, float(counts[name])) for name in ("sampled", "right", "kept")]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a metrics file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # being written
            continue
    return [row for row in rows if isinstance(row, dict)]
