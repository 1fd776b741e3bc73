"""What a rank of the pool does for converted checkpoints: megatron-core's own load of a part of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from r1_megatron.config.schema import ParallelConfig
from r1_megatron.parallel.device import cuda_type_names
from r1_megatron.parallel.groups import build_process_groups


def load_halves(folder: str, wanted: dict[str, tuple[str, tuple[int, ...]]], axis: int) -> dict[str, torch.Tensor]:
    """This rank's half along ``axis`` of every tensor (by key: dtype, shape), as bytes; or all of it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    build_process_groups(ParallelConfig(data_parallel_size=size))
    state = {}
    for key, (dtype, shape) in wanted.items():
        is_cut = axis < len(shape) and shape[axis] % size == 0
        local = [extent // size if is_cut and i == axis else extent for i, extent in enumerate(shape)]
        data = torch.empty(local, dtype=getattr(torch, dtype))
        cuts = [(axis, rank, size)] if is_cut else []
        state[key] = ShardedTensor.from_rank_offsets(key, data, *cuts, replica_id=0 if is_cut else rank)
    with cuda_type_names():
        loaded = dist_checkpointing.load(state, folder)
    return {key: tensor.contiguous().view(torch.uint8) for key, tensor in loaded.items()}
