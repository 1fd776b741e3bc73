"""The model of ``bench_vs_trl.py``, with the same weights for both sides: a Hugging Face folder and our checkpoint.

The weights are random, except for one channel of the residual stream, which the embedding sets and nothing else reads
or writes but the head's row of the end-of-sequence token. It decides how often a completion ends, by the weights alone:
no side needs an option for it, and none pays for one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from r1_megatron.checkpoint.hugging_face.config import hf_from_model
from r1_megatron.checkpoint.naming import entries, hugging_face_shapes
from r1_megatron.config.presets import PRESETS
from r1_megatron.config.schema import ModelConfig
from tools.rl_workload import write_tokenizer

PRESET = "bench_256"
MODEL = ModelConfig(**PRESETS[PRESET])
# The channel: its value in the residual stream, and the end token's weight on it. A token is the last one with a
# probability of less than 1e-9, or of about 1/50.
CHANNEL, CHANNEL_VALUE = 0, 0.3
END_WEIGHT = {"full": -4.0, "tailed": 0.65}


def write_model(folder: Path, end_weight: float, seed: int = 0, model: ModelConfig = MODEL) -> Path:
    """A Hugging Face folder of float32 weights."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    shapes = hugging_face_shapes(entries(model))
    tensors = {name: _draw(name, shape, model, end_weight, random) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = hf_from_model(model, "float32", eos_token_id=0) | {"pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, model.vocab_size)
    return folder


def convert(source: Path, target: Path) -> Path:
    """The same weights as a checkpoint of ours."""
    command = [sys.executable, "-m", "r1_megatron.cli", "convert", "from-hf", str(source), str(target), "--quiet"]
    subprocess.run([*command, "--workers", "1"], check=True, stdout=subprocess.DEVNULL)
    return target


def _draw(
    name: str, shape: tuple[int, ...], model: ModelConfig, end_weight: float, random: np.random.Generator
) -> np.ndarray:
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    if name.endswith("e_score_correction_bias"):
        return np.zeros(shape, np.float32)
    weight = random.standard_normal(shape, np.float32) * np.float32(model.init_method_std)
    if name == "model.embed_tokens.weight":
        weight[:, CHANNEL] = CHANNEL_VALUE
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        weight[CHANNEL] = 0
    elif weight.shape[1] == model.hidden_size:
        weight[:, CHANNEL] = 0
    if name == "lm_head.weight":
        weight[0] = 0
        weight[0, CHANNEL] = end_weight
    return weight
