"""What a rank of the pool does for the naming table: the keys and shapes of a checkpoint that training wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from r1_megatron.checkpoint.store import save_weights
from r1_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from r1_megatron.model.build import build_model
from r1_megatron.model.parameters import global_parameters
from r1_megatron.parallel.groups import build_process_groups


def keys_and_names(models: dict[str, ModelConfig], folder: str) -> dict[str, Any]:
    """Per model: ``keys`` of its checkpoint with the whole shape, and ``names`` of its parameters, likewise."""
    parallel = ParallelConfig()
    groups = build_process_groups(parallel)
    answers = {}
    for name, model in models.items():
        chunks = build_model(RunConfig(model=model, parallel=parallel, train=TrainConfig()), groups)
        path = save_weights(Path(folder) / name, chunks, groups, {})
        tensors = dist_checkpointing.load_tensors_metadata(str(path))
        answers[name] = {
            "keys": {key: tuple(tensor.global_shape) for key, tensor in tensors.items()},
            "names": {p.name: p.global_shape for p in global_parameters(chunks[0], groups, biases=True)},
        }
    return answers
