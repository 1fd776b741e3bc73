"""Rollouts to graded groups: one rank of each replica asks the reward functions, the others hear the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist

from r1_megatron.stages.setup import Run
from r1_megatron.types import GradedGroup, Prompt, Rollout


class Graded(NamedTuple):
    """The groups of this replica in order; with ``reward.on_error: zero`` also how many completions a reward failed
    on, and what the first failures said."""

    groups: list[GradedGroup]
    num_failed: int
    errors: tuple[str, ...]


def grade(run: Run, prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]]) -> Graded:
    """Grade the rollouts of this replica's prompts. Collective over the replica.

    Raises:
        RewardError: a reward failed and ``reward.on_error`` is ``fail``.
    """
    asked = [prompt for prompt, group in zip(prompts, rollouts) for _ in group]
    texts = [rollout.text for group in rollouts for rollout in group]
    answer: list = [None]
    if run.grader is not None:
        answer = [(run.grader.grade(asked, texts), run.grader.last_errors)]
    topology = run.groups.topology
    if topology.tp * topology.pp > 1:
        # The last stage's first tensor-parallel rank: `is_replica_writer`.
        source = dist.get_process_group_ranks(run.groups.model_parallel)[(topology.pp - 1) * topology.tp]
        dist.broadcast_object_list(answer, src=source, group=run.groups.model_parallel)
    (total, components, num_failed), errors = answer[0]
    graded, start = [], 0
    for prompt, group in zip(prompts, rollouts):
        part = slice(start, start + len(group))
        start += len(group)
        parts = {name: values[part] for name, values in components.items()}
        graded.append(GradedGroup(prompt, tuple(group), total[part], parts))
    return Graded(graded, num_failed, errors)
