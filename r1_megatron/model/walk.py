"""A forward of generation as a walk over a chunk's weights: the function of its modules, without what they do besides.

The modules split rows over tensor-parallel ranks and bring them together again around every projection, dispatch tokens
to experts through buffers and counts, and wrap each product for autograd. A step of decoding has a row a sequence: all
that costs more than the arithmetic. Here every tensor-parallel rank has all rows, a layer adds up its ranks' parts
twice (behind attention, behind the feed-forward), and a rank's experts are one operator (`kernels/decode.py`).

Experts on other data-parallel ranks are reached by an all-to-all each way (`model/expert_exchange.py`). Where a layer
is built otherwise (one module per expert), that part of it goes through its module. Transformer Engine's layers are not
walked at all (:func:`can_walk`).

Legend: T rows of the forward, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from r1_megatron.kernels.decode import mixture_of_experts, rms_norm, route_tokens
from r1_megatron.kernels.ops import ops
from r1_megatron.model.expert_exchange import ExpertExchange
from r1_megatron.model.experts import GroupedExperts
from r1_megatron.model.generation import StepContext, gather_rows, project
from r1_megatron.model.latent_attention import LatentAttention
from r1_megatron.model.norm import RMSNorm
from r1_megatron.parallel.groups import ProcessGroups

# A part of a layer: what it adds to the residual stream [T, H].
Part = Callable[[torch.Tensor, StepContext], torch.Tensor]


def can_walk(chunk: Any) -> bool:
    """Whether a chunk's layers are the local ones, whose weights mean what their names say."""
    return all(isinstance(layer.input_layernorm, RMSNorm) for layer in chunk.decoder.layers)


