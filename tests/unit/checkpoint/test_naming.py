"""The naming table against Transformers' own models, DeepSeek-V3's published sizes, and the rotation itself."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from r1_megatron.checkpoint.hugging_face.weights import assemble
from r1_megatron.checkpoint.matching import match_tensors, scale_shape
from r1_megatron.checkpoint.naming import (
    aliases,
    entries,
    entries_by_name,
    fused_expert_name,
    halves_to_pairs,
    hugging_face_shapes,
    ignored,
    pairs_to_halves,
)
from r1_megatron.config.presets import PRESETS, count_parameters
from r1_megatron.config.schema import ModelConfig
from tests.unit.checkpoint.variants import DEEPSEEK, DENSE, MODELS, transformers_model


@pytest.mark.parametrize("name", MODELS)
def test_names_and_shapes_are_transformers(name: str) -> None:
    """Nothing unknown, missing or mis-shaped; in memory Transformers fuses the experts."""
    model = MODELS[name]
    with torch.device("meta"):
        state = transformers_model(model).state_dict()
    match = match_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, model)
    assert match.problems == ()
    layers = model.num_moe_layers
    assert len(match.fused) == 2 * layers
    assert set(match.aliases) == ({"lm_head.weight"} if model.share_embeddings_and_output_weights else set())


def test_a_shared_expert_of_width_zero_is_none() -> None:
    """Transformers always has one; its tensors are empty then, and left alone."""
    model = replace(DEEPSEEK, moe_shared_expert_intermediate_size=0)
    with torch.device("meta"):
        state = transformers_model(model).state_dict()
    match = match_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, model)
    assert match.problems == ()
    assert match.ignored == {name for name, tensor in state.items() if ".shared_experts." in name}
    assert len(match.ignored) == 6


def test_saved_names_are_per_expert(tmp_path) -> None:
    torch.manual_seed(0)
    transformers_model(DEEPSEEK).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == hugging_face_shapes(entries(DEEPSEEK))


@pytest.mark.parametrize("rope_interleave", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_row_is_used_exactly_once(name: str, rope_interleave: bool) -> None:
    table = entries(MODELS[name], rope_interleave)
    used: Counter[tuple[str, int]] = Counter()
    for entry in table:
        assert sum(rows.stop - rows.start for rows in entry.rows) == entry.shape[0], entry.name
        for rows in entry.rows:
            used.update((rows.name, row) for row in range(rows.start, rows.stop))
    assert set(used.values()) == {1}
    assert set(used) == {(name, row) for name, shape in hugging_face_shapes(table).items() for row in range(shape[0])}


@pytest.mark.parametrize("name", MODELS)
def test_names_and_keys_are_unique(name: str) -> None:
    table = entries(MODELS[name])
    assert len({entry.name for entry in table}) == len({(entry.key, entry.expert) for entry in table}) == len(table)


def test_released_deepseek_v3() -> None:
    """671,026,404,352 parameters, and 91,991 tensors whose bytes and 163 file headers are the released 688.6 GB.

    The files hold 688,586,727,753 bytes: data, and headers of 129 bytes a tensor. With ``eh_proj`` in FP8, say, they
    would be 1,250 bytes a tensor.
    """
    model = ModelConfig(**PRESETS["deepseek_v3_671b"])
    table = entries(model)
    main = [entry for entry in table if not entry.name.startswith("mtp.")]
    biases = 58 * 256
    assert sum(math.prod(entry.shape) for entry in main) == 671_026_404_352 + biases
    assert sum(math.prod(entry.shape) for entry in table) == count_parameters(model)[0] + 59 * 256

    shapes = hugging_face_shapes(table)
    shapes.update((name, shapes[same]) for name, same in aliases(model).items())
    num_tensors, size = 0, 0
    for name, shape in shapes.items():
        if name.endswith("e_score_correction_bias"):
            size += 4 * math.prod(shape)
        elif any(part in name for part in ("norm", "embed_tokens", "head", "mlp.gate.weight", "eh_proj")):
            size += 2 * math.prod(shape)
        else:
            size += math.prod(shape) + 4 * math.prod(scale_shape(shape))
            num_tensors += 1
        num_tensors += 1
    assert num_tensors == 91_991
    assert 125 < (688_586_727_753 - size) / num_tensors < 135


def test_fc1_is_gate_then_up_and_experts_are_stacked() -> None:
    entry = entries_by_name(DEEPSEEK)["decoder.layers.2.mlp.experts.local_experts.5.linear_fc1.weight"]
    assert entry.key == "decoder.layers.2.mlp.experts.experts.linear_fc1.weight"
    assert (entry.expert, entry.shape) == (5, (32, 24))
    prefix = "model.layers.2.mlp.experts.5"
    assert [tuple(rows) for rows in entry.rows] == [
        (f"{prefix}.gate_proj.weight", 0, 16, False),
        (f"{prefix}.up_proj.weight", 0, 16, False),
    ]
    assert fused_expert_name(f"{prefix}.up_proj.weight") == ("model.layers.2.mlp.experts.gate_up_proj", 5, "up")
    assert fused_expert_name(f"{prefix}.down_proj.weight") == ("model.layers.2.mlp.experts.down_proj", 5, "down")
    assert fused_expert_name("model.layers.2.mlp.shared_experts.up_proj.weight") is None


def test_selection_biases_keep_float32() -> None:
    table = entries(DEEPSEEK)
    assert {entry.name for entry in table if entry.dtype is not None} == {
        f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (1, 2)
    }
    assert all(entry.dtype in (None, "F32") for entry in table)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_query_key_value_by_group(kind: str) -> None:
    """megatron-core reads the rows as [groups, (heads of a group + 2) * width] and splits each group's."""
    model = MODELS["qwen3_bias"]
    width = (model.hidden_size,) if kind == "weight" else ()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.1.self_attn.{part}_proj.{kind}": torch.randn(heads * 4, *width, generator=generator)
        for part, heads in (("q", 6), ("k", 2), ("v", 2))
    }
    qkv = assemble(entries_by_name(model)[f"decoder.layers.1.self_attention.linear_qkv.{kind}"], tensors)
    parts = qkv.view(2, 5 * 4, *width).split([3 * 4, 4, 4], dim=1)
    for found, expected in zip(parts, tensors.values()):
        assert torch.equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("name", ["deepseek_v3", "full_rank_query", "attention_bias"])
def test_halves_and_pairs_are_one_function(name: str) -> None:
    """Transformers with ``rope_interleave`` false and true: the table turns the first one's weights into the other's.

    Float64, but Transformers' rotary angles are float32: a permutation leaves them the same, so only the order of the
    sums differs.
    """
    model = MODELS[name]
    torch.manual_seed(3)
    halves, pairs = (transformers_model(model, rope_interleave=value).double().eval() for value in (False, True))
    for parameter in halves.parameters():  # also biases and norms, which start as zeros and ones
        torch.nn.init.normal_(parameter, std=0.3)
    source = halves.state_dict()
    there, here = entries_by_name(model, rope_interleave=False), entries_by_name(model, rope_interleave=True)
    target = dict(source)
    for megatron, entry in here.items():
        # With pairs, attention tensors have one piece: the whole Hugging Face tensor is megatron-core's.
        if ".self_attention." in megatron:
            target[entry.rows[0].name] = assemble(there[megatron], source)
    changed = {name for name in source if not torch.equal(source[name], target[name])}
    parts = {name.split("self_attn.")[1].rpartition(".")[0] for name in changed}
    assert parts == {"kv_a_proj_with_mqa", "q_proj" if model.q_lora_rank is None else "q_b_proj"}
    tokens = torch.randint(model.vocab_size, (1, 40))
    pairs.load_state_dict(source)
    with torch.no_grad():
        expected, unturned = halves(tokens).logits, pairs(tokens).logits
        pairs.load_state_dict(target)
        found = pairs(tokens).logits
    assert (found - expected).abs().max() <= 1e-10
    assert (unturned - expected).abs().max() > 0.01


def test_halves_and_pairs_are_inverse() -> None:
    rows = torch.arange(8)
    assert halves_to_pairs(rows).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    matrix = torch.randn(8, 3)
    assert torch.equal(pairs_to_halves(halves_to_pairs(matrix)), matrix)


