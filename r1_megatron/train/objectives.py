"""What a step minimises: token statistics of a microbatch to one weighted sum and its metrics.

Averaging is never done here: `MicroBatch.weights` already carry mask and aggregation over the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from r1_megatron.config.schema import RLConfig
from r1_megatron.rl.loss import policy_loss
from r1_megatron.types import MicroBatch

Metrics = dict[str, torch.Tensor]


class Objective(Protocol):
    """What the model's head has to compute, and what it becomes.

    ``need_entropy`` asks for the entropy, ``entropy_gradient`` for its gradient too; ``trains_mtp`` says whether the
    multi-token-prediction heads learn from the step's weights.
    """

    @property
    def temperature(self) -> float: ...

    @property
    def need_entropy(self) -> bool: ...

    @property
    def entropy_gradient(self) -> bool: ...

    @property
    def trains_mtp(self) -> bool: ...

    def __call__(
        self, nll: torch.Tensor, entropy: torch.Tensor | None, batch: MicroBatch
    ) -> tuple[torch.Tensor, Metrics]:
        """``nll``, ``entropy``: ``[1, T]``. Answers the scalar loss and metrics (sums; maxima end in ``_max``)."""
        ...


@dataclass(frozen=True)
class PolicyObjective:
    """GRPO and its variants (`rl/loss.py`)."""

    rl: RLConfig
    temperature: float
    need_entropy: bool = True
    trains_mtp: bool = False

    @property
    def entropy_gradient(self) -> bool:
        return self.rl.entropy_coef != 0

    def __call__(self, nll, entropy, batch):
        loss, metrics = policy_loss(-nll, entropy, batch.arrays, self.rl)
        return (loss * batch.weights).sum(), metrics


@dataclass(frozen=True)
class SupervisedObjective:
    """Cross entropy of the weighted tokens: supervised fine-tuning, rejection sampling, distillation."""

    temperature: float = 1.0
    need_entropy: bool = False
    entropy_gradient: bool = False
    trains_mtp: bool = True

    def __call__(self, nll, entropy, batch):
        learned = batch.weights > 0
        loss = (torch.where(learned, nll, 0.0) * batch.weights).sum()
        count = learned.sum().to(nll.dtype)
        return loss, {"num_tokens": count, "sft/loss": torch.where(learned, nll, 0.0).detach().sum()}
