"""The multi-token-prediction layer as it drafts: the token behind the next one, of every row of a generation step.

DeepSeek-V3 (arXiv 2412.19437, equations 21-23) gives the layer the trunk's hidden state ``h_i`` of a token and the
embedding of the token behind it::

    h'_i = transformer(W [norm(embedding(t_{i+1})); norm(h_i)])        logits of t_{i+2} = head(norm(h'_i))

(``h_i`` is behind the final norm, as in megatron-core's training.) Its transformer layer attends over its own past,
which lies in the same pages as the other layers'. So a step's rows, pages and prompts serve it as they are.

Legend: T rows of the forward, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch

from r1_megatron.kernels.decode import rms_norm
from r1_megatron.model.generation import StepContext, gather_rows, project
from r1_megatron.model.walk import Walk
from r1_megatron.parallel.groups import ProcessGroups


def drafting_layer(chunk: Any) -> Any:
    """The chunk's first multi-token-prediction layer; ``None`` where it has none."""
    return chunk.mtp.layers[0] if chunk.mtp_process else None


class DraftWalk:
    """The first multi-token-prediction layer of the last chunk, walked over like the chunk's other layers.

    Args:
        walk: of the same chunk.
    """

    def __init__(self, chunk: Any, walk: Walk, groups: ProcessGroups):
        self._walk, self._tp = walk, groups.tp
        self._module = drafting_layer(chunk)
        self._layer = walk.layer(self._module.transformer_layer)

    def __call__(self, hidden: torch.Tensor, following: torch.Tensor, step: StepContext) -> torch.Tensor:
        """What the output head makes logits of, ``[T, H]``, all rows on every tensor-parallel rank.

        Args:
            hidden: ``[T, H]`` behind the trunk's final norm.
            following: int64 ``[T]``, the token behind each row's.
        """
        module = self._module
        joined = torch.cat([_norm(module.enorm, self._walk.embed(following)), _norm(module.hnorm, hidden)], 1)
        stream, added = self._layer(self._all_columns(project(joined, module.eh_proj.weight)), None, step)
        return _norm(module.final_layernorm, added, stream)

    def _all_columns(self, columns: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` of each tensor-parallel rank's ``[T, H / tp]``."""
        size = self._tp.size()
        if size == 1:
            return columns
        return gather_rows(columns, self._tp).unflatten(0, (size, -1)).transpose(0, 1).flatten(1)


def _norm(norm: Any, rows: torch.Tensor, stream: torch.Tensor | None = None) -> torch.Tensor:
    return rms_norm(rows, norm.weight, norm.eps or 0.0, stream)[0]
