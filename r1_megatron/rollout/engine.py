"""Generation on the training model itself: the same modules, the same weights, the same parallel layout.

No second engine, no copy of the weights, nothing to synchronise after an optimizer step. A forward takes one row per
token: a decode token of every live sequence, then prompts, then padding up to a multiple of the tensor-parallel size,
so that sequence parallelism and expert dispatch work on it exactly as in training.

Pipeline stages work on different *lanes* (groups of sequences) at the same time. Virtual stage ``chunk * pp + rank``
hands hidden states to the next one around the ring of pipeline ranks; the last one draws tokens and sends them to all::

    for each round:  for each chunk of this rank:  for each lane:  receive, forward, send
    (first chunk: the lane takes its last tokens and plans its step; last virtual stage: it draws)

Every stage plans from the same requests and tokens, and takes and plans in the same order, for lanes share a queue and
the cache; so shapes are never sent. Copies of pages come right before each chunk's forward: lanes that plan one after
the other find, in every layer, what the ones before them have written. Data-parallel ranks generate for themselves,
except that ranks which exchange tokens between experts have to run the same forwards: they agree before each whether
any of them has tokens for it (`rollout/coupling.py`), and one that has none feeds padding.

Where a run may be asked to end, rounds come in segments, and after each of them all ranks of the job agree on whether
to go on. A segment ends between two rounds: every stage has been through the same steps of every lane, and drawn tokens
are all that is under way. Pausing therefore changes no forward.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from r1_megatron.config.schema import RunConfig, SamplingConfig
from r1_megatron.data.tokenizers import Tokenizer
from r1_megatron.model.drafting import drafting_layer
from r1_megatron.model.generation import StepContext, gather_rows, on_device, pack_prompts, project
from r1_megatron.model.routing import all_routers, chunk_routers
from r1_megatron.model.walk import Walk, can_walk
from r1_megatron.parallel.groups import ProcessGroups
from r1_megatron.rollout.answers import Answers
from r1_megatron.rollout.cache import TokenCache, page_size
from r1_megatron.rollout.coupling import Coupling
from r1_megatron.rollout.graphs import Capture, CudaCapture, StepGraphs, output_weight, why_not
from r1_megatron.rollout.in_flight import InFlight, RolloutStopped
from r1_megatron.rollout.pipeline import Pipeline
from r1_megatron.rollout.race import RACE_ROUNDS, Race
from r1_megatron.rollout.requests import Call, check_call, make_requests
from r1_megatron.rollout.sampler import Draw, group_gather, position_keys, sample_tokens
from r1_megatron.rollout.scheduler import SAMPLES_PER_PROMPT_LIMIT, Scheduler, StepPlan
from r1_megatron.rollout.speculation import Acceptance, Drafting, check_drafting
from r1_megatron.types import Prompt, Rollout


def build_engine(cfg: RunConfig, chunks: Sequence[Any], groups: ProcessGroups, tokenizer: Tokenizer) -> Engine:
    """The engine of this rank over its bare ``GPTModel`` chunks (not wrapped by DDP), which it shares with training.

    Raises:
        ValueError: a sequence of ``data.max_prompt_tokens + sampling.max_new_tokens`` is longer than the positions
            the model is prepared for, or the groups in flight do not fit.
    """
    max_len = cfg.data.max_prompt_tokens + cfg.sampling.max_new_tokens
    if max_len > cfg.model.max_position_embeddings:
        raise ValueError(
            f"data.max_prompt_tokens({cfg.data.max_prompt_tokens}) + sampling.max_new_tokens("
            f"{cfg.sampling.max_new_tokens}) = {max_len}, but model.max_position_embeddings="
            f"{cfg.model.max_position_embeddings}. Shorten one of the former or raise the latter."
        )
    if groups.topology.cp > 1:
        raise ValueError(f"parallel.context_parallel_size={groups.topology.cp}: generation needs 1.")
    rollout = cfg.rollout
    num_lanes = rollout.pipeline_groups or groups.topology.pp
    if rollout.max_sequences < num_lanes:
        raise ValueError(
            f"rollout.max_sequences={rollout.max_sequences} is less than the {num_lanes} groups in flight "
            "(rollout.pipeline_groups, at least one per pipeline stage). Raise rollout.max_sequences."
        )
    if rollout.cache_tokens is not None and rollout.cache_tokens < max_len:
        raise ValueError(
            f"rollout.cache_tokens={rollout.cache_tokens} is less than one sequence, which could never end: "
            f"data.max_prompt_tokens({cfg.data.max_prompt_tokens}) + sampling.max_new_tokens("
            f"{cfg.sampling.max_new_tokens}) = {max_len} tokens. Raise the former or shorten one of the latter."
        )
    if rollout.speculative_tokens:
        check_drafting(chunks, groups.pp_rank == groups.topology.pp - 1)
    return Engine(
        chunks,
        groups,
        tokenizer,
        vocab_size=cfg.model.vocab_size,
        max_sequences=rollout.max_sequences,
        num_lanes=num_lanes,
        max_len=max_len,
        page_size=page_size(groups.device.type, grouped=cfg.model.is_dense_student),
        cache_tokens=rollout.cache_tokens,
        max_prefill_tokens=rollout.max_prefill_tokens,
        record_routing=cfg.replays_experts,
        with_drafts=rollout.speculative_tokens > 0,
        capture=CudaCapture if rollout.cuda_graphs and not why_not(chunks, groups) else None,
    )


class Engine:
    """Draws samples from the policy. All ranks of the job call :meth:`generate` together.

    Args:
        chunks: this pipeline rank's virtual chunks.
        vocab_size: real vocabulary, without padding columns.
        max_sequences: in flight on this data-parallel rank, shared out over ``num_lanes``; at least as many.
        max_len: longest sequence, prompt included.
        page_size: positions of a page of the cache.
        cache_tokens: that the cache holds, rounded up to pages; at least ``max_len``. ``None``: enough for all
            ``max_sequences`` at ``max_len``.
        max_prefill_tokens: prompt tokens of one forward, at most.
        record_routing: fill :attr:`Rollout.routed_experts`.
        segment_rounds: rounds between two questions whether to stop.
        with_drafts: the multi-token-prediction layer drafts tokens, see `speculation.py`.
        capture: makes what records decode steps, see ``graphs.py``; ``None``: they are not recorded.

    ``metrics`` describes the last call: tokens drawn and fed, forwards, those of them that were played from a
    recording, sequences of a forward (mean), preemptions, seconds by activity, bytes of the cache and the most pages
    that were in use.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        groups: ProcessGroups,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        max_sequences: int,
        num_lanes: int,
        max_len: int,
        page_size: int,
        cache_tokens: int | None,
        max_prefill_tokens: int,
        record_routing: bool = False,
        segment_rounds: int = 64,
        with_drafts: bool = False,
        capture: Callable[[], Capture | None] | None = None,
    ):
        self.chunks, self.groups, self.tokenizer = list(chunks), groups, tokenizer
        self.vocab_size, self.max_len, self.page_size = vocab_size, max_len, page_size
        self.max_sequences, self.num_lanes, self.max_prefill_tokens = max_sequences, num_lanes, max_prefill_tokens
        pages = max_sequences * _pages(max_len, page_size) if cache_tokens is None else _pages(cache_tokens, page_size)
        self.num_pages = pages
        self.record_routing, self.segment_rounds = record_routing, segment_rounds
        self.config = self.chunks[0].config
        self.metrics: dict[str, float] = {}
        self.with_drafts = with_drafts
        self._layers = [layer for chunk in self.chunks for layer in chunk.decoder.layers]
        self._drafting_layer = drafting_layer(self.chunks[-1]) if with_drafts else None
        self._routers = [chunk_routers(chunk) for chunk in self.chunks]
        self._cache: TokenCache | None = None
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self._capture = capture
        self._graphs: StepGraphs | None = None

    @property
    def moe_layers(self) -> list[int]:
        """Global numbers (from 0) of this rank's mixture-of-experts layers, in `Rollout.routed_experts`'s order."""
        return [layer.layer_number - 1 for layer in self._layers if hasattr(layer.mlp, "router")]

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: SamplingConfig,
        *,
        seed: int,
        policy_version: int = 0,
        stop: Callable[[], bool] | None = None,
        in_flight: Sequence[InFlight] = (),
        race: Race | None = None,
    ) -> list[list[Rollout]]:
        """Samples of each prompt, in order.

        Args:
            prompts: this data-parallel rank's, the same on all of its tensor- and pipeline-parallel ranks; may be
                empty, also where the other data-parallel ranks' are not.
            seed: with :attr:`Prompt.index` and the sample's number it decides the sample, whatever the layout.
            stop: whether this rank was asked to end. All ranks of the job give it or none does; as soon as one of them
                answers true, all stop, within ``segment_rounds`` rounds.
            in_flight: what :class:`RolloutStopped` brought from a stopped call with the same arguments and weights, of
                these prompts; the layout may be another one. Finished samples are answered as they are, unfinished ones
                go on: the same tokens follow, log-probabilities so far are kept.
            race: answer the groups that are done first and stop drawing then. All ranks of the job give it or none
                does. A loser's samples are an empty list, and what is to go on of them is left in ``race.rest``;
                ``in_flight`` may then hold sequences that earlier calls left there, with other weights.

        Raises:
            ValueError: a prompt, an option or a sequence in flight is out of place; raised before anything runs.
            FloatingPointError: the model's logits are not finite.
            RolloutStopped: it stopped with work left; it carries the sequences. The cache is given back.
        """
        routing_shape = (self.moe_layers, self.config.moe_router_topk) if self.record_routing else None
        call = Call(prompts, samples_per_prompt, sampling, seed, policy_version, in_flight, routing_shape, race)
        check_call(call, vocab_size=self.vocab_size, max_len=self.max_len)
        stop_tokens = {self.tokenizer.eos_id, *sampling.stop_token_ids}
        scheduler = Scheduler(
            make_requests(call),
            num_lanes=self.num_lanes,
            max_sequences=self.max_sequences,
            max_len=self.max_len,
            num_pages=self.num_pages,
            page_size=self.page_size,
            stop_tokens=sorted(stop_tokens),
            max_prefill_tokens=self.max_prefill_tokens,
            with_drafts=self.with_drafts,
        )
        answers = Answers(call, self.tokenizer, stop_tokens)
        with self._generating():
            run = _Generation(self, scheduler, answers, sampling, race)
            played = run.graphs.num_played if run.graphs else 0
            run.run(stop)
            played = run.graphs.num_played - played if run.graphs else 0
        self.metrics = {
            **run.clock.metrics(),
            "rollout/num_forwards_played": played,
            "rollout/batch_mean": scheduler.num_stepped / max(scheduler.num_steps, 1),
            "rollout/preemptions": scheduler.num_given_up,
            "rollout/cache_pages_peak": scheduler.pool.peak,
            "rollout/cache_bytes": self._cache.num_bytes if self._cache else 0,
            **(run.acceptance.metrics(run.clock.num_tokens_drawn) if self.with_drafts else {}),
        }
        if race is not None:
            race.rest, self.metrics["rollout/cancelled_num_tokens"] = answers.losers()
        return answers.rollouts

    def release(self) -> None:
        """Give the cache's memory back; the next :meth:`generate` allocates it again."""
        self._cache = None
        self._rotary = None
        self._graphs = None

    @contextlib.contextmanager
    def _generating(self) -> Iterator[None]:
        """Evaluation mode, no autograd, routers recording; everything as it was afterwards.

        Not ``torch.inference_mode``: megatron-core keeps buffers between calls, and tensors made under it cannot be
        used in training.
        """
        modes = [chunk.training for chunk in self.chunks]
        replays = [router.router_replay for chunk in self.chunks for router in all_routers(chunk)]
        self._prepare_cache()
        try:
            for chunk in self.chunks:
                chunk.eval()
            for replay in replays:
                replay.begin(None)
                replay.record = self.record_routing
            with torch.no_grad():
                yield
        except BaseException:
            self.release()  # what is in it may not be finite
            raise
        finally:
            for replay in replays:
                replay.record, replay.recorded = False, None
            for chunk, mode in zip(self.chunks, modes):
                chunk.decoder.set_input_tensor(None)
                chunk.train(mode)

    def _prepare_cache(self) -> None:
        if self._cache is not None:
            return
        cfg = self.config
        num_routers = sum(map(len, self._routers))
        layers = [*self._layers, *([self._drafting_layer.transformer_layer] if self._drafting_layer else [])]
        self._cache = TokenCache(
            [layer.layer_number for layer in layers],
            self.num_pages,
            self.page_size,
            layers[0].self_attention.cache_width if layers else 0,
            cfg.params_dtype,
            self.groups.device,
            routing_shape=(num_routers, cfg.moe_router_topk) if self.record_routing else None,
            num_experts=cfg.num_moe_experts or 0,
        )
        if layers:
            self._rotary = layers[0].self_attention.rotary_tables(self.max_len)
        else:  # a pipeline stage of an embedding or a head only
            empty = torch.empty(self.max_len, 1, 0, device=self.groups.device)
            self._rotary = (empty, empty)

    def step_graphs(self, walks: Sequence[Walk]) -> StepGraphs | None:
        """Recorded decode steps, those of the last call if all is where it was then."""
        if self._capture is None or not walks:
            return None
        assert self._cache is not None and self._rotary is not None
        if self._graphs is None or not self._graphs.in_place:
            self._graphs = None  # gives its memory back first
            self._graphs = StepGraphs(
                self._capture(),
                self.chunks,
                walks,
                self.groups,
                self._cache,
                self._rotary,
                vocab_size=self.vocab_size,
                max_rows=self.max_sequences * (1 + self.with_drafts),
                max_pages=_pages(self.max_len, self.page_size),
                record_routing=self.record_routing,
            )
        return self._graphs


