"""Supervised rows: a prompt and the response to imitate, for the stages that learn from given responses."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from r1_megatron.config.schema import DataConfig, SFTConfig
from r1_megatron.data.conversations import Demonstration, LossOn, encode_conversation
from r1_megatron.data.decontamination import EvaluationTexts, evaluation_texts_of
from r1_megatron.data.formats import SupervisedRow, supervised_row, text_of
from r1_megatron.data.loading import ALONE, Decoded, Rows, Share, check_length, load_rows
from r1_megatron.data.order import RowOrder, epoch_order
from r1_megatron.data.prompts import normalized
from r1_megatron.data.sources import Source, sources_of, weights_of
from r1_megatron.data.tasks import Task
from r1_megatron.data.tasks.base import stable_hash
from r1_megatron.data.tokenizers import Tokenizer, token_problem


@dataclass(frozen=True)
class TaskTraces:
    """Demonstrations that a procedural task writes as they are asked for: a new one for every place in the stream."""

    task: Task
    problems: Sequence[Any]
    cfg: DataConfig
    tokenizer: Tokenizer
    corrupt_fraction: float = 0.0
    malformed_fraction: float = 0.0
    mixed_fraction: float = 0.0

    def __len__(self) -> int:
        return len(self.problems)

    def write(self, problem: int, place: int) -> Demonstration:
        """A pure function of (``data.seed``, place) and the problem."""
        chosen = self.problems[problem]
        response = self.task.demonstration(
            chosen,
            random.Random(stable_hash("demonstration", self.cfg.seed, place)),
            self.corrupt_fraction,
            self.malformed_fraction,
            self.mixed_fraction,
        )
        return encode_demonstration(self.task.prompt_text(chosen), response, self.cfg, self.tokenizer)


@dataclass(frozen=True)
class Demonstrations:
    """What a supervised stage learns from, and what it holds out.

    Attributes:
        parts: the sources: rows of files, or traces of a task.
        order: which row comes where in the endless stream.
        held_out: never learned from.
        left_out: how many rows are not used, by reason.
    """

    parts: tuple[Rows[Demonstration] | TaskTraces, ...]
    order: RowOrder
    held_out: Sequence[Demonstration] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Of an epoch; of a task's traces: its problems."""
        return self.order.num_rows

    def at(self, place: int) -> Demonstration:
        """The row of a place in the stream, the same on every rank and whenever it is asked for."""
        source, row = self.order.at(place)
        part = self.parts[source]
        return part.write(row, place) if isinstance(part, TaskTraces) else part[row]


def build_demonstrations(
    cfg: DataConfig,
    sft: SFTConfig,
    tokenizer: Tokenizer,
    vocab_size: int | None,
    max_tokens: int,
    num_held_out: int = 0,
    share: Share = ALONE,
) -> Demonstrations:
    """The supervised rows of all sources of a run.

    Args:
        max_tokens: longest row, prompt and response together.
        num_held_out: rows that are not learned from, of each source in proportion, all rows of a prompt or none; of a
            task: traces of held-out problems.
        share: of this rank in the work on streamed files; collective.

    Raises:
        ValueError: names every bad row with what is wrong, or nothing is left to learn from.
    """
    texts = evaluation_texts_of(cfg)
    parts: list[Rows[Demonstration] | TaskTraces] = []
    held_out: list[Demonstration] = []
    left_out = Counter[str]()
    noise = (sft.corrupt_fraction, sft.malformed_fraction, sft.mixed_fraction)
    sources = sources_of(cfg)
    for number, source in enumerate(sources):
        wanted = num_held_out * (number + 1) // len(sources) - num_held_out * number // len(sources)
        if (task := source.task) is not None:
            parts.append(TaskTraces(task, task.train, source.cfg, tokenizer, *noise))
            kept_out = TaskTraces(task, task.eval, source.cfg, tokenizer, *noise)
            order = RowOrder([len(kept_out)], None, source.cfg.seed, True) if wanted else None
            held_out += [kept_out.write(order.at(place)[1], place) for place in range(wanted)] if order else []
            continue
        rows = _load(source, tokenizer, vocab_size, max_tokens, sft.loss_on, texts, share)
        learned, kept = split_by_prompt(rows, wanted, cfg.seed)
        if not learned:
            raise ValueError(
                f"sft.held_out_rows={num_held_out} leaves none of the {len(rows)} rows of "
                f"{source.cfg.path} to learn from. Lower it."
            )
        left_out.update(rows.left_out)
        parts.append(learned)
        held_out += kept
    order = RowOrder([len(part) for part in parts], weights_of(cfg), cfg.seed, cfg.shuffle)
    return Demonstrations(tuple(parts), order, held_out, dict(left_out))


