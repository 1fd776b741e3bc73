"""Which sequences are in flight, where their past lies, and what each forward feeds the model. Host only, no torch.

A *lane* is a group of sequences that steps together: pipeline stages work on different lanes at the same time, so a
pipeline keeps at least as many lanes as stages. All lanes take requests from one queue and pages from one pool.
Invariants, all asserted or tested:

1. A sequence's past lies in *pages* of ``page_size`` positions. Its page table says which, so that sequences come and
   go without a row of the cache being moved.
2. A prompt that several samples share is fed once. They hold its pages together, and those who begin in the forward
   that feeds its last token draw from the same logits row. Samples that find a place later feed that last token
   themselves. As long as samples of it wait in the queue, the prompt's pages are kept for them.
3. What a sequence looks back on is never written again: who would write into a page that others hold as well takes a
   copy of it first.
4. Requests begin in the order of the queue, as far as places, pages and the prompt tokens of a forward allow; a place
   that is left is taken in the lane's next forward. Requests of a prompt that is still being fed are passed over.
5. A request begins if every sequence in flight could get one more page after it. When there is none left all the same,
   the lane that needs it gives up its youngest sequence: pages are freed, and what it has drawn goes back to the head
   of the queue. Tokens depend on nothing but their request, so it ends as if nothing had happened.
6. A prompt of more than ``max_prefill_tokens`` is fed in chunks over several forwards, with the others' decode tokens.
   A request that has drawn tokens (stopped in an earlier call, or given up in this one) feeds prompt and response as
   one piece, which is a prompt to all that follows.
7. Everything follows from the requests and the drawn tokens, so all ranks of a replica that ask in the same order hold
   equal lanes without a word said about shapes.
8. With drafts (`speculation.py`) a sequence may feed a guess of its next token behind its last token, in a page of its
   own if one is free; nobody gives up a place for a draft. A wrong one is fed over by the next forward. What the
   drafting layer keeps of a token depends on the one behind it, which for a prompt's last token the samples do not have
   in common: whoever began on another's forward feeds that last token once more, into a page of its own.

Progress: a sequence is given up in favour of an older one that draws a token in this very forward, or because other
lanes hold the pages. Alone in flight it gets whatever it needs: kept prompts give way, and the pages suffice for one
sequence of ``max_len``.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from r1_megatron.rollout.pages import PagePool

# Request id of sample j of a prompt: index * SAMPLES_PER_PROMPT_LIMIT + j.
SAMPLES_PER_PROMPT_LIMIT = 1 << 20


class Copy(NamedTuple):
    """What page ``source`` holds becomes that of page ``target``."""

    source: int
    target: int


@dataclass(frozen=True)
class Request:
    """One sample to draw.

    Attributes:
        request: unique id; ``key`` is its random-stream key (see ``sampler.request_key``).
        prompt_number: the prompt's place in the call; samples of one prompt have it in common.
        prompt: int64 ``[prompt_len]``.
        max_new_tokens: tokens to draw at most, those of ``response`` among them.
        response, logprobs: int64 and float32 ``[num_response]``, what was drawn before it was stopped or given up.
    """

    request: int
    key: int
    prompt_number: int
    prompt: np.ndarray
    max_new_tokens: int
    response: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    @property
    def is_new(self) -> bool:
        return len(self.response) == 0


class Live(NamedTuple):
    """A sequence on its way: ``tokens`` int64 with the prompt, ``logprobs`` float32 of the response.

    ``pages`` int32 hold what the cache keeps of all tokens but the last one.
    """

    request: Request
    tokens: np.ndarray
    logprobs: np.ndarray
    pages: np.ndarray


class Finished(NamedTuple):
    """A sequence that ended, by a stop token or string if ``stopped``."""

    sequence: Live
    stopped: bool


@dataclass(frozen=True)
class StepPlan:
    """One forward of a lane: T tokens.

    The first D tokens attend over pages, each for itself: one of every sequence that draws tokens, and the later chunks
    of prompts. The others are whole prompts or first chunks, packed: they attend among themselves.

    Attributes:
        tokens, positions: int64 ``[T]``.
        cache_rows: int64 ``[T]``, ``page * page_size + position % page_size``, where each token is kept.
        page_table: int32 ``[D, pages of the longest]``, unused entries hold any page.
        prefill_lengths: tokens of each packed piece.
        sequences: int64 ``[num_sampled]``, the scheduler's numbers of the sequences that draw a token.
        sampled_rows: int64 ``[num_drawn]``, the row of whose logits each draws; behind them the rows of drafts, which
            draw the token that follows if the draft is right.
        keys, sample_positions: int64 ``[num_drawn]``, what the sampler's noise is keyed by.
        draft_of: int64 ``[num_drawn - num_sampled]``, which of ``sequences`` each draft belongs to.
        following: int64 ``[T]``, the token behind each, ``~i`` where that is drawn token i; empty without drafts.
        copies: of pages, before the forward. Carried out together: all are read before any is written.
        given_up: sequences that had to make room. Their pages are as they were until the copies are carried out.
    """

    tokens: np.ndarray
    positions: np.ndarray
    cache_rows: np.ndarray
    page_table: np.ndarray
    prefill_lengths: tuple[int, ...]
    sequences: np.ndarray
    sampled_rows: np.ndarray
    keys: np.ndarray
    sample_positions: np.ndarray
    copies: tuple[Copy, ...]
    given_up: tuple[Live, ...]
    draft_of: np.ndarray
    following: np.ndarray

    @property
    def num_decode(self) -> int:
        return len(self.page_table)

    @property
    def num_sampled(self) -> int:
        return len(self.sequences)

    @property
    def num_drawn(self) -> int:
        return len(self.sampled_rows)


@dataclass
class _Sketch:
    """A forward while it is planned. ``leaders``: of prompts that it completes, the sequences that feed them."""

    budget: int
    joining: list[int] = field(default_factory=list)
    feeding: list[int] = field(default_factory=list)
    chunks: list[int] = field(default_factory=list)
    forks: list[tuple[int, int]] = field(default_factory=list)  # (sequence, its leader)
    leaders: dict[int, int] = field(default_factory=dict)
    copies: list[Copy] = field(default_factory=list)
    given_up: list[Live] = field(default_factory=list)


class Scheduler:
    """The sequences of one call.

    Args:
        requests: in the order to be served; samples of one prompt stand together.
        num_lanes: groups that step by turns.
        max_sequences: in flight, shared out evenly over the lanes; at least ``num_lanes``.
        max_len: longest sequence, in tokens.
        num_pages, page_size: of the cache; together at least ``max_len``.
        stop_tokens: ids that end a sequence.
        max_prefill_tokens: prompt tokens of one forward, at most.
        with_drafts: :meth:`expect` is told what may come next.

    ``num_steps``, ``num_stepped`` and ``num_given_up`` count forwards, the sequences of all of them, preemptions.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        num_lanes: int,
        max_sequences: int,
        max_len: int,
        num_pages: int,
        page_size: int,
        stop_tokens: Sequence[int],
        max_prefill_tokens: int,
        with_drafts: bool = False,
    ):
        assert max_sequences >= num_lanes and num_pages * page_size >= max_len and max_prefill_tokens > 0
        self.queue = deque(requests)
        self.lanes: list[list[int]] = [[] for _ in range(num_lanes)]  # sequences by age
        self.pool = PagePool(num_pages)
        self.num_steps = self.num_stepped = self.num_given_up = 0
        self._max_sequences, self._page_size, self._max_prefill_tokens = max_sequences, page_size, max_prefill_tokens
        self._stop_tokens = np.array(sorted(set(stop_tokens)), dtype=np.int64)
        # By sequence. Of the `_length` tokens `_fed` are in the cache once the forwards planned so far have run.
        num_rows = min(max_sequences, len(requests))
        self._free = list(range(num_rows - 1, -1, -1))
        self._requests: dict[int, Request] = {}
        self._tokens = np.zeros((num_rows, max_len), dtype=np.int64)
        self._logprobs = np.zeros((num_rows, max_len), dtype=np.float32)
        self._table = np.zeros((num_rows, self._pages_of(max_len)), dtype=np.int32)
        self._num_pages, self._prompt_len, self._length, self._fed, self._limit, self._key = np.zeros(
            (6, num_rows), dtype=np.int64
        )
        # Whether a draft of the next token stands behind the tokens, and how many of those fed are fed once more.
        self._with_drafts = with_drafts
        self._drafted, self._again = np.zeros((2, num_rows), dtype=np.int64)
        # By prompt number: samples that have not begun, the pages kept for them, and who feeds the prompt meanwhile.
        self._waiting = Counter(request.prompt_number for request in requests if request.is_new)
        self._prompts: dict[int, np.ndarray] = {}
        self._feeders: dict[int, int] = {}

    @property
    def num_live(self) -> int:
        return sum(map(len, self.lanes))

    @property
    def has_work(self) -> bool:
        return bool(self.queue) or any(self.lanes)

    def lane_has_work(self, lane: int) -> bool:
        return bool(self.queue or self.lanes[lane])

    def request(self, sequence: int) -> Request:
        return self._requests[sequence]

    def plan(self, lane: int) -> StepPlan:
        """Admit what fits and lay out the lane's next forward. It may have no tokens."""
        live, sketch = self.lanes[lane], _Sketch(self._max_prefill_tokens)
        self._make_room(live, sketch)
        old = np.array(live, dtype=np.int64)
        length, fed = self._length[old], self._fed[old]
        counts = np.minimum(length - fed, self._max_prefill_tokens)
        in_chunks = np.flatnonzero((fed < length - 1) | (length == self._prompt_len[old]))
        assert len(in_chunks) <= 1, "a lane feeds one long prompt at a time"
        for place in in_chunks.tolist():
            self._feed(live[place], int(counts[place]), sketch)
        drafted = self._room_for_drafts(old, sketch)
        self._admit(lane, sketch)
        if live:
            self.num_steps += 1
            self.num_stepped += len(live)
        return self._lay_out(old, counts, drafted, sketch)

    def append(self, sequences: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Take a drawn token of each sequence; answers which of them now end by a stop token, bool.

        All tokens before it are in the cache, a draft that was right among them.
        """
        length = self._length[sequences]
        self._tokens[sequences, length] = tokens
        self._logprobs[sequences, length] = logprobs
        self._fed[sequences] = length
        self._length[sequences] = length + 1
        return np.isin(tokens, self._stop_tokens)

    def expect(self, sequences: np.ndarray, tokens: np.ndarray) -> None:
        """Guesses of what the sequences draw next, to be fed with their last tokens.

        Of those that have to feed a token again they are not kept: they were made of another sample's past.
        """
        length = self._length[sequences]
        kept = (self._again[sequences] == 0) & (length < self._limit[sequences])
        self._drafted[sequences] = kept
        self._tokens[sequences[kept], length[kept]] = tokens[kept]

    def retire(self, lane: int, plan: StepPlan, stopped: np.ndarray) -> list[Finished]:
        """Take out those of the plan's sequences that stopped or reached their limit.

        Their pages are as they were until the next forward that is planned after this.
        """
        rows = plan.sequences
        done = stopped | (self._length[rows] >= self._limit[rows])
        finished = []
        for number in np.flatnonzero(done):
            row = int(rows[number])
            finished.append(Finished(self._told(row), bool(stopped[number])))
            self._forget(row)
        if finished:
            ended = set(rows[done].tolist())
            self.lanes[lane][:] = [row for row in self.lanes[lane] if row not in ended]
        return finished

    def cut(self, most_tokens: Callable[[Request], int]) -> None:
        """Let requests draw no more than so many tokens, those of ``response`` among them; between two forwards.

        Those in the queue that have as many are forgotten. A sequence in flight that has as many ends with its next
        draw, which may be under way.
        """
        for row, request in self._requests.items():
            most = min(request.max_new_tokens, most_tokens(request))
            self._requests[row] = replace(request, max_new_tokens=most)
            self._limit[row] = self._prompt_len[row] + most
        queue = list(self.queue)
        self.queue.clear()
        for request in queue:
            most = min(request.max_new_tokens, most_tokens(request))
            if most > len(request.response):
                self.queue.append(replace(request, max_new_tokens=most))
            elif request.is_new:
                self._forget_waiting(request.prompt_number)

    def sequences(self) -> list[Live]:
        """Those in flight that have drawn tokens and whose past is in the cache; between two steps of their lane."""
        return [self._told(row) for lane in self.lanes for row in lane if self._draws(row)]

    # ------------------------------------------------------------------------------------------------------- one step

    def _make_room(self, live: list[int], sketch: _Sketch) -> None:
        """A page of its own for what each sequence feeds next. Older ones come first, the youngest make room.

        Prompts in chunks have all their pages, but the one that their response begins in may be shared by then.
        """
        if self._again.any():
            self._make_room_at(live, self._fed - self._again, sketch)
        self._make_room_at(live, self._fed, sketch)

    def _make_room_at(self, live: list[int], positions: np.ndarray, sketch: _Sketch) -> None:
        """The same for one position of each sequence, ``[all sequences]``."""
        for place in self._without_page(np.array(live, dtype=np.int64), positions).tolist():
            while place < len(live) and not self._take_page(live[place], int(positions[live[place]]), sketch):
                if self._prompts:
                    self._drop_prompt()
                else:
                    self._give_up(live, sketch)

    def _without_page(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Which of the sequences have no page of their own at their position."""
        index = positions[rows] // self._page_size
        missing = index >= self._num_pages[rows]
        shared = self.pool.holders[self._table[rows, np.minimum(index, self._table.shape[1] - 1)]] > 1
        return np.flatnonzero(missing | shared)

    def _room_for_drafts(self, rows: np.ndarray, sketch: _Sketch) -> np.ndarray:
        """Which of the sequences feed their draft, 0 or 1 each.

        The last token that may be drawn needs none in front. Nobody makes room for a draft, but a free page is taken.
        """
        drafted = self._drafted[rows] * (self._length[rows] + 1 < self._limit[rows])
        if drafted.any():
            for place in self._without_page(rows, self._length).tolist():
                if drafted[place]:
                    drafted[place] = self._take_page(int(rows[place]), int(self._length[rows[place]]), sketch)
        return drafted

    def _take_page(self, row: int, position: int, sketch: _Sketch) -> bool:
        """Give the sequence the page of a position if it has none of its own; whether there was one."""
        index = position // self._page_size
        is_new = index == self._num_pages[row]
        page = int(self._table[row, index])
        if not is_new and self.pool.holders[page] == 1:
            return True
        if not self.pool.num_free:
            return False
        (own,) = self.pool.take(1)
        self._table[row, index] = own
        if is_new:
            self._num_pages[row] += 1
        else:
            sketch.copies.append(Copy(page, own))
            self.pool.release([page])
        return True

    def _give_up(self, live: list[int], sketch: _Sketch) -> None:
        """Put the lane's youngest sequence back into the queue.

        Copies that it was to get in this forward are not made: what they were to hold lies where it lay.
        """
        row = live.pop()
        request = self._requests[row]
        held = self._table[row, : self._num_pages[row]].tolist()
        sources = {copy.target: copy.source for copy in sketch.copies if copy.target in held}
        sketch.copies = [copy for copy in sketch.copies if copy.target not in sources]
        if self._draws(row):
            told = self._told(row)._replace(pages=np.array([sources.get(page, page) for page in held], dtype=np.int32))
            sketch.given_up.append(told)
            request = replace(request, response=told.tokens[len(request.prompt) :], logprobs=told.logprobs)
        if self._feeders.get(request.prompt_number) == row:
            del self._feeders[request.prompt_number]
        self._waiting[request.prompt_number] += request.is_new
        self.queue.appendleft(request)
        self.num_given_up += 1
        self._forget(row)

    def _admit(self, lane: int, sketch: _Sketch) -> None:
        """Begin requests in the order of the queue, those aside whose prompt is just being fed."""
        live, num_lanes = self.lanes[lane], len(self.lanes)
        # The lane's share of all places, and of all that there is to do; the first one if nothing is being done.
        todo = len(self.queue) + self.num_live
        places, work = ((n + num_lanes - 1 - lane) // num_lanes for n in (self._max_sequences, todo))
        work = max(work, self.num_live == 0)
        aside: list[Request] = []
        while self.queue and len(live) < min(places, work):
            request = self.queue.popleft()
            if request.is_new and request.prompt_number in self._feeders:
                aside.append(request)
            elif not self._begin(request, live, sketch):
                self.queue.appendleft(request)
                break
        self.queue.extendleft(reversed(aside))

    def _begin(self, request: Request, live: list[int], sketch: _Sketch) -> bool:
        """Whether there were pages, and room in this forward, for the request."""
        number, prompt_len = request.prompt_number, len(request.prompt)
        tokens = np.concatenate([request.prompt, request.response])
        # Short pieces wait for a forward that takes them whole.
        room = sketch.budget == self._max_prefill_tokens or len(tokens) <= sketch.budget
        while True:
            pages = self._prompts.get(number) if request.is_new else None
            if pages is None and not room:
                return False
            if self._fits(len(tokens), prompt_len + request.max_new_tokens, shares=pages is not None):
                break
            if self.num_live or not self._prompts:
                return False
            self._drop_prompt()
        row = self._free.pop()
        live.append(row)
        self._requests[row] = request
        self._tokens[row, : len(tokens)] = tokens
        self._logprobs[row, prompt_len : len(tokens)] = request.logprobs
        self._prompt_len[row], self._length[row], self._key[row] = prompt_len, len(tokens), request.key
        self._limit[row] = prompt_len + request.max_new_tokens
        self._waiting[number] -= request.is_new
        if pages is None:
            count = min(len(tokens), sketch.budget)
            self._hold(row, self.pool.take(self._pages_of(len(tokens))))
            self._fed[row] = 0
            sketch.feeding.append(row)
            sketch.chunks.append(count)
            self._feed(row, count, sketch)
        else:
            self.pool.share(pages)
            self._hold(row, pages)
            if number in sketch.leaders:
                self._fed[row] = prompt_len
                self._again[row] = self._with_drafts
                sketch.forks.append((row, sketch.leaders[number]))
            else:
                self._fed[row] = prompt_len - 1
                taken = self._take_page(row, prompt_len - 1, sketch)
                assert taken
                sketch.joining.append(row)
            if not self._waiting[number]:
                self.pool.release(self._prompts.pop(number))
        return True

    def _fits(self, num_tokens: int, limit: int, shares: bool) -> bool:
        """Whether a new sequence leaves a page for each one that may need another, itself included.

        Who shares its prompt's pages needs one for the token behind or a copy of the last one.
        """
        rows = [row for lane in self.lanes for row in lane]
        num_growing = int((self._num_pages[rows] * self._page_size < self._limit[rows]).sum())
        num_pages = self._pages_of(num_tokens)
        grows = num_pages < self._pages_of(limit)
        return (1 if shares else num_pages) + num_growing + grows <= self.pool.num_free

    def _feed(self, row: int, count: int, sketch: _Sketch) -> None:
        """The sequence feeds its next ``count`` tokens. Keep the prompt's pages if others wait for them."""
        sketch.budget -= count
        number, prompt_len = self._requests[row].prompt_number, int(self._prompt_len[row])
        if number in self._prompts or self._feeders.get(number, row) != row or not self._waiting[number]:
            return
        if self._fed[row] + count < prompt_len:
            self._feeders[number] = row
        elif self._fed[row] < prompt_len:
            self._feeders.pop(number, None)
            pages = self._table[row, : self._pages_of(prompt_len)].copy()
            self.pool.share(pages)
            self._prompts[number] = pages
            sketch.leaders[number] = row

    def _lay_out(self, old: np.ndarray, counts_old: np.ndarray, drafted_old: np.ndarray, sketch: _Sketch) -> StepPlan:
        rows = np.concatenate([old, np.array([*sketch.joining, *sketch.feeding], dtype=np.int64)])
        counts = np.concatenate([counts_old, np.array([*[1] * len(sketch.joining), *sketch.chunks], dtype=np.int64)])
        drafted = np.pad(drafted_old, (0, len(rows) - len(old)))
        fed, again = self._fed[rows], self._again[rows]
        spans = again + counts + drafted
        ends = np.cumsum(spans)
        before = fed - again - ends + spans  # a sequence's positions less its rows
        row_T = np.repeat(rows, spans)
        position_T = np.arange(len(row_T)) + np.repeat(before, spans)
        index_T = position_T // self._page_size
        num_decode = len(row_T) - sum(sketch.chunks)
        num_columns = int(index_T[:num_decode].max()) + 1 if num_decode else 0
        self._fed[rows] = fed + counts
        self._again[rows] = self._drafted[rows] = 0
        complete = fed + counts == self._length[rows]
        sequences, last_rows = rows[complete], (ends - drafted)[complete] - 1
        fork_rows = np.zeros(0, dtype=np.int64)
        if sketch.forks:
            before_of = dict(zip(rows.tolist(), before.tolist()))
            sequences = np.concatenate([sequences, np.array([row for row, _ in sketch.forks], dtype=np.int64)])
            fork_rows = np.array(
                [int(self._prompt_len[leader]) - 1 - before_of[leader] for _, leader in sketch.forks], dtype=np.int64
            )
        draft_rows = ends[drafted > 0] - 1
        draft_of = (np.cumsum(complete) - 1)[drafted > 0]
        drawing = np.concatenate([sequences, sequences[draft_of]])
        following = np.zeros(0, dtype=np.int64)
        if self._with_drafts:
            following = self._tokens[row_T, np.minimum(position_T + 1, self._tokens.shape[1] - 1)]
            following[last_rows] = ~np.arange(len(last_rows))
            following[draft_rows] = ~np.arange(len(sequences), len(drawing))
        return StepPlan(
            tokens=self._tokens[row_T, position_T],
            positions=position_T,
            cache_rows=self._table[row_T, index_T].astype(np.int64) * self._page_size + position_T % self._page_size,
            page_table=self._table[row_T[:num_decode], :num_columns],
            prefill_lengths=tuple(sketch.chunks),
            sequences=sequences,
            sampled_rows=np.concatenate([last_rows, fork_rows, draft_rows]),
            keys=self._key[drawing],
            sample_positions=self._length[drawing] + (np.arange(len(drawing)) >= len(sequences)),
            copies=tuple(sketch.copies),
            given_up=tuple(sketch.given_up),
            draft_of=draft_of,
            following=following,
        )

    # ---------------------------------------------------------------------------------------------------- bookkeeping

    def _pages_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _hold(self, row: int, pages: Sequence[int] | np.ndarray) -> None:
        self._table[row, : len(pages)] = pages
        self._num_pages[row] = len(pages)

    def _drop_prompt(self) -> None:
        """Keep one prompt less for samples that wait: the one that was fed last. The next of them feeds it again."""
        _, pages = self._prompts.popitem()
        self.pool.release(pages)

    def _forget_waiting(self, number: int) -> None:
        """One sample less waits for the prompt; nothing is kept for none."""
        self._waiting[number] -= 1
        if not self._waiting[number]:
            self._feeders.pop(number, None)
            if number in self._prompts:
                self.pool.release(self._prompts.pop(number))

    def _draws(self, row: int) -> bool:
        """Whether the sequence has drawn a token and feeds but the last one next."""
        length = self._length[row]
        return bool(self._fed[row] == length - 1 and length > self._prompt_len[row])

    def _told(self, row: int) -> Live:
        request, length = self._requests[row], int(self._length[row])
        return Live(
            request,
            self._tokens[row, :length].copy(),
            self._logprobs[row, self._prompt_len[row] : length].copy(),
            self._table[row, : self._num_pages[row]].copy(),
        )

    def _forget(self, row: int) -> None:
        self.pool.release(self._table[row, : self._num_pages[row]])
        self._num_pages[row] = self._drafted[row] = self._again[row] = 0
        del self._requests[row]
        self._free.append(row)
