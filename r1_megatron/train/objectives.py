"""What a step minimises: from the last hidden states of a microbatch to one weighted sum and its metrics.

An objective hands the model's last stage a *head* for each microbatch. The head gets the hidden states and the weight
of the output layer, and decides by itself what it makes of them, so that logits need never exist as a whole
(`kernels/linear_head.py`).

Averaging is never done here: `MicroBatch.weights` already carry mask and aggregation over the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from r1_megatron.config.schema import RLConfig
from r1_megatron.kernels.linear_head import TokenLoss, linear_policy_loss, linear_token_statistics
from r1_megatron.kernels.policy_loss import policy_surrogate, surrogate
from r1_megatron.model.policy_model import Head
from r1_megatron.rl.loss import policy_metrics, policy_options, policy_tokens
from r1_megatron.types import MicroBatch

Metrics = dict[str, Tensor]


class Objective(Protocol):
    """``trains_mtp`` says whether the multi-token-prediction heads learn from the step's weights."""

    @property
    def trains_mtp(self) -> bool: ...

    def head(self, batch: MicroBatch) -> Head:
        """The head of one microbatch. In training it answers ``(loss, metrics)``: the scalar that is minimised, which
        goes into backward() as it is, and detached scalars (sums; maxima end in ``_max``)."""
        ...


@dataclass(frozen=True)
class PolicyObjective:
    """GRPO and its variants (`rl/loss.py`)."""

    rl: RLConfig
    temperature: float
    need_entropy: bool = True
    trains_mtp: bool = False

    def head(self, batch: MicroBatch) -> Head:
        options = policy_options(self.rl)
        asked = {"temperature": self.temperature, "need_entropy": self.need_entropy or options.entropy_coef != 0}
        boundaries = None if options.is_token_wise else batch.cu_seqlens

        def head(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, **shard: Any) -> tuple[Tensor, Metrics]:
            dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
            tokens = policy_tokens(batch.arrays, batch.weights, self.rl, dtype, boundaries)
            if options.is_token_wise:

                def token_loss(rows: slice, logprobs_R: Tensor, entropy_R: Tensor | None):
                    return surrogate(logprobs_R, entropy_R, tokens[rows], options)

                loss, terms_NT = linear_policy_loss(hidden_TH, weight_VH, targets_T, token_loss, **asked, **shard)
            else:
                statistics = linear_token_statistics(hidden_TH, weight_VH, targets_T, **asked, **shard)
                loss_T, terms_NT = policy_surrogate(*statistics, tokens, options)
                loss = loss_T.sum()
            return loss, policy_metrics(terms_NT, tokens)

        return head


@dataclass(frozen=True)
class SupervisedObjective:
    """Cross entropy of the weighted tokens: supervised fine-tuning, rejection sampling, distillation."""

    trains_mtp: bool = True

    def head(self, batch: MicroBatch) -> Head:
        learned_T = batch.weights[0] != 0

        def head(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, **shard: Any) -> tuple[Tensor, Metrics]:
            loss, nll_1T = linear_policy_loss(
                hidden_TH, weight_VH, targets_T, cross_entropy(batch.weights[0]), need_entropy=False, **shard
            )
            nll = torch.where(learned_T, nll_1T[0], 0.0)
            return loss, {"num_tokens": learned_T.sum().to(nll.dtype), "sft/loss": nll.sum()}

        return head


def cross_entropy(weights_T: Tensor) -> TokenLoss:
    """``-weight * log-probability`` of every token; what a token without weight holds does not matter."""

    def token_loss(rows: slice, logprobs_R: Tensor, entropy_R: Tensor | None):
        weights_R = weights_T[rows].to(logprobs_R.dtype)
        loss_R = torch.where(weights_R == 0, 0.0, -weights_R * logprobs_R)
        return loss_R, -weights_R, None, -logprobs_R[None]

    return token_loss


def annotation(temperature: float) -> Head:
    """A head that answers the log-probability of every label, ``[1, T]``, and nothing else."""

    def head(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, **shard: Any) -> Tensor:
        logprobs_T, _ = linear_token_statistics(
            hidden_TH, weight_VH, targets_T, temperature=temperature, need_entropy=False, **shard
        )
        return logprobs_T[None]

    return head
