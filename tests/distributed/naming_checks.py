"""What a rank of the pool does for the naming table: a Hugging Face folder into the model, and its logits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from r1_megatron.checkpoint.hugging_face.config import model_from_hf
from r1_megatron.checkpoint.hugging_face.weights import load_hugging_face
from r1_megatron.checkpoint.matching import match_tensors
from r1_megatron.config.schema import ParallelConfig, RunConfig, TrainConfig
from r1_megatron.model.build import build_model
from r1_megatron.parallel.groups import build_process_groups


def logits_of_folders(folder: str, names: list[str], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """``[tokens, vocabulary]`` of every model below ``folder``, built and filled from its files alone."""
    parallel = ParallelConfig()
    groups = build_process_groups(parallel)
    answers = {}
    for name in names:
        config = json.loads((Path(folder) / name / "config.json").read_text())
        weights = load_file(Path(folder) / name / "model.safetensors")
        model = model_from_hf(config, weights)
        match_tensors({key: tuple(tensor.shape) for key, tensor in weights.items()}, model).check(name)
        cfg = RunConfig(model=model, parallel=parallel, train=TrainConfig())
        chunks = build_model(cfg, groups, draw_weights=False)
        load_hugging_face(chunks, groups, weights, model, config.get("rope_interleave", True))
        with torch.no_grad():
            answers[name] = chunks[0](tokens[None], torch.arange(len(tokens))[None], None)[0]
    return answers
