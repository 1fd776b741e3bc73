"""Stages that learn from rows: supervised, distillation, reward models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on packed prompt/response rows; the loss is on the response only.

    Rows hold ``prompt`` and ``response``, or chat messages. Procedural tasks write their own traces;
    ``corrupt_fraction`` of the reasoning steps are wrong, ``mixed_fraction`` of them are in the other language
    (``bilingual`` and ``translation`` have two) and ``malformed_fraction`` of the answers break the format, so that
    there is something left for reinforcement learning to sharpen.
    """

    batch_size: int = 128
    # Of a conversation, learn the last answer, or each of them (`data/conversations.py`).
    loss_on: Literal["last_turn", "every_turn"] = "last_turn"
    # Passes over the rows, instead of train.steps (which then keeps its default): epochs * rows / batch_size steps, the
    # last of them with the rows that are left. null: train.steps decides.
    epochs: int | None = None
    # Longest row, prompt included; null: the model's positions, which bound it, too. Others: `data.on_long_prompt`.
    max_tokens: int | None = None
    # Rows that are not learned from, all rows of a prompt or none: eval/loss is their loss. Of a procedural task they
    # are traces of held-out problems.
    held_out_rows: int = 0
    corrupt_fraction: float = 0.0
    malformed_fraction: float = 0.0
    mixed_fraction: float = 0.0


@dataclass(frozen=True)
class DistillConfig:
    """Stage ``distill``: what ``sft`` does, with a student of any architecture on a teacher's samples (``data.path``).
    The result is a Hugging Face folder, ``output_dir/hf``.
    """

    # The Hugging Face folder to start from. `model` is what its config.json says, and the tokenizer is its own unless
    # another one is named. null: checkpoint.load, or a student that is born here.
    student: str | None = None
    # Of the weights in hf/. "source": every tensor as in that folder; without one, as trained.
    dtype: Literal["source", "bf16", "fp16", "fp32"] = "source"


@dataclass(frozen=True)
class RewardModelConfig:
    """Reward models (stage ``reward_model``): a value head on the model of ``model``, its score read at the last token.

    DeepSeek-R1 (arXiv 2501.12948v2): batches of 256, train.lr 6e-6, one epoch, at most 8,192 tokens.
    """

    # "pairs": rows with ``prompt``, ``chosen``, ``rejected``, Bradley-Terry. "pointwise": rows with ``prompt``,
    # ``response``, ``label`` (true: safe), binary cross entropy.
    objective: Literal["pairs", "pointwise"] = "pairs"
    # Pairs, or rows, of a step.
    batch_size: int = 256
    # Passes over the pairs, or rows, instead of train.steps, as `sft.epochs`; null: train.steps decides.
    epochs: int | None = None
    # Longest sequence, prompt included; null: the model's positions. Longer ones: `data.on_long_prompt`.
    max_tokens: int | None = None
    # By how much the better answer's score has to exceed the other's, and how much more for each point that its judges
    # gave it more (pairs with scores, see data/preferences.py).
    margin: float = 0.0
    margin_per_score: float = 0.0
