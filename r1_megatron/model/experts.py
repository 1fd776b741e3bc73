"""A layer's routed experts with their weights stacked: one grouped product instead of one module per expert.

`GroupedExperts` takes the place of megatron-core's `SequentialMLP` in a layer's spec. One parameter holds a projection
of all local experts, so a rank with 64 experts has 2 parameters a layer instead of 128: as many fewer gradient hooks,
optimizer entries and checkpoint writes. The global names stay those of single experts (`model/parameters.py`), and so
do the keys and shapes in a distributed checkpoint: what either module writes, the other one reads.

Shapes: E local experts, H hidden, F expert width on this rank (the whole width over expert tensor parallelism).
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from r1_megatron.kernels.experts import grouped_swiglu_experts


class StackedLinear(torch.nn.Module):
    """Holds ``weight [E, rows, columns]`` and answers it; what it multiplies is the business of the expert layer.

    Asked by a call, because megatron-core waits for an overlapped parameter gather in the hook before a module's call.
    """

    def __init__(self, experts: int, rows: int, columns: int, partition_dim: int, config: TransformerConfig, init):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(experts, rows, columns, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=partition_dim, stride=1)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                init(self.weight)

    def forward(self) -> torch.Tensor:
        return self.weight


class GroupedExperts(MegatronModule):
    """SwiGLU experts over the grouped GEMM of `kernels/experts.py`; the interface of megatron-core's expert modules."""

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection=None):
        super().__init__(config=config)
        assert config.gated_linear_unit and config.activation_func is torch.nn.functional.silu, "SwiGLU experts only"
        assert not config.add_bias_linear and config.moe_latent_size is None and not config.moe_apply_probs_on_input
        assert pg_collection is not None
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        width, remainder = divmod(config.moe_ffn_hidden_size, self.tp_group.size())
        assert remainder == 0, f"moe_ffn_hidden_size={config.moe_ffn_hidden_size} over {self.tp_group.size()} ranks"
        hidden = config.hidden_size
        shape = num_local_experts, 2 * width, hidden
        self.linear_fc1 = StackedLinear(*shape, partition_dim=1, config=config, init=config.init_method)
        shape = num_local_experts, hidden, width
        self.linear_fc2 = StackedLinear(*shape, partition_dim=2, config=config, init=config.output_layer_init_method)

    def forward(self, hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor):
        """``hidden_states [M, H]`` sorted by expert, ``tokens_per_expert [E]``, ``probs [M]``; ``([M, H], None)``.

        Under expert tensor parallelism the answer is this rank's part of a sum that the token dispatcher takes.
        """
        offsets = tokens_per_expert.to(hidden_states.device, non_blocking=True).cumsum(0)
        return grouped_swiglu_experts(hidden_states, probs, self.linear_fc1(), self.linear_fc2(), offsets), None

    def backward_dw(self) -> None:
        """Nothing is left to do: weight gradients are never delayed."""

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Keys and global shapes of `SequentialMLP`: ``[..., experts, rows, columns]``, gate and up rows one by one."""
        assert not (metadata or {}).get("singleton_local_shards"), "one checkpoint tensor per expert is not written"
        lead = len(sharded_offsets)
        experts = (lead, self.ep_group.rank(), self.ep_group.size())
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        replica = (0, 0, self.dp_group.rank())

        def shard(key: str, tensor: torch.Tensor, axis: int, part: int, parts: int) -> ShardedTensor:
            offsets = (*sharded_offsets, experts, (lead + axis, part, parts))
            return ShardedTensor.from_rank_offsets(key, tensor, *offsets, replica_id=replica, prepend_axis_num=lead)

        @torch.no_grad()
        def split(key: str, tensor: torch.Tensor, replica_id, flattened_range):
            gate, up = tensor.chunk(2, dim=1)
            return [shard(key, gate, 1, tp_rank, 2 * tp_size), shard(key, up, 1, tp_size + tp_rank, 2 * tp_size)]

        @torch.no_grad()
        def join(parts: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(parts, dim=1)

        first, second = "linear_fc1.weight", "linear_fc2.weight"
        return {
            f"{prefix}{first}": ShardedTensorFactory(
                f"{prefix}experts.{first}", self.linear_fc1.weight, split, join, replica
            ),
            f"{prefix}{second}": shard(f"{prefix}experts.{second}", self.linear_fc2.weight, 2, tp_rank, tp_size),
        }
