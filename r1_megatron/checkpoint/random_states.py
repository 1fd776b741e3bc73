"""The states of every random generator of a rank, as tensors of a checkpoint.

Nothing of ours draws from them: samples, data order and initial weights are hashed from seeds and positions. A reward
plug-in or a layer with dropout may, so a resumed run goes on with the states it stopped with. They belong to ranks: a
run that goes on with another layout starts from its seed instead.
"""

from __future__ import annotations

import random
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def seed_random(seed: int) -> None:
    """Seed every generator of this rank, so that what a plug-in draws can be drawn again."""
    rank = dist.get_rank()
    random.seed(f"{seed}/{rank}")
    np.random.seed((seed * 1_000_003 + rank) % (1 << 32))
    torch.manual_seed((seed * 1_000_003 + rank) % (1 << 63))


def random_states() -> dict[str, torch.Tensor]:
    """``python`` and ``numpy`` (int64), ``torch``, ``cuda`` and megatron-core's ``tracker.<name>`` (uint8), all 1-D."""
    _, words, gauss = random.getstate()  # gauss: the second number of a pair, if one is left over
    _, keys, position, has_gauss, cached = cast(tuple, np.random.get_state(legacy=True))
    states = {
        "python": torch.tensor([*words, gauss is not None, *_bits(gauss or 0.0)], dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss, *_bits(cached)], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return states


def set_random_states(states: dict[str, torch.Tensor]) -> None:
    """The inverse of :func:`random_states`."""
    *words, has_gauss, low, high = states["python"].tolist()
    random.setstate((3, tuple(words), _from_bits(low, high) if has_gauss else None))
    *keys, position, has_gauss, low, high = states["numpy"].tolist()
    cached = _from_bits(low, high)
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu())
    tracker = get_cuda_rng_tracker()
    current = tracker.get_states()
    tracker.set_states({name: states[f"tracker.{name}"].to(state.device) for name, state in current.items()})


def sharded_random_states(states: dict[str, torch.Tensor]) -> dict[str, ShardedTensor]:
    """One row per rank under the keys ``rng.<name>``."""
    place = (0, dist.get_rank(), dist.get_world_size())
    return {name: ShardedTensor.from_rank_offsets(f"rng.{name}", state[None], place) for name, state in states.items()}


def _bits(value: float) -> tuple[int, int]:
    whole = int(np.float64(value).view(np.uint64))
    return whole & 0xFFFFFFFF, whole >> 32


def _from_bits(low: int, high: int) -> float:
    return float(np.uint64(high << 32 | low).view(np.float64))
