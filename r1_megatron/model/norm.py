"""RMSNorm for the local (non Transformer Engine) layers, usable with sequence parallelism.

megatron-core's own fallback asserts that sequence parallelism is off, yet mixture-of-experts layers with tensor
parallelism train only with it on.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """``x / rms(x) * weight`` over the last axis (arXiv 1910.07467), statistics as ``torch.nn.functional.rms_norm``.

    Under sequence parallelism each tensor-parallel rank sees its own tokens only; the mark on ``weight`` makes
    megatron-core sum the weight's gradient over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **kwargs):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel
