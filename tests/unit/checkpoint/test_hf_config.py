"""``config.json`` both ways, against Transformers' own configurations and models and the published files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from r1_megatron.checkpoint.hugging_face.config import hf_from_model, is_fp8, model_from_hf
from r1_megatron.checkpoint.matching import match_tensors
from r1_megatron.checkpoint.naming import entries, hugging_face_shapes
from r1_megatron.config.presets import PRESETS
from r1_megatron.config.schema import ModelConfig, RunConfig
from r1_megatron.config.validate import validate_config
from tests.unit.checkpoint.variants import DEEPSEEK, DENSE, MODELS, transformers_model

YARN = {
    "rope_type": "yarn",
    "rotary_base": 5e5,
    "original_max_position_embeddings": 256,
    "max_position_embeddings": 4096,
}
BORN = MODELS | {
    "no_shared_expert": replace(DEEPSEEK, moe_shared_expert_intermediate_size=0),
    "ungrouped": replace(DEEPSEEK, moe_router_num_groups=None, moe_router_group_topk=None),
    "mtp": replace(DEEPSEEK, mtp_num_layers=1),
    "dense_mtp": replace(DEEPSEEK, mtp_num_layers=1, first_k_dense_replace=3),
    "yarn": replace(DEEPSEEK, **YARN, rotary_scaling_factor=16.0, beta_fast=20.0, beta_slow=2.0),
    "yarn_without_mscale": replace(DEEPSEEK, **YARN, mscale=0.0, mscale_all_dim=0.0),
    "yarn_mscale_707": replace(DEEPSEEK, **YARN, mscale=0.707, mscale_all_dim=0.5),
    "yarn_qwen2": replace(DENSE, architecture="qwen2", **YARN, mscale=0.0, mscale_all_dim=0.0),
    "llama3": replace(DENSE, architecture="llama", **YARN | {"rope_type": "llama3"}, rotary_scaling_factor=8.0),
}
# Of a model without experts, and of another architecture: not written, so not read.
UNUSED_WITHOUT_EXPERTS = ("moe_router_num_groups", "moe_router_group_topk")
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
EXPERTS = ("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk")


def comparable(model: ModelConfig) -> ModelConfig:
    """The model with everything at its default that its function does not depend on."""
    unused: list[str] = ["preset", "moe_router_bias_update_rate", "moe_aux_loss_coeff", "mtp_loss_scaling_factor"]
    if model.num_moe_layers == 0:
        unused += [*EXPERTS, *UNUSED_WITHOUT_EXPERTS, "moe_router_topk_scaling_factor"]
    if model.is_dense_student:
        unused += [*LATENT, "first_k_dense_replace"]
        model = replace(model, num_query_groups=model.query_groups, head_dim=model.channels_per_head)
    scaled = {"rope": (), "llama3": ("rotary_scaling_factor", "original_max_position_embeddings")}
    scaled["yarn"] = (*scaled["llama3"], "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    unused += [name for name in scaled["yarn"] if name not in scaled[model.rope_type]]
    default = ModelConfig()
    return replace(model, **{name: getattr(default, name) for name in unused})


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", BORN)
def test_transformers_builds_the_model_from_our_file(name: str, tmp_path: Path) -> None:
    model = BORN[name]
    config = hf_from_model(model, eos_token_id=3)
    loaded = AutoConfig.from_pretrained(written(tmp_path, config))
    assert (loaded.eos_token_id, loaded.bos_token_id) == (3, None)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(loaded).state_dict()
    # Transformers does not build the multi-token-prediction layer.
    main = replace(model, mtp_num_layers=0)
    assert match_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, main).problems == ()
    assert comparable(model_from_hf(config)) == comparable(model)


@pytest.mark.parametrize("name", BORN)
def test_what_transformers_saves_is_the_same_model(name: str, tmp_path: Path) -> None:
    """Its own spelling: ``rope_parameters``, all fields written out."""
    model = BORN[name]
    AutoConfig.from_pretrained(written(tmp_path, hf_from_model(model))).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved and "rope_scaling" not in saved
    assert comparable(model_from_hf(saved)) == comparable(model)


DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
QWEN_15B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 131072,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def test_released_deepseek_v3() -> None:
    model = model_from_hf(DEEPSEEK_V3)
    expected = ModelConfig(**PRESETS["deepseek_v3_671b"])
    assert is_fp8(DEEPSEEK_V3)
    assert comparable(replace(model, init_method_std=expected.init_method_std)) == comparable(expected)


def test_released_moonlight() -> None:
    """One group of experts, two shared ones, full-rank queries, no scaling, no multi-token prediction."""
    expected = ModelConfig(**PRESETS["moonlight_16b_a3b"])
    config = DEEPSEEK_V3 | {
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 163840,
        "max_position_embeddings": 8192,
        "q_lora_rank": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "num_nextn_predict_layers": 0,
    }
    del config["quantization_config"]
    assert comparable(model_from_hf(config)) == comparable(expected)


@pytest.mark.parametrize("config", [DEEPSEEK_V3, QWEN_15B, LLAMA_8B], ids=lambda config: config["model_type"])
def test_released_models_can_be_trained(config: dict[str, Any]) -> None:
    """The section that comes out is one that a run accepts."""
    cfg = RunConfig(model=model_from_hf(config))
    assert [problem for problem in validate_config(cfg, check_files=False) if problem.startswith("model.")] == []


def test_released_students() -> None:
    """DeepSeek-R1-Distill-Qwen-1.5B and -Llama-8B, by their parameter counts: 1.777 and 8.030 billion."""
    counts = []
    for config in (QWEN_15B, LLAMA_8B):
        counts.append(sum(math.prod(shape) for shape in hugging_face_shapes(entries(model_from_hf(config))).values()))
    assert counts == [1_777_088_000, 8_030_261_248]
    assert (model_from_hf(LLAMA_8B).rope_type, model_from_hf(LLAMA_8B).rotary_scaling_factor) == ("llama3", 8.0)
    assert not is_fp8(QWEN_15B)


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"mscale": 1.0, "mscale_all_dim": 1.0},
        {"mscale": 0.707, "mscale_all_dim": 0.707},
        {"mscale": 0.707, "mscale_all_dim": 1.0},
        {"mscale": 0.707},
        {"mscale": 1.0, "mscale_all_dim": 0},
        {"mscale_all_dim": 0.8},
        {"mscale_all_dim": 0.8, "attention_factor": 0.9},
        {"mscale": 3.0, "mscale_all_dim": 0.8, "attention_factor": 1.1},
        {"attention_factor": 0.1 * math.log(16.0) + 1.0},
        {"factor": None},
    ],
)
def test_yarn_magnitudes_are_transformers(scaling: dict[str, Any], spelling: str) -> None:
    """How much cosine, sine and softmax are scaled: by Transformers, and by our fields' definition."""
    scaling = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256} | scaling
    rope = {"rope_theta": 5e5, "rope_scaling": scaling}
    if spelling == "new":
        rope = {"rope_parameters": scaling | {"rope_theta": 5e5}}
    with torch.device("meta"):
        theirs = transformers_model(DEEPSEEK, max_position_embeddings=4096, **json.loads(json.dumps(rope))).model
    ours = model_from_hf(hf_from_model(DEEPSEEK) | {"max_position_embeddings": 4096, "rope_scaling": None} | rope)

    def g(mscale: float) -> float:
        return 0.1 * mscale * math.log(ours.rotary_scaling_factor) + 1.0

    concentration = g(ours.mscale) / g(ours.mscale_all_dim) if ours.mscale and ours.mscale_all_dim else g(1.0)
    softmax = g(ours.mscale_all_dim) ** 2 / math.sqrt(ours.qk_head_dim + ours.qk_pos_emb_head_dim)
    assert ours.rotary_scaling_factor == 16.0
    assert concentration == pytest.approx(theirs.rotary_emb.attention_scaling, rel=1e-12)
    assert softmax == pytest.approx(theirs.layers[0].self_attn.scaling, rel=1e-12)
    assert (ours.rotary_base, ours.beta_fast, ours.beta_slow) == (5e5, 32.0, 1.0)


