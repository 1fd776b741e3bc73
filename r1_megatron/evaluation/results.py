"""From graded completions to ``evaluation.json``: figures with intervals, groups, and the counts they are made of.

Nothing in the file depends on when, where or under which layout the completions were drawn, so two evaluations of the
same checkpoint with the same configuration are the same, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from r1_megatron.config.schema import BenchmarkConfig, RunConfig
from r1_megatron.evaluation.completions import Line
from r1_megatron.evaluation.estimators import Votes, consensus_at_k, pass_at_k
from r1_megatron.evaluation.formats import GROUPS, QUESTIONS
from r1_megatron.evaluation.intervals import CONFIDENCE, share_interval
from r1_megatron.telemetry.run_folder import EVALUATION

FORMAT = 1
# A breakdown with more parts than this is none.
MAX_PARTS = 24

INTERVALS = (
    f"{CONFIDENCE:.0%} confidence, problems taken as a sample of all that could be asked: Wilson's score interval; "
    "where a problem has several samples, with the effective sample size of its clustering by problem and Student's t "
    "(Dean and Pagano, 2015). Paired differences: Agresti and Min (2005) with Student's t. Not corrected for the "
    "number of comparisons."
)
CONSENSUS = (
    "cons@k: the answer that most of k samples give, the mean over all choices of k samples; ties are broken at random "
    "(their expectation is taken), samples without an answer do not vote."
)


@dataclass(frozen=True)
class Result:
    """What was counted for one problem. Samples that nothing judged right or wrong are left out of the counts.

    Attributes:
        votes: one entry per answer that samples gave.
        greedy: 1 or 0; ``None``: not asked, or not judged.
        num_stopped: samples that ended by themselves; ``num_tokens``: of all samples together.
        terms: mean over the samples of each term of the run's reward, if that has graded them.
    """

    index: int
    key: str
    groups: dict[str, str]
    num_samples: int
    num_right: int
    votes: tuple[Votes, ...]
    greedy: int | None
    num_drawn: int
    num_stopped: int
    num_tokens: int
    terms: dict[str, float]


def results_of(lines: Iterable[Line]) -> list[Result]:
    """Of the lines of one benchmark, by problem."""
    by_index: dict[int, dict[str, Line]] = {}
    for line in lines:
        by_index.setdefault(line["index"], {})[line["pass"]] = line
    return [_result(index, by_index[index]) for index in sorted(by_index)]


def _result(index: int, passes: dict[str, Line]) -> Result:
    line, greedy = passes["sampled"], passes.get("greedy")
    judged = [(right, vote) for right, vote in zip(line["right"], line["votes"], strict=True) if right is not None]
    given, right_given = Counter(vote for _, vote in judged), Counter(vote for right, vote in judged if right)
    votes = tuple(Votes(given[vote], right_given[vote]) for vote in sorted(v for v in given if v is not None))
    answered = None if greedy is None else greedy["right"][0]
    return Result(
        index,
        line["key"],
        line["groups"],
        len(judged),
        sum(right for right, _ in judged),
        votes,
        None if answered is None else int(answered),
        len(line["texts"]),
        line["finish"].count("stop"),
        sum(line["num_tokens"]),
        _means(line.get("terms", {})),
    )


def _means(terms: dict[str, list[float | None]]) -> dict[str, float]:
    known = {name: [value for value in values if value is not None] for name, values in terms.items()}
    return {name: sum(values) / len(values) for name, values in known.items() if values}


def _shares(results: Sequence[Result]) -> list[str]:
    """Terms of the reward that are shares, as figures: format, language consistency."""
    names = {name for result in results for name in result.terms}
    return [f"term:{name}" for name in sorted(names) if all(0 <= result.terms.get(name, 0) <= 1 for result in results)]


def figure_names(benchmark: BenchmarkConfig) -> list[str]:
    """Of a benchmark, in the order of the table."""
    n = benchmark.samples_per_prompt
    consensus = (benchmark.cons_at or (n,)) if n > 1 and benchmark.format != "livecodebench" else ()
    names = [f"pass@{k}" for k in sorted({1, *benchmark.pass_at})] + [f"cons@{k}" for k in sorted({*consensus})]
    return [*names, "greedy"] if benchmark.greedy else names


def figure_values(results: Sequence[Result], name: str) -> dict[str, float]:
    """A figure's value per problem, by the problem's key; problems with too few judged samples are left out."""
    if name == "greedy":
        return {result.key: float(result.greedy) for result in results if result.greedy is not None}
    if name.startswith("term:"):
        term = name.removeprefix("term:")
        return {result.key: result.terms[term] for result in results if term in result.terms}
    kind, _, number = name.partition("@")
    k = int(number)
    enough = [result for result in results if result.num_samples >= k]
    if kind == "pass":
        return {result.key: pass_at_k(result.num_samples, result.num_right, k) for result in enough}
    return {result.key: consensus_at_k(result.votes, result.num_samples, k) for result in enough}


def figures_of(results: Sequence[Result], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """``{"pass@1": {"value": ..., "low": ..., "high": ..., "num_problems": ...}, ...}``."""
    found = {}
    for name in names:
        values = list(figure_values(results, name).values())
        if values:
            most = max(result.num_drawn for result in results)
            interval = share_interval(np.clip(values, 0.0, 1.0).tolist(), 1 if name == "greedy" else most)
            mean = float(np.mean(values))
            found[name] = {"value": mean, "low": interval.low, "high": interval.high, "num_problems": len(values)}
    return found


def breakdown(results: Sequence[Result], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures by each of :data:`GROUPS` that has several values: ``{"subject": {"Algebra": {...}, ...}}``."""
    found: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
        parts: dict[str, list[Result]] = {}
        for result in results:
            if group in result.groups:
                parts.setdefault(result.groups[group], []).append(result)
        if 1 < len(parts) <= MAX_PARTS:
            found[group] = {
                part: {"num_problems": len(some), "figures": figures_of(some, names)}
                for part, some in sorted(parts.items())
            }
    return found