def _pages(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


@dataclass
class _Clock:
    """Counts and seconds of one call of ``generate``."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("plan", "wait", "forward", "sample"), 0.0))
    num_forwards: int = 0
    num_tokens_drawn: int = 0
    num_tokens_fed: int = 0
    _last: float = field(default_factory=time.perf_counter)

    def charge(self, activity: str) -> None:
        """The time since the last call went into this."""
        now = time.perf_counter()
        self.seconds[activity] += now - self._last
        self._last = now

    def metrics(self) -> dict[str, float]:
        total = sum(self.seconds.values())
        return {
            "rollout/num_tokens": self.num_tokens_drawn,
            "rollout/num_tokens_fed": self.num_tokens_fed,
            "rollout/num_forwards": self.num_forwards,
            "rollout/tokens_per_s": self.num_tokens_drawn / total if total else 0.0,
            **{f"rollout/{activity}_s": seconds for activity, seconds in self.seconds.items()},
        }


@dataclass
class _Flight:
    """A lane on its way: the step it is in, and the tokens it waits for."""

    lane: int
    active: bool = True  # of coupled ranks: some of them had work in this lane when they last agreed
    plan: StepPlan | None = None  # of this round; None: the lane runs no forward in it
    step: StepContext = field(init=False)
    hidden: torch.Tensor | None = None  # between two chunks where one rank holds the whole pipeline
    arriving: tuple[StepPlan, torch.Tensor, Any] | None = None  # the step, what it draws, a receive to wait for


class _Generation:
    """One call of :meth:`Engine.generate`."""

    def __init__(
        self, engine: Engine, scheduler: Scheduler, answers: Answers, sampling: SamplingConfig, race: Race | None
    ):
        assert engine._cache is not None and engine._rotary is not None
        self.engine, self.scheduler, self.answers, self.sampling = engine, scheduler, answers, sampling
        self.race = race
        self.groups, self.config, self.device = engine.groups, engine.config, engine.groups.device
        self.cache, (self.cos, self.sin) = engine._cache, engine._rotary
        self.flights = [_Flight(lane) for lane in range(engine.num_lanes)]
        self.pipeline = Pipeline(self.groups, len(engine.chunks))
        self.clock = _Clock()
        self.num_rounds, self.over = 0, False
        self.tp = self.groups.topology.tp
        self.num_shards = self.tp if self.config.sequence_parallel else 1
        self.coupling = Coupling(self.groups) if self.groups.exchanges_tokens else None
        # Each chunk's layers and mixture-of-experts layers among those of this rank.
        counts = [len(chunk.decoder.layers) for chunk in engine.chunks]
        counts[-1] += engine._drafting_layer is not None
        self.layers = _slices(counts)
        self.moe_layers = _slices([len(routers) for routers in engine._routers])
        # The walk has all rows on every tensor-parallel rank; all ranks of the job walk or none does.
        self.walks = [Walk(chunk, self.groups, engine.record_routing) for chunk in engine.chunks if can_walk(chunk)]
        self.walks = self.walks if len(self.walks) == len(engine.chunks) else []
        self.num_row_shards = 1 if self.walks else self.num_shards
        self.acceptance, self.drafting = Acceptance(), None
        if engine._drafting_layer is not None:
            self.drafting = Drafting(engine.chunks[-1], self.walks[-1], self.groups, self._sample)
        self.graphs = engine.step_graphs(self.walks)

    def run(self, stop: Callable[[], bool] | None) -> None:
        """Rounds until every lane is empty; with ``stop`` or a race, in segments until all ranks of the job are done.

        Raises:
            RolloutStopped: on all ranks, between two segments, if any rank was asked to stop and any has work left.
        """
        if stop is None and self.race is None:
            self._run_rounds()
        else:
            rounds = self.engine.segment_rounds
            if self.race is not None:
                rounds = min(rounds, RACE_ROUNDS)
                self._meet(stop)  # groups may have been done before
            work_left = True
            while work_left:
                self._run_rounds(rounds)
                work_left, stopping = self._meet(stop)
                if work_left and stopping:
                    raise RolloutStopped(self._all_in_flight())
        self.pipeline.flush()
        self.clock.charge("wait")

    def _meet(self, stop: Callable[[], bool] | None) -> tuple[bool, bool]:
        """Whether any rank of the job has work left, and whether any was asked to stop.

        In a race all hear which groups are done, and draw no more than that leaves to be drawn.
        """
        asked = stop is not None and stop()
        anywhere = torch.tensor([int(not self.over), int(asked), *self.answers.done()], device=self.device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        work_left, stopping, *done = anywhere.tolist()
        if self.race is not None and self.race.hear(done):
            self.scheduler.cut(self.answers.most_tokens())
        self.clock.charge("wait")
        return bool(work_left), bool(stopping)

    def _all_in_flight(self) -> list[InFlight]:
        for flight in self.flights:
            self._take_arriving(flight)
        self.pipeline.flush()
        return self.answers.in_flight(self.scheduler.sequences(), self._routing)

    def _run_rounds(self, limit: int | None = None) -> None:
        """At most ``limit`` rounds, fewer if all is done before."""
        end = None if limit is None else self.num_rounds + limit
        while self.num_rounds != end and not self._is_over():
            self.num_rounds += 1
            for number in range(len(self.engine.chunks)):
                for flight in self.flights:
                    if number == 0:
                        self._begin(flight)
                    if flight.plan is not None:
                        self._forward(flight, flight.plan, number)
            for flight in self.flights:
                if flight.plan is not None and flight.plan.num_sampled and flight.arriving is None:
                    shape = (flight.plan.num_drawn, 2 + self.engine.with_drafts)
                    drawn = torch.empty(shape, dtype=torch.float64, device=self.device)
                    flight.arriving = (flight.plan, drawn, self.pipeline.expect_tokens(drawn))

    def _is_over(self) -> bool:
        """Whether all is done; asked before each round. Coupled ranks answer alike."""
        if self.coupling is None:
            self.over = not self.scheduler.has_work
        else:
            self.over = not any(flight.active for flight in self.flights)
        return self.over

    def _begin(self, flight: _Flight) -> None:
        """Take the tokens of the last step and plan the next one, if there is one."""
        self._take_arriving(flight)
        flight.plan = None
        plan = self.scheduler.plan(flight.lane)
        for sequence in plan.given_up:
            self.answers.give_up(sequence, self._routing)
        runs, peer_rows = len(plan.tokens) > 0, ()
        if self.coupling is not None:
            self.clock.charge("plan")
            agreed = self.coupling.agree(len(plan.tokens), self.scheduler.lane_has_work(flight.lane))
            flight.active, runs, peer_rows = agreed.any_work, agreed.any_tokens, agreed.peer_rows
            self.clock.charge("wait")
        if runs:
            flight.plan, flight.step = plan, self._context(plan, peer_rows)
        self.clock.charge("plan")

    def _context(self, plan: StepPlan, peer_rows: tuple[int, ...]) -> StepContext:
        """The step on the device."""
        num_tokens, num_decode = len(plan.tokens), plan.num_decode
        num_rows = max(-(-num_tokens // self.num_shards), 1) * self.num_shards
        table = np.zeros((3, num_rows), dtype=np.int64)
        table[:, :num_tokens] = plan.tokens, plan.positions, plan.cache_rows
        tokens, positions, cache_rows = on_device(table, self.device).unbind(0)
        lengths = (plan.positions[:num_decode] + 1).astype(np.int32)
        return StepContext(
            num_rows=num_rows,
            num_decode=num_decode,
            num_prompt_tokens=num_tokens - num_decode,
            tokens=tokens,
            positions=positions,
            cache=self.cache.layers,
            cache_rows=cache_rows[:num_tokens],
            page_table=on_device(plan.page_table, self.device),
            lengths=on_device(lengths, self.device),
            cos=self.cos[positions],
            sin=self.sin[positions],
            prompts=pack_prompts(plan.prefill_lengths, self.device),
            peer_rows=peer_rows,
        )

    def _forward(self, flight: _Flight, plan: StepPlan, number: int) -> None:
        """One virtual stage of one lane's step."""
        last, drawn = self.pipeline.is_last(number), None
        if self.graphs is not None and self.graphs.takes(plan):
            entering = None if self.pipeline.is_first(number) else self._hidden_of_stage(flight, number)[:, 0]
            self.cache.copy(plan.copies, self.layers[number], self.moe_layers[number])
            rows, drawn = self.graphs(number, plan, entering, self.sampling)
            hidden = rows[:, None]
        else:
            hidden = self._hidden_of_stage(flight, number)
            self.cache.copy(plan.copies, self.layers[number], self.moe_layers[number])
            hidden = self._through_layers(number, hidden, flight.step)
        self._record_routing(number, flight.step)
        if number == len(self.engine.chunks) - 1:
            self.clock.num_tokens_fed += len(plan.tokens)
        self.clock.num_forwards += 1
        self.clock.charge("forward")
        if not last:
            if self.pipeline.size == 1:
                flight.hidden = hidden
            else:
                self.pipeline.send_hidden(hidden)
        else:
            if drawn is None and plan.num_sampled:
                drawn = self._draw(hidden, plan)
            if self.drafting is not None:
                drawn = self.drafting.draft(hidden[:, 0], flight.step, plan, drawn)
                self.clock.charge("sample")
            if drawn is not None:
                self.pipeline.send_tokens(drawn)
                flight.arriving = (plan, drawn, None)

    def _hidden_of_stage(self, flight: _Flight, number: int) -> torch.Tensor:
        """What goes into a chunk's layers, ``[T, 1, H]``, or this rank's rows of it: embedded here, or received."""
        chunk, step = self.engine.chunks[number], flight.step
        if self.pipeline.is_first(number):
            if self.walks:
                return self.walks[number].embed(step.tokens)[:, None]
            return chunk.embedding(input_ids=step.tokens[None], position_ids=None)
        if self.pipeline.size == 1:
            assert flight.hidden is not None
            return flight.hidden
        shape = (step.num_rows // self.num_row_shards, 1, self.config.hidden_size)
        received = torch.empty(shape, dtype=self.config.params_dtype, device=self.device)
        self.pipeline.receive_hidden(received)
        self.clock.charge("wait")
        return received

    def _through_layers(self, number: int, hidden: torch.Tensor, step: StepContext) -> torch.Tensor:
        """The chunk's layers and, behind the last one, the final norm."""
        if self.walks:
            return self.walks[number](hidden[:, 0], step)[:, None]
        chunk = self.engine.chunks[number]
        chunk.decoder.set_input_tensor(hidden)  # where it embeds, the argument counts
        return chunk.decoder(hidden_states=hidden, attention_mask=None, inference_context=step)

    def _draw(self, hidden: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """(token, log-probability) of every row that draws, float64 ``[num_drawn, 2]``."""
        rows = hidden[:, 0]
        if self.num_row_shards > 1:
            rows = gather_rows(rows, self.groups.tp)
        table = on_device(np.stack([plan.sampled_rows, plan.keys, plan.sample_positions]), self.device)
        draw = self._sample(rows[table[0]], table[1], table[2])
        drawn = torch.stack([draw.tokens_B.double(), draw.logprobs_B.double()], 1)
        self.clock.charge("sample")
        return drawn

    def _sample(self, rows: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> Draw:
        """A token per row of what goes into the last chunk's head, with the noise of (request key, position)."""
        chunk = self.engine.chunks[-1]
        logits = project(rows, output_weight(chunk))
        return sample_tokens(
            logits,
            vocab_start=self.groups.tp_rank * logits.shape[1],
            vocab_size=self.engine.vocab_size,
            keys_B=position_keys(keys, positions),
            sampling=self.sampling,
            gather=group_gather(self.groups.tp),
        )

    def _take_arriving(self, flight: _Flight) -> None:
        """Take the tokens of the lane's last step, drawn here or received; all stages do so at the same point."""
        if flight.arriving is None:
            return
        plan, drawn, receive = flight.arriving
        flight.arriving = None
        if receive is not None:
            receive.wait()
        drawn = drawn.cpu()
        self.clock.charge("wait")
        self._take(flight.lane, plan, drawn)

    def _take(self, lane: int, plan: StepPlan, drawn: torch.Tensor) -> None:
        """Append the drawn tokens to their sequences and answer those that end."""
        tokens, logprobs = drawn[:, 0].numpy().astype(np.int64), drawn[:, 1].numpy()
        stopped = np.zeros(plan.num_sampled, dtype=bool)
        for places, rows in self.acceptance.turns(plan, tokens, stopped):
            sequences = plan.sequences[places]
            self._check_finite(sequences, plan.sample_positions[rows], logprobs[rows])
            stopped[places] = self.scheduler.append(sequences, tokens[rows], logprobs[rows])
            self.clock.num_tokens_drawn += len(rows)
            if self.sampling.stop:
                for place, sequence, token in zip(places.tolist(), sequences.tolist(), tokens[rows].tolist()):
                    request = self.scheduler.request(sequence).request
                    stopped[place] |= self.answers.completes_stop_string(request, token)
            if self.engine.with_drafts:
                self.scheduler.expect(sequences, drawn[:, 2].numpy().astype(np.int64)[rows])
        for end in self.scheduler.retire(lane, plan, stopped):
            self.answers.finish(end, self._routing)
        self.clock.charge("plan")

    def _check_finite(self, sequences: np.ndarray, positions: np.ndarray, logprobs: np.ndarray) -> None:
        if not np.isfinite(logprobs).all():
            number = int(np.flatnonzero(~np.isfinite(logprobs))[0])
            request = self.scheduler.request(int(sequences[number])).request
            raise FloatingPointError(
                f"generation: the logits are not finite at position {positions[number]} of request "
                f"{request} (prompt {request // SAMPLES_PER_PROMPT_LIMIT})"
            )

    def _routing(self, pages: np.ndarray, num_tokens: int) -> np.ndarray | None:
        """The experts recorded in a sequence's pages, ``[num_tokens, layers of this rank, topk]``."""
        recorded = self.cache.recorded_routing(torch.from_numpy(pages).to(self.device), num_tokens)
        return None if recorded is None else recorded.cpu().numpy()

    def _record_routing(self, number: int, step: StepContext) -> None:
        """If asked for, keep the experts that this chunk's routers just chose, in the rows of their tokens."""
        routers, record = self.engine._routers[number], self.cache.routing
        num_tokens = step.num_decode + step.num_prompt_tokens
        if not routers or record is None:
            return
        experts = torch.stack([router.router_replay.recorded for router in routers], 1).to(record.dtype)
        if self.num_shards > 1:
            experts = gather_rows(experts, self.groups.tp)
        self.cache.record_routing(step.cache_rows, self.moe_layers[number], experts[:num_tokens])


def _slices(counts: Sequence[int]) -> list[slice]:
    """Consecutive pieces of these lengths."""
    ends = np.cumsum(counts).tolist()
    return [slice(end - count, end) for end, count in zip(ends, counts)]