def test_attention_factor_of_a_dense_model() -> None:
    """Dense models only scale cosine and sine: g(mscale) / g(mscale_all_dim) gives any positive factor."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.0}
    model = model_from_hf(QWEN_15B | {"rope_scaling": rope})
    assert (model.mscale, model.mscale_all_dim) == (pytest.approx(1.0), 1.0)


def test_the_weights_tell_of_multi_token_prediction() -> None:
    """Transformers drops the layer when it saves, and leaves the field; casts lower the field and leave the layer."""
    with_layer = hugging_face_shapes(entries(replace(DEEPSEEK, mtp_num_layers=1)))
    without = hugging_face_shapes(entries(DEEPSEEK))
    config = hf_from_model(DEEPSEEK)
    for field in ("num_nextn_predict_layers", "num_mtp_layers"):
        for announced in (0, 1):
            told = {name: value for name, value in config.items() if name != "num_nextn_predict_layers"}
            told[field] = announced
            assert model_from_hf(told, with_layer).mtp_num_layers == 1
            assert model_from_hf(told, without).mtp_num_layers == 0
            assert model_from_hf(told).mtp_num_layers == announced
    damaged = [n for n in with_layer if not n.endswith(("enorm.weight", "hnorm.weight", "eh_proj.weight"))]
    assert model_from_hf(config | {"num_nextn_predict_layers": 1}, damaged).mtp_num_layers == 1


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("deepseek_v3", {"model_type": "deepseek_v2"}, "model_type='deepseek_v2'"),
        ("deepseek_v3", {"model_type": "kimi_k2"}, "Supported: deepseek_v3, qwen2, qwen3, llama"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax': not supported"),
        ("deepseek_v3", {"topk_method": "group_limited_greedy"}, "Supported: 'noaux_tc'"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob=False"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v3", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("deepseek_v3", {"topk_group": 5}, "more than n_group=4"),
        ("deepseek_v3", {"num_key_value_heads": 1}, "num_attention_heads=4"),
        ("deepseek_v3", {"hidden_size": "24"}, "hidden_size='24': expected a whole number"),
        ("deepseek_v3", {"hidden_size": 0}, "hidden_size=0: expected a whole number, at least 1"),
        ("deepseek_v3", {"rms_norm_eps": True}, "rms_norm_eps=True: expected a number"),
        ("deepseek_v3", {"tie_word_embeddings": "no"}, "tie_word_embeddings='no': expected true or false"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ("deepseek_v3", {"rope_scaling": 3}, "rope_scaling=3: expected an object"),
        ("deepseek_v3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "Supported: default, yarn."),
        ("deepseek_v3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}}, "truncate=False"),
        (
            "deepseek_v3",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}},
            "rope_scaling.attention_factor=1.0: cannot be expressed",
        ),
        ("deepseek_v3", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters.full_attention"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method='awq'"),
        (
            "deepseek_v3",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "Supported: [128, 128]",
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}, "max_window_layers=1"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ("qwen2", {"num_key_value_heads": 4}, "does not divide num_attention_heads=6"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0}},
            "rope_scaling.low_freq_factor=2.0: not supported. Supported: 1",
        ),
    ],
)
def test_refused(name: str, change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError) as error:
        model_from_hf(hf_from_model(MODELS[name]) | change)
    assert told in str(error.value)


def test_all_problems_at_once() -> None:
    config = hf_from_model(DEEPSEEK) | {"scoring_func": "softmax", "hidden_act": "relu"}
    del config["q_lora_rank"], config["vocab_size"]
    with pytest.raises(ValueError) as error:
        model_from_hf(config)
    for field in ("scoring_func", "hidden_act", "q_lora_rank is missing", "vocab_size is missing"):
        assert field in str(error.value)


def test_the_class_tells_the_type() -> None:
    config = hf_from_model(DEEPSEEK)
    del config["model_type"]
    assert model_from_hf(config).architecture == "deepseek_v3"


def test_a_sliding_window_that_no_layer_uses() -> None:
    config = hf_from_model(MODELS["qwen2"]) | {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}
    assert model_from_hf(config).architecture == "qwen2"


def test_a_shared_expert_of_another_width_has_no_config() -> None:
    with pytest.raises(ValueError, match="moe_shared_expert_intermediate_size=24 is no multiple"):
        hf_from_model(replace(DEEPSEEK, moe_shared_expert_intermediate_size=24))
