"""Reading prompts and walking through them.

:func:`build_prompts` gives the training and the held-out prompts of a run, from JSONL files or from a procedural task;
:class:`PromptStream` hands them out step after step. A file with problems is refused with all of them, each with its
line number, before anything starts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from r1_megatron.config.schema import DataConfig
from r1_megatron.data.tasks import Task, build_task
from r1_megatron.data.tasks.base import stable_hash
from r1_megatron.data.templates import check_messages, render
from r1_megatron.data.tokenizers import Tokenizer, encode_prompt
from r1_megatron.types import Prompt

MAX_PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts in file order; ``index`` is the position here. The counts say how many rows were left out."""

    prompts: tuple[Prompt, ...]
    num_too_long: int = 0
    num_duplicates: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Prompt, ...]: ...

    def __getitem__(self, index):
        return self.prompts[index]


def build_prompts(
    cfg: DataConfig, tokenizer: Tokenizer, vocab_size: int | None = None, train: bool = True
) -> tuple[PromptSet, PromptSet, Task | None]:
    """The prompts of a run: training, held-out (empty without ``data.eval_path``), and the task they come from.

    Args:
        vocab_size: the model's; a prompt with a token outside of it is refused.
        train: without it ``data.path`` is not read and there are no training prompts (it may hold other rows).
    """
    if cfg.source != "jsonl":
        task = build_task(cfg.source, cfg.task_options, cfg.num_train, cfg.num_eval, cfg.seed)
        training = task_prompts(task, task.train, cfg, tokenizer, vocab_size)
        return training, task_prompts(task, task.eval, cfg, tokenizer, vocab_size), task
    if cfg.path is None:
        raise ValueError("data.path: data.source=jsonl needs a file. Set data.path, or data.source to a task.")
    training = load_prompts(cfg.path, cfg, tokenizer, vocab_size) if train else PromptSet(())
    held_out = PromptSet(())
    if cfg.eval_path is not None:
        held_out = load_prompts(cfg.eval_path, cfg, tokenizer, vocab_size)
        check_disjoint(training, held_out, cfg)
    return training, held_out, None


def check_disjoint(training: PromptSet, held_out: PromptSet, cfg: DataConfig) -> None:
    """Raises ValueError where a held-out prompt is trained on: its accuracy would say nothing."""
    seen = {prompt.text for prompt in training}
    both = [prompt.text for prompt in held_out if prompt.text in seen]
    if both:
        raise ValueError(
            f"data.eval_path: {len(both)} of the {len(held_out)} prompts in {cfg.eval_path} are in data.path too "
            f"({both[0][:60]!r}). Take them out of one of the files."
        )


def load_prompts(path: str | Path, cfg: DataConfig, tokenizer: Tokenizer, vocab_size: int | None = None) -> PromptSet:
    """Read JSONL rows ``{"prompt": text or chat messages, "label": any, "metadata": {...}}`` (names per ``cfg``).

    ``label`` may be missing everywhere but not in some rows only; ``metadata`` is optional.

    Raises:
        ValueError: names every bad line (the first 20 of them) with what is wrong and the remedy.
    """
    builder = _Builder(cfg, tokenizer, vocab_size)
    problems: list[str] = []
    unlabelled: list[int] = []
    for line, row in read_rows(Path(path), problems):
        if cfg.prompt_key not in row:
            problems.append(f"line {line}: no {cfg.prompt_key!r} among the keys {sorted(row)} (data.prompt_key)")
            continue
        metadata = row.get(cfg.metadata_key)
        if metadata is not None and not isinstance(metadata, dict):
            problems.append(f"line {line}: {cfg.metadata_key!r} is a {type(metadata).__name__}, expected an object")
            continue
        if cfg.label_key not in row:
            unlabelled.append(line)
        builder.add(f"line {line}", row[cfg.prompt_key], row.get(cfg.label_key), metadata or {}, str(path), problems)
    if unlabelled and len(unlabelled) < builder.num_seen:
        problems += [f"line {line}: no {cfg.label_key!r}, but other lines have one" for line in unlabelled]
    return builder.finish(str(path), problems)


