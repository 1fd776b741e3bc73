"""An evaluation graded again from its completions: with mended rewards, or a benchmark's corrected labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from r1_megatron.config.load import load_config
from r1_megatron.config.schema import RunConfig
from r1_megatron.evaluation.completions import Line, gather_completions, write_completions
from r1_megatron.evaluation.formats import BY_REWARD, Problem, benchmarks_of, load_problems
from r1_megatron.evaluation.grading import Judge, terms_of, verdicts_of
from r1_megatron.evaluation.report import as_text, benchmark_table
from r1_megatron.evaluation.results import build_evaluation, read_evaluation
from r1_megatron.rewards.base import Grader, build_rewards
from r1_megatron.telemetry import run_folder
from r1_megatron.types import Prompt

MOST_WORKERS = 8


def regrade(folder: str | Path, workers: int | None = None) -> str:
    """Write verdicts, ``evaluation.json`` and ``evaluation.md`` of a run folder anew; answers what to say.

    Labels are those of the benchmarks' files; of prompts that the run's reward grades, those that were kept.

    Raises:
        ValueError: the folder holds no evaluation that is done, or a file asks other questions than were answered.
    """
    folder = Path(folder)
    cfg = load_config(folder / run_folder.CONFIG)
    checkpoint = read_evaluation(folder)["checkpoint"]
    benchmarks = {benchmark.title: benchmark for benchmark in benchmarks_of(cfg)}
    if any(one.format in BY_REWARD for one in benchmarks.values()):
        _check_terms(cfg)
    problems = {title: load_problems(one) for title, one in benchmarks.items() if one.format not in BY_REWARD}
    lines = gather_completions(folder)
    if workers is not None and workers < 1:
        raise ValueError(f"--workers={workers}: at least 1.")
    count = workers or min(MOST_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        parts = [lines[i::count] for i in range(count)]
        done = list(pool.map(lambda part: _grade(cfg, problems, max(checkpoint["step"], 1), part), parts))
    graded: list[Line] = [{}] * len(lines)
    for i, part in enumerate(done):
        graded[i::count] = part
    changed = sum(a is not b for old, new in zip(lines, graded) for a, b in zip(old["right"], new["right"]))
    evaluation = build_evaluation(cfg, list(benchmarks.values()), graded, checkpoint)
    write_completions(folder, graded)
    run_folder.write_atomic(folder / run_folder.EVALUATION_PAGE, as_text(evaluation))
    run_folder.write_json(folder / run_folder.EVALUATION, evaluation)
    total = sum(len(line["texts"]) for line in lines)
    return f"{total:,} completions graded, {changed:,} verdicts changed\n\n{benchmark_table(evaluation)}"


def _check_terms(cfg: RunConfig) -> None:
    models = [term.function for term in cfg.reward.terms if term.function == "reward_model"]
    if models:
        raise ValueError(
            "reward.terms: a reward model has to be loaded to grade. Evaluate again (stage=evaluate), into another "
            "output_dir."
        )


def _grade(cfg: RunConfig, problems: dict[str, list[Problem]], step: int, lines: Sequence[Line]) -> list[Line]:
    """One grader's share, in order."""
    benchmarks = {benchmark.title: benchmark for benchmark in benchmarks_of(cfg)}
    by_reward = any(benchmarks[line["benchmark"]].format in BY_REWARD for line in lines)
    judge = Judge([one for one in benchmarks.values() if one.format not in BY_REWARD], cfg.reward)
    grader = build_rewards(cfg.graded_by) if by_reward else None
    try:
        graded = []
        for line in lines:
            format = benchmarks[line["benchmark"]].format
            if format in BY_REWARD:
                assert grader is not None
                graded.append(_by_reward(grader, line, step))
            else:
                problem = _problem_of(line, problems[line["benchmark"]])
                prompt = Prompt(line["index"], line["prompt"], (), problem.label, problem.metadata)
                verdicts = judge.grade(format, prompt, line["texts"])
                graded.append({**line, "key": problem.key, "groups": problem.groups, **verdicts._asdict()})
        return graded
    finally:
        judge.close()
        if grader is not None:
            grader.close()


def _by_reward(grader: Grader, line: Line, step: int) -> Line:
    prompt = Prompt(line["index"], line["prompt"], (), line["label"], line["metadata"], line["source"])
    texts = line["texts"]
    grades = grader.grade([prompt] * len(texts), texts, step=step, num_tokens=line["num_tokens"])
    graded = {"rewards": grades.total.tolist(), "terms": terms_of(grades.components)}
    return {**line, **verdicts_of(grades.components, texts)._asdict(), **graded}


def _problem_of(line: Line, problems: Sequence[Problem]) -> Problem:
    """The problem in the line's place. Its label may have been corrected, its question not."""
    index = line["index"]
    if index < len(problems) and problems[index].question in line["prompt"]:
        return problems[index]
    raise ValueError(
        f"evaluate.benchmarks ({line['benchmark']}): problem {index} of its file is not the one that was answered. "
        "Bring the file back that the completions were drawn for."
    )
