"""The profile of one step over all ranks, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from r1_megatron.telemetry.trace import TraceSummary

# What the rollout engine says of its time (``rollout/<activity>_s``), the largest of all ranks.
ROLLOUT_ACTIVITIES = ("plan", "wait", "forward", "sample")


@dataclass(frozen=True)
class Peak:
    """TFLOP/s of one rank at best, and where the number is from."""

    tflops: float
    source: str


@dataclass(frozen=True)
class StepProfile:
    """A step on all ranks.

    Attributes:
        device: "cpu" or "cuda".
        ranks: what each rank's trace says.
        memory: peak memory of each rank in bytes: resident so far, on CUDA allocated in this step.
        metrics: the step's line in ``metrics.jsonl``.
    """

    step: int
    device: str
    ranks: Sequence[TraceSummary]
    memory: Sequence[int]
    peak: Peak
    metrics: Mapping[str, float]

    @property
    def mfu(self) -> float:
        """Model FLOPs of the forward and backward passes over ``timing_s/train``, as a share of the peak."""
        return self.metrics["perf/train_tflops_per_gpu"] / self.peak.tflops

    @property
    def bubble_share(self) -> float:
        """Waiting in receives, of the time of the pipeline's passes."""
        return _share([rank.waiting for rank in self.ranks], [rank.passes for rank in self.ranks])

    @property
    def communication_share(self) -> float:
        """Time with communication under way, of the step."""
        return _share([rank.communication for rank in self.ranks], [rank.step for rank in self.ranks])

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        shares = {name: getattr(self, name) for name in ("mfu", "bubble_share", "communication_share")}
        return asdict(self) | shares

    def to_text(self) -> str:
        """The table."""
        seconds = _mean([rank.step for rank in self.ranks])
        return "\n".join(
            [
                f"step {self.step} on {len(self.ranks)} ranks ({self.device}): {seconds:.3f} s under the profiler",
                "",
                *self._phase_lines(seconds),
                "",
                *self._rate_lines(),
                *self._communication_lines(),
                "",
            ]
        )

    def _phase_lines(self, step_seconds: float) -> Iterator[str]:
        yield f"{'phase':<32} {'mean s':>9} {'max s':>9} {'of step':>8}"
        for path in dict.fromkeys(path for rank in self.ranks for path in rank.phases):
            seconds = [rank.phases.get(path, 0.0) for rank in self.ranks]
            yield _row(path, _mean(seconds), max(seconds), step_seconds)
            if path == "rollout":
                for activity in ROLLOUT_ACTIVITIES:
                    yield _row(f"{path}/{activity}", None, self.metrics[f"rollout/{activity}_s"], step_seconds)

    def _rate_lines(self) -> Iterator[str]:
        metrics = self.metrics
        if "rollout/num_tokens" in metrics:
            yield f"rollout: {metrics['rollout/num_tokens']:.0f} tokens, {metrics['rollout/tokens_per_s']:.1f} /s"
        yield (
            f"training: {metrics['perf/train_tokens']:.0f} tokens, {metrics['perf/train_throughput']:.1f} /s, "
            f"{metrics['perf/train_tflops_per_gpu']:.4g} model TFLOP/s a rank"
        )
        yield f"MFU of training: {self.mfu:.1%} of {self.peak.tflops:.4g} TFLOP/s ({self.peak.source})"
        how = "allocated in this step" if self.device == "cuda" else "resident so far"
        yield f"peak memory: {max(self.memory) / 1e9:.2f} GB on the largest rank ({how})"

    def _communication_lines(self) -> Iterator[str]:
        waiting = _mean([rank.waiting for rank in self.ranks])
        yield f"pipeline bubble: {self.bubble_share:.1%} of the passes, {waiting:.3f} s a rank in receives"
        seconds = _mean([rank.communication for rank in self.ranks])
        yield (
            f"communication under way: {self.communication_share:.1%} of the step, {seconds:.3f} s a rank, waiting for "
            "other ranks included"
        )
        for kind in dict.fromkeys(kind for rank in self.ranks for kind in rank.communication_kinds):
            found = [rank.communication_kinds.get(kind, 0.0) for rank in self.ranks]
            yield f"  {kind:<30} {_mean(found):>9.3f} {max(found):>9.3f}"


def _row(path: str, mean: float | None, longest: float, step_seconds: float) -> str:
    """``mean``: ``None`` where only the largest is known."""
    name = "  " * path.count("/") + path.split("/")[-1]
    shown, share = ("", longest) if mean is None else (f"{mean:.3f}", mean)
    return f"{name:<32} {shown:>9} {longest:>9.3f} {share / step_seconds:>8.1%}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(parts: Sequence[float], wholes: Sequence[float]) -> float:
    return sum(parts) / sum(wholes) if sum(wholes) else 0.0
