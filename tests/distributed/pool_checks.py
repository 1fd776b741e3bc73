"""What tests/unit/test_rank_pool.py asks ranks to do: the honest, the wrong, the hanging and the dying."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist


def ring(offset: int) -> tuple[int, int]:
    """Send my rank around the ring: ``(rank of my left neighbour + offset, sum of all ranks)``."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine, left = torch.tensor([rank]), torch.empty(1, dtype=torch.int64)
    total = torch.tensor([rank])
    dist.all_reduce(total)
    if size == 1:
        return rank + offset, int(total)
    sending = dist.isend(mine, (rank + 1) % size)
    dist.recv(left, (rank - 1) % size)
    sending.wait()
    return int(left) + offset, int(total)


def environment() -> dict[str, object]:
    """What a rank finds around it."""
    return {
        "rank": os.environ["RANK"],
        "world_size": os.environ["WORLD_SIZE"],
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "preloaded": "megatron.core" in sys.modules,
        "nursery_threads": len(os.listdir(f"/proc/{os.getppid()}/task")),
        "cuda": torch.cuda.is_available(),
    }


def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


def leave_state_behind() -> bool:
    """True if an earlier call left something in this process."""
    found = hasattr(torch, "_left_behind")
    torch._left_behind = True
    return found


def raise_on(rank: int) -> None:
    """One rank raises, the others wait for it in a collective."""
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} has had enough")
    dist.barrier()


def die_on(rank: int, how: str) -> None:
    """One rank dies, the others wait for it in a collective."""
    if dist.get_rank() == rank:
        print("last words", flush=True)
        if how == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(7)
    dist.barrier()


def hang_on(rank: int) -> None:
    """One rank sleeps, the others wait for it in a collective."""
    if dist.get_rank() == rank:
        sleep_forever()
    dist.barrier()


def sleep_forever() -> None:
    while True:
        time.sleep(3600)


def leave_a_process_behind(dies: bool) -> int:
    """Start a process that would live for an hour; answers its id."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    if dies:
        raise RuntimeError(f"child {child.pid}")
    return child.pid


def unpicklable() -> object:
    return lambda: None
