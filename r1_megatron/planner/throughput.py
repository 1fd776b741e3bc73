"""How long a step takes: training by products, memory traffic and exchanges; sampling by what a step has to read.

A model with few constants (below), each fitted to published figures and rounded; `tests/unit/planner` holds it against
others that it has not seen. It is made to compare layouts and to be right within some 30 %, not to replace a run.

**Training.** A microbatch on a stage takes the time of its layers (`passes.py`). A pass takes
``(microbatches + (pp - 1) / vpp)`` times the slowest stage. A critic and reward models make passes of their own
(`value_times.py`).

**Sampling.** A pipeline stage reads its weights (and of the experts those that somebody chose) and the caches of a
lane's sequences for one token of each. Lanes follow each other through the stages, so all sequences of a data-parallel
rank get a token in ``max(lanes, pp)`` stage times. Sequences end when they end; ranks that share experts wait for the
last one.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from r1_megatron.config.schema import RunConfig
from r1_megatron.planner.communication import Links, StepTraffic, Traffic
from r1_megatron.planner.flops import model_flops
from r1_megatron.planner.hardware import Hardware
from r1_megatron.planner.parameters import (
    ATTENTION,
    ATTENTION_DOWN,
    ROUTED_EXPERTS,
    SHARED_EXPERT,
    RankParameters,
    layer_parts,
    rank_parameters,
)
from r1_megatron.planner.passes import ATTENTION_FORWARD, BF16_PRODUCTS, Passes
from r1_megatron.planner.precision import precision
from r1_megatron.planner.value_times import OtherTime, other_times
from r1_megatron.planner.workload import Workload, workload
from r1_megatron.topology import Topology

# A layer of a decode step beyond its bytes: kernels from Python, and with a CUDA graph; the draw of a token.
DECODE_LAUNCH, DECODE_GRAPH, DECODE_DRAW = 400e-6, 30e-6, 500e-6
DECODE_MEMORY_SHARE = 0.65
# Grading, packing, logging.
STEP_OVERHEAD = 2.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the run.

    Attributes:
        rollout, annotate, train: seconds, of the policy.
        others: of the other models, each with its formula.
        pass_time: of ``train``, by what they go into, in the slowest stage.
        tokens_per_gpu: tokens of the step per second of the whole step and GPU.
        training_tokens_per_gpu: tokens per second of training alone and GPU.
        training_tflops: model FLOPs (`flops.py`) of training alone, TFLOP/s per GPU.
        bubble: of the pipeline, relative to the work.
        traffic: bytes of one update.
    """

    rollout: float
    annotate: float
    train: float
    others: tuple[OtherTime, ...]
    pass_time: dict[str, float]
    tokens_per_gpu: float
    training_tokens_per_gpu: float
    training_tflops: float
    bubble: float
    traffic: StepTraffic

    @property
    def total(self) -> float:
        return self.rollout + self.annotate + self.train + self.of() + STEP_OVERHEAD

    def of(self, *kinds: str) -> float:
        """Seconds of other models: of these kinds, or of all."""
        return sum(other.seconds for other in self.others if not kinds or other.kind in kinds)


def plan_time(
    cfg: RunConfig, hardware: Hardware, load: Workload | None = None, rollout: float | None = None
) -> StepTime:
    """How long a step of a run without contradictions takes on GPUs.

    ``rollout``: :func:`rollout_seconds`, where they are known, of a run that differs in how it trains alone.
    """
    load = workload(cfg) if load is None else load
    ranks = rank_parameters(cfg.model, cfg.parallel)
    passes = Passes.of(cfg, hardware, load)
    slowest, waits = passes.slowest, passes.waits
    after, traffic = passes.after(slowest.held)
    train = passes.training()
    # All sequences in one pass before the first update, and another for the reference.
    annotate = passes.asking(load.annotations)
    if rollout is None:
        rollout = rollout_seconds(cfg, hardware, load)
    if cfg.is_rl and cfg.train.offload:
        rollout += max(_lending_seconds(cfg, hardware, rank) for rank in ranks)
        if cfg.rl.kl_coef:  # the reference policy comes from the host once
            annotate += max(rank.total for rank in ranks) * precision(cfg).activation / hardware.host_bandwidth
    flops = model_flops(cfg.model)
    square = load.mean_square
    per_sequence = 3 * (flops.per_token * load.mean_length + flops.per_pair * (square + load.mean_length) / 2)
    epochs = cfg.rl.inner_epochs if cfg.is_rl else 1
    gpus = passes.links.topology.world_size
    pass_time = {
        name: load.updates * load.microbatches * (slowest.forward.get(name, 0) + slowest.backward.get(name, 0))
        for name in slowest.backward
    }
    pass_time["bubble"] = load.updates * load.microbatches * waits * slowest.seconds
    pass_time["update"] = load.updates * after
    others = tuple(other_times(cfg, hardware, load))
    total = rollout + annotate + train + sum(other.seconds for other in others) + STEP_OVERHEAD
    kinds = {name: amount * load.microbatches for name, amount in slowest.traffic.items()} | traffic
    return StepTime(
        rollout=rollout,
        annotate=annotate,
        train=train,
        others=others,
        pass_time=pass_time,
        tokens_per_gpu=load.tokens / total / gpus,
        training_tokens_per_gpu=load.tokens * epochs / train / gpus if train else 0.0,
        training_tflops=load.sequences * epochs * per_sequence / train / gpus / 1e12 if train else 0.0,
        bubble=waits,
        traffic=StepTraffic(kinds),
    )


