"""Which sequences are in flight, and what each forward feeds the model. Pure bookkeeping on the host, no torch.

A *lane* is a group of sequences that steps together: pipeline stages work on different lanes at the same time, so a
pipeline keeps at least as many lanes as stages. Each lane owns a run of cache slots. Invariants, all asserted or
tested:

1. The live sequences of a lane occupy its first ``num_live`` slots, in order. A decode step therefore reads one
   contiguous piece of the cache; when a sequence ends, the last one moves into its place.
2. A prompt that several samples share is fed once: one slot computes it, the others copy its rows, and all draw their
   first token from the same logits row. Samples that find no free slot join later: they copy all but the prompt's last
   token from a sibling that is still live and feed that last token themselves, or they feed the prompt again.
3. A request that was stopped on its way feeds its prompt and all it had drawn as one piece and draws on behind it. New
   samples of its prompt copy the prompt's rows from it and draw their first token in the midst of that piece.
4. Everything follows from the requests and the drawn tokens, so all ranks of a replica hold equal lanes without a word
   said about shapes.

Legend: a slot index is local to the lane; ``first_slot + index`` is the cache's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# Activations of a forward grow with its prompt tokens; beyond this many, a GPU is busy anyway.
MAX_PREFILL_TOKENS = 16384
# Request id of sample j of a prompt: index * SAMPLES_PER_PROMPT_LIMIT + j.
SAMPLES_PER_PROMPT_LIMIT = 1 << 20


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
        prompt_number: the prompt's place in the call; samples of one prompt have it in common.
        prompt: int64 ``[prompt_len]``.
        max_new_tokens: tokens to draw at most, those of ``response`` among them.
        response, logprobs: int64 and float32 ``[num_response]``, what an earlier call drew before it was stopped.
    """

    request: int
    key: int
    prompt_number: int
    prompt: np.ndarray
    max_new_tokens: int
    response: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))


@dataclass(frozen=True)
class StepPlan:
    """One forward of a lane.

    ``tokens`` and ``positions`` (int64 ``[num_tokens]``) list the decode tokens of slots ``0 .. num_decode - 1`` first,
    then the prompts (of resumed requests: all tokens so far) packed. ``sampled_rows`` (int64 ``[num_live]``) names, for
    every live sequence in slot order, the row whose logits its next token comes from.

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


class Live(NamedTuple):
    """A sequence on its way: ``tokens`` int64 with the prompt, ``logprobs`` float32 of the response, its cache slot."""

    request: Request
    tokens: np.ndarray
    logprobs: np.ndarray
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
        pieces: list[np.ndarray] = []  # prompts, and resumed requests' tokens so far
        piece_slots: list[int] = []
        piece_of: dict[int, int] = {}  # prompt number -> the first of `pieces` that begins with it
        copies_before: list[Copy] = []
        copies_after: list[Copy] = []
        draws: list[tuple[int, int]] = []  # (piece, tokens of it) whose next token is drawn

        # A sibling that already decodes still holds the prompt. Requests are in prompt order, so those who find one
        # come first and their decode tokens stay in slot order.
        holders = {request.prompt_number: slot for slot, request in enumerate(self.live)} if self.queue else {}
        num_late = 0
        while self.queue and self.num_live < len(self._length):
            request = self.queue[0]
            slot, prompt, number = self.num_live, request.prompt, request.prompt_number
            tokens = np.concatenate([prompt, request.response])
            feeds_all = len(request.response) > 0 or (number not in holders and number not in piece_of)
            if feeds_all and pieces and sum(map(len, pieces)) + len(tokens) > self.max_prefill_tokens:
                break
            self.queue.popleft()
            self._admit(request, tokens)
            if feeds_all:
                piece_of.setdefault(number, len(pieces))
                draws.append((len(pieces), len(tokens)))
                pieces.append(tokens)
                piece_slots.append(slot)
            elif number in piece_of:
                draws.append((piece_of[number], len(prompt)))
                copies_after.append(self._copy(piece_slots[piece_of[number]], slot, len(prompt)))
            else:
                assert not pieces, "samples of one prompt stand together"
                num_late += 1
                copies_before.append(self._copy(holders[number], slot, len(prompt) - 1))
                decode_tokens.append(prompt[-1:])
                decode_positions.append(np.array([len(prompt) - 1]))

        num_decode = num_old + num_late
        lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        starts = num_decode + np.cumsum(lengths) - lengths
        return StepPlan(
            tokens=np.concatenate([*decode_tokens, *pieces]),
            positions=np.concatenate([*decode_positions, *(np.arange(length) for length in lengths)]),
            slots=np.concatenate([np.arange(num_decode), np.repeat(np.array(piece_slots, dtype=np.int64), lengths)]),
            num_decode=num_decode,
            prefill_lengths=tuple(lengths.tolist()),
            sampled_rows=np.array([*range(num_decode), *(starts[i] + count - 1 for i, count in draws)], dtype=np.int64),
            keys=self._key[: self.num_live].copy(),
            sample_positions=self._length[: self.num_live].copy(),
            copies_before=tuple(copies_before),
            copies_after=tuple(copies_after),
        )

    def _admit(self, request: Request, tokens: np.ndarray) -> None:
        slot, prompt_len, length = self.num_live, len(request.prompt), len(tokens)
        self.live.append(request)
        self._tokens[slot, :length] = tokens
        self._logprobs[slot, prompt_len:length] = request.logprobs
        self._length[slot] = length
        self._limit[slot] = prompt_len + request.max_new_tokens
        self._key[slot] = request.key

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

    def sequences(self) -> list[Live]:
        """The live sequences, in slot order. Of each the cache holds all tokens but the last one, between two steps."""
        return [
            Live(
                request,
                self._tokens[slot, : self._length[slot]].copy(),
                self._logprobs[slot, len(request.prompt) : self._length[slot]].copy(),
                self.first_slot + slot,
            )
            for slot, request in enumerate(self.live)
        ]

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
