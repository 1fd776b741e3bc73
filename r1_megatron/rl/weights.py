"""Aggregation is data: every way of averaging the loss is one weight per token.

With ``B`` sequences that carry loss, ``N`` loss tokens in all of them, ``n_i`` in sequence ``i`` ::

    token_mean      1 / N              every token counts the same (DAPO, arXiv 2503.14476, eq. 8)
    sequence_mean   1 / (B n_i)        every sequence counts the same (GRPO, arXiv 2402.03300, eq. 3)
    dr_grpo         1 / (B L_max)      a constant length, the longest allowed (Dr.GRPO, arXiv 2503.20783)

``B`` and ``N`` count the whole minibatch, all data-parallel ranks together, so the weights of a minibatch mean the
same under every layout and nothing is divided by afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class LossCounts:
    """Sequences with at least one loss token, and loss tokens. Add them over the data-parallel ranks."""

    num_sequences: int = 0
    num_tokens: int = 0

    def __add__(self, other: LossCounts) -> LossCounts:
        return LossCounts(self.num_sequences + other.num_sequences, self.num_tokens + other.num_tokens)


def count(loss_masks: Iterable[np.ndarray]) -> LossCounts:
    """The counts of this rank's sequences."""
    lengths = [int(mask.sum()) for mask in loss_masks]
    return LossCounts(sum(n > 0 for n in lengths), sum(lengths))


def token_weights(
    loss_mask: np.ndarray,
    aggregation: Literal["token_mean", "sequence_mean", "dr_grpo"],
    counts: LossCounts,
    *,
    max_new_tokens: int,
) -> np.ndarray:
    """Float32 ``[num_tokens]``: the weight of each token of one sequence, zero outside ``loss_mask``.

    ``counts`` are those of the whole minibatch; ``max_new_tokens`` is the ``L_max`` of "dr_grpo".
    """
    length = int(loss_mask.sum())
    if length == 0:
        return np.zeros(len(loss_mask), dtype=np.float32)
    assert counts.num_sequences >= 1 and counts.num_tokens >= length, f"{counts} do not hold this sequence's {length}"
    if aggregation == "token_mean":
        denominator = counts.num_tokens
    elif aggregation == "sequence_mean":
        denominator = counts.num_sequences * length
    elif aggregation == "dr_grpo":
        denominator = counts.num_sequences * max_new_tokens
    else:
        raise ValueError(f"rl.aggregation={aggregation!r}: use token_mean, sequence_mean or dr_grpo")
    return loss_mask.astype(np.float32) / np.float32(denominator)
