"""Procedural tasks: problems with known answers, made on the spot.

>>> task = build_task("chain_sum", {}, num_train=4096, num_eval=256, seed=1)
>>> task.prompt_text((3, 4, 1, 9)), task.label((3, 4, 1, 9))
('3+4+1+9=', 17)
"""

from __future__ import annotations

from typing import Any

from r1_megatron.data.tasks.base import Task
from r1_megatron.data.tasks.bilingual import Bilingual
from r1_megatron.data.tasks.chain_sum import ChainSum
from r1_megatron.data.tasks.countdown import Countdown
from r1_megatron.data.tasks.translation import Translation

TASKS = {"chain_sum": ChainSum, "countdown": Countdown, "bilingual": Bilingual, "translation": Translation}


def build_task(name: str, options: dict[str, Any], num_train: int, num_eval: int, seed: int) -> Task:
    """The task's problems: ``num_train`` to learn from and ``num_eval`` held out, in an order set by ``seed``."""
    if name not in TASKS:
        raise ValueError(f"data.source: {name!r} is no task; the tasks are {', '.join(TASKS)}.")
    if num_train < 1 or num_eval < 0:
        raise ValueError(f"data.num_train={num_train}, data.num_eval={num_eval}: expected at least 1 and 0.")
    return TASKS[name](options, num_train, num_eval, seed)


__all__ = ["TASKS", "Task", "build_task"]
