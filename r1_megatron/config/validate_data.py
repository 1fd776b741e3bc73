"""What contradicts itself in the ``data`` and ``tokenizer`` sections, and which of their files are not there."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path

from r1_megatron.config.schema import DataConfig, DataSourceConfig, RunConfig

# Tasks that make their own problems.
PROCEDURAL = ("chain_sum", "countdown", "bilingual", "translation")
_BILINGUAL = {"bilingual", "translation"}
# Tokenizers that are built on the spot, and the tasks that they write.
TASK_TOKENIZERS = {"chain_sum": {"chain_sum"}, "countdown": {"countdown"}, "bilingual": set(PROCEDURAL)}
_KEYS = ("prompt_key", "label_key", "metadata_key", "response_key", "source_key")
_SUPERVISED_STAGES = ("sft", "distill")


def data_problems(cfg: RunConfig) -> Iterator[str]:
    d = cfg.data
    if not cfg.asks_held_out:
        yield from _tokenizer(cfg)
        return
    yield from _one_or_many(d)
    if d.source == "mixture":
        for number, source in enumerate(d.sources):
            yield from _source_problems(cfg, source, f"data.sources.{number}", source.kind)
        if _wants_held_out(cfg) and all(source.kind == "jsonl" and not source.eval_path for source in d.sources):
            yield (
                "data.sources: none has an eval_path, so there are no held-out prompts. Name a file"
                + ("." if cfg.stage == "evaluate" else ", or set evaluate.num_prompts=0.")
            )
    else:
        yield from _source_problems(cfg, d, "data", d.source)
        if (
            d.source in PROCEDURAL
            and cfg.stage not in (*_SUPERVISED_STAGES, "reject")
            and cfg.evaluate.num_prompts > d.num_eval
        ):
            yield f"evaluate.num_prompts({cfg.evaluate.num_prompts}) exceeds the data.num_eval({d.num_eval}) held out."
    keys = [getattr(d, key) for key in _KEYS]
    if len(set(keys)) != len(keys) or "" in keys:
        yield f"data.{', '.join(_KEYS)} = {', '.join(keys)}: different names are needed."
    yield from _options(cfg)
    yield from _tokenizer(cfg)


def _one_or_many(d: DataConfig) -> Iterator[str]:
    if d.source != "mixture":
        if d.sources:
            yield f"data.sources names {len(d.sources)} sources, but data.source={d.source}. Set data.source=mixture."
        return
    if not d.sources:
        yield "data.source=mixture needs data.sources, a list of what is mixed."
    for name in ("path", "eval_path", "task_options"):
        if getattr(d, name):
            yield f"data.{name} is set, but data.source=mixture. Set it in an entry of data.sources."
    weights = [source.weight for source in d.sources]
    if any(weight is None for weight in weights) and any(weight is not None for weight in weights):
        yield f"data.sources: the weights are {weights}. Give one to every source, or to none (by their rows)."
    for number, weight in enumerate(weights):
        if weight is not None and weight <= 0:
            yield f"data.sources.{number}.weight={weight:g} has to be greater than 0. Take the source out instead."
    names = [source.name or (source.path if source.kind == "jsonl" else source.kind) for source in d.sources]
    for name in sorted({str(name) for name in names if names.count(name) > 1}):
        yield f"data.sources: two are called {name}. Give them different names."


def _source_problems(cfg: RunConfig, d: DataConfig | DataSourceConfig, where: str, kind: str) -> Iterator[str]:
    key = "source" if where == "data" else "kind"
    if kind != "jsonl":
        for name in ("path", "eval_path"):
            if getattr(d, name) is not None:
                yield (
                    f"{where}.{name} is set, but {where}.{key}={kind} makes its own problems. Set {where}.{key}=jsonl."
                )
        for name in ("num_train", "num_eval"):
            if where != "data" and getattr(d, name) < 1:
                yield f"{where}.{name}={getattr(d, name)} has to be at least 1."
        return
    if d.path is None:
        yield f"{where}.{key}=jsonl needs {where}.path, a file with one JSON object per line, or parquet."
    if d.task_options and where != "data":
        yield f"{where}.task_options are those of a procedural task, but {where}.{key}=jsonl. Take them out."
    if where == "data" and d.eval_path is None and _wants_held_out(cfg):
        yield (
            f"{where}.{key}=jsonl: {where}.eval_path is null, so there are no held-out prompts. Name a file"
            + ("." if cfg.stage == "evaluate" else ", or set evaluate.num_prompts=0.")
        )


def _wants_held_out(cfg: RunConfig) -> bool:
    return cfg.stage == "evaluate" or (cfg.is_rl and cfg.evaluate.num_prompts > 0)


def _options(cfg: RunConfig) -> Iterator[str]:
    d = cfg.data
    kinds = {source.kind for source in d.sources} if d.source == "mixture" else {d.source}
    if d.streaming and "jsonl" not in kinds:
        yield "data.streaming=true reads files, and there are none: the tasks make their problems. Set it to false."
    if d.decontaminate_ngram < 1:
        yield f"data.decontaminate_ngram={d.decontaminate_ngram} has to be at least 1."
    if d.min_score_difference < 0:
        yield f"data.min_score_difference={d.min_score_difference:g} has to be at least 0."
    if cfg.sft.mixed_fraction and not kinds & _BILINGUAL:
        yield (
            f"sft.mixed_fraction={cfg.sft.mixed_fraction:g} mixes languages, and only bilingual and translation have "
            f"two; the data is of {', '.join(sorted(kinds))}. Set it to 0."
        )


def _tokenizer(cfg: RunConfig) -> Iterator[str]:
    d, t = cfg.data, cfg.tokenizer
    if t.kind not in TASK_TOKENIZERS:
        if t.path is None:
            what = "a .model file" if t.kind == "sentencepiece" else "a folder or a tokenizer.json"
            yield f"tokenizer.kind={t.kind} needs tokenizer.path, {what}."
        return
    kinds = {source.kind for source in d.sources} if d.source == "mixture" else {d.source}
    # Files say themselves what cannot be written; the tasks' texts are known.
    foreign = kinds & set(PROCEDURAL) - TASK_TOKENIZERS[t.kind]
    if foreign:
        remedy = d.source if d.source in TASK_TOKENIZERS else "bilingual, which writes all tasks"
        yield (
            f"tokenizer.kind={t.kind} is built for data.source={t.kind}, but the data is of "
            f"{', '.join(sorted(foreign))}. Set tokenizer.kind={remedy}."
        )
    if t.path is not None:
        yield f"tokenizer.path is set, but tokenizer.kind={t.kind} is built into the run folder. Set path to null."
    if d.template == "chat":
        yield f"data.template=chat needs a tokenizer with a chat template, and tokenizer.kind={t.kind} has none."


def task_sources(d: DataConfig) -> dict[str, str]:
    """The procedural task of every source that is one, by the source's name."""
    if d.source != "mixture":
        return {d.source: d.source} if d.source in PROCEDURAL else {}
    return {source.name or source.kind: source.kind for source in d.sources if source.kind in PROCEDURAL}


def data_files(cfg: RunConfig) -> dict[str, str]:
    """Every file, or pattern of files, that the data is read from, by the option that names it."""
    d = cfg.data
    if not cfg.asks_held_out:
        return {}
    named: dict[str, str | None] = {}
    if d.source == "jsonl":
        named |= {"data.path": d.path, "data.eval_path": d.eval_path}
    for number, source in enumerate(d.sources if d.source == "mixture" else ()):
        if source.kind == "jsonl":
            named |= {f"data.sources.{number}.{name}": getattr(source, name) for name in ("path", "eval_path")}
    named |= {f"data.decontaminate.{number}": path for number, path in enumerate(d.decontaminate)}
    return {name: path for name, path in named.items() if path is not None}


def data_file_problems(cfg: RunConfig) -> Iterator[str]:
    """Asks this machine."""
    for name, path in data_files(cfg).items():
        if Path(path).is_dir():
            yield f"{name}: {path} is a folder; a JSONL file is needed, or a pattern such as {path}/*.jsonl."
        elif not Path(path).exists() and not glob.glob(path):
            yield f"{name}: {path} does not exist (seen from {Path.cwd()})."
