"""Decode steps as CUDA graphs: a step's thousands of kernels are queued by one call.

A forward without prompts runs on the same buffers every time, from the embedding to the drawn tokens: its rows are
padded up to the next *bucket*, its page tables to the pages of the longest sequence. So one recording per bucket serves
every such step, whatever lane it is of. The first steps of a bucket just run, which lets libraries set themselves up
and spares the recording of what is rare; then it is recorded, and played from there on. What a step does besides
(copies of pages, keeping the experts that were chosen, messages between pipeline stages) stays outside.

Invariants, tested:

1. What is recorded waits for nothing and makes no shape from values. Drawing by top-p alone does (it looks further
   until the mass is found): there the recording ends with the logits.
2. A row that pads is a copy of the step's last row: it writes what that row writes where it writes it, and meets the
   experts that row meets.
3. Weights, cache and buffers lie where they lay when it was recorded. Updates of the weights are in place; that
   somebody moved them, or gave the cache back, is noticed by the next `generate`, which throws all recordings away.
4. All tensor-parallel ranks record and play in the same rounds, for they plan alike: collectives inside meet.

How to record is given from outside (:data:`Capture`), so that the same steps run on any device.

Legend: R rows of a bucket, D rows of a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from r1_megatron.config.schema import SamplingConfig
from r1_megatron.kernels import library
from r1_megatron.model.experts import GroupedExperts
from r1_megatron.model.generation import StepContext, on_device, project
from r1_megatron.model.latent_attention import LatentAttention
from r1_megatron.model.routing import chunk_routers
from r1_megatron.model.walk import Walk, can_walk
from r1_megatron.parallel.groups import ProcessGroups
from r1_megatron.rollout.cache import TokenCache
from r1_megatron.rollout.sampler import draws_at_once, group_gather, position_keys, sample_tokens
from r1_megatron.rollout.scheduler import StepPlan

# Runs a function and records what it queues: answers what queues it again, and the tensors that then hold its results.
Capture = Callable[[Callable[[], list[torch.Tensor]]], tuple[Callable[[], None], list[torch.Tensor]]]

# Steps of a bucket that run before one is recorded.
WARM_UPS = 2


class CudaCapture:
    """The device's own recordings. They share one pool of memory, for no two of them run at a time.

    A pool whose recordings are all gone is not to be used again: whoever begins anew makes another of these.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], list[torch.Tensor]]) -> tuple[Callable[[], None], list[torch.Tensor]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, a checkpoint's writer) may ask the device things meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = run()
        graph.replay()  # recording runs nothing
        return graph.replay, results


def why_not(chunks: Sequence[Any], groups: ProcessGroups) -> str:
    """Why steps over these chunks cannot be recorded; empty if they can."""
    if groups.device.type != "cuda":
        return "on GPUs only"
    if not library.load().with_cuda:
        return "without csrc's CUDA operators a step reads all experts and all pages of a table"
    return why_not_layers(chunks, groups)


def why_not_layers(chunks: Sequence[Any], groups: ProcessGroups) -> str:
    """The same, whatever the device."""
    if not all(map(can_walk, chunks)):
        return "Transformer Engine's layers are not walked"
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        if not isinstance(layer.self_attention, LatentAttention) and groups.tp.size() > 1:
            return "grouped attention goes through modules that share a buffer over tensor-parallel ranks"
        if not hasattr(layer.mlp, "router"):
            continue
        if not isinstance(layer.mlp.experts, GroupedExperts):
            return "experts that are modules of their own wait for the counts (train.moe_experts: grouped)"
        if groups.exchanges_tokens:
            return "experts over data-parallel ranks wait for the counts"
    return ""


def bucket_of(num_rows: int, multiple: int = 1) -> int:
    """Rows of the bucket: 1, 2, 4, 8, then steps of 8, from 128 on of a sixteenth to an eighth of the whole.

    Example:
        >>> [bucket_of(n) for n in (1, 3, 8, 9, 64, 100, 130, 300)]
        [1, 4, 8, 16, 64, 104, 144, 320]
    """
    assert num_rows > 0
    power = 1 << (num_rows - 1).bit_length()
    step = power if power <= 8 else max(8, power // 16)
    rows = -(-num_rows // step) * step
    return -(-rows // multiple) * multiple


@dataclass
class _Recording:
    play: Callable[[], None]
    results: list[torch.Tensor]  # hidden states; drawn [R, 2] or logits, if the chunk has a head; experts by router


class StepGraphs:
    """The recordings of one engine's decode steps, by chunk, bucket and law of drawing.

    Args:
        capture: who records; ``None``: steps only run, on the same buffers.
        walks: of this rank's chunks.
        rotary: (cos, sin) by position.
        max_rows: of a step that is recorded; longer ones are not taken.
        max_pages: of a sequence.
        record_routing: keep the experts chosen where `RouterReplay.recorded` is.
    """

    def __init__(
        self,
        capture: Capture | None,
        chunks: Sequence[Any],
        walks: Sequence[Walk],
        groups: ProcessGroups,
        cache: TokenCache,
        rotary: tuple[torch.Tensor, torch.Tensor],
        *,
        vocab_size: int,
        max_rows: int,
        max_pages: int,
        record_routing: bool,
    ):
        self.num_recorded = self.num_played = 0
        self._capture, self._chunks, self._walks, self._groups = capture, list(chunks), list(walks), groups
        self._cache, (self._cos, self._sin), self._vocab_size = cache, rotary, vocab_size
        self._routers = [chunk_routers(chunk) if record_routing else [] for chunk in self._chunks]
        config, device = self._chunks[0].config, groups.device
        self._multiple = groups.topology.tp if config.sequence_parallel else 1
        self._max_rows = bucket_of(max_rows, self._multiple)
        # Tokens, positions, cache rows, lengths; rows drawn from, their keys and positions.
        self._numbers = torch.zeros(7, self._max_rows, dtype=torch.int64, device=device)
        self._pages = torch.zeros(self._max_rows, max_pages, dtype=torch.int32, device=device)
        self._hidden = torch.zeros(self._max_rows, config.hidden_size, dtype=config.params_dtype, device=device)
        self._met: Counter[tuple[Any, ...]] = Counter()  # by chunk, bucket and law of drawing, as the recordings
        self._recordings: dict[tuple[Any, ...], _Recording] = {}
        self._places = self._where()

    @property
    def in_place(self) -> bool:
        """Whether everything still lies where it was when this was built."""
        return self._places == self._where()

    def takes(self, plan: StepPlan) -> bool:
        """Whether the step is one of those that are recorded."""
        num_rows = len(plan.tokens)
        return not plan.prefill_lengths and 0 < max(num_rows, plan.num_drawn) <= self._max_rows

    def __call__(
        self, number: int, plan: StepPlan, hidden: torch.Tensor | None, sampling: SamplingConfig
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One chunk's part of the step: what leaves its layers, and (token, log-probability) if it draws.

        Args:
            number: of the chunk on this rank.
            hidden: ``[D, H]``, what goes into its layers; ``None`` where it embeds.

        Answers ``[D, H]``, D rounded up to what sequence parallelism divides, and float64 ``[num_drawn, 2]``.
        """
        num_rows, num_drawn = len(plan.tokens), plan.num_drawn
        bucket = bucket_of(max(num_rows, num_drawn), self._multiple)
        self._fill(plan, bucket, hidden)
        has_head = self._chunks[number].post_process
        law = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) if has_head else None
        results = self._run((number, bucket, law), lambda: self._forward(number, bucket, sampling))
        for router, chosen in zip(self._routers[number], results[1 + has_head :]):
            router.router_replay.recorded = chosen
        padded = -(-num_rows // self._multiple) * self._multiple
        hidden = results[0][:padded].clone()  # the next step writes there
        if not has_head or not num_drawn:
            return hidden, None
        drawn = results[1][:num_drawn]
        return hidden, drawn.clone() if draws_at_once(sampling) else self._draw(drawn, bucket, sampling)

    # ------------------------------------------------------------------------------------------------------- one step

    def _fill(self, plan: StepPlan, bucket: int, hidden: torch.Tensor | None) -> None:
        """The step into the buffers; the last row again behind it."""
        num_rows = len(plan.tokens)
        numbers = np.zeros((7, bucket), dtype=np.int64)
        numbers[:4, :num_rows] = plan.tokens, plan.positions, plan.cache_rows, plan.positions + 1
        numbers[:4, num_rows:] = numbers[:4, num_rows - 1 : num_rows]
        numbers[4:, : plan.num_drawn] = plan.sampled_rows, plan.keys, plan.sample_positions
        pages = np.zeros((bucket, plan.page_table.shape[1]), dtype=np.int32)
        pages[:num_rows], pages[num_rows:] = plan.page_table, plan.page_table[-1]
        self._numbers[:, :bucket] = on_device(numbers, self._numbers.device)
        self._pages[:bucket, : pages.shape[1]] = on_device(pages, self._pages.device)
        if hidden is not None:
            self._hidden[:num_rows] = hidden[:num_rows]
            self._hidden[num_rows:bucket] = hidden[num_rows - 1]

    def _run(self, key: tuple[Any, ...], forward: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Run a step, record it, or play it."""
        if (recording := self._recordings.get(key)) is not None:
            recording.play()
            self.num_played += 1
            return recording.results
        self._met[key] += 1
        if self._capture is None or self._met[key] <= WARM_UPS:
            return forward()
        self._recordings[key] = recording = _Recording(*self._capture(forward))
        self.num_recorded += 1
        return recording.results

    def _forward(self, number: int, bucket: int, sampling: SamplingConfig) -> list[torch.Tensor]:
        """What is recorded: the buffers' first rows through one chunk; what its routers chose comes behind."""
        chunk, walk = self._chunks[number], self._walks[number]
        tokens, positions, cache_rows, lengths, sampled_rows, *_ = self._numbers[:, :bucket].unbind(0)
        step = StepContext(
            num_rows=bucket,
            num_decode=bucket,
            num_prompt_tokens=0,
            tokens=tokens,
            positions=positions,
            cache=self._cache.layers,
            cache_rows=cache_rows,
            page_table=self._pages[:bucket],
            lengths=lengths.to(torch.int32),
            cos=self._cos[positions],
            sin=self._sin[positions],
            prompts=None,
        )
        hidden = walk(walk.embed(tokens) if chunk.pre_process else self._hidden[:bucket], step)
        results = [hidden]
        if chunk.post_process:
            logits = project(hidden[sampled_rows], output_weight(chunk))
            results.append(self._draw(logits, bucket, sampling) if draws_at_once(sampling) else logits)
        return results + [router.router_replay.recorded for router in self._routers[number]]

    def _draw(self, logits: torch.Tensor, bucket: int, sampling: SamplingConfig) -> torch.Tensor:
        keys, positions = self._numbers[5:, :bucket].unbind(0)
        draw = sample_tokens(
            logits,
            vocab_start=self._groups.tp_rank * logits.shape[1],
            vocab_size=self._vocab_size,
            keys_B=position_keys(keys[: len(logits)], positions[: len(logits)]),
            sampling=sampling,
            gather=group_gather(self._groups.tp),
        )
        return torch.stack([draw.tokens_B.double(), draw.logprobs_B.double()], 1)

    def _where(self) -> list[int]:
        tensors = [tensor for chunk in self._chunks for tensor in (*chunk.parameters(), *chunk.buffers())]
        return [tensor.data_ptr() for tensor in (*tensors, *self._cache.layers.values(), self._cos, self._sin)]


def output_weight(chunk: Any) -> torch.Tensor:
    """Of the language-model head, ``[columns of this rank, H]``."""
    if chunk.share_embeddings_and_output_weights:
        return chunk.shared_embedding_or_output_weight()
    return chunk.output_layer.weight
