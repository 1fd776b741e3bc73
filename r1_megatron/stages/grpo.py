"""GRPO with rule rewards: R1-Zero (arXiv 2501.12948), and the same loop for every later reinforcement stage.

    r1-megatron train examples/chain_sum_zero_ep2.yaml

All ranks run this file in step. A step's prompts are cut into ``rl.num_minibatches`` blocks and each block is dealt
round robin to the data-parallel replicas, so the minibatches are the same under every layout.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from r1_megatron.config.schema import RunConfig
from r1_megatron.data.prompts import PromptStream
from r1_megatron.rl.credit import assign_credit, count_loss
from r1_megatron.rl.select import apply_overlong_penalty, select_groups
from r1_megatron.rl.weights import LossCounts
from r1_megatron.stages.evaluate import evaluate_if_due
from r1_megatron.stages.grading import grade
from r1_megatron.stages.setup import Run, open_run
from r1_megatron.telemetry.metrics import Metrics
from r1_megatron.train.objectives import PolicyObjective
from r1_megatron.train.step import train_step
from r1_megatron.types import GradedGroup, Prompt, StepResult, TrainSample

# One minibatch on this rank: its samples, and what it counts on all ranks together.
Minibatch = tuple[list[TrainSample], LossCounts]


class RolloutMismatchError(RuntimeError):
    """Rollout and training disagree about the probability of a sampled token by more than `rl.probs_diff_limit`."""


def run(cfg: RunConfig) -> None:
    """Sample, grade, credit, learn. Each line enters one room."""
    with open_run(cfg) as run:
        prompts = PromptStream(run.train_prompts, cfg.data.seed, cfg.data.shuffle)
        objective = PolicyObjective(cfg.rl, cfg.sampling.temperature)
        refresh_reference(run, step=0)
        evaluate_if_due(run, step=0)
        for step in range(1, cfg.train.steps + 1):
            with run.log.clock("rollout"):
                blocks = deal(prompts.take(cfg.rollout.prompts_per_step), run)
                rollouts = generate(run, blocks)
            with run.log.clock("reward"):
                graded, num_failed = grade_blocks(run, blocks, rollouts)
            with run.log.clock("annotate"):
                minibatches, dropped = assign(run, graded)
                minibatches = annotate(run, minibatches)
            with run.log.clock("train"):
                results = learn(run, step, minibatches, objective)
            metrics = step_metrics(run, graded, dropped, num_failed, minibatches, results)
            run.log.samples(step, sample_rows(run, graded))
            run.log.write(step, metrics)
            check_rollout_match(run, step, metrics)
            refresh_reference(run, step)
            evaluate_if_due(run, step)
            run.save_if_due(step)


def deal(prompts: Sequence[Prompt], run: Run) -> list[list[Prompt]]:
    """This replica's prompts of each minibatch: contiguous blocks of the step, dealt round robin."""
    dp, dp_rank, blocks = run.groups.topology.dp, run.groups.dp_rank, run.cfg.rl.num_minibatches
    size = len(prompts) // blocks
    return [list(prompts[b * size : (b + 1) * size])[dp_rank::dp] for b in range(blocks)]


def generate(run: Run, blocks: Sequence[Sequence[Prompt]]) -> list[list]:
    """Samples of every prompt of this replica, block by block."""
    flat = [prompt for block in blocks for prompt in block]
    with run.policy.gathered():
        return run.engine.generate(
            flat,
            run.cfg.rollout.samples_per_prompt,
            run.cfg.sampling,
            seed=run.cfg.seed,
            policy_version=run.policy.version,
        )


def grade_blocks(run: Run, blocks, rollouts) -> tuple[list[list[GradedGroup]], int]:
    """Graded groups of each block, the penalty for overlong completions included."""
    flat = [prompt for block in blocks for prompt in block]
    groups, num_failed = grade(run, flat, rollouts)
    groups = apply_overlong_penalty(groups, run.cfg.rl, max_new_tokens=run.cfg.sampling.max_new_tokens)
    sizes = [len(block) for block in blocks]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [groups[start : start + size] for start, size in zip(starts, sizes)], num_failed


def assign(run: Run, graded: Sequence[Sequence[GradedGroup]]) -> tuple[list[Minibatch], int]:
    """Advantages and weights; the weights of a minibatch know its tokens on all ranks. Also counts dropped groups."""
    minibatches, num_dropped = [], 0
    for block in graded:
        kept, dropped = select_groups(block, run.cfg.rl)
        num_dropped += len(dropped)
        mine = count_loss(kept, run.cfg.rl)
        totals = torch.tensor([mine.num_sequences, mine.num_tokens], device=run.groups.device)
        dist.all_reduce(totals, group=run.groups.dp)
        counts = LossCounts(*totals.tolist())
        samples = assign_credit(kept, run.cfg.rl, counts, max_new_tokens=run.cfg.sampling.max_new_tokens)
        minibatches.append((samples, counts))
    return minibatches, num_dropped


def annotate(run: Run, minibatches: Sequence[Minibatch]) -> list[Minibatch]:
    """Add the log-probabilities that the loss compares with.

    The old policy's, unless there is a single update (then the forward of that update is the old policy), and the
    reference policy's where there is a KL term.
    """
    rl, temperature = run.cfg.rl, run.cfg.sampling.temperature
    samples = [sample for block, _ in minibatches for sample in block]
    if rl.num_minibatches * rl.inner_epochs > 1:
        old = run.policy.logprobs(samples, temperature)
        samples = [replace(sample, old_logprobs=values) for sample, values in zip(samples, old)]
    if rl.kl_coef:
        assert run.policy.reference is not None, "refresh_reference() comes first"
        with run.policy.using(run.policy.reference):
            reference = run.policy.logprobs(samples, temperature, replay=False)
        samples = [replace(sample, reference_logprobs=values) for sample, values in zip(samples, reference)]
    annotated, start = [], 0
    for block, counts in minibatches:
        annotated.append((samples[start : start + len(block)], counts))
        start += len(block)
    return annotated


