"""Generation on the training model itself: the same modules, the same weights, the same parallel layout.

No second engine, no copy of the weights, nothing to synchronise after an optimizer step. A forward takes one row per
token: a decode token of every live sequence, then whole prompts, then padding up to a multiple of the tensor-parallel
size, so that sequence parallelism and expert dispatch work on it exactly as in training.

Pipeline stages work on different *lanes* (groups of sequences) at the same time. Virtual stage ``chunk * pp + rank``
hands hidden states to the next one around the ring of pipeline ranks; the last one draws tokens and sends them to all::

    for each round:  for each chunk of this rank:  for each lane:  receive, forward, send
    (first chunk: the lane takes its last tokens and plans its step; last virtual stage: it draws)

Every stage plans from the same requests and tokens, so shapes are never sent. Data-parallel ranks generate for
themselves, except that ranks which exchange tokens between experts have to run the same number of forwards: they agree
every few steps whether a lane has work anywhere, and a lane without sequences feeds padding.

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
import torch.nn.functional as F

from r1_megatron.config.schema import RunConfig, SamplingConfig
from r1_megatron.data.tokenizers import Tokenizer
from r1_megatron.model.generation import StepContext, gather_rows, pack_prompts
from r1_megatron.model.routing import chunk_routers
from r1_megatron.parallel.groups import ProcessGroups
from r1_megatron.rollout.answers import Answers
from r1_megatron.rollout.cache import TokenCache
from r1_megatron.rollout.in_flight import InFlight, RolloutStopped
from r1_megatron.rollout.pipeline import Pipeline
from r1_megatron.rollout.requests import Call, check_call, make_requests
from r1_megatron.rollout.sampler import group_gather, position_keys, sample_tokens
from r1_megatron.rollout.scheduler import SAMPLES_PER_PROMPT_LIMIT, Lane, StepPlan, split_lanes
from r1_megatron.types import Prompt, Rollout

# Coupled ranks ask each other every so many steps whether a lane still has work.
AGREE_EVERY = 4


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
    num_lanes = cfg.rollout.pipeline_groups or groups.topology.pp
    split_lanes([], num_lanes, cfg.rollout.max_sequences, max_len, ())  # says what does not fit
    return Engine(
        chunks,
        groups,
        tokenizer,
        vocab_size=cfg.model.vocab_size,
        num_slots=cfg.rollout.max_sequences,
        num_lanes=num_lanes,
        max_len=max_len,
        record_routing=cfg.rollout.router_replay,
    )


class Engine:
    """Draws samples from the policy. All ranks of the job call :meth:`generate` together.

    Args:
        chunks: this pipeline rank's virtual chunks.
        vocab_size: real vocabulary, without padding columns.
        num_slots: sequences in flight on this data-parallel rank, shared out over ``num_lanes``.
        max_len: longest sequence, prompt included.
        record_routing: fill :attr:`Rollout.routed_experts`.
        segment_rounds: rounds between two questions whether to stop.

    ``metrics`` describes the last call: tokens drawn and fed, forwards, seconds by activity, bytes of the cache.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        groups: ProcessGroups,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        num_slots: int,
        num_lanes: int,
        max_len: int,
        record_routing: bool = False,
        segment_rounds: int = 64,
    ):
        self.chunks, self.groups, self.tokenizer = list(chunks), groups, tokenizer
        self.vocab_size, self.num_slots, self.num_lanes, self.max_len = vocab_size, num_slots, num_lanes, max_len
        self.record_routing, self.segment_rounds = record_routing, segment_rounds
        self.config = self.chunks[0].config
        self.metrics: dict[str, float] = {}
        self._layers = [layer for chunk in self.chunks for layer in chunk.decoder.layers]
        self._routers = [chunk_routers(chunk) for chunk in self.chunks]
        self._cache: TokenCache | None = None
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

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

        Raises:
            ValueError: a prompt, an option or a sequence in flight is out of place; raised before anything runs.
            FloatingPointError: the model's logits are not finite.
            RolloutStopped: it stopped with work left; it carries the sequences. The cache is given back.
        """
        routing_shape = (self.moe_layers, self.config.moe_router_topk) if self.record_routing else None
        call = Call(prompts, samples_per_prompt, sampling, seed, policy_version, in_flight, routing_shape)
        check_call(call, vocab_size=self.vocab_size, max_len=self.max_len)
        stop_tokens = {self.tokenizer.eos_id, *sampling.stop_token_ids}
        lanes = split_lanes(make_requests(call), self.num_lanes, self.num_slots, self.max_len, sorted(stop_tokens))
        answers = Answers(call, self.tokenizer, stop_tokens)
        with self._generating():
            run = _Generation(self, lanes, answers, sampling)
            run.run(stop)
        self.metrics = run.clock.metrics(self._cache.num_bytes if self._cache else 0)
        return answers.rollouts

    def release(self) -> None:
        """Give the cache's memory back; the next :meth:`generate` allocates it again."""
        self._cache = None
        self._rotary = None

    @contextlib.contextmanager
    def _generating(self) -> Iterator[None]:
        """Evaluation mode, no autograd, routers recording; everything as it was afterwards.

        Not ``torch.inference_mode``: megatron-core keeps buffers between calls, and tensors made under it cannot be
        used in training.
        """
        modes = [chunk.training for chunk in self.chunks]
        replays = [router.router_replay for routers in self._routers for router in routers]
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
        self._cache = TokenCache(
            [layer.layer_number for layer in self._layers],
            self.num_slots,
            self.max_len,
            self._layers[0].self_attention.cache_width if self._layers else 0,
            cfg.params_dtype,
            self.groups.device,
            routing_shape=(num_routers, cfg.moe_router_topk) if self.record_routing else None,
            num_experts=cfg.num_moe_experts or 0,
        )
        if self._layers:
            self._rotary = self._layers[0].self_attention.rotary_tables(self.max_len)
        else:  # a pipeline stage of an embedding or a head only
            empty = torch.empty(self.max_len, 1, 0, device=self.groups.device)
            self._rotary = (empty, empty)


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

    def metrics(self, cache_bytes: int) -> dict[str, float]:
        total = sum(self.seconds.values())
        return {
            "rollout/num_tokens": self.num_tokens_drawn,
            "rollout/num_tokens_fed": self.num_tokens_fed,
            "rollout/num_forwards": self.num_forwards,
            "rollout/tokens_per_s": self.num_tokens_drawn / total if total else 0.0,
            "rollout/cache_bytes": cache_bytes,
            **{f"rollout/{activity}_s": seconds for activity, seconds in self.seconds.items()},
        }