def _lending_seconds(cfg: RunConfig, hardware: Hardware, held: RankParameters) -> float:
    """The optimizer to the host and back (``train.offload``)."""
    of = precision(cfg)
    lent = held.optimizer_shard(cfg.train.use_distributed_optimizer) * (1 - of.offloaded) * of.optimizer
    return 2 * lent / hardware.host_bandwidth


# ---------------------------------------------------------------------------------------------------------------------
# Sampling.


def rollout_seconds(cfg: RunConfig, hardware: Hardware, load: Workload) -> float:
    """Seconds until the last sequence of a step has ended."""
    if cfg.learns_from_rows:
        return 0.0
    ranks = rank_parameters(cfg.model, cfg.parallel)
    decode = _Decode(cfg, hardware, Links(Topology.from_config(cfg.parallel), hardware), ranks)
    slots = min(cfg.rollout.max_sequences, load.per_replica)
    if cfg.rollout.cache_tokens is not None:
        slots = min(slots, max(1, cfg.rollout.cache_tokens // load.mean_length))
    seconds = decode.prompts(load)
    # Sequences take a slot as it becomes free, in an order that has nothing to do with their length.
    lengths = _shuffled(load.response_lengths)
    ends, waiting, now = [], iter(lengths), 0
    for length, _ in zip(waiting, range(slots)):
        heapq.heappush(ends, length)
    while ends:
        next_end = ends[0]
        active = len(ends)
        seconds += (next_end - now) * decode.token(active, load.mean_prompt + load.mean_response / 2)
        now = heapq.heappop(ends)
        length = next(waiting, None)
        if length is not None:
            heapq.heappush(ends, now + length)
    return seconds / (1 + 0.8 * bool(cfg.rollout.speculative_tokens))


def _shuffled(lengths: list[int]) -> list[int]:
    """A fixed order without a trend: multiples of a golden fraction."""
    return [length for _, length in sorted((i * 0.6180339887 % 1, length) for i, length in enumerate(lengths))]


class _Decode:
    """A decode step of a data-parallel rank."""

    def __init__(self, cfg: RunConfig, hardware: Hardware, links: Links, ranks: tuple[RankParameters, ...]):
        self.cfg, self.hardware, self.links = cfg, hardware, links
        self.lanes = cfg.rollout.pipeline_groups or links.topology.pp
        self._known: dict[tuple[int, int], float] = {}
        self._stages = {self._layers(rank) for rank in ranks}

    def _layers(self, rank: RankParameters) -> tuple[int, int, int]:
        first = self.cfg.model.num_dense_layers
        numbers = [i for chunk in rank.chunks for i in chunk.chunk.layers]
        dense = sum(i < first for i in numbers)
        return dense, len(numbers) - dense, sum(chunk.chunk.loss for chunk in rank.chunks)

    def token(self, active: int, context: float) -> float:
        """Seconds until every one of ``active`` sequences with ``context`` tokens behind them has another one."""
        rows = -(-active // self.lanes)
        key = (rows, round(context))
        if key not in self._known:
            self._known[key] = max(self._stage(*layers, rows, context) for layers in self._stages)
        used = min(self.lanes, active)
        return max(used, self.links.topology.pp) * self._known[key]

    def _stage(self, dense: int, sparse: int, heads: int, rows: int, context: float) -> float:
        cfg, m, hw, t = self.cfg, self.cfg.model, self.hardware, self.links.topology
        of, bandwidth = precision(cfg), hw.memory_bandwidth * DECODE_MEMORY_SHARE
        each, weight = of.activation, of.quantised_once or of.activation
        parts = layer_parts(m, dense=m.num_moe_layers == 0)
        attention = (parts[ATTENTION] / t.tp + parts[ATTENTION_DOWN]) * weight / bandwidth
        attention += self._attention(rows, context)
        launch = DECODE_GRAPH if self._has_graphs() else DECODE_LAUNCH
        around = launch + 2 * self._sum(rows)
        seconds = dense * (attention + 3 * m.hidden_size * m.ffn_hidden_size / t.tp * weight / bandwidth + around)
        if sparse:
            seconds += sparse * (attention + self._experts(parts, rows) + around)
        if heads:
            seconds += m.hidden_size * m.vocab_size / t.tp * each / bandwidth + DECODE_DRAW
        if t.pp > 1:
            seconds += Traffic(network=rows * m.hidden_size * each).seconds(hw)
        return seconds

    def _attention(self, rows: int, context: float) -> float:
        """Reading the caches, or multiplying with them: absorbed, a latent serves all heads of the rank."""
        m, hw, t = self.cfg.model, self.hardware, self.links.topology
        if m.is_dense_student:
            width, heads = 2 * m.query_groups / t.tp * m.channels_per_head, m.num_attention_heads / t.tp
            flops = 4 * heads * m.channels_per_head
        else:
            width, heads = m.kv_lora_rank + m.qk_pos_emb_head_dim, m.num_attention_heads / t.tp
            flops = 2 * heads * (2 * m.kv_lora_rank + m.qk_pos_emb_head_dim)
        read = width * precision(self.cfg).activation / (hw.memory_bandwidth * DECODE_MEMORY_SHARE)
        return rows * context * max(read, flops / (hw.bf16_flops * ATTENTION_FORWARD))

    def _experts(self, parts, rows: int) -> float:
        """Weights of the local experts that somebody chose, and the exchange with other data-parallel ranks."""
        cfg, m, hw, t = self.cfg, self.cfg.model, self.hardware, self.links.topology
        ranks = t.ep * t.etp
        sharing = max(1, ranks // t.tp)  # data-parallel ranks that meet at the experts
        rows_of_all = rows * sharing
        chosen = 1 - (1 - m.moe_router_topk / m.num_moe_experts) ** rows_of_all
        of, bandwidth = precision(cfg), hw.memory_bandwidth * DECODE_MEMORY_SHARE
        each, weight = of.activation, of.quantised_once or of.activation
        seconds = chosen * parts[ROUTED_EXPERTS] / ranks * weight / bandwidth
        seconds += parts[SHARED_EXPERT] / t.tp * weight / bandwidth
        flops = 2 * rows_of_all * m.moe_router_topk * parts[ROUTED_EXPERTS] / m.num_moe_experts / ranks
        seconds += flops / (hw.bf16_flops * BF16_PRODUCTS * 0.5)
        if sharing > 1:
            send = self.links.all_to_all("etp-ep", rows * ranks * m.hidden_size * each)
            seconds += 2 * (send.seconds(hw) + NETWORK_EXCHANGE)
        return seconds

    def _sum(self, rows: int) -> float:
        """Tensor-parallel ranks add their parts up."""
        if self.links.topology.tp == 1:
            return 0.0
        payload = rows * self.cfg.model.hidden_size * precision(self.cfg).activation
        return (self.links.ring("tp", payload) * 2).seconds(self.hardware)

    def _has_graphs(self) -> bool:
        """As ``rollout/graphs.py`` allows: local layers, experts held by the tensor-parallel ranks."""
        t = self.links.topology
        local = not self.cfg.train.bf16 or self.cfg.train.moe_experts == "grouped"
        return self.cfg.rollout.cuda_graphs and local and t.ep * t.etp <= t.tp

    def prompts(self, load: Workload) -> float:
        """Every prompt once for all of its samples."""
        flops = model_flops(self.cfg.model)
        per_group = self.cfg.rollout.samples_per_prompt if self.cfg.is_rl else 1
        tokens = load.sequences // per_group * load.mean_prompt
        return flops.per_token * tokens / (self.links.topology.world_size * self.hardware.bf16_flops * 0.3)


# Counting rows and starting an all-to-all from the host.
NETWORK_EXCHANGE = 60e-6
