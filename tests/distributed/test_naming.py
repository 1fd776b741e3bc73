"""Names and configuration together: folders that Transformers saved, read into our model, give Transformers' logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.rank_pool import RankPool
from tests.unit.checkpoint.variants import MODELS, transformers_model

YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 16.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
# (model, what its configuration says besides); the rotary embedding is stretched well within the sequence.
FOLDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3": ("deepseek_v3", {}),
    "halves": ("full_rank_query_bias", {"rope_interleave": False}),
    "halves_low_rank": ("attention_bias", {"rope_interleave": False, "rms_norm_eps": 1e-3}),
    "tied": ("tied", {}),
    "no_experts": ("no_experts", {}),
    "all_experts": ("all_experts", {"routed_scaling_factor": 1.3}),
    "yarn": ("deepseek_v3", {"rope_parameters": YARN}),
    "yarn_mscale": ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 1.3}}),
    "yarn_mscale_alone": ("deepseek_v3", {"rope_parameters": YARN | {"mscale": 0.707}}),
    "yarn_all_dim_alone": ("deepseek_v3", {"rope_parameters": YARN | {"mscale_all_dim": 0.8, "beta_fast": 8}}),
    "yarn_factor": ("deepseek_v3", {"rope_parameters": YARN | {"mscale_all_dim": 0.8, "attention_factor": 0.9}}),
    "qwen2": ("qwen2_tied", {}),
    "qwen2_yarn": ("qwen2", {"rope_parameters": YARN | {"attention_factor": 0.8}}),
    "qwen3": ("qwen3", {"rope_parameters": YARN}),
    "qwen3_bias": ("qwen3_bias", {"rms_norm_eps": 1e-3}),
    "llama3": ("llama_bias", {"rope_parameters": LLAMA3}),
}


def test_logits_are_transformers(ranks: RankPool, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(67, (48,), generator=generator)
    expected = {}
    for name, (kind, options) in FOLDERS.items():
        model = transformers_model(MODELS[kind], max_position_embeddings=256, **options).eval()
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                mean = 1.0 if "norm" in key else 0.0
                size = 0.3 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
                tensor.copy_(mean + size * torch.randn(tensor.shape, generator=generator))
            expected[name] = model(tokens[None]).logits[0]
        model.save_pretrained(tmp_path / name)
    options = {"folder": str(tmp_path), "names": list(FOLDERS), "tokens": tokens}
    found = ranks.run("tests.distributed.naming_checks:logits_of_folders", 1, **options)[0]
    errors = {name: (found[name] - logits).abs().max().item() for name, logits in expected.items()}
    assert max(errors.values()) <= 1e-4, errors
    assert min(logits.std().item() for logits in expected.values()) > 0.3
