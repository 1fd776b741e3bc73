"""Speculative decoding with the model's own multi-token-prediction layer: the same samples in fewer forwards.

The last virtual stage drafts the token behind each one that it draws (`model/drafting.py`). The sequence's next forward
feeds both, the drawn token and its draft, and draws from the logits of both rows. If the first of the two draws is the
draft, the second one counts as well; if not, it is dropped, and the next forward feeds over what the draft left in the
cache. DeepSeek-V3 (arXiv 2412.19437, section 5.4.3) found 85 to 90 % of such drafts accepted.

**The law is the sampler's, whatever the draft.** The noise of a token is hashed from its request and position
(`sampler.py`), so the token is a function of its logits: a draft is compared with it, and chooses nothing. No rejection
step is needed as in speculative sampling with free noise (arXiv 2211.17192). Drafts are drawn with the noise of the
position that they are for. Two laws that share Gumbel noise draw the same token with a probability of at least
(1 - d) / (1 + d), where d is their distance in total variation (arXiv 2408.07978); at temperature 0 both are greedy.

Legend: T rows of the forward, R tokens drawn of them, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from r1_megatron.model.drafting import DraftWalk, drafting_layer
from r1_megatron.model.generation import StepContext, on_device
from r1_megatron.model.walk import Walk, can_walk
from r1_megatron.parallel.groups import ProcessGroups
from r1_megatron.rollout.sampler import Draw
from r1_megatron.rollout.scheduler import StepPlan

# Draws a token per row: (what the head makes logits of [R, H], request keys int64 [R], positions int64 [R]).
Sample = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Draw]


def check_drafting(chunks: Sequence[Any], is_last_stage: bool) -> None:
    """Raise ``ValueError`` if this rank's chunks cannot make drafts."""
    if not all(can_walk(chunk) for chunk in chunks):
        raise ValueError(
            "rollout.speculative_tokens: drafts are made by a walk over the local layers, and this model is built of "
            "Transformer Engine's. Set it to 0."
        )
    if is_last_stage and drafting_layer(chunks[-1]) is None:
        raise ValueError(
            "rollout.speculative_tokens: the stage that draws tokens has no multi-token-prediction layer "
            "(model.mtp_num_layers, parallel.pipeline_model_parallel_layout). Set it to 0."
        )


class Drafting:
    """Drafts on the last virtual stage, for as long as the weights stay the same.

    Args:
        walk: of ``chunk``, the last one.
    """

    def __init__(self, chunk: Any, walk: Walk, groups: ProcessGroups, sample: Sample):
        self._walk, self._sample, self._device = DraftWalk(chunk, walk, groups), sample, groups.device

    def draft(
        self, hidden: torch.Tensor, step: StepContext, plan: StepPlan, drawn: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Walk all rows, which leaves their past to later drafts, and append a column of drafts to what was drawn.

        Args:
            hidden: ``[T, H]`` behind the trunk's final norm.
            drawn: float64 ``[R, 2]``, (token, log-probability), or ``None`` if the forward draws nothing. Answers
                ``[R, 3]``, or ``None``.
        """
        rows = self._walk(hidden, self._following(step.num_rows, plan, drawn), step)
        if drawn is None:
            return None
        table = on_device(np.stack([plan.sampled_rows, plan.keys, plan.sample_positions + 1]), self._device)
        drafts = self._sample(rows[table[0]], table[1], table[2])
        return torch.cat([drawn, drafts.tokens_B[:, None].double()], 1)

    def _following(self, num_rows: int, plan: StepPlan, drawn: torch.Tensor | None) -> torch.Tensor:
        """int64 ``[T]``: the token behind each row's, known or just drawn; 0 behind padding."""
        padded = np.zeros(num_rows, dtype=np.int64)
        padded[: len(plan.following)] = plan.following
        following = on_device(padded, self._device)
        if drawn is None:
            return following
        return torch.where(following < 0, drawn[:, 0].long()[(~following).clamp_(min=0)], following)


@dataclass
class Acceptance:
    """Which drawn tokens count, and how many did.

    ``num_drafted`` and ``num_accepted`` count drafts that were fed and those that were right, ``num_draws`` the times
    that a sequence drew a token or two.
    """

    num_drafted: int = 0
    num_accepted: int = 0
    num_draws: int = 0

    def turns(self, plan: StepPlan, tokens: np.ndarray, stopped: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The tokens that sequences take, one turn after the other: (places in ``plan.sequences``, rows of ``tokens``).

        Args:
            tokens: int64 ``[R]``, all that were drawn.
            stopped: bool ``[num_sampled]``, which sequences have ended; the caller notes it before the next turn.
        """
        every = np.arange(plan.num_sampled)
        self.num_draws += len(every)
        yield every, every
        if len(plan.draft_of):
            right = tokens[plan.draft_of] == plan.tokens[plan.sampled_rows[plan.num_sampled :]]
            self.num_drafted += len(right)
            self.num_accepted += int(right.sum())
            taken = right & ~stopped[plan.draft_of]
            yield plan.draft_of[taken], plan.num_sampled + np.flatnonzero(taken)

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """``num_tokens``: all that sequences took."""
        return {
            "rollout/num_drafts": self.num_drafted,
            "rollout/num_draws": self.num_draws,
            "rollout/draft_acceptance": self.num_accepted / max(self.num_drafted, 1),
            "rollout/tokens_per_draw": num_tokens / max(self.num_draws, 1),
        }
