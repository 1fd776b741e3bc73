"""What a rank measures about the model variants: training and generation on each, compared with Transformers' model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from r1_megatron.config.schema import ParallelConfig
from r1_megatron.parallel.groups import build_process_groups
from tests.distributed.train_checks import Bench, gradients_of
from tests.tiny import VARIANTS


def training(parallel: ParallelConfig, path: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By variant: loss and gradients of the batch on this layout and, on one rank, the logits of one sequence."""
    bench = Bench(parallel, build_process_groups(parallel), path)
    answers = {}
    for name in names:
        policy = bench.policy(bench.config(VARIANTS[name]), name)
        answers[name] = gradients_of(policy, bench.mine(bench.samples()), bench.references[name])
        if bench.groups.model_parallel.size() == 1 and not VARIANTS[name].mtp_num_layers:
            tokens = bench.references["batch"]["tokens"][0]
            with torch.no_grad():
                logits = policy.chunks[0](tokens[None], torch.arange(len(tokens))[None], None)[0]
            gap = logits[:, : VARIANTS[name].vocab_size] - bench.references[name]["logits"]
            answers[name]["logit_error"] = gap.abs().max().item()
    return answers
