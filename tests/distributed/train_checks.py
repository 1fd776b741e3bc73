"""What a rank measures about training: run by the pool, compared with the references by the tests.

A check builds its own policy on the layout's process groups, and answers plain numbers. ``run`` walks through several
of them in one call, for building the groups costs more than most checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from r1_megatron.config.schema import ParallelConfig, RunConfig
from r1_megatron.model.parameters import global_parameters
from r1_megatron.parallel.groups import build_process_groups
from r1_megatron.train.policy import build_policy
from tests.distributed import family_checks, gradient_checks, paper_checks, update_checks
from tests.distributed.train_bench import NORMAL, Answer, Bench
from tests.tiny import TINY_MTP

CHECKS: dict[str, Callable[[Bench], Answer]] = {
    check.__name__: check
    for module in (gradient_checks, update_checks, family_checks, paper_checks)
    for check in module.CHECKS
}


def run(parallel: ParallelConfig, path: str, names: Sequence[str]) -> dict[str, Answer]:
    """Walk through the checks ``names`` on one layout."""
    bench = Bench(parallel, build_process_groups(parallel), path)
    answers = {}
    for name in names:
        print(f"check {name}", flush=True)
        answers[name] = CHECKS[name](bench)
    return answers


def initial_weights(parallel: ParallelConfig, path: str) -> Answer:
    """Random initial weights: one rank alone writes them to ``path``, the ranks of a layout compare theirs with them.

    The vocabulary is padded by some layouts only: padded rows are nobody's.
    """
    groups = build_process_groups(parallel)
    policy = build_policy(RunConfig(model=TINY_MTP, parallel=parallel, train=NORMAL, seed=77), groups)
    parameters = [p for chunk in policy.chunks for p in global_parameters(chunk, groups, biases=True)]
    if dist.get_world_size() == 1:
        torch.save({p.name: p.tensor.detach() for p in parameters}, path)
    whole = torch.load(path, weights_only=True)
    different = []
    for p in parameters:
        expected = whole[p.name]
        padding = p.global_shape[0] - expected.shape[0]
        if padding:
            expected = torch.cat([expected, expected.new_zeros(padding, *expected.shape[1:])])
        rows = p.tensor.shape[0] - (padding if p.shard == p.shards - 1 else 0)
        if not torch.equal(p.tensor[:rows], p.shard_of(expected)[:rows]):
            different.append(p.name)
    return {"different": different, "names": [p.name for p in parameters]}
