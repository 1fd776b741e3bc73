"""A microbatch on a pipeline rank: the seconds of its passes and what they send, and what follows an update.

A microbatch on a stage takes the time of its layers. Products run at a share of the peak, less where an expert sees few
rows; flash attention at its own; everything else moves what the layer keeps (`activations.py`) several times. Exchanges
between experts, tensor- and context-parallel ranks stand beside them unless they are overlapped. Fused permutation,
batched neighbours' exchanges and FP8's own statistics and padding are within the constants: they do not move the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from r1_megatron.config.schema import RunConfig
from r1_megatron.planner import communication
from r1_megatron.planner.activations import layer_activations
from r1_megatron.planner.communication import Links, Traffic
from r1_megatron.planner.hardware import Hardware
from r1_megatron.planner.parameters import (
    MLP,
    NORMS,
    ROUTED_EXPERTS,
    ROUTER,
    SHARED_EXPERT,
    RankParameters,
    layer_parts,
    mtp_parts,
    rank_parameters,
)
from r1_megatron.planner.precision import keeps_bf16, option, precision
from r1_megatron.planner.schedule import bubble
from r1_megatron.planner.workload import Workload
from r1_megatron.topology import Topology

# Share of the dense peak that large products reach. FP8's includes the casts of their operands.
BF16_PRODUCTS, FP8_PRODUCTS, FP8_BLOCKWISE_PRODUCTS = 0.70, 0.52, 0.42
# Rows of an expert at which its products reach half of that.
HALF_ROWS = 160
# Flash attention's share of the bf16 peak, forward and backward, which multiplies 2.5 times as much.
ATTENTION_FORWARD, ATTENTION_BACKWARD, BACKWARD_PRODUCTS = 0.60, 0.48, 2.5
# How often norms, activations, permutations, casts and residuals read or write what a layer keeps.
FORWARD_MOVES, BACKWARD_MOVES = 4.0, 7.0
MEMORY_SHARE = 0.75
# Seconds that the host needs to start a layer's kernels, forward; twice that backward.
HOST_DENSE, HOST_SPARSE = 0.25e-3, 0.7e-3
# What is left of an overlapped exchange; DeepEP's multiprocessors are taken from the products.
EXPOSED_EXCHANGE = 0.07
# Of a collective that hides behind the backward pass.
EXPOSED_REDUCTION = 0.2
# Bytes a second that one GPU's share of the host's processors updates parameters with, 28 bytes each.
HOST_ADAM = 40e9


@dataclass(frozen=True)
class StagePass:
    """One microbatch on one pipeline rank: seconds and bytes by what they go into."""

    held: RankParameters
    forward: dict[str, float]
    backward: dict[str, float]
    traffic: dict[str, Traffic]

    @property
    def forward_seconds(self) -> float:
        return sum(self.forward.values())

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward_seconds + sum(self.backward.values())


@dataclass(frozen=True)
class Passes:
    """The passes of one model over the sequences of a step; ``links`` are those of its own layout."""

    cfg: RunConfig
    hardware: Hardware
    links: Links
    load: Workload
    known: dict[tuple[bool, bool, bool], StagePass] = field(default_factory=dict)  # layers by what makes them differ

    @classmethod
    def of(cls, cfg: RunConfig, hardware: Hardware, load: Workload) -> Passes:
        return cls(cfg, hardware, Links(Topology.from_config(cfg.parallel), hardware), load)

    @cached_property
    def slowest(self) -> StagePass:
        """The stage that the others wait for."""
        ranks = rank_parameters(self.cfg.model, self.cfg.parallel)
        # Ranks that hold the same need the same.
        stages = [self.stage(rank) for rank in {rank.makeup: rank for rank in ranks}.values()]
        return max(stages, key=lambda stage: stage.seconds)

    @property
    def waits(self) -> float:
        """Of the pipeline in an update, relative to the work."""
        t = self.links.topology
        return bubble(t.pp, t.vpp, self.load.microbatches)

    @property
    def num_packs(self) -> int:
        """Microbatches of a data-parallel rank that hold all sequences of the step once."""
        return self.load.microbatches * num_minibatches(self.cfg)

    def asking(self, times: int = 1) -> float:
        """Seconds of so many forward passes over all sequences of the step, each as one pass of the pipeline."""
        return times * (self.num_packs + self.links.topology.pp - 1) * self.slowest.forward_seconds

    def training(self) -> float:
        """Seconds of all updates of the step."""
        after, _ = self.after(self.slowest.held)
        once = self.load.microbatches * (1 + self.waits) * self.slowest.seconds
        return self.load.updates * (once + after)

    @property
    def rows(self) -> float:
        """Of a microbatch of sequences of the mean length, on one rank."""
        t = self.links.topology
        sequences = self.load.sequences / (t.dp * num_minibatches(self.cfg))
        tokens = sequences * self.load.mean_length / self.load.microbatches
        return tokens / (t.tp * t.cp)

    def stage(self, held: RankParameters) -> StagePass:
        m = self.cfg.model
        forward: dict[str, float] = dict.fromkeys(
            ("products", "attention", "memory", "exchange", "tp_cp", "host", "pp"), 0.0
        )
        backward = dict(forward)
        traffic: dict[str, Traffic] = dict.fromkeys(("experts", "tensor", "context", "pipeline"), Traffic())
        for chunk in held.chunks:
            train, layers = self.cfg.train, chunk.chunk.layers
            kinds = [(i < m.num_dense_layers, False, keeps_bf16(train, i, m.num_layers)) for i in layers]
            kinds += [(m.num_moe_layers == 0, True, False)] * chunk.chunk.mtp
            for kind in kinds:
                if kind not in self.known:
                    self.known[kind] = self._layer(*kind)
                layer = self.known[kind]
                for name in layer.forward:
                    forward[name] += layer.forward[name]
                    backward[name] += layer.backward[name]
                for name in layer.traffic:
                    traffic[name] = traffic[name] + layer.traffic[name]
            heads = chunk.chunk.loss + chunk.chunk.mtp
            if heads:
                columns = 1 if m.head == "value" else m.vocab_size
                seconds = heads * 2 * self.rows * m.hidden_size * columns / (self.hardware.bf16_flops * BF16_PRODUCTS)
                forward["products"] += seconds
                backward["products"] += 2 * seconds
            hop = communication.pipeline(self.cfg, self.links, self.rows)
            traffic["pipeline"] = traffic["pipeline"] + hop * 2
            if len(held.chunks) == 1:  # interleaving hides it
                forward["pp"] += hop.seconds(self.hardware)
                backward["pp"] += hop.seconds(self.hardware)
        return StagePass(held, forward, backward, traffic)

    def _layer(self, dense: bool, mtp: bool, bf16: bool) -> StagePass:
        cfg, m, hw, rows = self.cfg, self.cfg.model, self.hardware, self.rows
        parts = mtp_parts(m) if mtp else layer_parts(m, dense)
        rate = self._rate(bf16)
        products = self._products(parts, dense, rate)
        pairs = self.load.mean_square / (2 * self.load.mean_length) + 0.5
        width = 2 * m.channels_per_head if m.is_dense_student else m.qk_head_dim + m.qk_pos_emb_head_dim + m.v_head_dim
        attention = 2 * rows * pairs * m.num_attention_heads * width / hw.bf16_flops
        kept = layer_activations(cfg, dense, mtp, bf16)
        moved = rows * (kept.kept + kept.recomputed).total() / (hw.memory_bandwidth * MEMORY_SHARE)
        send = Traffic() if dense else communication.dispatch(cfg, self.links, rows)
        overlapped = bool(option(cfg.train, "overlap_moe_expert_parallel_comm", False))
        exchange = 2 * send.seconds(hw) * (EXPOSED_EXCHANGE if overlapped else 1.0)
        beneath = 2 * rows * parts[SHARED_EXPERT] / rate if cfg.train.moe_shared_expert_overlap else 0.0
        tensor = communication.tensor_parallel(cfg, self.links, rows, dense)
        context = communication.context_parallel(cfg, self.links, rows)
        beside = tensor.seconds(hw) + context.seconds(hw)
        again = self._recomputed()
        full = "all" in again
        forward = {
            "products": products,
            "attention": attention / ATTENTION_FORWARD,
            "memory": FORWARD_MOVES * moved,
            "exchange": max(0.0, exchange - beneath),
            "tp_cp": beside,
        }
        backward = {
            "products": 2 * products + (products if full else self._again(parts, again, dense, rate)),
            "attention": BACKWARD_PRODUCTS * attention / ATTENTION_BACKWARD + (forward["attention"] if full else 0),
            "memory": (BACKWARD_MOVES + (FORWARD_MOVES if full else 0)) * moved,
            "exchange": max(0.0, exchange - 2 * beneath) + (forward["exchange"] if full or "moe" in again else 0.0),
            "tp_cp": beside * (3 if full else 2),
        }
        host = HOST_DENSE if dense else HOST_SPARSE
        forward["host"] = max(0.0, host - sum(forward.values()))
        backward["host"] = max(0.0, (3 if full else 2) * host - sum(backward.values()))
        ways = 4 + 2 * (full or "moe" in again)
        traffic = {"experts": send * ways, "tensor": tensor * (3 + full), "context": context * (3 + full)}
        return StagePass(_NOTHING, forward, backward, traffic)

    def _recomputed(self) -> set[str]:
        train = self.cfg.train
        if train.recompute_granularity == "full":
            return {"all"}
        return set(train.recompute_modules)

    def _products(self, parts, dense: bool, rate: float) -> float:
        """Seconds of a layer's products, forward."""
        m, hw = self.cfg.model, self.hardware
        linear = parts.total() - parts[NORMS] - parts[ROUTER] - parts[ROUTED_EXPERTS]
        seconds = 2 * self.rows * (linear / rate + parts[ROUTER] / (hw.bf16_flops * BF16_PRODUCTS))
        if not dense:
            chosen = parts[ROUTED_EXPERTS] * m.moe_router_topk / m.num_moe_experts
            seconds += 2 * self.rows * chosen / (rate * self._expert_share())
        return seconds

    def _again(self, parts, again: set[str], dense: bool, rate: float) -> float:
        """Seconds of the products that selective recomputation repeats."""
        m, macs, seconds = self.cfg.model, 0, 0.0
        if "mla_up_proj" in again and not m.is_dense_student:
            heads = m.num_attention_heads
            macs += (m.q_lora_rank or m.hidden_size) * heads * (m.qk_head_dim + m.qk_pos_emb_head_dim)
            macs += m.kv_lora_rank * heads * (m.qk_head_dim + m.v_head_dim)
        if "mlp" in again and dense:
            macs += parts[MLP]
        if not dense and again & {"moe", "shared_experts"}:
            macs += parts[SHARED_EXPERT]
        if not dense and "moe" in again:
            chosen = parts[ROUTED_EXPERTS] * m.moe_router_topk / m.num_moe_experts
            seconds += 2 * self.rows * chosen / (rate * self._expert_share())
        return seconds + 2 * self.rows * macs / rate

    def _rate(self, bf16: bool) -> float:
        """FLOP/s of large products."""
        hw, of = self.hardware, precision(self.cfg)
        if bf16 or not of.fp8:
            rate = hw.bf16_flops * BF16_PRODUCTS
        else:
            rate = hw.fp8_flops * (FP8_BLOCKWISE_PRODUCTS if of.fp8_recipe == "blockwise" else FP8_PRODUCTS)
        if option(self.cfg.train, "overlap_moe_expert_parallel_comm", False):
            rate *= 1 - self.cfg.train.moe_deepep_num_sms / hw.multiprocessors
        return rate

    def _expert_share(self) -> float:
        """Of that rate, where an expert sees few rows."""
        t, m = self.links.topology, self.cfg.model
        rows = self.rows * t.ep * t.etp * m.moe_router_topk / m.num_moe_experts
        return rows / (rows + HALF_ROWS)

    def after(self, held: RankParameters) -> tuple[float, dict[str, Traffic]]:
        """Seconds behind the last microbatch of an update: reductions that are left, the optimizer."""
        cfg, hw, of = self.cfg, self.hardware, precision(self.cfg)
        reductions = communication.gradients(cfg, self.links, held)
        seconds = reductions.seconds(hw) * (EXPOSED_REDUCTION if cfg.train.overlap_grad_reduce else 1.0)
        shard = held.optimizer_shard(cfg.train.use_distributed_optimizer)
        seconds += (
            shard * (1 - of.offloaded) * (2 * of.optimizer + of.gradient + 2) / (hw.memory_bandwidth * MEMORY_SHARE)
        )
        adam, copies = 28 / HOST_ADAM, (of.gradient + 2) / hw.host_bandwidth
        overlapped = cfg.train.overlap_cpu_optimizer_d2h_h2d
        seconds += shard * of.offloaded * (max(adam, copies) if overlapped else adam + copies)
        return seconds, {"data": reductions}


_NOTHING = RankParameters(0, (), 0, 0, 1, 1)


def num_minibatches(cfg: RunConfig) -> int:
    """That the sequences of a step are cut into."""
    return cfg.rl.num_minibatches if cfg.is_rl else 1
