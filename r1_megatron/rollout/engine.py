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
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1_megatron.config.schema import RunConfig, SamplingConfig
from r1_megatron.data.tokenizers import Tokenizer
from r1_megatron.model.latent_attention import StepContext, gather_rows, pack_prompts
from r1_megatron.model.routing import chunk_routers
from r1_megatron.parallel.groups import ProcessGroups
from r1_megatron.rollout.cache import LatentCache
from r1_megatron.rollout.pipeline import Pipeline
from r1_megatron.rollout.sampler import check_sampling, group_gather, position_keys, request_key, sample_tokens
from r1_megatron.rollout.scheduler import Lane, Request, StepPlan, split_lanes
from r1_megatron.rollout.stopping import StopStrings
from r1_megatron.types import Prompt, Rollout

# Request id of sample j of a prompt: index * SAMPLES_PER_PROMPT_LIMIT + j.
SAMPLES_PER_PROMPT_LIMIT = 1 << 20
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
    ):
        self.chunks, self.groups, self.tokenizer = list(chunks), groups, tokenizer
        self.vocab_size, self.num_slots, self.num_lanes, self.max_len = vocab_size, num_slots, num_lanes, max_len
        self.record_routing = record_routing
        self.config = self.chunks[0].config
        self.metrics: dict[str, float] = {}
        self._layers = [layer for chunk in self.chunks for layer in chunk.decoder.layers]
        self._routers = [chunk_routers(chunk) for chunk in self.chunks]
        self._cache: LatentCache | None = None
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: SamplingConfig,
        *,
        seed: int,
        policy_version: int = 0,
    ) -> list[list[Rollout]]:
        """Samples of each prompt, in order.

        Args:
            prompts: this data-parallel rank's, the same on all of its tensor- and pipeline-parallel ranks; may be
                empty, also where the other data-parallel ranks' are not.
            seed: with :attr:`Prompt.index` and the sample's number it decides the sample, whatever the layout.

        Raises:
            ValueError: a prompt or an option is out of range; raised before anything runs.
            FloatingPointError: the model's logits are not finite.
        """
        self._check(prompts, samples_per_prompt, sampling)
        requests = [
            Request(
                request=request,
                key=request_key(seed, request),
                prompt_number=number,
                sample=sample,
                prompt=np.asarray(prompt.tokens, dtype=np.int64),
                max_new_tokens=sampling.max_new_tokens,
            )
            for number, prompt in enumerate(prompts)
            for sample in range(samples_per_prompt)
            for request in [prompt.index * SAMPLES_PER_PROMPT_LIMIT + sample]
        ]
        stop_tokens = {self.tokenizer.eos_id, *sampling.stop_token_ids}
        lanes = split_lanes(requests, self.num_lanes, self.num_slots, self.max_len, sorted(stop_tokens))
        answers: list[list[Any]] = [[None] * samples_per_prompt for _ in prompts]
        with self._generating():
            run = _Generation(self, lanes, answers, sampling, policy_version, stop_tokens)
            run.run()
        self.metrics = run.clock.metrics(self._cache.num_bytes if self._cache else 0)
        return answers

    def release(self) -> None:
        """Give the cache's memory back; the next :meth:`generate` allocates it again."""
        self._cache = None
        self._rotary = None

    def _check(self, prompts: Sequence[Prompt], samples_per_prompt: int, sampling: SamplingConfig) -> None:
        check_sampling(sampling)
        if not 1 <= samples_per_prompt <= SAMPLES_PER_PROMPT_LIMIT:
            raise ValueError(f"samples_per_prompt={samples_per_prompt} must be in [1, {SAMPLES_PER_PROMPT_LIMIT}].")
        outside = [token for token in sampling.stop_token_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"sampling.stop_token_ids: {outside} are outside the vocabulary [0, {self.vocab_size}).")
        seen: set[int] = set()
        problems = []
        for prompt in prompts:
            length = len(prompt.tokens)
            wrong = [token for token in prompt.tokens if not 0 <= token < self.vocab_size]
            if wrong:
                problems.append(f"prompt {prompt.index}: token ids {wrong[:5]} are outside [0, {self.vocab_size})")
            if length == 0:
                problems.append(f"prompt {prompt.index} is empty")
            if length + sampling.max_new_tokens > self.max_len:
                problems.append(
                    f"prompt {prompt.index}: {length} tokens + sampling.max_new_tokens({sampling.max_new_tokens}) = "
                    f"{length + sampling.max_new_tokens}, but the cache holds {self.max_len} tokens a sequence "
                    "(data.max_prompt_tokens + sampling.max_new_tokens of the run)"
                )
            if prompt.index in seen or not 0 <= prompt.index < 1 << 43:
                problems.append(f"prompt {prompt.index}: the index must be in [0, 2**43) and stand once in a call")
            seen.add(prompt.index)
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError("cannot generate: " + "; ".join(problems[:8]) + more)

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
        self._cache = LatentCache(
            [layer.layer_number for layer in self._layers],
            self.num_slots,
            self.max_len,
            cfg.kv_lora_rank + cfg.qk_pos_emb_head_dim,
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

    def __init__(
        self,
        engine: Engine,
        lanes: Sequence[Lane],
        answers: list[list[Any]],
        sampling: SamplingConfig,
        policy_version: int,
        stop_tokens: set[int],
    ):
        assert engine._cache is not None and engine._rotary is not None
        self.engine, self.answers, self.sampling, self.policy_version = engine, answers, sampling, policy_version
        self.groups, self.config, self.device = engine.groups, engine.config, engine.groups.device
        self.cache, (self.cos, self.sin) = engine._cache, engine._rotary
        self.flights = [_Flight(lane) for lane in lanes]
        self.pipeline = Pipeline(self.groups, len(engine.chunks))
        self.clock = _Clock()
        self.stop_tokens = stop_tokens
        self.stop_strings = StopStrings(engine.tokenizer, sampling.stop) if sampling.stop else None
        self.tp = self.groups.topology.tp
        self.num_shards = self.tp if self.config.sequence_parallel else 1
        expert_peers = set(dist.get_process_group_ranks(self.groups.expert_tp_ep))
        self.coupled = not expert_peers <= set(dist.get_process_group_ranks(self.groups.tp))
        self.first_router = np.cumsum([0, *map(len, engine._routers)]).tolist()

    def run(self) -> None:
        last_chunk = len(self.engine.chunks) - 1
        while not all(flight.over for flight in self.flights):
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
        self.pipeline.flush()
        self.clock.charge("wait")

    def _begin(self, flight: _Flight) -> None:
        """Take the tokens of the last step, agree on whether there is another, and plan it."""
        if flight.arriving is not None:
            work, drawn = flight.arriving
            flight.arriving = None
            work.wait()
            drawn = drawn.cpu()
            self.clock.charge("wait")
            self._take(flight, drawn)
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
            latents=self.cache.latents,
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
        if self.stop_strings is not None:
            for slot, (request, token) in enumerate(zip(lane.live, tokens.tolist())):
                stopped[slot] |= self.stop_strings.completes(request.request, token)
        finished, copies = lane.retire(stopped)
        for end in finished:
            request = end.request
            routing = None
            if self.cache.routing is not None:
                routing = self.cache.routing[end.slot, : len(end.tokens) - 1].cpu().numpy().copy()
            self.answers[request.prompt_number][request.sample] = Rollout(
                request=request.request,
                tokens=end.tokens,
                prompt_len=len(request.prompt),
                logprobs=end.logprobs,
                routed_experts=routing,
                finish="stop" if end.stopped else "length",
                policy_version=self.policy_version,
                text=self._text(end.tokens[len(request.prompt) :].tolist()),
            )
            if self.stop_strings is not None:
                self.stop_strings.forget(request.request)
        self.cache.copy(copies)
        self.clock.charge("plan")

    def _text(self, response: list[int]) -> str:
        if response and response[-1] in self.stop_tokens:
            response = response[:-1]
        # The model's vocabulary may be larger than the tokenizer's (DeepSeek-V3: 129280 against 128815).
        known = self.engine.tokenizer.vocab_size
        return self.engine.tokenizer.decode([token for token in response if token < known])

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
