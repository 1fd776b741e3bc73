"""The rows that a reward model learns from: what was preferred or allowed, and in which steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from r1_megatron.config.schema import DataConfig, RewardModelConfig, RunConfig
from r1_megatron.data.loading import Rows, Share
from r1_megatron.data.order import RowOrder
from r1_megatron.data.preferences import PreferencePair, SafetyExample, load_preferences, load_safety
from r1_megatron.data.prompts import check_same_order
from r1_megatron.data.tokenizers import Tokenizer

Judged = PreferencePair | SafetyExample


def read_judgements(cfg: RunConfig, tokenizer: Tokenizer, share: Share, name: str) -> Rows[Judged]:
    """The rows of ``data.path`` or ``data.eval_path``; sequences that the model has no positions for are left out or
    refused."""
    path = cfg.data.path if name == "data.path" else cfg.data.eval_path
    load: Callable[..., Any] = load_preferences if cfg.reward_model.objective == "pairs" else load_safety
    longest = cfg.longest_row
    return load(path, cfg.data, tokenizer, cfg.model.vocab_size, longest, share, name)


class JudgementStream:
    """Endless rows, in a new order every epoch; the same on every rank."""

    def __init__(self, rows: Sequence[Judged], cfg: RewardModelConfig, data: DataConfig):
        self._rows, self._cfg = rows, cfg
        self._order = RowOrder([len(rows)], None, data.seed, data.shuffle)
        self._position = 0

    @property
    def epochs(self) -> float:
        """Passes over the rows so far."""
        return self._position / self._order.num_rows

    def state(self) -> dict[str, Any]:
        """The place in the stream, and which rows it is over."""
        return {"position": self._position, "num_rows": self._order.num_rows, "order": self._order.kind}

    def restore(self, state: dict[str, Any]) -> None:
        check_same_order(state["num_rows"], state["order"], self._order, "rows")
        self._position = state["position"]

    def of_step(self, step: int) -> list[Judged]:
        """The next ``reward_model.batch_size`` rows; with ``reward_model.epochs`` the last step takes what is left."""
        count = self._cfg.batch_size
        if self._cfg.epochs is not None:
            count = min(count, self._cfg.epochs * self._order.num_rows - (step - 1) * self._cfg.batch_size)
        start, self._position = self._position, self._position + count
        return [self._rows[self._order.at(place)[1]] for place in range(start, start + count)]
