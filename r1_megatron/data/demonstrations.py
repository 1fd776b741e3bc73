"""Supervised rows: a prompt and the response to imitate, for stage ``sft``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1_megatron.config.schema import DataConfig
from r1_megatron.data.prompts import epoch_order, raise_problems, read_rows, token_problem
from r1_megatron.data.tasks import Task
from r1_megatron.data.tasks.base import stable_hash
from r1_megatron.data.templates import check_messages, render
from r1_megatron.data.tokenizers import Tokenizer, encode_prompt

RESPONSE_KEY = "response"


@dataclass(frozen=True)
class Demonstration:
    """``tokens`` holds the prompt (``prompt_len`` tokens), then the response with its stop token at the end.

    Prompt and response are tokenized apart, exactly as they meet when the policy continues a prompt.
    """

    tokens: tuple[int, ...]
    prompt_len: int


def load_demonstrations(
    path: str | Path, cfg: DataConfig, tokenizer: Tokenizer, vocab_size: int | None, max_tokens: int
) -> list[Demonstration]:
    """Read JSONL rows ``{"prompt": text or chat messages, "response": text}``.

    Args:
        max_tokens: longest row, prompt and response together (the model's ``max_position_embeddings``). Longer rows
            are an error or left out, by ``data.on_long_prompt``; the same prompt may come several times.

    Raises:
        ValueError: names every bad line with what is wrong.
    """
    problems: list[str] = []
    found: list[Demonstration] = []
    for line, row in read_rows(Path(path), problems):
        missing = [key for key in (cfg.prompt_key, RESPONSE_KEY) if key not in row]
        if missing:
            problems.append(f"line {line}: no {' and no '.join(map(repr, missing))} among the keys {sorted(row)}")
            continue
        prompt, response = row[cfg.prompt_key], row[RESPONSE_KEY]
        problem = None if isinstance(prompt, str) and prompt.strip() else _prompt_problem(prompt)
        if problem is None and (not isinstance(response, str) or not response.strip()):
            problem = f"{RESPONSE_KEY!r} is empty or not text"
        if problem is None:
            try:
                demonstration = encode_demonstration(prompt, response, cfg, tokenizer)
            except ValueError as error:
                problem = str(error)
            else:
                problem = token_problem(demonstration.tokens, tokenizer, vocab_size)
                num_tokens = len(demonstration.tokens)
                if problem is None and num_tokens <= max_tokens:
                    found.append(demonstration)
                elif problem is None and cfg.on_long_prompt == "error":
                    problem = (
                        f"{num_tokens} tokens, but the limit is {max_tokens} (model.max_position_embeddings). "
                        "Shorten it, or set data.on_long_prompt=skip"
                    )
        if problem is not None:
            problems.append(f"line {line}: {problem}")
    raise_problems(str(path), problems)
    if not found:
        raise ValueError(f"{path}: no demonstrations of at most {max_tokens} tokens. Give at least one row.")
    return found


def encode_demonstration(prompt: Any, response: str, cfg: DataConfig, tokenizer: Tokenizer) -> Demonstration:
    prompt_ids = encode_prompt(tokenizer, render(cfg.template, prompt, tokenizer))
    return Demonstration((*prompt_ids, *tokenizer.encode(response), tokenizer.eos_id), len(prompt_ids))


def task_demonstrations(
    task: Task,
    problems: Sequence[Any],
    start: int,
    count: int,
    cfg: DataConfig,
    tokenizer: Tokenizer,
    corrupt_fraction: float = 0.0,
    malformed_fraction: float = 0.0,
) -> list[Demonstration]:
    """Traces number ``start`` to ``start + count - 1`` of an endless supply over the problems of a task.

    Trace ``i`` is a pure function of (``data.seed``, ``i``): every rank makes the same ones. Each pass over the
    problems is in a new order and writes new traces.
    """
    found = []
    for i in range(start, start + count):
        rng = random.Random(stable_hash("demonstration", cfg.seed, i))
        epoch, position = divmod(i, len(problems))
        problem = problems[epoch_order(len(problems), cfg.seed, epoch)[position]]
        response = task.demonstration(problem, rng, corrupt_fraction, malformed_fraction)
        found.append(encode_demonstration(task.prompt_text(problem), response, cfg, tokenizer))
    return found


def _prompt_problem(prompt: Any) -> str | None:
    return "the prompt is empty" if isinstance(prompt, str) else check_messages(prompt)
