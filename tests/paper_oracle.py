"""The papers of `config/algorithms.py` in their own letters: plain loops over outputs of questions, autograd behind.

``R`` rewards, ``A`` advantages, ``r`` ratios. Nothing here knows of masks, weights, packing or operators; the dtype is
that of what is handed in. Each paper answers the loss: minus the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

L_MAX = 20
# Of each question's outputs. The second question says nothing; 20 tokens are cut at the limit.
LENGTHS = ((4, 9, 20, 17), (3, 5, 2, 6), (12, 1, 18, 7))
REWARDS = ((1.0, 0.0, 1.0, 0.1), (1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.0))


class Output(NamedTuple):
    """One output: what is learned, ``l`` (with gradient), and what was known before."""

    l: Tensor
    old: Tensor
    reference: Tensor


Questions = list[list[Output]]
Rewards = list[np.ndarray]


def clipped(r: Tensor, A: float | Tensor, low: float, high: float) -> Tensor:
    return torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A)


def k3(o: Output) -> Tensor:
    d = o.reference - o.l
    return d.exp() - d - 1


def standardized(R: np.ndarray) -> np.ndarray:
    return (R - R.mean()) / (R.std(ddof=1) + 1e-6)


def grpo(q: Questions, R: Rewards) -> Tensor:
    """arXiv 2402.03300, eq. 3; R1's beta."""
    gains = [
        (clipped((o.l - o.old).exp(), A, 0.2, 0.2) - 0.001 * k3(o)).mean() / len(outputs) / len(q)
        for outputs, rewards in zip(q, R)
        for o, A in zip(outputs, standardized(rewards) if np.ptp(rewards) else rewards * 0)
    ]
    return -torch.stack(gains).sum()


def r1(q: Questions, R: Rewards) -> Tensor:
    """arXiv 2501.12948, eq. 1: the ratio is that of the whole output."""
    gains = [
        (clipped((o.l - o.old).exp().prod(), A, 10.0, 10.0) - 0.001 * k3(o).mean()) / len(outputs) / len(q)
        for outputs, rewards in zip(q, R)
        for o, A in zip(outputs, standardized(rewards) if np.ptp(rewards) else rewards * 0)
    ]
    return -torch.stack(gains).sum()


def shaped(q: Questions, R: Rewards) -> tuple[Questions, Rewards]:
    """DAPO, eq. 13 (a fifth of the limit) and eq. 11."""
    R = [
        rewards + np.array([0 if n <= L_MAX - 4 else (L_MAX - 4 - n) / 4 for n in (len(o.l) for o in outputs)])
        for outputs, rewards in zip(q, R)
    ]
    kept = [number for number, rewards in enumerate(R) if len(set(rewards)) > 1]
    return [q[number] for number in kept], [R[number] for number in kept]


def dapo(q: Questions, R: Rewards) -> Tensor:
    """arXiv 2503.14476, eq. 8."""
    q, R = shaped(q, R)
    gains = [
        clipped((o.l - o.old).exp(), A, 0.2, 0.28)
        for outputs, rewards in zip(q, R)
        for o, A in zip(outputs, standardized(rewards))
    ]
    return -torch.cat(gains).mean()


def dr_grpo(q: Questions, R: Rewards) -> Tensor:
    """arXiv 2503.20783, section 3.2, with the constant of its code: the longest response."""
    gains = [
        clipped((o.l - o.old).exp(), A, 0.2, 0.2).sum() / L_MAX
        for outputs, rewards in zip(q, R)
        for o, A in zip(outputs, rewards - rewards.mean())
    ]
    return -torch.stack(gains).mean()


def gspo(q: Questions, R: Rewards) -> Tensor:
    """arXiv 2507.18071, eq. 5 to 7."""
    gains = [
        clipped((o.l.sum() - o.old.sum()).div(len(o.l)).exp(), A, 3e-4, 4e-4)
        for outputs, rewards in zip(q, R)
        for o, A in zip(outputs, standardized(rewards) if np.ptp(rewards) else rewards * 0)
    ]
    return -torch.stack(gains).mean()


def cispo(q: Questions, R: Rewards) -> Tensor:
    """arXiv 2506.13585, eq. 4 and 5, without a lower clip."""
    q, R = shaped(q, R)
    gains = [
        (o.l - o.old).exp().clamp(max=6.0).detach() * A * o.l
        for outputs, rewards in zip(q, R)
        for o, A in zip(outputs, standardized(rewards))
    ]
    return -torch.cat(gains).mean()


def rloo_advantages(q: Questions, R: Rewards) -> list[tuple[Output, float]]:
    """arXiv 2402.14740: the reward of eq. 2, the baseline of eq. 6."""
    pairs = []
    for outputs, rewards in zip(q, R):
        total = [r - 0.03 * (o.old.sum() - o.reference.sum()).item() for o, r in zip(outputs, rewards)]
        for i, o in enumerate(outputs):
            others = total[:i] + total[i + 1 :]
            pairs.append((o, total[i] - sum(others) / len(others)))
    return pairs


def rloo(q: Questions, R: Rewards) -> Tensor:
    """Off policy as TRL does it: the ratio of the output, clipped."""
    return -torch.stack([clipped((o.l - o.old).exp().prod(), A, 0.2, 0.2) for o, A in rloo_advantages(q, R)]).mean()


def whitened_loss(pairs: list[tuple[Output, Tensor]]) -> Tensor:
    flat = torch.cat([A for _, A in pairs])
    A_norm = (flat - flat.mean()) / (flat.std() + 1e-6)
    r = torch.cat([o.l - o.old for o, _ in pairs]).exp()
    return -clipped(r, A_norm, 0.2, 0.2).mean()


def reinforce_plus_plus(q: Questions, R: Rewards) -> Tensor:
    """arXiv 2501.03262: A_t = r - beta sum_{i >= t} KL(i), normalised over the batch."""
    pairs = []
    for outputs, rewards in zip(q, R):
        for o, r in zip(outputs, rewards):
            kl = o.old - o.reference
            pairs.append((o, torch.stack([r - 0.01 * kl[t:].sum() for t in range(len(kl))])))
    return whitened_loss(pairs)


def reinforce_plus_plus_baseline(q: Questions, R: Rewards) -> Tensor:
    """The same, with the group's mean as baseline and k2 in the loss."""
    pairs = [
        (o, torch.full((len(o.l),), float(A), dtype=torch.float64))
        for outputs, rewards in zip(q, R)
        for o, A in zip(outputs, rewards - rewards.mean())
    ]
    k2 = torch.cat([(o.l - o.reference) ** 2 / 2 for o, _ in pairs])
    return whitened_loss(pairs) + 0.001 * k2.mean()


PAPERS: dict[str, Callable[[Questions, Rewards], Tensor]] = {
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}
