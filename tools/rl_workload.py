"""What both sides of ``bench_vs_trl.py`` are given: one model, one tokenizer, one list of prompts, one reward.

Only the standard library here: the other side's Python environment need not have ours, and a reward's process stays
small.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

VOCAB_SIZE = 1024
# Ids 0 and 1 of the tokenizer; all others are words, "w2" to "w1023".
EOS, PAD = "</s>", "<pad>"


@dataclass(frozen=True)
class Workload:
    """A step's rollouts and the lengths of everything. Prompts have between ``min`` and ``max_prompt_tokens``.

    ``long_new_tokens`` is the length of the comparison with Transformers' ``generate``, and the longest completion of
    the workload whose completions end by themselves.
    """

    num_prompts: int = 8
    samples_per_prompt: int = 8
    min_prompt_tokens: int = 32
    max_prompt_tokens: int = 64
    new_tokens: int = 128
    long_new_tokens: int = 256
    learning_rate: float = 1e-6

    @property
    def num_completions(self) -> int:
        return self.num_prompts * self.samples_per_prompt

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: Path) -> Workload:
        return Workload(**json.loads(path.read_text()))


def write_prompts(path: Path, workload: Workload, num_steps: int, vocab_size: int = VOCAB_SIZE) -> None:
    """Distinct prompts of random words for so many steps, as JSONL."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(num_steps * workload.num_prompts):
            length = draw.randint(workload.min_prompt_tokens, workload.max_prompt_tokens)
            words = (f"w{draw.randrange(2, vocab_size)}" for _ in range(length))
            file.write(json.dumps({"prompt": " ".join(words)}) + "\n")


def read_prompts(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def write_tokenizer(folder: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """A word is a token. No library is needed to write it and every one reads it."""
    words = [EOS, PAD, *(f"w{number}" for number in range(2, vocab_size))]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **special} for i, text in enumerate((EOS, PAD))],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": PAD},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": PAD, "unk_token": PAD}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def reward(prompts: list[str], completions: list[str], *_, **__) -> list[float]:
    """The share of even words: cheap, and different for every completion, so that no group is without a gradient."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(len(text.split()), 1) for text in completions]
