"""Evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal


@dataclass(frozen=True)
class BenchmarkConfig:
    """A benchmark of ``stage: evaluate``. Sampling is DeepSeek-R1's by default (arXiv 2501.12948v2, section 3: 4 to 64
    samples, T = 0.6, top-p 0.95); what is not said here is the run's own ``sampling``.
    """

    # "aime", "math500", "gsm8k", "gpqa", "livecodebench": rows as those are published (evaluation/formats.py).
    # "prompts": rows as in `data`, "held_out": the held-out prompts of `data`; both are graded by the run's `reward`.
    format: Literal["held_out", "prompts", "aime", "math500", "gsm8k", "gpqa", "livecodebench"] = "prompts"
    # JSONL; null: "held_out" alone has no file.
    path: str | None = None
    # In tables; null: the file's name without its ending.
    name: str | None = None
    # Prompts of these sources (`source` of a row; a procedural task's name); empty: all. Of "held_out" and "prompts".
    sources: tuple[str, ...] = ()
    # The first so many problems; null: all.
    num_prompts: int | None = None
    # What is asked, {problem} in it; null: as is usual for the format. Of formats that are graded by themselves.
    question: str | None = None
    # "chat": the tokenizer's own chat template, the question being the user's message. null: data.template.
    template: Literal["r1_zero", "compact", "none", "chat"] | None = None
    samples_per_prompt: int = 16
    temperature: float = 0.6
    top_p: float = 0.95
    # null: sampling.max_new_tokens, which is the most there may be.
    max_new_tokens: int | None = None
    # One more completion of each problem, at temperature 0.
    greedy: bool = True
    # k of further pass@k, and of cons@k (empty: the majority of all samples). pass@1 is always there.
    pass_at: tuple[int, ...] = ()
    cons_at: tuple[int, ...] = ()

    @property
    def is_as_in_training(self) -> bool:
        """Whether it asks what training asks in between, so that its figures have the same names."""
        return self.format == "held_out" and not self.sources

    @property
    def title(self) -> str:
        """The name in tables and files."""
        if self.name is not None:
            return self.name
        return self.format if self.path is None else PurePath(self.path).stem


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy on held-out prompts: sampled (``samples_per_prompt`` each at the run's temperature) and greedy."""

    # Steps between evaluations; 0: only at the start (not for sft) and at the end.
    interval: int = 0
    num_prompts: int = 256
    samples_per_prompt: int = 1
    # What `stage: evaluate` asks; empty: the held-out prompts as above. Training looks at those alone.
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    # Problems that `stage: evaluate` samples before it keeps their completions; one that is killed draws at most so
    # many again. null: four times what is in flight at once.
    block_prompts: int | None = None
