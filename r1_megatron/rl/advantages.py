"""Group-relative advantages: what a completion did better than its siblings (arXiv 2402.03300, section 4.1.2)."""

from __future__ import annotations

from typing import Literal

import numpy as np


def has_variance(rewards: np.ndarray) -> bool:
    """Whether a group's rewards differ at all. Compared exactly: no rounding of a mean can fake a difference."""
    return len(rewards) > 0 and bool(rewards.max() != rewards.min())


def group_advantages(
    rewards: np.ndarray, normalization: Literal["std", "none"] = "std", epsilon: float = 1e-6
) -> np.ndarray:
    """One advantage per completion of a group, float64 like the rewards, with mean zero.

    ``"std"``: ``(r - mean) / (std + epsilon)`` (DeepSeek-R1, eq. 3). The standard deviation is the sample's, with
    ``n - 1`` in the denominator, as in TRL and verl; the papers leave that open, and for 16 samples it makes 3 %.
    ``"none"``: ``r - mean`` (Dr.GRPO, arXiv 2503.20783): dividing by the spread lets a group in which almost nothing
    differs weigh as much as one in which everything does.

    Equal rewards, and a group of one, give exactly zero.
    """
    assert rewards.ndim == 1 and np.isfinite(rewards).all(), f"rewards must be finite [num_rollouts], got {rewards}"
    rewards = rewards.astype(np.float64)
    if not has_variance(rewards):
        return np.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred if normalization == "none" else centred / (rewards.std(ddof=1) + epsilon)
