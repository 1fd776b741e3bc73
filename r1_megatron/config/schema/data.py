"""Tokenizer and data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TokenizerConfig:
    """``sentencepiece``: a ``.model`` file. ``huggingface``: a folder or a ``tokenizer.json``.

    ``chain_sum``, ``countdown`` and ``bilingual`` build their own small sentencepiece model into the run folder:
    nothing to download. The first two write printable ASCII, ``bilingual`` also the words of its task and of
    ``translation``: it writes all.
    """

    kind: Literal["sentencepiece", "huggingface", "chain_sum", "countdown", "bilingual"] = "chain_sum"
    path: str | None = None
    # Stop token; null: the tokenizer's own end of sentence.
    eos_token: str | None = None


@dataclass(frozen=True)
class DataSourceConfig:
    """One of the sources that ``data.source: mixture`` mixes: files, or a procedural task."""

    kind: Literal["jsonl", "chain_sum", "countdown", "bilingual", "translation"] = "jsonl"
    # What rewards and reports call it, where a row does not say so itself; empty: the task, or the path.
    name: str = ""
    # Its share of what is drawn, relative to the others'. null for all: by their numbers of rows, so that each row
    # comes once an epoch.
    weight: float | None = None
    path: str | None = None
    eval_path: str | None = None
    # null: as in `data`.
    prompt_key: str | None = None
    label_key: str | None = None
    metadata_key: str | None = None
    response_key: str | None = None
    source_key: str | None = None
    num_train: int = 4096
    num_eval: int = 256
    task_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from. ``path``: JSONL or parquet, one file or a pattern such as ``part-*.jsonl``, with
    ``prompt``, ``label``, ``metadata``; verl's rows, chat messages and ShareGPT are known too (`data/formats.py`).
    """

    # "jsonl": files. "mixture": what `sources` names.
    source: Literal["jsonl", "chain_sum", "countdown", "bilingual", "translation", "mixture"] = "chain_sum"
    path: str | None = None
    eval_path: str | None = None
    sources: tuple[DataSourceConfig, ...] = ()
    # Names of a row's fields; a dot goes into an object (reward_model.ground_truth).
    prompt_key: str = "prompt"
    label_key: str = "label"
    metadata_key: str = "metadata"
    response_key: str = "response"
    source_key: str = "source"
    # "r1_zero": the paper's plain template; "compact": "User: ... Assistant:" for small models; "none"; "chat": the
    # tokenizer's chat template, which chat messages go through in any case.
    template: Literal["r1_zero", "compact", "none", "chat"] = "compact"
    # Of prompts for rollouts; how long a supervised row may be: sft.max_tokens.
    max_prompt_tokens: int = 256
    # A prompt that is too long ends the run ("error") or is left out and counted ("skip").
    on_long_prompt: Literal["error", "skip"] = "error"
    on_duplicate_prompt: Literal["error", "skip"] = "error"
    # Read training rows when they are needed instead of holding them: files may be larger than memory. The ranks share
    # the work of examining them at the start. JSONL only; the order is the same.
    streaming: bool = False
    shuffle: bool = True
    seed: int = 1
    # Evaluation files (or patterns) of which training rows may repeat nothing: rows that have a run of so many words in
    # common with a question (of scripts without spaces: characters) are left out and counted (10: DeepSeek-R1,
    # arXiv 2501.12948v2).
    decontaminate: tuple[str, ...] = ()
    decontaminate_ngram: int = 10
    # Scored preference pairs whose averaged scores differ by this much or less are left out; those whose averages say
    # the opposite are turned round or left out (R1: 1; see data/preferences.py).
    min_score_difference: float = 0.0
    inverted_pairs: Literal["reorient", "drop"] = "reorient"
    # Procedural tasks: how many distinct problems, how many of them are held out, and the task's own options.
    num_train: int = 4096
    num_eval: int = 256
    task_options: dict[str, Any] = field(default_factory=dict)
