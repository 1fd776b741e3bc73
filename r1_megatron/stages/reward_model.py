"""Reward models: one number for a whole answer, read at its last token, learned from what was preferred or allowed.

    r1-megatron train examples/chain_sum_reward_model.yaml

``reward_model.objective: pairs`` learns from two answers to one prompt, the better one first (Bradley-Terry);
``pointwise`` from answers that are safe or not. DeepSeek-R1 trains one of each kind: helpfulness from pairs, safety
from single answers (arXiv 2501.12948v2). The model is any policy's trunk under a value head
(`model/value_head.py`), on the same layouts; a policy's checkpoint starts one with a fresh head. The run is so many
steps long (``train.steps``) or so many passes over the rows (``reward_model.epochs``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch.distributed as dist

from r1_megatron.config.schema import RewardModelConfig, RunConfig
from r1_megatron.data.loading import counted
from r1_megatron.data.preferences import PreferencePair, SafetyExample
from r1_megatron.rl.calibration import calibration_error
from r1_megatron.stages.evaluate import end_step, evaluate_at_start
from r1_megatron.stages.judgements import Judged, JudgementStream, read_judgements
from r1_megatron.stages.roll_backs import rolls_back
from r1_megatron.stages.setup import Run, data_share, open_run
from r1_megatron.stages.step_profile import profiled_steps
from r1_megatron.train.step import train_step
from r1_megatron.train.value_objectives import ScoreObjective, bradley_terry, pointwise, scored
from r1_megatron.types import TrainSample


def run(cfg: RunConfig) -> None:
    """Read, score, learn."""
    objective = ScoreObjective(bradley_terry if cfg.reward_model.objective == "pairs" else pointwise)
    with open_run(cfg) as run:
        assert run.judgements is not None
        rows = run.checkpoints.track("judgements", JudgementStream(run.judgements, cfg.reward_model, cfg.data))
        held_out = held_out_judgements(run)
        evaluation = functools.partial(evaluate_scores, held_out=held_out[: cfg.evaluate.num_prompts])
        evaluate_at_start(run, evaluation)
        for step in profiled_steps(run):
            with run.log.clock("data"):
                batch = rows.of_step(step)
                mine = batch[run.groups.replica :: run.groups.topology.num_replicas]
                samples = [sample for row in mine for sample in samples_of(row, cfg.reward_model, 1.0 / len(batch))]
            with run.log.clock("train"):
                packed = run.policy.pack(samples, num_tokens=len(batch))
                result = train_step(run.policy, packed, objective, sequences_in(batch), step)
            if rolls_back(run, step, [result]):
                continue
            lengths = [len(tokens) for row in batch for tokens in sequences_of(row)]
            metrics = result.metrics | {
                "train/loss": result.loss,
                "train/updates": float(result.updated),
                "train/skipped_updates": float(not result.updated),
                "reward_model/epoch": rows.epochs,
                "perf/total_num_tokens": float(sum(lengths)),
                "perf/train_tokens": float(sum(lengths)),
                "perf/train_flops": float(run.policy.flops.training(lengths)),
            }
            run.log.write(step, metrics | run.pace.metrics(step) | run.readings.of_step(step))
            if result.problem:
                run.log.note(f"update skipped: {result.problem}")
            if end_step(run, step, evaluation):
                break


def held_out_judgements(run: Run) -> Sequence[Judged]:
    """The rows of ``data.eval_path``, if it is said."""
    if not run.cfg.data.eval_path:
        return []
    rows = read_judgements(run.cfg, run.tokenizer, data_share(run.cfg), "data.eval_path")
    if rows.left_out:
        run.log.note(f"data.eval_path: {len(rows)} rows; left out: {counted(rows.left_out)}")
    return rows


def sequences_of(row: Judged) -> Sequence[np.ndarray]:
    """The token sequences that a row is about."""
    return (row.chosen, row.rejected) if isinstance(row, PreferencePair) else (row.tokens,)


def sequences_in(batch: Sequence[Judged]) -> int:
    return sum(len(sequences_of(row)) for row in batch)


def samples_of(row: Judged, cfg: RewardModelConfig, weight: float) -> list[TrainSample]:
    """A pair's two sequences, which stay together, or a row's one; ``weight`` is that of the row's loss in the step."""
    if isinstance(row, SafetyExample):
        return [scored(row.tokens, row.prompt_len, (weight, float(row.safe)))]
    margin = cfg.margin + cfg.margin_per_score * (row.difference or 0.0)
    chosen = scored(row.chosen, row.prompt_len, (weight, margin))
    return [chosen, scored(row.rejected, row.prompt_len, (weight, margin), joined=True)]


def evaluate_scores(
    run: Run, step: int, stop: Callable[[], bool] | None = None, *, held_out: Sequence[Judged]
) -> dict[str, float]:
    """Scores of held-out rows in numbers. Collective over all ranks.

    ``accuracy``: pairs whose better answer has the higher score (equal ones count a half), or rows on the right side
    of 0. ``margin``: what the better answer has more. ``calibration_error``: how far the probabilities that the scores
    stand for, sigmoid of a margin or of a score, are from what came true; a pair is asked about in a fixed but
    arbitrary order, for "the first one is better" would always be true.
    """
    if not held_out:
        return {}
    count, mine = run.groups.topology.num_replicas, run.groups.replica
    sequences = [[scored(tokens, row.prompt_len) for tokens in sequences_of(row)] for row in held_out[mine::count]]
    values = iter(run.policy.values([sample for row in sequences for sample in row]))
    found = [tuple(float(next(values)[-1]) for _ in row) for row in sequences]
    everyone: list[list[tuple[float, ...]]] = [found] * count
    if count > 1:
        dist.all_gather_object(everyone, found, group=run.groups.replicas)
    scores = np.array([everyone[i % count][i // count] for i in range(len(held_out))])
    results = score_results(scores, np.array([getattr(row, "safe", True) for row in held_out], dtype=bool))
    run.log.evaluation(step, results)
    return {f"eval/{name}": value for name, value in results.items()}


def score_results(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Of pairs, ``scores [n, 2]`` (the better one first), or of rows, ``[n, 1]`` with their labels."""
    is_pairs = scores.shape[1] == 2
    gap = scores[:, 0] - scores[:, 1] if is_pairs else np.where(labels, scores[:, 0], -scores[:, 0])
    asked = np.arange(len(gap)) % 2 == 0 if is_pairs else labels
    probabilities = 1.0 / (1.0 + np.exp(-np.where(asked, gap, -gap)))
    results = {
        "num_rows": float(len(scores)),
        "accuracy": float(np.mean((gap > 0) + 0.5 * (gap == 0))),
        "loss": float(np.mean(np.logaddexp(0.0, -gap))),
        "score": float(np.mean(scores)),
        "calibration_error": calibration_error(probabilities, asked.astype(float)),
    }
    return results | ({"margin": float(np.mean(gap))} if is_pairs else {})
