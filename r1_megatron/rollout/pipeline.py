"""What pipeline stages tell each other while they generate: hidden states around the ring, drawn tokens to everyone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from r1_megatron.parallel.groups import ProcessGroups

# Gloo tells flows apart by tag; NCCL by communicator and order, see `Pipeline`.
_HIDDEN, _TOKENS = 1, 2


class Pipeline:
    """Messages between the virtual stages of one pipeline.

    Order keeps NCCL right, which has no tags: hidden states to the next rank travel on ``pp``; those from the last
    rank back to the first (between two chunks) share ``token`` with the tokens, in one direction and in the order in
    which the engine's loop sends and receives them.
    """

    def __init__(self, groups: ProcessGroups, num_chunks: int):
        self.size, self.rank, self.num_chunks = groups.topology.pp, groups.pp_rank, num_chunks
        self._groups, self._ranks = groups, groups.pipeline_ranks
        self._sends: list[tuple[Any, torch.Tensor]] = []

    def is_first(self, chunk: int) -> bool:
        return chunk == 0 and self.rank == 0

    def is_last(self, chunk: int) -> bool:
        return chunk == self.num_chunks - 1 and self.rank == self.size - 1

    def receive_hidden(self, hidden: torch.Tensor) -> None:
        group = self._groups.pp if self.rank > 0 else self._groups.token
        dist.recv(hidden, self._ranks[self.rank - 1], group=group, tag=_HIDDEN)

    def send_hidden(self, hidden: torch.Tensor) -> None:
        wraps = self.rank == self.size - 1
        group = self._groups.token if wraps else self._groups.pp
        self._send(hidden.contiguous(), self._ranks[0 if wraps else self.rank + 1], group, _HIDDEN)

    def send_tokens(self, drawn: torch.Tensor) -> None:
        for rank in self._ranks[:-1]:
            self._send(drawn, rank, self._groups.token, _TOKENS)

    def expect_tokens(self, drawn: torch.Tensor) -> Any:
        return dist.irecv(drawn, self._ranks[-1], group=self._groups.token, tag=_TOKENS)

    def flush(self) -> None:
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()

    def _send(self, tensor: torch.Tensor, rank: int, group: dist.ProcessGroup, tag: int) -> None:
        self._sends = [entry for entry in self._sends if not entry[0].is_completed()]
        self._sends.append((dist.isend(tensor, rank, group=group, tag=tag), tensor))
