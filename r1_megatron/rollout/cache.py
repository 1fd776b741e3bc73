"""What generation remembers of the tokens it has seen: what every local layer keeps of them, and the experts they met.

A *page* is ``page_size`` rows, which hold consecutive positions of one sequence; ``scheduler.py`` says whose and which.
Latent attention keeps ``kv_lora_rank + qk_pos_emb_head_dim`` numbers per token and layer, whatever the number of heads,
on every tensor-parallel rank; grouped attention keeps the rank's own key and value heads. With routing recorded, the
chosen experts lie in pages of the same numbers, so that whoever shares a page or takes a copy of it has both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r1_megatron.kernels import flash
from r1_megatron.rollout.scheduler import Copy

# Positions of a page, by device. On CUDA what FlashMLA's kernels read at a time.
PAGE_SIZE = {"cpu": 16, "cuda": 64}


def page_size(device_type: str, grouped: bool) -> int:
    """Positions of a page, for latent or for grouped attention."""
    asked = flash.load(device_type).grouped_page if grouped else None
    return asked or PAGE_SIZE[device_type]


class TokenCache:
    """The pages of all local layers.

    Rows are ``[num_layers, num_pages, page_size, width]``, recorded experts ``[num_pages, page_size, layers, topk]``.

    Args:
        layer_numbers: global numbers of the layers that this pipeline rank holds, over all of its chunks.
        width: numbers per token and layer, the attention module's ``cache_width``.
        routing_shape: ``(mixture-of-experts layers of this rank, experts per token)``, or ``None``.
        num_experts: decides the record's type, uint8 up to 256 experts, else int16.
    """

    def __init__(
        self,
        layer_numbers: Sequence[int],
        num_pages: int,
        page_size: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        routing_shape: tuple[int, int] | None = None,
        num_experts: int = 0,
    ):
        self.num_pages, self.page_size = num_pages, page_size
        self._rows = torch.zeros(len(layer_numbers), num_pages, page_size, width, dtype=dtype, device=device)
        self.layers = dict(zip(layer_numbers, self._rows.unbind(0)))
        self.routing: torch.Tensor | None = None
        if routing_shape is not None:
            record_dtype = torch.uint8 if num_experts <= 256 else torch.int16
            self.routing = torch.zeros(num_pages, page_size, *routing_shape, dtype=record_dtype, device=device)

    @property
    def num_bytes(self) -> int:
        tensors = [self._rows] + ([] if self.routing is None else [self.routing])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def copy(self, copies: Sequence[Copy], layers: slice, moe_layers: slice) -> None:
        """Copy pages of some of this rank's layers (numbered from 0 here); all are read before any is written."""
        if not copies:
            return
        source, target = torch.tensor(copies, device=self._rows.device).unbind(1)
        self._rows[layers, target] = self._rows[layers, source]
        if self.routing is not None:
            self.routing[target, :, moe_layers] = self.routing[source, :, moe_layers]

    def record_routing(self, cache_rows: torch.Tensor, moe_layers: slice, experts: torch.Tensor) -> None:
        """Note the experts ``[tokens, layers, topk]`` of tokens, in rows ``page * page_size + position % page_size``.

        The layers are some of this rank's mixture-of-experts layers.
        """
        assert self.routing is not None
        rows = self.routing.view(-1, *self.routing.shape[2:])[:, moe_layers]
        rows.index_copy_(0, cache_rows, experts.to(rows.dtype))

    def recorded_routing(self, pages: torch.Tensor, num_tokens: int) -> torch.Tensor | None:
        """The experts ``[num_tokens, layers, topk]`` of the first tokens in a sequence's pages, if recorded."""
        return None if self.routing is None else self.routing[pages].flatten(0, 1)[:num_tokens]