class Walk:
    """The decoder layers of one chunk, looked up once for as long as its parameters are the same objects.

    Args:
        record: keep the experts that are chosen where the routers' own record is (`RouterReplay.recorded`).
    """

    def __init__(self, chunk: Any, groups: ProcessGroups, record: bool):
        self._chunk, self._groups, self._record = chunk, groups, record
        self._shards = groups.topology.tp if chunk.config.sequence_parallel else 1
        self._layers = [self.layer(layer) for layer in chunk.decoder.layers]
        self._final_norm = chunk.decoder.final_layernorm  # of the stage that has the last layer, else None

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 ``[T]`` to ``[T, H]``, all rows on every tensor-parallel rank."""
        weight, tp = self._chunk.embedding.word_embeddings.weight, self._groups.tp
        if tp.size() == 1:
            return F.embedding(tokens, weight)
        rows = tokens - tp.rank() * len(weight)
        elsewhere = (rows < 0) | (rows >= len(weight))
        return self._sum(F.embedding(rows.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere[:, None], 0))

    def __call__(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor:
        """``[T, H]`` through all layers, and the final norm where this chunk has it."""
        added = None
        for layer in self._layers:
            hidden, added = layer(hidden, added, step)
        if self._final_norm is not None:
            return _norm(self._final_norm, hidden, added)[0]
        return hidden if added is None else hidden + added

    def layer(self, layer: Any) -> Layer:
        """A transformer layer of the chunk, looked up."""
        attention, feed_forward = self.attention(layer.self_attention), self.feed_forward(layer.mlp)
        return Layer(layer.input_layernorm, attention, layer.pre_mlp_layernorm, feed_forward)

    def all_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """All rows of what sequence parallelism has split."""
        return rows if self._shards == 1 else gather_rows(rows, self._groups.tp)

    def own_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows that sequence parallelism gives this rank."""
        return rows if self._shards == 1 else rows.chunk(self._shards)[self._groups.tp_rank]

    # ------------------------------------------------------------------------------------------------ parts of a layer

    def attention(self, attention: Any) -> Part:
        """Of a transformer layer's attention module."""
        if not isinstance(attention, LatentAttention):
            return self._through(lambda rows, step: attention(rows, None, inference_context=step))
        weight, bias = attention.linear_proj.weight, attention.linear_proj.bias

        def part(rows: torch.Tensor, step: StepContext) -> torch.Tensor:
            added = self._sum(project(attention.attend(*attention.project_down(rows), step), weight))
            return added if bias is None else added + bias

        return part

    def feed_forward(self, mlp: Any) -> Part:
        """Of a transformer layer's MLP or mixture of experts."""
        if not hasattr(mlp, "router"):
            gated = _gated_mlp(mlp)
            return lambda rows, step: self._sum(gated(rows))
        experts = mlp.experts
        if not isinstance(experts, GroupedExperts):
            return self._through(lambda rows, step: mlp(rows))
        shared = None if mlp.shared_experts is None else _gated_mlp(mlp.shared_experts)
        if self._groups.exchanges_tokens:
            return self._over_replicas(mlp.router, experts, shared)
        routed = self._routed(mlp.router, experts)

        def part(rows: torch.Tensor, step: StepContext) -> torch.Tensor:
            added = routed(rows)
            return self._sum(added if shared is None else added + shared(rows))

        return part

    def _route(self, router: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """What gives rows their gates and experts, each ``[T, topk]``."""
        cfg = router.config
        return lambda rows: route_tokens(
            project(rows.float(), router.weight.float()),
            router.expert_bias,
            cfg.moe_router_topk,
            num_groups=cfg.moe_router_num_groups,
            group_topk=cfg.moe_router_group_topk,
            scaling=cfg.moe_router_topk_scaling_factor or 1.0,
        )

    def _routed(self, router: Any, experts: GroupedExperts) -> Callable[[torch.Tensor], torch.Tensor]:
        """This rank's part of what the routed experts add, ``[T, H]``; those of all tensor-parallel ranks add up."""
        route, replay = self._route(router), router.router_replay
        w1, w2 = experts.linear_fc1.weight, experts.linear_fc2.weight
        first = experts.ep_group.rank() * experts.num_local_experts
        # Ranks with the same experts (fewer expert ranks than tensor-parallel ones) share the tokens out.
        sharers = self._groups.tp.size() // (experts.ep_group.size() * experts.tp_group.size())
        turn = self._groups.tp_rank // (experts.ep_group.size() * experts.tp_group.size())

        def routed(rows: torch.Tensor) -> torch.Tensor:
            gates, chosen = route(rows)
            if self._record:
                replay.recorded = self.own_rows(chosen)
            if sharers > 1:
                mine = torch.arange(len(rows), device=rows.device) % sharers == turn
                chosen = torch.where(mine[:, None], chosen, -1)
            return mixture_of_experts(rows, gates, chosen, w1, w2, first)

        return routed

    def _over_replicas(
        self, router: Any, experts: GroupedExperts, shared: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> Part:
        """A mixture of experts whose ranks are not all of one replica; tensor-parallel ranks share the rows out."""
        route, replay = self._route(router), router.router_replay
        exchange = ExpertExchange(experts, self._groups.expert_tp_ep)

        def part(rows: torch.Tensor, step: StepContext) -> torch.Tensor:
            own = self.own_rows(rows)
            gates, chosen = route(own)
            if self._record:
                replay.recorded = chosen
            num_real = step.num_decode + step.num_prompt_tokens - self._groups.tp_rank * len(own)
            if num_real < len(own):
                chosen[max(num_real, 0) :] = -1  # padding
            finish = exchange.begin(own, gates, chosen, step.peer_rows)
            added = torch.zeros_like(rows) if shared is None else shared(rows)
            self.own_rows(added).add_(finish())
            return self._sum(added)

        return part

    def _through(self, module: Callable[[torch.Tensor, StepContext], tuple[torch.Tensor, Any]]) -> Part:
        """A part that goes through its module: rows are split for it and brought together again."""

        def part(rows: torch.Tensor, step: StepContext) -> torch.Tensor:
            added, bias = module(self.own_rows(rows)[:, None], step)
            added = added if bias is None else added + bias
            return self.all_rows(added[:, 0])

        return part

    def _sum(self, rows: torch.Tensor) -> torch.Tensor:
        """The sum of all tensor-parallel ranks' parts."""
        if self._groups.tp.size() > 1:
            dist.all_reduce(rows, group=self._groups.tp)
        return rows


@dataclass(frozen=True)
class Layer:
    """One transformer layer: norms and what stands behind them."""

    attention_norm: RMSNorm
    attention: Part
    feed_forward_norm: RMSNorm
    feed_forward: Part

    def __call__(
        self, stream: torch.Tensor, added: torch.Tensor | None, step: StepContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream, and what is still to be added to it, ``[T, H]`` each, before the layer and behind it."""
        normed, stream = _norm(self.attention_norm, stream, added)
        normed, stream = _norm(self.feed_forward_norm, stream, self.attention(normed, step))
        return stream, self.feed_forward(normed, step)


def _norm(norm: RMSNorm, stream: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream with what was added to it, normed, and not."""
    if added is None:
        return rms_norm(stream, norm.weight, norm.eps or 0.0)
    return rms_norm(added, norm.weight, norm.eps or 0.0, stream)


def _gated_mlp(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """This rank's part of a SwiGLU MLP: gate and up projection stacked, the ranks' parts add up."""
    fc1, fc2 = mlp.linear_fc1.weight, mlp.linear_fc2.weight
    return lambda rows: project(ops.swiglu(project(rows, fc1), None), fc2)