def load_demonstrations(
    path: str,
    cfg: DataConfig,
    tokenizer: Tokenizer,
    vocab_size: int | None,
    max_tokens: int,
    loss_on: LossOn = "last_turn",
) -> Rows[Demonstration]:
    """Read rows ``{"prompt": text or chat messages, "response": text}``, or chat messages that end with an answer.

    Args:
        max_tokens: longest row. Longer rows are an error or left out, by ``data.on_long_prompt``; the same prompt may
            come several times.

    Raises:
        ValueError: names every bad line with what is wrong.
    """
    source = Source(replace(cfg, path=str(path)), "", "data")
    return _load(source, tokenizer, vocab_size, max_tokens, loss_on, None, ALONE)


def _load(
    source: Source,
    tokenizer: Tokenizer,
    vocab_size: int | None,
    max_tokens: int,
    loss_on: LossOn,
    texts: EvaluationTexts | None,
    share: Share,
) -> Rows[Demonstration]:
    cfg = source.cfg
    if cfg.path is None:
        raise ValueError(f"{source.where}.path: source jsonl needs a file. Set it, or name a task instead.")
    decode = demonstration_decoder(cfg, tokenizer, vocab_size, max_tokens, loss_on, texts)
    rows = load_rows(
        cfg.path,
        f"{source.where}.path",
        lambda row: decode(supervised_row(row.fields, cfg)),
        streaming=cfg.streaming,
        share=share,
        on_duplicate="keep",
    )
    if not rows:
        reasons = "".join(f"; {count} {reason}" for reason, count in rows.left_out.items())
        raise ValueError(
            f"{cfg.path}: no demonstrations of at most {max_tokens} tokens{reasons}. Give at least one row."
        )
    return rows


def demonstration_decoder(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    vocab_size: int | None,
    max_tokens: int,
    loss_on: LossOn,
    texts: EvaluationTexts | None,
) -> Callable[[SupervisedRow], Decoded]:
    def decode(row: SupervisedRow) -> Decoded:
        if texts is not None:
            texts.leave_out(text_of(row.prompt), row.response)
        found = encode_conversation(row.prompt, row.response, cfg.template, tokenizer, loss_on)
        if problem := token_problem(found.tokens, tokenizer, vocab_size):
            raise ValueError(problem)
        check_length(len(found.tokens), max_tokens, cfg)
        return Decoded(found, normalized(row.prompt))

    return decode


def split_by_prompt(
    rows: Rows[Demonstration], count: int, seed: int
) -> tuple[Rows[Demonstration], Sequence[Demonstration]]:
    """``rows`` without, and those of, some prompts that have ``count`` rows together, or more by the last one's.

    A prompt's rows stay together: its other answers would give a held-out one away. The choice is a pure function of
    the prompts' order and the seed.
    """
    if not count:
        return rows, ()
    _, first, group = np.unique(rows.keys, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))  # of the prompts, in order of their first rows
    chosen_at = {}
    groups = rank[group]
    sizes = np.bincount(groups)
    total = 0
    for prompt in sorted(range(len(sizes)), key=lambda i: stable_hash("held_out", seed, i)):
        if total >= count:
            break
        chosen_at[prompt] = True
        total += int(sizes[prompt])
    is_held_out = np.isin(groups, list(chosen_at))
    numbers = np.arange(len(rows))
    return rows.subset(numbers[~is_held_out]), rows.subset(numbers[is_held_out])


def encode_demonstration(prompt: Any, response: str, cfg: DataConfig, tokenizer: Tokenizer) -> Demonstration:
    return encode_conversation(prompt, response, cfg.template, tokenizer)


def task_demonstrations(
    task: Task,
    problems: Sequence[Any],
    start: int,
    count: int,
    cfg: DataConfig,
    tokenizer: Tokenizer,
    corrupt_fraction: float = 0.0,
    malformed_fraction: float = 0.0,
    mixed_fraction: float = 0.0,
) -> list[Demonstration]:
    """Traces number ``start`` to ``start + count - 1`` of an endless supply over the problems of a task.

    Trace ``i`` is a pure function of (``data.seed``, ``i``): every rank makes the same ones. Each pass over the
    problems is in a new order and writes new traces.
    """
    traces = TaskTraces(task, problems, cfg, tokenizer, corrupt_fraction, malformed_fraction, mixed_fraction)
    found = []
    for place in range(start, start + count):
        epoch, i = divmod(place, len(problems))
        found.append(traces.write(epoch_order(len(problems), cfg.seed, epoch)[i], place))
    return found
