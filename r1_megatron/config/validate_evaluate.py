"""What `evaluate.benchmarks` says that contradicts itself, its files' contents not looked at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from r1_megatron.config.schema import BenchmarkConfig, RunConfig

LEAST_CODE_TIMEOUT_S = 300.0
_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Formats whose questions and grading are their own.
QUESTIONED = ("aime", "math500", "gsm8k", "gpqa", "livecodebench")


def evaluation_problems(cfg: RunConfig) -> Iterator[str]:
    block = cfg.evaluate.block_prompts
    if block is not None and block < 1:
        yield f"evaluate.block_prompts={block} has to be null or at least 1."
    for title, count in Counter(benchmark.title for benchmark in cfg.evaluate.benchmarks).items():
        if count > 1:
            yield f"evaluate.benchmarks: {count} of them are called {title}. Give each a name of its own."
    for number, benchmark in enumerate(cfg.evaluate.benchmarks):
        for problem in _benchmark(cfg, benchmark):
            yield f"evaluate.benchmarks.{number}{problem}"


def _benchmark(cfg: RunConfig, b: BenchmarkConfig) -> Iterator[str]:
    if b.format == "held_out" and b.path is not None:
        yield ".path is set, but prompts of format=held_out are those of `data`. Set path to null, or format=prompts."
    if b.format != "held_out" and b.path is None:
        yield f".path: format={b.format} needs a file, JSONL or parquet."
    if not _TITLE.fullmatch(b.title):
        yield f".name={b.title!r} has to consist of letters, digits, '.', '_' and '-'."
    if b.sources and b.format in QUESTIONED:
        yield f".sources: rows of format={b.format} have no source. Leave it empty."
    for name in ("num_prompts", "max_new_tokens"):
        value = getattr(b, name)
        if value is not None and value < 1:
            yield f".{name}={value} has to be null or at least 1."
    if b.max_new_tokens is not None and b.max_new_tokens > cfg.sampling.max_new_tokens:
        yield (
            f".max_new_tokens({b.max_new_tokens}) exceeds sampling.max_new_tokens({cfg.sampling.max_new_tokens}), for "
            f"which there is room. Raise the latter to {b.max_new_tokens}."
        )
    if b.samples_per_prompt < 1:
        yield f".samples_per_prompt={b.samples_per_prompt} has to be at least 1."
    if b.temperature <= 0:
        yield (
            f".temperature={b.temperature:g} has to be greater than 0: all samples would be the same. For one "
            "completion at temperature 0 there is greedy=true."
        )
    if not 0 < b.top_p <= 1:
        yield f".top_p={b.top_p:g} has to be in (0, 1]; 1 switches it off."
    for name in ("pass_at", "cons_at"):
        outside = [k for k in getattr(b, name) if not 1 <= k <= b.samples_per_prompt]
        if outside:
            yield f".{name}: {outside} are not within 1 and samples_per_prompt({b.samples_per_prompt})."
    if b.cons_at and b.format == "livecodebench":
        yield ".cons_at: programs do not vote. Leave it empty for format=livecodebench."
    if b.format == "livecodebench" and cfg.reward.timeout_s < LEAST_CODE_TIMEOUT_S:
        yield (
            f".format=livecodebench: a program may have hundreds of tests, and reward.timeout_s="
            f"{cfg.reward.timeout_s:g} is the limit of a batch of programs. Set reward.timeout_s="
            f"{LEAST_CODE_TIMEOUT_S:g} or more."
        )
    if b.question is not None and "{problem}" not in b.question:
        yield f".question={b.question[:60]!r} has no {{problem}} in it."
    if b.question is not None and b.format not in QUESTIONED:
        yield f".question is set, but rows of format={b.format} are whole prompts. Set it to null."
    if b.format == "held_out" and b.template is not None:
        yield f".template={b.template}: held-out prompts have data.template({cfg.data.template}). Set it to null."


def evaluation_file_problems(cfg: RunConfig) -> Iterator[str]:
    """What this machine lacks; asked for where benchmarks are about to be read."""
    if cfg.stage != "evaluate":
        return
    for number, benchmark in enumerate(cfg.evaluate.benchmarks):
        path = benchmark.path
        if path is not None and not Path(path).is_file():
            what = "is a folder; a file is needed" if Path(path).is_dir() else "does not exist"
            yield f"evaluate.benchmarks.{number}.path: {path} {what} (seen from {Path.cwd()})."
