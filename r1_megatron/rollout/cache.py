"""What generation remembers of the tokens it has seen: what every local layer keeps of them, and the experts they met.

A *slot* is a run of ``max_len`` rows that belongs to one sequence. Latent attention keeps ``kv_lora_rank +
qk_pos_emb_head_dim`` numbers per token and layer, whatever the number of heads, on every tensor-parallel rank; grouped
attention keeps the rank's own key and value heads. With routing recorded, the chosen experts lie in rows of the same
slots, so that whatever moves a sequence (a shared prompt, a slot that is closed up) moves both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r1_megatron.rollout.scheduler import Copy


class TokenCache:
    """Rows ``[num_layers, slots, max_len, width]`` and, if recorded, experts ``[slots, max_len, layers, topk]``.

    Args:
        layer_numbers: global numbers of the layers that this pipeline rank holds, over all of its chunks.
        num_slots: sequences at a time.
        max_len: tokens of a sequence, prompt included.
        width: numbers per token and layer, the attention module's ``cache_width``.
        routing_shape: ``(mixture-of-experts layers of this rank, experts per token)``, or ``None``.
        num_experts: decides the record's type, uint8 up to 256 experts, else int16.
    """

    def __init__(
        self,
        layer_numbers: Sequence[int],
        num_slots: int,
        max_len: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        routing_shape: tuple[int, int] | None = None,
        num_experts: int = 0,
    ):
        self.num_slots, self.max_len = num_slots, max_len
        self._rows = torch.zeros(len(layer_numbers), num_slots, max_len, width, dtype=dtype, device=device)
        self.layers = dict(zip(layer_numbers, self._rows.unbind(0)))
        self.routing: torch.Tensor | None = None
        if routing_shape is not None:
            record_dtype = torch.uint8 if num_experts <= 256 else torch.int16
            self.routing = torch.zeros(num_slots, max_len, *routing_shape, dtype=record_dtype, device=device)

    @property
    def num_bytes(self) -> int:
        tensors = [self._rows] + ([] if self.routing is None else [self.routing])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Carry out copies that do not depend on each other (no target is a source), as one operation per tensor."""
        copies = [copy for copy in copies if copy.length]
        if not copies:
            return
        assert not {copy.source for copy in copies} & {copy.target for copy in copies}, copies
        longest = max(copy.length for copy in copies)  # rows behind a sequence's length are never read
        source = torch.tensor([copy.source for copy in copies], device=self._rows.device)
        target = torch.tensor([copy.target for copy in copies], device=self._rows.device)
        self._rows[:, target, :longest] = self._rows[:, source, :longest]
        if self.routing is not None:
            self.routing[target, :longest] = self.routing[source, :longest]

    def copy_prompt(self, source: int, targets: Sequence[int], length: int) -> None:
        """Give the slots ``targets`` the prompt of ``length`` tokens that ``source`` holds."""
        self.copy([Copy(source, target, length) for target in targets])

    def record_routing(self, cache_rows: torch.Tensor, first_layer: int, experts: torch.Tensor) -> None:
        """Note the experts ``[tokens, layers, topk]`` of the tokens at rows ``slot * max_len + position``.

        The layers are ``first_layer`` and the following of this rank's mixture-of-experts layers.
        """
        assert self.routing is not None
        rows = self.routing.view(-1, *self.routing.shape[2:])[:, first_layer : first_layer + experts.shape[1]]
        rows.index_copy_(0, cache_rows, experts.to(rows.dtype))
