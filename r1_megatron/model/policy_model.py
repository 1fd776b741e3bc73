"""The GPTModel whose loss hook answers token log-probabilities (and entropies) instead of one cross entropy."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from r1_megatron.kernels.vocab_parallel import token_statistics


class PolicyModel(GPTModel):
    """A chunk of the policy. With labels, the last chunk answers float32 (float64 for float64 weights) statistics.

    The answer is ``[1, T]``: the negative log-probability of each label at ``temperature``; with ``need_entropy`` it
    is ``[2, T]``, the entropy of the distribution below it (with a gradient only if ``entropy_gradient``). The
    multi-token-prediction heads pass through the same hook and always get ``[1, T]`` at temperature 1, the plain cross
    entropy megatron-core expects there.
    """

    def __init__(self, *args, real_vocab_size: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.temperature = 1.0
        self.need_entropy = False
        self.entropy_gradient = False
        self._main_labels: torch.Tensor | None = None

    def forward(self, input_ids, position_ids, attention_mask, *args, labels=None, **kwargs):
        self._main_labels = labels
        try:
            return super().forward(input_ids, position_ids, attention_mask, *args, labels=labels, **kwargs)
        finally:
            self._main_labels = None

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``labels [1, T]``, ``logits [T, 1, V / tp]``."""
        main_head = labels is self._main_labels
        shard = logits.shape[-1]
        logprobs_T, entropy_T = token_statistics(
            logits.squeeze(1),
            labels[0],
            vocab_start=self.pg_collection.tp.rank() * shard,
            vocab_size=self.real_vocab_size,
            group=self.pg_collection.tp,
            temperature=self.temperature if main_head else 1.0,
            need_entropy=self.need_entropy and main_head,
        )
        if entropy_T is None:
            return -logprobs_T[None]
        return torch.stack([-logprobs_T, entropy_T if self.entropy_gradient else entropy_T.detach()])