def learn(run: Run, step: int, minibatches: Sequence[Minibatch], objective: PolicyObjective) -> list[StepResult]:
    """One optimizer step per minibatch and inner epoch. A minibatch with nothing left to learn is passed over."""
    results = []
    for _ in range(run.cfg.rl.inner_epochs):
        for samples, counts in minibatches:
            if counts.num_tokens == 0:
                continue
            batch = run.policy.pack(samples, counts.num_tokens)
            results.append(train_step(run.policy, batch, objective, counts.num_sequences, step))
    return results


def refresh_reference(run: Run, step: int) -> None:
    """The reference policy is the policy the run starts from, replaced every `rl.reference_refresh_steps`."""
    rl = run.cfg.rl
    if rl.kl_coef and (step == 0 or (rl.reference_refresh_steps and step % rl.reference_refresh_steps == 0)):
        run.policy.reference = run.policy.snapshot()


def step_metrics(run: Run, graded, num_dropped: int, num_failed: int, minibatches, results) -> dict[str, float]:
    """The step in numbers, over all ranks."""
    mine = Metrics()
    if run.groups.is_replica_writer:
        groups = [group for block in graded for group in block]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = [
            float(r)
            for g in groups
            for r in g.rewards - run.cfg.rl.overlong_penalty * g.components.get("overlong", 0.0)
        ]
        mine.distribution("critic/score", scores, ("mean", "max", "min"))
        mine.distribution("critic/rewards", [float(r) for g in groups for r in g.rewards], ("mean", "max", "min"))
        for group in groups:
            for name, values in group.components.items():
                mine.distribution(f"reward/{name}", values, ("mean",))
        lengths = [rollout.num_response for rollout in rollouts]
        mine.distribution("response_length", lengths, ("mean", "max", "min"))
        for rollout in rollouts:
            mine.mean("response_length/clip_ratio", rollout.finish == "length")
        mine.distribution("prompt_length", [rollout.prompt_len for rollout in rollouts], ("mean", "max"))
        for samples, _ in minibatches:
            for sample in samples:
                advantage = float(sample.advantages[sample.loss_mask][0]) if sample.loss_mask.any() else 0.0
                tokens = int(sample.loss_mask.sum())
                mine.mean("critic/advantages/mean", advantage, tokens)
        mine.distribution("critic/advantages", _advantages(minibatches), ("std",))
        mine.sum("rl/dropped_groups", num_dropped)
        mine.sum("reward/failed", num_failed)
        mine.sum("perf/total_num_tokens", sum(len(rollout.tokens) for rollout in rollouts))
        for name, value in run.engine.metrics.items():
            (mine.sum if name.endswith(("num_tokens", "per_s")) else mine.max)(name, value)
    metrics = mine.reduce(_gather).result()
    for name in sorted({name for result in results for name in result.metrics}):
        values = [result.metrics[name] for result in results]
        metrics[name] = largest(values) if name.endswith("_max") else sum(values) / len(values)
    if results:
        metrics["train/loss"] = sum(result.loss for result in results) / len(results)
    metrics["train/updates"] = float(sum(result.updated for result in results))
    metrics["train/skipped_updates"] = float(sum(not result.updated for result in results))
    metrics.update(_device_memory())
    return metrics


def sample_rows(run: Run, graded):
    """This replica's completions, as `samples.jsonl` wants them."""
    for block in graded:
        for group in block:
            for rollout, reward, i in zip(group.rollouts, group.rewards, range(len(group.rewards))):
                yield {
                    "prompt": group.prompt.text,
                    "response": rollout.text,
                    "label": group.prompt.label,
                    "reward": float(reward),
                    "components": {name: float(values[i]) for name, values in group.components.items()},
                    "finish": rollout.finish,
                    "prompt_tokens": rollout.prompt_len,
                    "response_tokens": rollout.num_response,
                }


def check_rollout_match(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Stop, or warn, when rollout and training have become two policies."""
    limit = run.cfg.rl.probs_diff_limit
    difference = metrics.get("training/rollout_probs_diff_max")
    if limit is None or difference is None or difference <= limit:  # NaN is above every limit
        return
    text = (
        f"step {step}: training/rollout_probs_diff_max={difference:.3g} is above rl.probs_diff_limit={limit:.3g}: "
        "the training forward gives some sampled token another probability than the rollout did. "
        "With bf16 raise the limit or set rollout.router_replay=true and rl.tis_cap; in fp32 it is a fault."
    )
    if run.cfg.rl.on_probs_diff == "stop":
        raise RolloutMismatchError(text)
    warnings.warn(text, stacklevel=2)
    run.log.note(f"warning: {text}")


def largest(values: Sequence[float]) -> float:
    """The maximum, NaN if there is one: a NaN must not pass for a small difference."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _advantages(minibatches: Sequence[Minibatch]) -> list[float]:
    """Of every loss token."""
    return [float(a) for samples, _ in minibatches for sample in samples for a in sample.advantages[sample.loss_mask]]


def _gather(metrics: Metrics) -> list[Metrics]:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, metrics)
    return everyone


def _device_memory() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    peak = torch.cuda.max_memory_allocated() / 1e9
    return {"perf/max_memory_allocated_gb": peak} if math.isfinite(peak) else {}