def task_prompts(
    task: Task, problems: Sequence[Any], cfg: DataConfig, tokenizer: Tokenizer, vocab_size: int | None = None
) -> PromptSet:
    """The problems of a procedural task as prompts."""
    if not problems:
        return PromptSet(())
    builder = _Builder(cfg, tokenizer, vocab_size)
    complaints: list[str] = []
    for number, problem in enumerate(problems):
        builder.add(f"problem {number}", task.prompt_text(problem), task.label(problem), {}, task.name, complaints)
    return builder.finish(f"task {task.name}", complaints)


class PromptStream:
    """Endless prompts, a fresh order every epoch; ``take`` numbers them on across epochs.

    The order is a pure function of (seed, epoch), computed from a hash and not from a library's random generator, so
    the whole state is one number and a resumed run continues with the very next prompt.

    Example:
        >>> stream = PromptStream(prompts, seed=1)
        >>> [p.index for p in stream.take(3)], [p.index for p in stream.take(2)]
        ([0, 1, 2], [3, 4])
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int = 1, shuffle: bool = True):
        if not prompts:
            raise ValueError("no prompts to draw from. Check data.path or data.num_train.")
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0

    @property
    def position(self) -> int:
        """Number of prompts taken so far."""
        return self._position

    @property
    def epoch(self) -> int:
        """Number of whole passes over the prompts."""
        return self._position // len(self._prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next ``n`` prompts."""
        return [self._next() for _ in range(n)]

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps. The number of prompts is there to notice that the data changed."""
        return {"position": self._position, "num_prompts": len(self._prompts)}

    def restore(self, state: dict[str, int]) -> None:
        if state["num_prompts"] != len(self._prompts):
            raise ValueError(
                f"the checkpoint was made with {state['num_prompts']} prompts, but the data now has "
                f"{len(self._prompts)}: the order would differ. Resume with the same data, or start a new run."
            )
        self._position = state["position"]

    def at(self, position: int) -> Prompt:
        """The prompt of a place in the stream, taken or not."""
        num = len(self._prompts)
        chosen = epoch_order(num, self._seed, position // num)[position % num] if self._shuffle else position % num
        return dataclasses.replace(self._prompts[chosen], index=position)

    def _next(self) -> Prompt:
        self._position += 1
        return self.at(self._position - 1)


@functools.lru_cache(maxsize=4)
def epoch_order(num: int, seed: int, epoch: int) -> Sequence[int]:
    """A permutation of ``range(num)``, a pure function of (seed, epoch) on every machine and library version."""
    return sorted(range(num), key=lambda i: stable_hash("epoch", seed, epoch, i))


class _Builder:
    """Collects prompts and everything that is wrong with them."""

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer, vocab_size: int | None):
        self.cfg, self.tokenizer, self.vocab_size = cfg, tokenizer, vocab_size
        self.prompts: list[Prompt] = []
        self.num_seen = self.num_too_long = self.num_duplicates = 0
        self._where_seen: dict[str, str] = {}

    def add(
        self, where: str, prompt: Any, label: Any, metadata: dict[str, Any], source: str, problems: list[str]
    ) -> None:
        self.num_seen += 1
        cfg = self.cfg
        if not isinstance(prompt, str) and (problem := check_messages(prompt)):
            problems.append(f"{where}: {cfg.prompt_key!r}: {problem}")
            return
        key = normalized(prompt)
        if not key:
            problems.append(f"{where}: the prompt is empty")
            return
        if key in self._where_seen:
            self.num_duplicates += 1
            if cfg.on_duplicate_prompt == "error":
                problems.append(
                    f"{where}: same prompt as {self._where_seen[key]}. Remove it, or set data.on_duplicate_prompt=skip"
                )
            return
        self._where_seen[key] = where
        try:
            rendered = render(cfg.template, prompt, self.tokenizer)
            tokens = encode_prompt(self.tokenizer, rendered)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            return
        if problem := token_problem(tokens, self.tokenizer, self.vocab_size):
            problems.append(f"{where}: {problem}")
            return
        if len(tokens) > cfg.max_prompt_tokens:
            self.num_too_long += 1
            if cfg.on_long_prompt == "error":
                problems.append(
                    f"{where}: {len(tokens)} tokens with its template, but data.max_prompt_tokens="
                    f"{cfg.max_prompt_tokens}. Raise it, or set data.on_long_prompt=skip"
                )
            return
        text = prompt if isinstance(prompt, str) else rendered
        self.prompts.append(Prompt(len(self.prompts), text, tuple(tokens), label, metadata, source))

    def finish(self, name: str, problems: list[str]) -> PromptSet:
        raise_problems(name, problems)
        if not self.prompts:
            left_out = f"{self.num_too_long} too long, {self.num_duplicates} duplicates" if self.num_seen else "empty"
            raise ValueError(f"{name}: no prompts ({left_out}). Give at least one row.")
        return PromptSet(tuple(self.prompts), self.num_too_long, self.num_duplicates)


def normalized(prompt: str | Sequence[dict[str, Any]]) -> str:
    """Text by which duplicates are found: canonical Unicode form (NFC), white space collapsed, case kept."""
    if not isinstance(prompt, str):
        contents = [(m["role"], normalized(m["content"])) for m in prompt]
        return json.dumps(contents) if any(content for _, content in contents) else ""
    return " ".join(unicodedata.normalize("NFC", prompt).split())


def token_problem(tokens: Sequence[int], tokenizer: Tokenizer, vocab_size: int | None) -> str | None:
    """Why the model cannot read these tokens, or ``None``."""
    if tokenizer.unk_id is not None and tokenizer.unk_id in tokens:
        position = list(tokens).index(tokenizer.unk_id)
        before = tokenizer.decode(tokens[:position])[-20:]
        return f"the tokenizer has no token for the text after {before!r}. Change the text or the tokenizer"
    largest = max(tokens, default=-1)
    if vocab_size is not None and largest >= vocab_size:
        return (
            f"token id {largest}, but model.vocab_size={vocab_size} (the tokenizer has {tokenizer.vocab_size}). "
            f"Set model.vocab_size={tokenizer.vocab_size} or use the model's own tokenizer"
        )
    return None


def raise_problems(name: str, problems: list[str]) -> None:
    """One error for all problems of a file."""
    if problems:
        shown = "\n  ".join(problems[:MAX_PROBLEMS_SHOWN])
        more = len(problems) - MAX_PROBLEMS_SHOWN
        rest = f"\n  ... and {more} more" if more > 0 else ""
        raise ValueError(f"{name}: {len(problems)} bad row{'s'[: len(problems) > 1]}:\n  {shown}{rest}")


def read_rows(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for every line that is not blank; lines that are not objects become problems."""
    try:
        with path.open("rb") as file:
            for line, data in enumerate(file, start=1):
                if line == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")  # A byte order mark, as some editors write.
                if not data.strip():
                    continue
                row, problem = _parse_row(data)
                if row is None:
                    problems.append(f"line {line}: {problem}")
                else:
                    yield line, row
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}). Give an existing JSONL file.") from error


def _parse_row(data: bytes) -> tuple[dict[str, Any] | None, str]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        row = json.loads(data.rstrip(b"\r\n").decode("utf-8"), parse_constant=refuse)
    except json.JSONDecodeError as error:
        return None, f"malformed JSON, column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return None, f"malformed JSON: {error}"
    if not isinstance(row, dict):
        return None, f"a {type(row).__name__}, expected an object like {{...}}"
    return row, ""
