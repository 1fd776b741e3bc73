"""Which sequences are in flight, and what each forward feeds the model. Pure bookkeeping on the host, no torch.

A *lane* is a group of sequences that steps together: pipeline stages work on different lanes at the same time, so a
pipeline keeps at least as many lanes as stages. Each lane owns a run of cache slots. Invariants, all asserted or
tested:

1. The live sequences of a lane occupy its first ``num_live`` slots, in order. A decode step therefore reads one
   contiguous piece of the cache; when a sequence ends, the last one moves into its place.
2. A prompt that several samples share is fed once: one slot computes it, the others copy its rows, and all draw their
   first token from the same logits row. Samples that find no free slot join later: they copy all but the prompt's last
   token from a sibling that is still live and feed that last token themselves, or they feed the prompt again.
3. Everything follows from the requests and the drawn tokens, so all ranks of a replica hold equal lanes without a word
   said about shapes.

Legend: a slot index is local to the lane; ``first_slot + index`` is the cache's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# Activations of a forward grow with its prompt tokens; beyond this many, a GPU is busy anyway.
MAX_PREFILL_TOKENS = 16384


class Copy(NamedTuple):
    """The first ``length`` rows of cache slot ``source`` become those of slot ``target``."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Request:
    """One sample to draw.

    Attributes:
        request: unique id; ``key`` is its random-stream key (see ``sampler.request_key``).
        prompt_number, sample: where the answer goes: prompt by place in the call, sample by place in its group.
        prompt: int64 ``[prompt_len]``.
        max_new_tokens: tokens to draw at most.
    """

    request: int
    key: int
    prompt_number: int
    sample: int
    prompt: np.ndarray
    max_new_tokens: int