def test_aliases() -> None:
    layer = "model.layers.3."
    two = replace(DEEPSEEK, mtp_num_layers=2)
    assert aliases(DEEPSEEK) == {}
    assert aliases(two)[layer + "embed_tokens.weight"] == "model.embed_tokens.weight"
    assert aliases(two)[layer + "shared_head.head.weight"] == "lm_head.weight"
    assert len(aliases(two)) == 4
    tied = replace(DEEPSEEK, mtp_num_layers=1, share_embeddings_and_output_weights=True)
    assert set(aliases(tied).values()) == {"model.embed_tokens.weight"}
    assert set(aliases(tied)) == {"lm_head.weight", layer + "embed_tokens.weight", layer + "shared_head.head.weight"}
    assert aliases(replace(DENSE, architecture="qwen2", mtp_num_layers=1)) == {}


# --- matching ------------------------------------------------------------------------------------------------------


def source_shapes(model: ModelConfig = DEEPSEEK) -> dict[str, tuple[int, ...]]:
    return hugging_face_shapes(entries(model))


def fused(shapes: dict[str, tuple[int, ...]], layer: int) -> dict[str, tuple[int, ...]]:
    prefix = f"model.layers.{layer}.mlp.experts."
    rest = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
    return rest | {prefix + "gate_up_proj": (8, 32, 24), prefix + "down_proj": (8, 24, 16)}


def test_each_layer_may_fuse_its_experts_or_not() -> None:
    match = match_tensors(fused(source_shapes(), 2), DEEPSEEK)
    assert match.problems == ()
    assert match.fused == {f"model.layers.2.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")}
    match.check("here")


def test_all_problems_are_told_at_once() -> None:
    shapes = source_shapes()
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (8,)
    del shapes["model.norm.weight"]
    shapes["lm_head.weight"] = (68, 24)
    shapes["model.layers.1.mlp.experts.gate_up_proj"] = (8, 24, 32)
    shapes["model.layers.9.input_layernorm.weight"] = (24,)
    match = match_tensors(shapes, DEEPSEEK)
    assert ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert match.ignored == {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    with pytest.raises(ValueError) as error:
        match.check("SRC")
    text = str(error.value)
    assert text.startswith("SRC: 20 tensors do not fit")
    assert "model.norm.weight: missing, expected shape [24]" in text
    assert "lm_head.weight: shape [68, 24], expected [67, 24]" in text
    assert "model.layers.1.mlp.experts.gate_up_proj: shape [8, 24, 32], expected [8, 32, 24]" in text
    assert "model.layers.1.mlp.experts.7.up_proj.weight: there, and in model.layers.1.mlp.experts.gate_up_proj" in text
    assert "model.layers.9.input_layernorm.weight: not a tensor of this model, shape [24]" in text


def test_very_many_problems_are_counted() -> None:
    with pytest.raises(ValueError, match=r"and \d+ more"):
        match_tensors({}, DEEPSEEK).check("SRC")


def test_aliases_may_be_there_or_not() -> None:
    model = replace(DEEPSEEK, mtp_num_layers=1)
    shapes = source_shapes(model)
    assert match_tensors(shapes, model).problems == ()
    shapes["model.layers.3.shared_head.head.weight"] = (67, 24)
    assert match_tensors(shapes, model).aliases == {"model.layers.3.shared_head.head.weight": "lm_head.weight"}
    shapes["model.layers.3.embed_tokens.weight"] = (66, 24)
    assert match_tensors(shapes, model).problems == (
        "model.layers.3.embed_tokens.weight: shape [66, 24], expected [67, 24]",
    )


def test_block_scales() -> None:
    model = replace(DEEPSEEK, hidden_size=136)
    shapes = source_shapes(model)
    name = "model.layers.0.mlp.gate_proj.weight"
    good = shapes | {name + "_scale_inv": (1, 2)}
    assert match_tensors(good, model, float8={name}).scales == {name + "_scale_inv"}
    assert match_tensors(good, model).problems == ()
    wrong = match_tensors(shapes | {name + "_scale_inv": (2, 1)}, model).problems
    assert wrong == (f"{name}_scale_inv: shape [2, 1], expected [1, 2]: one for every 128 x 128 block of [40, 136]",)
    assert "is no float8_e4m3fn tensor" in match_tensors(good, model, float8=()).problems[0]
    assert f"{name}_scale_inv is missing" in match_tensors(shapes, model, float8={name}).problems[0]
    stacked = fused(source_shapes(), 1) | {"model.layers.1.mlp.experts.down_proj_scale_inv": (8, 1, 1)}
    assert "only matrices" in match_tensors(stacked, DEEPSEEK).problems[0]
