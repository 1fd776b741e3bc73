"""Generation with experts on other data-parallel ranks: one all-to-all to them and one back, in every layer.

A rank chooses experts for rows of its own and sends each row once to every rank that needs it, however many of the
row's experts that rank has (as DeepEP does); the row's gates and choice travel in the same message. The owner answers
one sum a row over the experts it has, and the sender adds the ranks' sums up in rank order. A row's bits therefore
depend neither on the batch nor on which of the ranks it belongs to::

    choose -> send .......... receive -> theirs -> send .......... receive -> add up
                    (own rows)                        (shared expert)

What is in brackets is computed while messages are under way. A rank's rows need no message to itself.

**How many rows come** must be known where memory is handed out, on the host. There are two ways:

* *Every row to every rank*: the ranks agreed on their rows before the step (`StepContext.peer_rows`), so no layer asks
  or waits; where a rank has none of the row's experts it computes nothing and answers zeros. P ranks cost a sender
  ``2 (P - 1)`` messages of a row.
* *Rows to the ranks they chose*: an exchange of P counts, which the host waits for, goes first. With K experts chosen
  independently a rank is left out with probability ``(1 - 1/P)^K``; only the others cost messages.

The first way is faster until the rows it sends in vain weigh more than counting, which takes some 0.1 ms: over Gloo as
a call, on CUDA because the host waits. DeepSeek-V3's row is 14.4 kB (7168 bfloat16, 8 gates and experts). 128 rows a
rank on P = 8 send 12.9 MB one way, of which 4.4 MB in vain: 11 us of NVLink at 400 GB/s. On P = 64 it is 116 MB,
of which 102 MB in vain: 2 ms of InfiniBand at 50 GB/s, so there rows are counted. Zeros do not change a sum: both ways
give the same bits.

Under expert tensor parallelism a row goes to all ranks that have a slice of its expert, and their parts add up like
those of different experts.

Legend: T rows of this rank, R received rows, N sent ones, P ranks that exchange, H hidden, K experts chosen per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist

from r1_megatron.kernels.decode import mixture_of_experts
from r1_megatron.model.experts import GroupedExperts

# Rows that are sent in vain may weigh so much before they are counted instead, in bytes: 0.16 ms at 50 GB/s.
COUNTING_IS_WORTH = 8 << 20


class ExpertExchange:
    """The routed experts of one layer for rows of this rank; all ranks of ``group`` call it together.

    Args:
        experts: this rank's part of them.
        group: the ranks that have all experts among them, slices of an expert side by side.
    """

    def __init__(self, experts: GroupedExperts, group: dist.ProcessGroup):
        self._group, self._rank, self._size = group, group.rank(), group.size()
        self._num_local, self._slices = experts.num_local_experts, experts.tp_group.size()
        self._first = experts.ep_group.rank() * experts.num_local_experts
        self._weights = experts.linear_fc1.weight, experts.linear_fc2.weight

    def begin(
        self, rows_TH: torch.Tensor, gates_TK: torch.Tensor, chosen_TK: torch.Tensor, peer_rows: tuple[int, ...]
    ) -> Callable[[], torch.Tensor]:
        """Start with the rows; what is answered waits for the sums over all their experts, ``[T, H]``.

        Args:
            rows_TH: float32 or bfloat16, like the weights; contiguous.
            gates_TK: float32.
            chosen_TK: int64; -1 adds nothing, for rows that are padding.
            peer_rows: T of each rank of the group, known to all of them.
        """
        assert peer_rows[self._rank] == len(rows_TH), f"{len(rows_TH)} rows, agreed were {peer_rows}"
        width = rows_TH.view(torch.int32).shape[1]
        message = torch.cat(
            [rows_TH.view(torch.int32), gates_TK.view(torch.int32), chosen_TK.to(torch.int32)], dim=1
        )  # [T, width + 2 K]
        plan = self._plan(chosen_TK, peer_rows, 4 * message.shape[1])
        received, arriving = self._start(plan.outgoing(message), plan.num_received, plan.num_sent)
        own_TH = self._experts(rows_TH, gates_TK, chosen_TK)
        arriving.wait()
        x, gates, chosen = received.split([width, gates_TK.shape[1], gates_TK.shape[1]], dim=1)
        theirs_RH = self._experts(
            x.contiguous().view(rows_TH.dtype), gates.contiguous().view(torch.float32), chosen.long()
        )
        answers_NH, returning = self._start(theirs_RH, plan.num_sent, plan.num_received)

        def finish() -> torch.Tensor:
            returning.wait()
            return plan.add_up(answers_NH, own_TH, self._rank)

        return finish

    def _experts(self, rows: torch.Tensor, gates: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """What this rank's experts add to the rows."""
        return mixture_of_experts(rows, gates, chosen, *self._weights, self._first) if len(rows) else rows

    def _start(
        self, rows: torch.Tensor, num_received: list[int], num_sent: list[int]
    ) -> tuple[torch.Tensor, dist.Work]:
        """An all-to-all under way: (what will be received, what to wait for)."""
        received = rows.new_empty(sum(num_received), rows.shape[1])
        work: Any = dist.all_to_all_single(received, rows, num_received, num_sent, group=self._group, async_op=True)
        return received, work

    def _plan(self, chosen_TK: torch.Tensor, peer_rows: tuple[int, ...], row_bytes: int) -> _EveryRow | _ChosenRows:
        vain = rows_in_vain(max(peer_rows), self._size // self._slices, self._slices, chosen_TK.shape[1])
        if vain * row_bytes > COUNTING_IS_WORTH:
            return self._count(chosen_TK)
        return _every_row(peer_rows, self._rank)

    def _count(self, chosen_TK: torch.Tensor) -> _ChosenRows:
        """Which rows go where, and how many come from where."""
        owner_TK = chosen_TK.div(self._num_local, rounding_mode="floor")
        owners = torch.arange(self._size // self._slices, device=chosen_TK.device)
        needs_TP = (owner_TK[:, :, None] == owners).any(1).repeat_interleave(self._slices, dim=1)
        needs_TP[:, self._rank] = False
        sent = needs_TP.sum(0)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        num_sent, num_received = torch.stack([sent, received]).tolist()
        most = min(self._size, chosen_TK.shape[1] * self._slices + 1)
        return _ChosenRows(num_sent, num_received, needs_TP, most)


def rows_in_vain(rows: int, owners: int, slices: int, choices: int) -> float:
    """Expected messages to ranks that have none of a row's experts, where every row goes to every rank.

    Example:
        >>> round(rows_in_vain(rows=128, owners=8, slices=1, choices=8))
        308
    """
    return rows * slices * (owners - 1) * (1 - 1 / owners) ** choices


@dataclass(frozen=True)
class _EveryRow:
    """All rows go to all ranks. ``num_sent`` and ``num_received``: by rank, none to this one itself."""

    num_sent: list[int]
    num_received: list[int]

    def outgoing(self, message: torch.Tensor) -> torch.Tensor:
        copies = len(self.num_sent) - 1
        return message if copies == 1 else message.repeat(copies, 1)

    def add_up(self, answers_NH: torch.Tensor, own_TH: torch.Tensor, rank: int) -> torch.Tensor:
        """The sum in rank order, into one of the arguments."""
        parts = list(answers_NH.split(len(own_TH)))
        parts.insert(rank, own_TH)
        total = parts[0]
        for part in parts[1:]:
            total = total.add_(part)
        return total


@lru_cache
def _every_row(peer_rows: tuple[int, ...], rank: int) -> _EveryRow:
    others = [peer != rank for peer in range(len(peer_rows))]
    sent = [peer_rows[rank] * other for other in others]
    return _EveryRow(sent, [rows * other for rows, other in zip(peer_rows, others)])


@dataclass(frozen=True)
class _ChosenRows:
    """Rows go to the ranks that have their experts. ``most``: ranks that a row can have a sum of."""

    num_sent: list[int]
    num_received: list[int]
    needs_TP: torch.Tensor
    most: int

    def outgoing(self, message: torch.Tensor) -> torch.Tensor:
        return message[self.needs_TP.T.nonzero()[:, 1]]

    def add_up(self, answers_NH: torch.Tensor, own_TH: torch.Tensor, rank: int) -> torch.Tensor:
        """The sum in rank order; each row takes its answers from a table of where they lie."""
        num_rows, num_sent = len(own_TH), len(answers_NH)
        lies_TP = (self.needs_TP.T.flatten().cumsum(0) - 1).view(-1, num_rows).T
        lies_TP[:, rank] = num_sent + torch.arange(num_rows, device=own_TH.device)
        has_TP = self.needs_TP.clone()
        has_TP[:, rank] = True
        lies_TP = lies_TP.masked_fill(~has_TP, num_sent + num_rows)  # a row of zeros
        order_TP = has_TP.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        parts = torch.cat([answers_NH, own_TH, own_TH.new_zeros(1, own_TH.shape[1])])
        lies_TP = lies_TP.gather(1, order_TP[:, : self.most])
        total = parts[lies_TP[:, 0]]
        for column in lies_TP.T[1:]:
            total += parts[column]
        return total
