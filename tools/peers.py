"""The same results in plain PyTorch, and in the packages that others use: what the operators are compared with.

Shapes: T tokens, V columns, M rows, F width of an expert, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

# Those that take part where they are installed: name -> module.
PACKAGES = {"TE": "transformer_engine", "Liger": "liger_kernel", "TRL": "trl"}
CLIP = 0.2
ENTROPY_COEF = 0.01

# (logits, targets) -> (log-probabilities, entropies)
Statistics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def is_installed(name: str) -> bool:
    return find_spec(PACKAGES[name]) is not None


def plain_statistics(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    log_p_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    logprobs_T = log_p_TV.gather(1, targets_T[:, None]).squeeze(1)
    return logprobs_T, -(log_p_TV.exp() * log_p_TV).sum(dim=-1)


def lean_statistics(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """The least memory that eager PyTorch can do with: no log-softmax is kept."""
    logits_TV = logits_TV.float()
    lse_T = torch.logsumexp(logits_TV, dim=-1)
    logprobs_T = logits_TV.gather(1, targets_T[:, None]).squeeze(1) - lse_T
    return logprobs_T, lse_T - (torch.softmax(logits_TV, dim=-1) * logits_TV).sum(dim=-1)


def trl_statistics(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits_TV = logits_TV.float()
    return selective_log_softmax(logits_TV, targets_T), entropy_from_logits(logits_TV)


def statistics_peers() -> dict[str, Statistics]:
    peers: dict[str, Statistics] = {"PyTorch": plain_statistics, "PyTorch, logsumexp": lean_statistics}
    return peers | {"TRL": trl_statistics} if is_installed("TRL") else peers


def forward_backward(
    statistics: Statistics, logits_TV: Tensor, targets_T: Tensor, g_T: Tensor, h_T: Tensor
) -> tuple[Tensor, ...]:
    """Both statistics and the gradient of ``sum(g logprob + h entropy)`` with respect to the logits."""
    logprobs_T, entropy_T = statistics(logits_TV, targets_T)
    loss = (g_T * logprobs_T + h_T * entropy_T).sum()
    return logprobs_T.detach(), entropy_T.detach(), *torch.autograd.grad(loss, logits_TV)


@dataclass(frozen=True)
class HeadTask:
    """A policy loss with the language-model head: PPO's clip and an entropy bonus, a mean over all tokens."""

    hidden_TH: Tensor
    weight_VH: Tensor
    targets_T: Tensor
    old_logprobs_T: Tensor
    advantages_T: Tensor

    @staticmethod
    def make(tokens: int, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device) -> HeadTask:
        torch.manual_seed(0)
        hidden_TH = torch.randn(tokens, hidden, dtype=dtype, device=device)
        weight_VH = torch.randn(vocab, hidden, dtype=dtype, device=device) * hidden**-0.5
        targets_T = torch.randint(vocab, (tokens,), device=device)
        now_T, _ = lean_statistics(F.linear(hidden_TH, weight_VH), targets_T)
        # Close to the present policy: a token on the edge of the clip would be a matter of rounding.
        old_T = now_T + 0.02 * torch.randn(tokens, device=device)
        # Around one, so that the loss is no sum of terms that cancel.
        advantages_T = 1 + torch.randn(tokens, device=device)
        return HeadTask(hidden_TH.requires_grad_(), weight_VH.requires_grad_(), targets_T, old_T, advantages_T)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *torch.autograd.grad(loss, [self.hidden_TH, self.weight_VH])

    def ours(self) -> tuple[Tensor, ...]:
        from r1_megatron.kernels.linear_head import linear_policy_loss
        from r1_megatron.kernels.policy_loss import PolicyOptions, PolicyTokens, surrogate

        ones_T = torch.ones_like(self.advantages_T)
        tokens = PolicyTokens(
            loss_mask=ones_T, weights=ones_T / len(ones_T), advantages=self.advantages_T,
            behaviour_logprobs=self.old_logprobs_T, old_logprobs=self.old_logprobs_T,
        )  # fmt: skip
        options = PolicyOptions(clip_low=CLIP, clip_high=CLIP, entropy_coef=ENTROPY_COEF)

        def token_loss(rows: slice, logprobs_R: Tensor, entropy_R: Tensor | None):
            return surrogate(logprobs_R, entropy_R, tokens[rows], options)

        loss, _ = linear_policy_loss(self.hidden_TH, self.weight_VH, self.targets_T, token_loss)
        return self.gradients(loss)

    def plain(self) -> tuple[Tensor, ...]:
        logits_TV = F.linear(self.hidden_TH, self.weight_VH)
        logprobs_T, entropy_T = plain_statistics(logits_TV, self.targets_T)
        ratio_T = (logprobs_T - self.old_logprobs_T).exp()
        clipped_T = ratio_T.clamp(1 - CLIP, 1 + CLIP)
        pg_T = -torch.minimum(ratio_T * self.advantages_T, clipped_T * self.advantages_T)
        return self.gradients((pg_T - ENTROPY_COEF * entropy_T).mean())

    def liger(self) -> tuple[Tensor, ...]:
        """Its loss has no entropy and one advantage per sequence: every token is a sequence of its own here."""
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        num_tokens, hidden = self.hidden_TH.shape
        loss_function = LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, chunk_size=min(4096, num_tokens)
        )
        loss, _ = loss_function(
            self.hidden_TH.view(num_tokens, 1, hidden), self.weight_VH, self.targets_T[:, None],
            torch.ones_like(self.targets_T[:, None]), self.advantages_T,
            old_per_token_logps=self.old_logprobs_T[:, None],
        )  # fmt: skip
        return self.gradients(loss)

    def products_alone(self) -> tuple[Tensor, ...]:
        """The three matrix products of the head, nothing else: logits, and both gradients from a gradient of logits."""
        with torch.no_grad():
            logits_TV = F.linear(self.hidden_TH, self.weight_VH)
            return logits_TV, logits_TV @ self.weight_VH, logits_TV.T @ self.hidden_TH


def liger_from_logits(logits_TV: Tensor, targets_T: Tensor) -> tuple[Callable[[Tensor], tuple], Callable[[], tuple]]:
    """Liger's GRPO loss from logits, forward and backward, no entropy: ``(run, inputs)``; one sequence of T tokens."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    logits_1TV = torch.cat([logits_TV, logits_TV[:1]])[None]  # it expects one position more than there are tokens
    old_T, _ = lean_statistics(logits_TV, targets_T)
    ones = torch.ones_like(old_T[:1])

    def run(logits: Tensor) -> tuple:
        loss, *_ = triton_grpo_loss(
            logits, old_T[None], None, targets_T[None], ones, temperature=1.0, beta=0.0, inplace=False
        )
        return torch.autograd.grad(loss.sum(), logits)

    return run, lambda: (logits_1TV.detach().requires_grad_(),)


def plain_swiglu(h_M2F: Tensor, probs_M: Tensor) -> Tensor:
    gate, up = h_M2F.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * probs_M[:, None]).to(h_M2F.dtype)
