"""A step of GRPO in numbers and samples, over all ranks: what the log writes."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from r1_megatron.stages.setup import Run
from r1_megatron.stages.thinking import observe
from r1_megatron.telemetry.metrics import Metrics
from r1_megatron.types import GradedGroup, StepResult, TrainSample

# What replicas add up of what their engines say, by how it ends, and what a mean is of. Of the rest the largest counts.
_SUMMED = ("num_tokens", "per_s", "preemptions", "num_drafts", "num_draws")
_PER = {"rollout/draft_acceptance": "rollout/num_drafts", "rollout/tokens_per_draw": "rollout/num_draws"}


@dataclass(frozen=True)
class Minibatch:
    """The samples of one optimizer step on this rank; the counts are over all ranks.

    ``num_tokens`` counts tokens that carry loss, ``num_sequences`` all sequences. ``groups``: what the samples are
    from, rollout by rollout.
    """

    samples: list[TrainSample]
    num_tokens: int
    num_sequences: int
    groups: Sequence[GradedGroup] = ()


class StepReport:
    """Collects what happens on the way through a step, on this rank.

    Attributes:
        replaced: groups without variance in whose place others were sampled, ``num_resamples`` times.
        engine_metrics: of each call of the engine; empty: of its last one.
        divergences: from the reference policy, as they were taken off the reward.
    """

    def __init__(self, run: Run):
        self._run = run
        self.num_dropped = 0
        self.num_failed = 0
        self.num_expired_tokens = 0
        self.num_resamples = 0
        self.max_new_tokens = 0
        self.errors: tuple[str, ...] = ()
        self.replaced: list[GradedGroup] = []
        self.engine_metrics: list[dict[str, float]] = []
        self.divergences: list[np.ndarray] = []

    def metrics(
        self, graded: Sequence[Sequence[GradedGroup]], minibatches: Sequence[Minibatch], results: Sequence[StepResult]
    ) -> dict[str, float]:
        """The step's metrics (names in ``telemetry/catalogue.py``). Collective; also shows what failed and was passed.

        A stage that does not learn has no ``minibatches``, and hears of no updates.
        """
        mine = Metrics()
        if self._run.groups.is_replica_writer:
            self._of_rollouts(mine, [group for block in graded for group in block])
            self._of_samples(mine, [sample for minibatch in minibatches for sample in minibatch.samples])
            self._of_passes(mine, minibatches)
        if torch.cuda.is_available():
            mine.max("perf/max_memory_allocated_gb", torch.cuda.max_memory_allocated() / 1e9)
        everyone: list[tuple[Metrics, tuple[str, ...]]] = [(mine, ())] * dist.get_world_size()
        dist.all_gather_object(everyone, (mine, self.errors if self._run.grader is not None else ()))
        metrics = mine.reduce(lambda _: [part for part, _ in everyone]).result()
        for error in (error for _, errors in everyone for error in errors):
            self._run.log.note(f"reward failed, counted as zero: {error}")
        for problem in (result.problem for result in results if result.problem):
            self._run.log.note(f"update skipped: {problem}")
        return metrics | (self._of_updates(results) if minibatches else {})

    def sample_rows(self, graded: Sequence[Sequence[GradedGroup]]) -> Iterator[dict[str, Any]]:
        """This replica's completions, as `samples.jsonl` wants them."""
        for group in (group for block in graded for group in block):
            for i, (rollout, reward) in enumerate(zip(group.rollouts, group.rewards)):
                yield {
                    "prompt": group.prompt.text,
                    "response": rollout.text,
                    "label": group.prompt.label,
                    "reward": float(reward),
                    "components": {
                        name: float(values[i]) for name, values in group.components.items() if not np.isnan(values[i])
                    },
                    "finish": rollout.finish,
                    "prompt_tokens": rollout.prompt_len,
                    "response_tokens": rollout.num_response,
                }

    def _of_rollouts(self, mine: Metrics, groups: Sequence[GradedGroup]) -> None:
        penalty = self._run.cfg.rl.overlong_penalty
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = [group.rewards - penalty * group.components.get("overlong", 0.0) for group in groups]
        mine.distribution("critic/score", _flat(scores), ("mean", "max", "min"))
        mine.distribution("critic/rewards", _flat(group.rewards for group in groups), ("mean", "max", "min"))
        for group in groups:
            for name, values in group.components.items():
                mine.distribution(f"reward/{name}", _flat([values[~np.isnan(values)]]), ("mean",))
            mine.sum("reward/ungraded", num_ungraded(group))
            self._of_source(mine, group)
        mine.distribution("response_length", [rollout.num_response for rollout in rollouts], ("mean", "max", "min"))
        observe(mine, "aha/", [rollout.text for rollout in rollouts])
        mine.distribution("prompt_length", [rollout.prompt_len for rollout in rollouts], ("mean", "max"))
        for rollout in rollouts:
            mine.mean("response_length/clip_ratio", rollout.finish == "length")
            if rollout.versions is not None:
                age = rollout.policy_version - rollout.versions
                mine.mean("rollout/stale_tokens_fraction", float((age > 0).mean()), weight=rollout.num_response)
                mine.max("rollout/staleness_max", float(age.max()))
        mine.sum("rl/dropped_groups", self.num_dropped + len(self.replaced))
        if self._run.cfg.rl.zero_variance_groups == "resample":
            mine.max("rl/resamples", self.num_resamples)
        mine.sum("reward/failed", self.num_failed)
        mine.sum("perf/total_num_tokens", sum(len(rollout.tokens) for rollout in rollouts))
        mine.sum("perf/rollout_flops", sum(self._flops_of(group) for group in groups))
        if self._run.cfg.sampling.length_switches:
            mine.max("rollout/max_new_tokens", self.max_new_tokens)
        engine = of_several_calls(self.engine_metrics or [self._run.engine.metrics])
        for name, value in engine.items():
            if name in _PER:
                mine.mean(name, value, weight=engine[_PER[name]])
            else:
                (mine.sum if name.endswith(_SUMMED) else mine.max)(name, value)
        if self.num_expired_tokens:
            mine.sum("rollout/cancelled_num_tokens", self.num_expired_tokens)

    def _flops_of(self, group: GradedGroup) -> int:
        """Model FLOPs of sampling a group: its prompt once, every token of its responses but the last ones, which
        nothing follows."""
        flops, prompt = self._run.policy.flops, len(group.prompt.tokens)
        return flops.forward(prompt) + sum(flops.forward(one.num_response - 1, prompt) for one in group.rollouts)

    def _of_source(self, mine: Metrics, group: GradedGroup) -> None:
        """Of the sources that a reward term names: how each fares on its own."""
        source = group.prompt.source
        if any(source in term.sources for term in self._run.cfg.reward.terms):
            name = f"source/{source.replace('/', '_')}"
            mine.distribution(f"{name}/rewards", _flat([group.rewards]), ("mean",))
            lengths = [rollout.num_response for rollout in group.rollouts]
            mine.distribution(f"{name}/response_length", lengths, ("mean",))

    def _of_samples(self, mine: Metrics, samples: Sequence[TrainSample]) -> None:
        mine.distribution("critic/advantages", _flat(sample.advantages[sample.loss_mask] for sample in samples))
        mine.distribution("actor/reward_kl_penalty", _flat(self.divergences), ("mean",))

    def _of_passes(self, mine: Metrics, minibatches: Sequence[Minibatch]) -> None:
        """Tokens and model FLOPs of this replica's samples in all forward and backward passes.

        The tokens are those of the sequences. The FLOPs are what they need: a prompt that its samples share counts
        once (and no more where a family was cut, so that several microbatches compute it).
        """
        policy, epochs = self._run.policy, self._run.cfg.rl.inner_epochs
        for samples in (minibatch.samples for minibatch in minibatches if minibatch.num_tokens):
            lengths, shared = [len(sample.tokens) for sample in samples], policy.shared_tokens(samples)
            mine.sum("perf/train_tokens", epochs * sum(lengths))
            mine.sum("perf/shared_tokens", epochs * sum(shared))
            mine.sum("perf/train_flops", epochs * policy.flops.training(lengths, shared))

    @staticmethod
    def _of_updates(results: Sequence[StepResult]) -> dict[str, float]:
        """Means over the updates that were made; they are the same on every rank."""
        made = [result for result in results if result.updated]
        metrics: dict[str, float] = {}
        for name in sorted({name for result in made for name in result.metrics}):
            values = [result.metrics[name] for result in made]
            metrics[name] = largest(values) if name.endswith("_max") else sum(values) / len(values)
        if made:
            metrics["train/loss"] = sum(result.loss for result in made) / len(made)
        metrics["train/updates"] = float(len(made))
        metrics["train/skipped_updates"] = float(len(results) - len(made))
        return metrics