def evaluate_benchmark(cfg: RunConfig, benchmark: BenchmarkConfig, lines: Iterable[Line]) -> dict[str, Any]:
    """A benchmark's entry of ``evaluation.json``."""
    results = results_of(lines)
    names = [*figure_names(benchmark), *_shares(results)]
    drawn = sum(result.num_drawn for result in results)
    return {
        "name": benchmark.title,
        "format": benchmark.format,
        "path": benchmark.path,
        "sha256": None if benchmark.path is None else _digest(Path(benchmark.path)),
        "settings": settings_of(cfg, benchmark),
        "num_problems": len(results),
        "num_judged": sum(result.num_samples > 0 for result in results),
        "figures": figures_of(results, names),
        "mean_tokens": sum(result.num_tokens for result in results) / drawn,
        "stopped": sum(result.num_stopped for result in results) / drawn,
        "groups": breakdown(results, names),
        "problems": [{**asdict(result), "votes": [list(votes) for votes in result.votes]} for result in results],
    }


def settings_of(cfg: RunConfig, benchmark: BenchmarkConfig) -> dict[str, Any]:
    """What decides a benchmark's samples beside the checkpoint."""
    chosen = benchmark.question or QUESTIONS.get(benchmark.format)
    return {
        "sources": list(benchmark.sources),
        "samples_per_prompt": benchmark.samples_per_prompt,
        "temperature": benchmark.temperature,
        "top_p": benchmark.top_p,
        "top_k": cfg.sampling.top_k,
        "min_p": cfg.sampling.min_p,
        "max_new_tokens": benchmark.max_new_tokens or cfg.sampling.max_new_tokens,
        "stop": list(cfg.sampling.stop),
        "template": benchmark.template or cfg.data.template,
        "question": chosen,
        "seed": cfg.seed,
    }


def build_evaluation(
    cfg: RunConfig, benchmarks: Sequence[BenchmarkConfig], lines: Sequence[Line], checkpoint: dict[str, Any]
) -> dict[str, Any]:
    """``evaluation.json``. ``checkpoint``: path, stage, step and the digest of its description."""
    return {
        "format": FORMAT,
        "name": cfg.name,
        "checkpoint": checkpoint,
        "model": {"architecture": cfg.model.architecture, "preset": cfg.model.preset, "bf16": cfg.train.bf16},
        "intervals": INTERVALS,
        "consensus": CONSENSUS,
        "benchmarks": [
            evaluate_benchmark(cfg, one, [line for line in lines if line["benchmark"] == one.title])
            for one in benchmarks
        ],
    }


def metrics_of(evaluation: dict[str, Any], lines: Iterable[Line]) -> dict[str, float]:
    """For ``metrics.jsonl``: ``<benchmark>/<figure>``, and of held-out prompts what training calls them."""
    found: dict[str, float] = {}
    for entry in evaluation["benchmarks"]:
        if entry["format"] == "held_out" and not entry["settings"]["sources"]:
            found |= _as_in_training(entry, [line for line in lines if line["benchmark"] == entry["name"]])
        else:
            found |= {f"{entry['name']}/{name}": figure["value"] for name, figure in entry["figures"].items()}
            found |= {f"{entry['name']}/{name}": entry[name] for name in ("mean_tokens", "stopped")}
    return found


def _as_in_training(entry: dict[str, Any], lines: Iterable[Line]) -> dict[str, float]:
    found = {"num_prompts": float(entry["num_problems"])}
    for name in ("sampled", "greedy"):
        drawn = [line for line in lines if line["pass"] == name]
        judged = [right for line in drawn for right in line["right"] if right is not None]
        finish = [finish for line in drawn for finish in line["finish"]]
        if judged:
            found[f"{name}_accuracy"] = sum(judged) / len(judged)
        if finish:
            found[f"{name}_reward"] = sum(reward for line in drawn for reward in line["rewards"]) / len(finish)
            found[f"{name}_stopped"] = finish.count("stop") / len(finish)
            found[f"{name}_length"] = sum(length for line in drawn for length in line["num_tokens"]) / len(finish)
    return found


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """An ``evaluation.json``, or that of a run folder.

    Raises:
        ValueError: there is none, or it is not one of this version.
    """
    path = Path(path)
    file = path / EVALUATION if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be read ({error.strerror}). Name a run folder of stage: evaluate that is done, or its "
            f"{EVALUATION}."
        ) from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{file}: no evaluation of this version (format {FORMAT}). Make it again: evaluate regrade.")
    return found


def results_in(entry: dict[str, Any]) -> list[Result]:
    """The counts of a benchmark's entry as they were."""
    return [
        Result(**{**problem, "votes": tuple(Votes(*votes) for votes in problem["votes"])})
        for problem in entry["problems"]
    ]


def digest_of_checkpoint(folder: str | Path) -> str:
    """Of its ``checkpoint.json``, which lists every file's checksum."""
    return _digest(Path(folder) / "checkpoint.json")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