@dataclass
class _Flight:
    """A lane on its way: the step it is in, and the tokens it waits for."""

    lane: Lane
    plan: StepPlan = field(init=False)
    step: StepContext = field(init=False)
    token_ids: torch.Tensor = field(init=False)
    hidden: torch.Tensor | None = None  # between two chunks where one rank holds the whole pipeline
    arriving: tuple[Any, torch.Tensor] | None = None
    num_steps: int = 0
    over: bool = False


class _Generation:
    """One call of :meth:`Engine.generate`."""

    def __init__(self, engine: Engine, lanes: Sequence[Lane], answers: Answers, sampling: SamplingConfig):
        assert engine._cache is not None and engine._rotary is not None
        self.engine, self.answers, self.sampling = engine, answers, sampling
        self.groups, self.config, self.device = engine.groups, engine.config, engine.groups.device
        self.cache, (self.cos, self.sin) = engine._cache, engine._rotary
        self.flights = [_Flight(lane) for lane in lanes]
        self.pipeline = Pipeline(self.groups, len(engine.chunks))
        self.clock = _Clock()
        self.tp = self.groups.topology.tp
        self.num_shards = self.tp if self.config.sequence_parallel else 1
        expert_peers = set(dist.get_process_group_ranks(self.groups.expert_tp_ep))
        self.coupled = not expert_peers <= set(dist.get_process_group_ranks(self.groups.tp))
        self.first_router = np.cumsum([0, *map(len, engine._routers)]).tolist()

    def run(self, stop: Callable[[], bool] | None) -> None:
        """Rounds until every lane is empty; with ``stop``, in segments until that holds on all ranks of the job.

        Raises:
            RolloutStopped: on all ranks, between two segments, if any rank was asked to stop and any has work left.
        """
        if stop is None:
            self._run_rounds()
        else:
            work_left = True
            while work_left:
                self._run_rounds(self.engine.segment_rounds)
                work_left, stopping = self._meet(stop)
                if work_left and stopping:
                    raise RolloutStopped(self._all_in_flight())
        self.pipeline.flush()
        self.clock.charge("wait")

    def _meet(self, stop: Callable[[], bool]) -> tuple[bool, bool]:
        """Whether any rank of the job has work left, and whether any was asked to stop."""
        working = not all(flight.over for flight in self.flights)
        anywhere = torch.tensor([int(working), int(stop())], device=self.device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        work_left, stopping = anywhere.tolist()
        self.clock.charge("wait")
        return bool(work_left), bool(stopping)

    def _all_in_flight(self) -> list[InFlight]:
        for flight in self.flights:
            self._take_arriving(flight)
        self.pipeline.flush()
        return self.answers.in_flight([flight.lane for flight in self.flights], self._routing)

    def _run_rounds(self, limit: int | None = None) -> None:
        """At most ``limit`` rounds, fewer if every lane is over before."""
        last_chunk = len(self.engine.chunks) - 1
        num_rounds = 0
        while num_rounds != limit and not all(flight.over for flight in self.flights):
            num_rounds += 1
            for number in range(last_chunk + 1):
                for flight in self.flights:
                    if number == 0 and not flight.over:
                        self._begin(flight)
                    if not flight.over:
                        self._forward(flight, number)
            for flight in self.flights:
                if not flight.over and self.pipeline.rank < self.pipeline.size - 1 and flight.plan.num_sampled:
                    drawn = torch.empty(flight.plan.num_sampled, 2, dtype=torch.float64, device=self.device)
                    flight.arriving = (self.pipeline.expect_tokens(drawn), drawn)

    def _begin(self, flight: _Flight) -> None:
        """Take the tokens of the last step, agree on whether there is another, and plan it."""
        self._take_arriving(flight)
        has_work = flight.lane.has_work
        if self.coupled and flight.num_steps % AGREE_EVERY == 0:
            anywhere = torch.tensor([int(has_work)], device=self.device)
            dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=self.groups.expert_tp_ep)
            flight.over = not anywhere.item()
            self.clock.charge("wait")
        elif not self.coupled:
            flight.over = not has_work
        if flight.over:
            return
        flight.num_steps += 1
        flight.plan = flight.lane.plan()
        self.cache.copy(flight.plan.copies_before)
        flight.step, flight.token_ids = self._context(flight.lane, flight.plan)
        self.clock.charge("plan")

    def _context(self, lane: Lane, plan: StepPlan) -> tuple[StepContext, torch.Tensor]:
        """The step on the device, and its token ids int64 ``[T]``."""
        num_tokens, num_decode = len(plan.tokens), plan.num_decode
        num_rows = max(-(-num_tokens // self.num_shards), 1) * self.num_shards
        table = np.zeros((3, num_rows), dtype=np.int64)
        table[0, :num_tokens] = plan.tokens
        table[1, :num_tokens] = plan.positions
        table[2, :num_tokens] = (lane.first_slot + plan.slots) * self.cache.max_len + plan.positions
        tokens, positions, cache_rows = torch.from_numpy(table).to(self.device).unbind(0)
        num_cached = int(plan.positions[:num_decode].max()) + 1 if num_decode else 0
        behind = torch.arange(num_cached, device=self.device) > positions[:num_decode, None]
        bias = torch.zeros(num_decode, 1, num_cached, device=self.device).masked_fill_(behind[:, None], -torch.inf)
        step = StepContext(
            num_rows=num_rows,
            num_decode=num_decode,
            num_prompt_tokens=num_tokens - num_decode,
            first_slot=lane.first_slot,
            num_cached=num_cached,
            cache=self.cache.layers,
            cache_rows=cache_rows[:num_tokens],
            decode_bias=bias,
            cos=self.cos[positions],
            sin=self.sin[positions],
            prompts=pack_prompts(plan.prefill_lengths, self.device),
        )
        return step, tokens

    def _forward(self, flight: _Flight, number: int) -> None:
        """One virtual stage of one lane's step."""
        chunk, step, plan = self.engine.chunks[number], flight.step, flight.plan
        hidden = None
        if self.pipeline.is_first(number):
            hidden = chunk.embedding(input_ids=flight.token_ids[None], position_ids=None)
        elif self.pipeline.size == 1:
            chunk.decoder.set_input_tensor(flight.hidden)
        else:
            shape = (step.num_rows // self.num_shards, 1, self.config.hidden_size)
            received = torch.empty(shape, dtype=self.config.params_dtype, device=self.device)
            self.pipeline.receive_hidden(received)
            chunk.decoder.set_input_tensor(received)
            self.clock.charge("wait")
        hidden = chunk.decoder(hidden_states=hidden, attention_mask=None, inference_context=step)
        self._record_routing(number, step)
        if number == len(self.engine.chunks) - 1:
            self.cache.copy(plan.copies_after)
            self.clock.num_tokens_fed += len(plan.tokens)
        self.clock.num_forwards += 1
        self.clock.charge("forward")
        if not self.pipeline.is_last(number):
            if self.pipeline.size == 1:
                flight.hidden = hidden
            else:
                self.pipeline.send_hidden(hidden)
        elif plan.num_sampled:
            drawn = self._draw(chunk, hidden, plan)
            self.pipeline.send_tokens(drawn)
            self._take(flight, drawn.cpu())

    def _draw(self, chunk: Any, hidden: torch.Tensor, plan: StepPlan) -> torch.Tensor:
        """(token, log-probability) of every live sequence, float64 ``[num_sampled, 2]``."""
        rows = hidden[:, 0]
        if self.num_shards > 1:
            rows = gather_rows(rows, self.groups.tp)
        table = torch.from_numpy(np.stack([plan.sampled_rows, plan.keys, plan.sample_positions])).to(self.device)
        if plan.prefill_lengths or plan.num_sampled != len(rows):
            rows = rows[table[0]]
        weight = chunk.output_layer.weight
        if chunk.share_embeddings_and_output_weights:
            weight = chunk.shared_embedding_or_output_weight()
        logits = F.linear(rows, weight)
        draw = sample_tokens(
            logits,
            vocab_start=self.groups.tp_rank * logits.shape[1],
            vocab_size=self.engine.vocab_size,
            keys_B=position_keys(table[1], table[2]),
            sampling=self.sampling,
            gather=group_gather(self.groups.tp),
        )
        drawn = torch.stack([draw.tokens_B.double(), draw.logprobs_B.double()], 1)
        self.clock.charge("sample")
        return drawn

    def _take_arriving(self, flight: _Flight) -> None:
        """Take the tokens that the last stage drew for this lane, if any are under way."""
        if flight.arriving is None:
            return
        work, drawn = flight.arriving
        flight.arriving = None
        work.wait()
        drawn = drawn.cpu()
        self.clock.charge("wait")
        self._take(flight, drawn)

    def _take(self, flight: _Flight, drawn: torch.Tensor) -> None:
        """Append the drawn tokens to their sequences and answer those that end."""
        lane = flight.lane
        tokens, logprobs = drawn[:, 0].numpy().astype(np.int64), drawn[:, 1].numpy()
        if not np.isfinite(logprobs).all():
            slot = int(np.flatnonzero(~np.isfinite(logprobs))[0])
            raise FloatingPointError(
                f"generation: the logits are not finite at position {flight.plan.sample_positions[slot]} of request "
                f"{lane.live[slot].request} (prompt {lane.live[slot].request // SAMPLES_PER_PROMPT_LIMIT})"
            )
        stopped = lane.append(tokens, logprobs)
        self.clock.num_tokens_drawn += len(tokens)
        if self.sampling.stop:
            for slot, (request, token) in enumerate(zip(lane.live, tokens.tolist())):
                stopped[slot] |= self.answers.completes_stop_string(request.request, token)
        finished, copies = lane.retire(stopped)
        for end in finished:
            self.answers.finish(end, self._routing)
        self.cache.copy(copies)
        self.clock.charge("plan")

    def _routing(self, slot: int, num_tokens: int) -> np.ndarray | None:
        """The experts recorded in a cache slot, ``[num_tokens, layers of this rank, topk]``."""
        if self.cache.routing is None:
            return None
        return self.cache.routing[slot, :num_tokens].cpu().numpy().copy()

    def _record_routing(self, number: int, step: StepContext) -> None:
        """If asked for, keep the experts that this chunk's routers just chose, in the rows of the tokens' slots."""
        routers, record = self.engine._routers[number], self.cache.routing
        num_tokens = step.num_decode + step.num_prompt_tokens
        if not routers or record is None:
            return
        experts = torch.stack([router.router_replay.recorded for router in routers], 1).to(record.dtype)
        if self.num_shards > 1:
            experts = gather_rows(experts, self.groups.tp)
        self.cache.record_routing(step.cache_rows, self.first_router[number], experts[:num_tokens])
