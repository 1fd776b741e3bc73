"""Rewards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

# Reward functions of ours; others are named by import path.
REWARD_NAMES = (
    "accuracy", "code", "countdown", "format", "language_consistency", "token_count", "reward_model",
)  # fmt: skip


@dataclass(frozen=True)
class RewardTermConfig:
    """One reward function: a name of ours (accuracy, countdown, format, ...) or ``package.module:function``."""

    function: str = "accuracy"
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    # The first and the last step at which it counts; null: to the end. An evaluation grades with the terms of its step.
    from_step: int = 0
    until_step: int | None = None
    # It counts in the last so many steps only (of train.steps), instead of from_step. An evaluation counts them back
    # from its own train.steps, as a run's file that is evaluated has it.
    last_steps: int | None = None
    # The sources whose prompts it counts for (`source` of a row; a procedural task's name); none: all.
    sources: tuple[str, ...] = ()
    # What of a completion it sees: all of it, the text behind the last </think>, or what stands before that.
    on: Literal["response", "summary", "reasoning"] = "response"
    # Stage `reject` keeps a completion only where this term is at least so much; null: it does not decide.
    at_least: float | None = None


@dataclass(frozen=True)
class CodeOptions:
    """``options`` of a reward term ``code``: unit tests on the program in a response, in a sandbox."""

    # 1 where all tests are passed, else 0; or the share of tests that are passed.
    score: Literal["all", "share"] = "all"
    # Path of the programs' interpreter, Python 3.8 or newer; null: the one of the run, or, where root has given up its
    # rights for the sandbox and could not run that, /usr/bin/python3.
    python: str | None = None
    # A test's CPU time in whole seconds (on the clock it has three times as much and 2 s), its memory, the
    # processes and threads that it may start, and its files, which are gone with it.
    time_s: float = 6.0
    memory_mb: int = 1024
    processes: int = 8
    disk_mb: int = 16
    # Sandboxes at a time for each rank that grades; null: its share of the node's cores.
    parallel: int | None = None


@dataclass(frozen=True)
class RewardConfig:
    terms: tuple[RewardTermConfig, ...] = (RewardTermConfig("accuracy"), RewardTermConfig("format"))
    # Seconds one call may take, which is a rank's whole batch: of plug-ins, of `code`, and of accuracy's computer
    # algebra. Other terms of ours are bounded by the length of the text, reward models by parallel.timeout_s.
    timeout_s: float = 60.0
    # A reward that raises, hangs or answers nonsense ends the run ("fail"), or counts zero and is counted ("zero").
    on_error: Literal["fail", "zero"] = "fail"

    def over(self, steps: int) -> RewardConfig:
        """The same for a run of ``steps`` steps: every term says its first one, none how many of the last."""
        return replace(
            self, terms=tuple(replace(term, from_step=first_step(term, steps), last_steps=None) for term in self.terms)
        )


def first_step(term: RewardTermConfig, steps: int) -> int:
    """The first step at which a term counts in a run of ``steps`` steps."""
    return term.from_step if term.last_steps is None else steps - term.last_steps + 1