def num_ungraded(group: GradedGroup) -> int:
    """Completions for which no term counts, at this step and for this source: their reward is zero for nothing."""
    terms = [values for name, values in group.components.items() if name != "overlong"]
    return int(np.isnan(terms).all(axis=0).sum()) if terms else 0


def of_several_calls(calls: Sequence[dict[str, float]]) -> dict[str, float]:
    """The engine's metrics of several calls as those of one."""
    if len(calls) == 1:
        return dict(calls[0])
    drawing = [call for call in calls if call["rollout/num_tokens"]]
    seconds = sum(call["rollout/num_tokens"] / call["rollout/tokens_per_s"] for call in drawing)
    merged: dict[str, float] = {}
    for name in {name: None for call in calls for name in call}:
        values = [call.get(name, 0.0) for call in calls]
        weight = "rollout/num_forwards" if name == "rollout/batch_mean" else _PER.get(name)
        if name == "rollout/tokens_per_s":
            merged[name] = sum(call["rollout/num_tokens"] for call in calls) / seconds if seconds else 0.0
        elif weight is not None:
            weights = [call.get(weight, 0.0) for call in calls]
            merged[name] = sum(map(operator.mul, values, weights)) / max(sum(weights), 1.0)
        elif name.endswith(("_peak", "_bytes")):
            merged[name] = max(values)
        else:
            merged[name] = sum(values)
    return merged


def largest(values: Sequence[float]) -> float:
    """The maximum, NaN if there is one: a NaN must not pass for a small difference."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _flat(arrays) -> list[float]:
    return [float(value) for array in arrays for value in array]