@dataclass(frozen=True)
class StepPlan:
    """One forward of a lane.

    ``tokens`` and ``positions`` (int64 ``[num_tokens]``) list the decode tokens of slots ``0 .. num_decode - 1`` first,
    then the prompts of ``prefills`` packed. ``sampled_rows`` (int64 ``[num_live]``) names, for every live sequence in
    slot order, the row whose logits its next token comes from.

    Attributes:
        slots: int64 ``[num_tokens]``, the lane's slot of each token.
        copies_before, copies_after: cache copies around the forward, in cache slots.
        keys, sample_positions: int64 ``[num_live]``, what the sampler's noise is keyed by.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    num_decode: int
    prefill_lengths: tuple[int, ...]
    sampled_rows: np.ndarray
    keys: np.ndarray
    sample_positions: np.ndarray
    copies_before: tuple[Copy, ...]
    copies_after: tuple[Copy, ...]

    @property
    def num_sampled(self) -> int:
        return len(self.sampled_rows)


@dataclass(frozen=True)
class Finished:
    """A sequence that ended: ``tokens`` int64 with the prompt, ``logprobs`` float32 of the response, its last slot."""

    request: Request
    tokens: np.ndarray
    logprobs: np.ndarray
    stopped: bool
    slot: int


class Lane:
    """The sequences of one group in flight.

    Args:
        requests: in the order to be served; samples of one prompt stand together.
        first_slot, num_slots: the lane's share of the cache.
        max_len: longest sequence, in tokens.
        stop_tokens: ids that end a sequence.
        max_prefill_tokens: prompt tokens of one forward, at most (a longer prompt gets a forward of its own).
    """

    def __init__(
        self,
        requests: Sequence[Request],
        first_slot: int,
        num_slots: int,
        max_len: int,
        stop_tokens: Sequence[int],
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
    ):
        assert num_slots > 0 or not requests
        self.first_slot, self.num_slots, self.max_prefill_tokens = first_slot, num_slots, max_prefill_tokens
        self.queue = deque(requests)
        self.live: list[Request] = []
        num_slots = min(num_slots, len(requests))
        self._tokens = np.zeros((num_slots, max_len), dtype=np.int64)
        self._logprobs = np.zeros((num_slots, max_len), dtype=np.float32)
        self._length = np.zeros(num_slots, dtype=np.int64)
        self._limit = np.zeros(num_slots, dtype=np.int64)
        self._key = np.zeros(num_slots, dtype=np.int64)
        self._stop_tokens = np.array(sorted(set(stop_tokens)), dtype=np.int64)

    @property
    def num_live(self) -> int:
        return len(self.live)

    @property
    def has_work(self) -> bool:
        return bool(self.live or self.queue)

    def plan(self) -> StepPlan:
        """Admit what fits and lay out the next forward."""
        num_old = self.num_live
        decode_tokens = [self._tokens[np.arange(num_old), self._length[:num_old] - 1]]
        decode_positions = [self._length[:num_old] - 1]
        prompts: list[np.ndarray] = []
        prompt_slots: list[int] = []
        source_of: dict[int, int] = {}  # prompt number -> place in `prompts`
        copies_before: list[Copy] = []
        copies_after: list[Copy] = []
        last_rows: list[int] = []  # of newly fed prompts, counted from the first prompt token

        # A sibling that already decodes still holds the prompt. Requests are in prompt order, so those who find one
        # come first and their decode tokens stay in slot order.
        holders = {request.prompt_number: slot for slot, request in enumerate(self.live)} if self.queue else {}
        num_late = 0
        while self.queue and self.num_live < len(self._length):
            request = self.queue[0]
            slot, prompt, number = self.num_live, request.prompt, request.prompt_number
            is_new = number not in holders and number not in source_of
            if is_new and prompts and sum(map(len, prompts)) + len(prompt) > self.max_prefill_tokens:
                break
            self.queue.popleft()
            self.live.append(request)
            self._tokens[slot, : len(prompt)] = prompt
            self._length[slot] = len(prompt)
            self._limit[slot] = len(prompt) + request.max_new_tokens
            self._key[slot] = request.key
            if number in holders:
                assert not prompts, "samples of one prompt stand together"
                num_late += 1
                copies_before.append(self._copy(holders[number], slot, len(prompt) - 1))
                decode_tokens.append(prompt[-1:])
                decode_positions.append(np.array([len(prompt) - 1]))
                continue
            if is_new:
                source_of[number] = len(prompts)
                prompts.append(prompt)
                prompt_slots.append(slot)
            else:
                copies_after.append(self._copy(prompt_slots[source_of[number]], slot, len(prompt)))
            last_rows.append(source_of[number])

        num_decode = num_old + num_late
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        last_of_prompt = num_decode + np.cumsum(lengths) - 1
        return StepPlan(
            tokens=np.concatenate([*decode_tokens, *prompts]),
            positions=np.concatenate([*decode_positions, *(np.arange(length) for length in lengths)]),
            slots=np.concatenate([np.arange(num_decode), np.repeat(np.array(prompt_slots, dtype=np.int64), lengths)]),
            num_decode=num_decode,
            prefill_lengths=tuple(len(prompt) for prompt in prompts),
            sampled_rows=np.concatenate([np.arange(num_decode), last_of_prompt[last_rows].astype(np.int64)]),
            keys=self._key[: self.num_live].copy(),
            sample_positions=self._length[: self.num_live].copy(),
            copies_before=tuple(copies_before),
            copies_after=tuple(copies_after),
        )

    def append(self, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Take the drawn tokens (one per live sequence); answers which sequences now end by a stop token, bool."""
        num_live = self.num_live
        rows, length = np.arange(num_live), self._length[:num_live]
        self._tokens[rows, length] = tokens
        self._logprobs[rows, length] = logprobs
        self._length[:num_live] += 1
        return np.isin(tokens, self._stop_tokens)

    def retire(self, stopped: np.ndarray) -> tuple[list[Finished], list[Copy]]:
        """Take out the sequences that stopped or reached their limit.

        Answers them, and the cache copies that close the gaps; read a finished slot before carrying these out.
        """
        num_live = self.num_live
        done = stopped | (self._length[:num_live] >= self._limit[:num_live])
        if not done.any():
            return [], []
        finished = []
        for slot in np.flatnonzero(done):
            request, length = self.live[slot], self._length[slot]
            finished.append(
                Finished(
                    request,
                    self._tokens[slot, :length].copy(),
                    self._logprobs[slot, len(request.prompt) : length].copy(),
                    bool(stopped[slot]),
                    self.first_slot + int(slot),
                )
            )
        num_left = num_live - len(finished)
        holes = np.flatnonzero(done[:num_left]).tolist()
        movers = (num_left + np.flatnonzero(~done[num_left:])).tolist()
        for array in (self._tokens, self._logprobs, self._length, self._limit, self._key):
            array[holes] = array[movers]
        for hole, mover in zip(holes, movers):
            self.live[hole] = self.live[mover]
        del self.live[num_left:]
        # The newest token is not in the cache yet.
        copies = [self._copy(mover, hole, int(self._length[hole]) - 1) for hole, mover in zip(holes, movers)]
        return finished, copies

    def _copy(self, source: int, target: int, length: int) -> Copy:
        return Copy(self.first_slot + source, self.first_slot + target, length)


def split_lanes(
    requests: Sequence[Request], num_lanes: int, num_slots: int, max_len: int, stop_tokens: Sequence[int]
) -> list[Lane]:
    """Share requests and slots out over the lanes, evenly and in order, so that samples of a prompt stay together.

    Raises:
        ValueError: there are fewer slots than lanes.
    """
    if num_slots < num_lanes:
        raise ValueError(
            f"rollout.max_sequences={num_slots} is less than the {num_lanes} groups in flight "
            "(rollout.pipeline_groups, at least one per pipeline stage). Raise rollout.max_sequences."
        )
    bounds = [len(requests) * lane // num_lanes for lane in range(num_lanes + 1)]
    width = num_slots // num_lanes
    return [
        Lane(requests[begin:end], lane * width, width, max_len, stop_tokens)
        for lane, (begin, end) in enumerate(pairwise(bounds))
    ]
