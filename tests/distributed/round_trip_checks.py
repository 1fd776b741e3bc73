"""What the round-trip test asks ranks to do: read converted checkpoints into models, and write them again."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from r1_megatron.checkpoint.contents import Contents
from r1_megatron.checkpoint.hugging_face.origin import copy_origin
from r1_megatron.checkpoint.store import load_checkpoint
from r1_megatron.checkpoint.writer import CheckpointWriter
from r1_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from r1_megatron.model.build import build_model
from r1_megatron.parallel.groups import build_process_groups
from r1_megatron.train.policy import build_policy


def load_and_save(
    parallel: ParallelConfig, folder: str, checkpoints: dict[str, tuple[ModelConfig, str]], target: str
) -> None:
    """Each ``folder/<name>/checkpoint`` as a policy's weights, in the dtype given, to ``folder/<name>/<target>``."""
    groups = build_process_groups(parallel)
    for name, (model, dtype) in checkpoints.items():
        source, written = Path(folder, name, "checkpoint"), Path(folder, name, target)
        train = TrainConfig(bf16=dtype == "bfloat16")
        cfg = RunConfig(model=model, parallel=parallel, train=train, stage="evaluate")
        chunks = build_model(cfg, groups, draw_weights=False)
        load_checkpoint(source, Contents(chunks, groups), model)
        policy = build_policy(cfg, groups, chunks)

        def with_origin(partial: Path, source: Path = source) -> None:
            if dist.get_rank() == 0:
                copy_origin(source, partial)

        description = {"step": 1, "policy_version": 1, "stage": "sft", "weights": {"dtype": dtype, "fp8": None}}
        state = Contents(policy.chunks, groups).sharded_state()
        CheckpointWriter().begin(written, state, description, model, with_origin)
