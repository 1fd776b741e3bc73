"""Parameter counts against published figures, and against modules built by Transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from r1_megatron.config.explain import rank_parameters
from r1_megatron.config.presets import PRESETS, count_parameters, layer_parameters, mtp_parameters
from r1_megatron.config.schema import ModelConfig, ParallelConfig, RunConfig
from r1_megatron.config.validate import validate_config
from r1_megatron.topology import Topology, place_layers
from tests.oracle import Oracle
from tests.tiny import VARIANTS


def preset(name: str, **changes) -> ModelConfig:
    return replace(ModelConfig(preset=name, **PRESETS[name]), **changes)


def test_deepseek_v3_has_its_published_size():
    total, active = count_parameters(preset("deepseek_v3_671b", mtp_num_layers=0))
    assert total == 671_026_404_352, "embedding and head included, selection bias (58 * 256) not"
    # README_WEIGHTS.md: 36.6 B active with the head; 11.5 B of the MTP module are its own.
    assert round(active / 1e9, 1) == 36.6
    assert mtp_parameters(preset("deepseek_v3_671b")).routed == 256 * 3 * 7168 * 2048
    with_mtp, same_active = count_parameters(preset("deepseek_v3_671b"))
    assert round((with_mtp - total) / 1e9, 1) == 11.6 and same_active == active


def test_moonlight_has_its_published_size():
    """arXiv 2502.16982, table 3: 15.29 B parameters, 2.24 B active, without embedding and head."""
    model = preset("moonlight_16b_a3b")
    total, active = count_parameters(model)
    vocabulary = model.vocab_size * model.hidden_size
    assert round((total - 2 * vocabulary) / 1e9, 2) == 15.29
    assert round((active - vocabulary) / 1e9, 2) == 2.24


def test_demo_and_tiny_are_small():
    assert 0.7e6 < count_parameters(preset("demo"))[1] < 0.9e6
    assert count_parameters(preset("tiny"))[0] < 0.5e6


@pytest.mark.parametrize("name", ["tiny", "demo"])
@pytest.mark.parametrize("q_lora_rank", [None, 48])
def test_counts_are_those_of_the_transformers_model(name: str, q_lora_rank: int | None):
    transformers = pytest.importorskip("transformers")
    m = preset(name, q_lora_rank=q_lora_rank)
    config = transformers.DeepseekV3Config(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        intermediate_size=m.ffn_hidden_size,
        moe_intermediate_size=m.moe_ffn_hidden_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_attention_heads,
        num_key_value_heads=m.num_attention_heads,
        n_shared_experts=m.moe_shared_expert_intermediate_size // m.moe_ffn_hidden_size,
        n_routed_experts=m.num_moe_experts,
        kv_lora_rank=m.kv_lora_rank,
        q_lora_rank=m.q_lora_rank,
        qk_rope_head_dim=m.qk_pos_emb_head_dim,
        v_head_dim=m.v_head_dim,
        qk_nope_head_dim=m.qk_head_dim,
        n_group=m.moe_router_num_groups,
        topk_group=m.moe_router_group_topk,
        num_experts_per_tok=m.moe_router_topk,
        first_k_dense_replace=m.first_k_dense_replace,
        tie_word_embeddings=False,
    )
    reference = transformers.DeepseekV3ForCausalLM(config)
    assert count_parameters(m)[0] == sum(parameter.numel() for parameter in reference.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("r1_distill_qwen_1_5b", 1_777_088_000),
        ("r1_distill_qwen_7b", 7_615_616_512),
        ("r1_distill_qwen_14b", 14_770_033_664),
        ("r1_distill_qwen_32b", 32_763_876_352),
        ("r1_distill_llama_8b", 8_030_261_248),
        ("r1_distill_llama_70b", 70_553_706_496),
    ],
)
def test_students_have_their_published_size(name: str, published: int):
    """Parameters of the weight files, as huggingface.co counts them. All work on a token but the embedding."""
    model = preset(name)
    assert count_parameters(model) == (published, published - model.vocab_size * model.hidden_size)


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_of_variants_are_those_of_the_transformers_model(name: str):
    oracle = Oracle(VARIANTS[name])
    assert count_parameters(VARIANTS[name])[0] == sum(parameter.numel() for parameter in oracle.parameters())


@pytest.mark.parametrize("name", ["biases", "qwen2", "qwen3", "llama"])
def test_ranks_hold_a_variant_together(name: str):
    """Two tensor-parallel ranks hold the model, its replicated parameters twice, and the padding of 259 to 260 rows."""
    model = VARIANTS[name]
    stage = place_layers(ParallelConfig(), 4)[0]
    one, two = (rank_parameters(model, Topology(tp=tp), stage) for tp in (1, 2))
    layers = [layer_parameters(model, dense=index < model.num_dense_layers) for index in range(4)]
    whole = model.hidden_size + sum(layer.replicated + layer.routed for layer in layers)
    matrices = 1 if model.share_embeddings_and_output_weights else 2
    assert one == count_parameters(model)[0]
    assert 2 * two == one + whole + matrices * model.hidden_size


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_no_problems(name: str):
    assert validate_config(RunConfig(model=preset(name))) == []


def test_ranks_hold_the_whole_model_together():
    """One shard of everything that is cut, summed over the ranks that cut it, is the model; the rest is replicated."""
    model = preset("demo", vocab_size=103, mtp_num_layers=0)
    total, _ = count_parameters(model)
    one = ParallelConfig()
    assert rank_parameters(model, Topology(), place_layers(one, 4)[0]) == total

    pipeline = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    stages = place_layers(pipeline, 4)
    topology = Topology.from_config(pipeline)
    assert sum(rank_parameters(model, topology, chunks) for chunks in stages) == total

    experts = Topology(ep=4, dp=4)
    routed = 3 * 8 * 3 * 128 * 80
    assert rank_parameters(model, experts, place_layers(one, 4)[0]) == total - routed + routed // 4

    # tp 2 pads the vocabulary of 103 to 104 rows.
    tensor = rank_parameters(model, Topology(tp=2), place_layers(one, 4)[0])
    replicated = 4 * (2 * 128 + 128 * 40 + 32 + 128 * 48 + 48) + 3 * 8 * 128 + 128
    assert tensor == replicated + routed + (total - 2 * 103 * 128 - replicated - routed) // 2 + 2 * 52 * 128


def test_shared_embedding_is_counted_once():
    model = preset("demo", share_embeddings_and_output_weights=True)
    apart = count_parameters(preset("demo"))[0]
    assert count_parameters(model)[0] == apart - 104 * 128
    assert rank_parameters(model, Topology(), place_layers(ParallelConfig(), 4)[0]) == apart - 104 * 128
