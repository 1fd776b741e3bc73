"""Conversions from folder to folder: bytes in, the same bytes out, and everything that must be refused.

Checkpoints are written by ``tools/make_checkpoint.py`` and read with the safetensors library, so the converter's own
files code is not what judges it.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1_megatron.checkpoint.convert import (
    ExportOptions,
    ImportOptions,
    Resources,
    from_hugging_face,
    to_hugging_face,
    verify,
)
from r1_megatron.checkpoint.convert.manifest import MANIFEST, read_description
from r1_megatron.checkpoint.integrity import file_problems
from r1_megatron.cli import main
from tests.rank_pool import RankPool
from tests.unit.checkpoint.variants import FP8_MODEL, MODELS
from tools.make_checkpoint import make_checkpoint

# Slices of a few hundred elements, so that small tensors have many of them.
QUIET = Resources(workers=2, quiet=True)


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models should go through the same mechanisms: several units, several slices a tensor."""
    monkeypatch.setattr("r1_megatron.checkpoint.convert.work._MAX_ELEMENTS", 2000)
    monkeypatch.setattr("r1_megatron.checkpoint.convert.work._BLOCK_BYTES", 1000)
    monkeypatch.setattr("r1_megatron.checkpoint.convert.importing.PART_BYTES", 40_000)
    monkeypatch.setattr("r1_megatron.checkpoint.convert.exporting.UNIT_BYTES", 30_000)


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file but the manifest."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, by the safetensors library."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Dtype, shape and every bit."""
    alike = left.dtype == right.dtype and left.shape == right.shape
    return alike and torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"dtype": "bf16", "max_shard_size": 20_000},
    "full_rank_query": {"dtype": "fp32"},
    "attention_bias": {"dtype": "fp16", "config": {"rope_interleave": False}, "max_shard_size": 9_000},
    "full_rank_query_bias": {"dtype": "fp32", "config": {"rope_interleave": False}},
    "tied": {"dtype": "bf16", "repeats": True},
    "no_experts": {"dtype": "bf16"},
    "all_experts": {"dtype": "bf16", "fused": True, "max_shard_size": 20_000},
    "qwen2": {"dtype": "bf16"},
    "qwen3_bias": {"dtype": "fp32"},
    "llama_bias": {"dtype": "fp16"},
}


@pytest.mark.parametrize("name", [*VARIANTS, "fp8", "mtp_without_repeats"])
def test_an_unchanged_model_comes_back_as_the_same_files(name: str, tmp_path: Path) -> None:
    if name in VARIANTS:
        source = make_checkpoint(tmp_path / "source", MODELS[name], **VARIANTS[name])
    else:
        options = {"dtype": "fp8", "max_shard_size": 100_000} if name == "fp8" else {"repeats": False}
        source = make_checkpoint(tmp_path / "source", FP8_MODEL, **options)
    done = from_hugging_face(source, tmp_path / "checkpoint", ImportOptions(verify=True), QUIET)
    back = to_hugging_face(done.folder, tmp_path / "back", ExportOptions(verify=True), QUIET)
    assert files_of(back.folder) == files_of(source)
    assert not list(tmp_path.glob("*.partial"))


def test_targets_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_checkpoint(tmp_path / "source", FP8_MODEL, "fp8", max_shard_size=100_000)
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "from-hf", "source", "new/checkpoint", "--quiet"]) == 0
    assert main(["convert", "to-hf", "new/checkpoint", "new/back", "--quiet", "--verify"]) == 0
    assert files_of(tmp_path / "new" / "back") == files_of(source)


def test_bytes_that_stay_need_no_torch(tmp_path: Path) -> None:
    """Both ways and the check, in a process that cannot import it; also where rotary rows change their places."""
    source = tmp_path / "source"
    make_checkpoint(source, MODELS["attention_bias"], "bf16", 200_000, config={"rope_interleave": False})
    program = (
        "import sys; sys.modules['torch'] = None; from r1_megatron.cli import main; "
        "sys.exit(any(main(['convert', *line.split(), '--quiet']) for line in sys.argv[1:]))"
    )
    commands = [f"from-hf {source} {tmp_path}/there", f"to-hf {tmp_path}/there {tmp_path}/back"]
    commands += [f"verify {tmp_path}/{folder}" for folder in ("there", "back")]
    subprocess.run([sys.executable, "-c", program, *commands], check=True, timeout=120)
    names = [path.name for path in source.iterdir()]
    assert filecmp.cmpfiles(source, tmp_path / "back", names, shallow=False)[0] == names


def test_the_manifest_tells_every_tensor(tmp_path: Path) -> None:
    """Both manifests against hashes of the tensors as the safetensors library reads them."""
    source = make_checkpoint(tmp_path / "source", FP8_MODEL, "fp8", max_shard_size=100_000)
    from_hugging_face(source, tmp_path / "checkpoint", ImportOptions(fp8="dequantize", dtype="fp32"), QUIET)
    to_hugging_face(
        tmp_path / "checkpoint",
        tmp_path / "back",
        ExportOptions(experts="fused", dtype="bf16", fp8="dequantize"),
        QUIET,
    )
    there, back = tensors_of(source), tensors_of(tmp_path / "back")
    for folder, tensors in ((tmp_path / "checkpoint", there), (tmp_path / "back", back)):
        head, *lines = (json.loads(line) for line in (folder / MANIFEST).read_text().splitlines())
        assert head["source"] == str(source if tensors is there else tmp_path / "checkpoint")
        named = {line["name"]: line for line in lines if "name" in line}
        repeats = {name for name in tensors if "layers.2.embed" in name or "shared_head.head" in name}
        assert set(named) == set(tensors) - (repeats if tensors is there else set())
        for name, line in named.items():
            digest = hashlib.sha256(tensors[name].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            assert digest == (line["source"] if tensors is there else line)["sha256"], name
            assert line["shape"] == list(tensors[name].shape)
    index = json.loads((tmp_path / "checkpoint" / "checkpoint.json").read_text())
    assert index["weights"] == {"dtype": "float32", "fp8": "dequantized"}
    assert set(index["files"]) == set(files_of(tmp_path / "checkpoint")) - {"checkpoint.json"} | {MANIFEST}


def released_cast(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """bf16 of an FP8 checkpoint, a block at a time, in fp32."""
    cast = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        cast[name] = tensor
        if tensor.dtype == torch.float8_e4m3fn:
            values, scales = tensor.float(), tensors[name + "_scale_inv"]
            for i in range(0, len(values), 128):
                for j in range(0, values.shape[1], 128):
                    values[i : i + 128, j : j + 128] *= scales[i // 128, j // 128]
            cast[name] = values.bfloat16()
    return cast


def test_fp8_to_bf16_is_the_released_cast_and_goes_back(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", FP8_MODEL, "fp8")
    expected = released_cast(tensors_of(source))
    for fp8 in ("keep", "dequantize"):
        checkpoint = tmp_path / fp8
        from_hugging_face(source, checkpoint, ImportOptions(fp8=fp8, verify=True), QUIET)
        to_hugging_face(checkpoint, tmp_path / f"{fp8}_bf16", ExportOptions(fp8="dequantize"), QUIET)
        found = tensors_of(tmp_path / f"{fp8}_bf16")
        assert set(found) == set(expected)
        assert all(same_bytes(found[name], expected[name]) for name in expected)
        assert "quantization_config" not in json.loads((tmp_path / f"{fp8}_bf16" / "config.json").read_text())
        to_hugging_face(checkpoint, tmp_path / f"{fp8}_fp8", ExportOptions(), QUIET)
        assert files_of(tmp_path / f"{fp8}_fp8") == files_of(source)


def test_only_changed_blocks_get_new_scales(tmp_path: Path) -> None:
    """One value of a bf16 copy is changed before it goes through, with the scales of the FP8 source at hand."""
    source = make_checkpoint(tmp_path / "source", FP8_MODEL, "fp8")
    checkpoint = tmp_path / "checkpoint"
    from_hugging_face(source, checkpoint, ImportOptions(fp8="dequantize"), QUIET)
    name = "model.layers.1.mlp.experts.3.gate_proj.weight"
    key, row, column = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight", 129, 130
    change_element(checkpoint, key, (3, row, column), 0.5)
    to_hugging_face(checkpoint, tmp_path / "back", ExportOptions(), QUIET)
    before, after = tensors_of(source), tensors_of(tmp_path / "back")
    assert {n for n in before if not same_bytes(before[n], after[n])} == {name, name + "_scale_inv"}
    assert (before[name + "_scale_inv"] != after[name + "_scale_inv"]).nonzero().tolist() == [[1, 1]]
    values, expected = released_cast(after)[name], released_cast(before)[name]
    expected[row, column] = 0.5
    new = after[name + "_scale_inv"][1, 1]
    assert new == expected[128:, 128:].float().abs().max() / 448
    assert same_bytes(values[:128], expected[:128]) and same_bytes(values[:, :128], expected[:, :128])
    error = (values.float() - expected.float()).abs()
    assert (error <= expected.float().abs() / 15 + new * 2**-9).all()


def change_element(checkpoint: Path, key: str, index: tuple[int, ...], value: float) -> None:
    """Rewrite one bf16 element of a checkpoint, as torch itself reads and writes it."""
    from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save

    metadata = FileSystemReader(checkpoint).read_metadata()
    state = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in metadata.state_dict_metadata.items()
    }
    load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    state[key][index] = value
    description = json.loads((checkpoint / "checkpoint.json").read_text())
    for path in checkpoint.glob("*.distcp"):
        path.unlink()
    (checkpoint / ".metadata").unlink()
    (checkpoint / MANIFEST).unlink()
    save(state, storage_writer=FileSystemWriter(checkpoint), no_dist=True)
    (checkpoint / "checkpoint.json").write_text(json.dumps({**description, "files": {}}))


def test_other_dtypes_and_layouts_of_experts(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", FP8_MODEL, "fp32", max_shard_size=10**9)
    from_hugging_face(source, tmp_path / "checkpoint", ImportOptions(dtype="bf16", verify=True), QUIET)
    to_hugging_face(
        tmp_path / "checkpoint", tmp_path / "plain", ExportOptions(dtype="bf16", max_shard_size=200_000), QUIET
    )
    to_hugging_face(tmp_path / "checkpoint", tmp_path / "fused", ExportOptions(dtype="bf16", experts="fused"), QUIET)
    there, plain, fused = tensors_of(source), tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "fused")
    bias = "mlp.gate.e_score_correction_bias"
    for name, tensor in there.items():
        assert same_bytes(plain[name], tensor if name.endswith(bias) else tensor.bfloat16()), name
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    shards = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(shards.values())) > 3 and set(shards) == set(plain)
    assert all((tmp_path / "plain" / shard).stat().st_size < 210_000 for shard in set(shards.values()))
    experts = "model.layers.1.mlp.experts."
    for number in range(4):
        gate_up = fused[experts + "gate_up_proj"][number]
        assert torch.equal(gate_up[:130], plain[f"{experts}{number}.gate_proj.weight"])
        assert torch.equal(gate_up[130:], plain[f"{experts}{number}.up_proj.weight"])
        assert torch.equal(fused[experts + "down_proj"][number], plain[f"{experts}{number}.down_proj.weight"])
    assert not any(name.startswith(f"{experts}0.") for name in fused)

    from_hugging_face(tmp_path / "fused", tmp_path / "again", ImportOptions(verify=True), QUIET)
    to_hugging_face(tmp_path / "again", tmp_path / "unfused", ExportOptions(experts="per-expert"), QUIET)
    unfused = tensors_of(tmp_path / "unfused")
    assert set(unfused) == set(plain) and all(same_bytes(unfused[name], plain[name]) for name in plain)


def test_kept_fp8_can_only_be_fused_without_its_blocks(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", FP8_MODEL, "fp8")
    from_hugging_face(source, tmp_path / "checkpoint", ImportOptions(), QUIET)
    for fp8 in ("source", "quantize"):
        with pytest.raises(ValueError, match="--experts fused: fused experts have no block scales"):
            to_hugging_face(tmp_path / "checkpoint", tmp_path / "out", ExportOptions(experts="fused", fp8=fp8), QUIET)
    to_hugging_face(
        tmp_path / "checkpoint", tmp_path / "fused", ExportOptions(experts="fused", fp8="dequantize"), QUIET
    )
    expected, found = released_cast(tensors_of(source)), tensors_of(tmp_path / "fused")
    for number in range(4):
        name = f"model.layers.1.mlp.experts.{number}.down_proj.weight"
        assert same_bytes(found["model.layers.1.mlp.experts.down_proj"][number], expected[name])


def test_quantizing_a_model_that_never_was_fp8(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", FP8_MODEL, "bf16")
    from_hugging_face(source, tmp_path / "checkpoint", ImportOptions(), QUIET)
    to_hugging_face(tmp_path / "checkpoint", tmp_path / "fp8", ExportOptions(fp8="quantize", verify=True), QUIET)
    found, values = tensors_of(tmp_path / "fp8"), tensors_of(source)
    quantized = {name for name in found if found[name].dtype == torch.float8_e4m3fn}
    # Three layers' attention, a dense MLP, and four experts with a shared one in the other two layers.
    assert len(quantized) == 3 * 5 + 3 + 2 * (4 + 1) * 3
    assert all(name.endswith(("_proj.weight", "_proj_with_mqa.weight")) for name in quantized)
    cast = released_cast(found)
    for name, tensor in values.items():
        if name not in quantized:
            assert same_bytes(found[name], tensor), name
            continue
        largest = tensor.float().abs().max()
        assert ((cast[name].float() - tensor.float()).abs() <= tensor.float().abs() / 15 + largest / 448 / 512).all()
    assert json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]["fmt"] == "e4m3"


def test_megatron_core_reads_it_in_parts(ranks: RankPool, tmp_path: Path) -> None:
    """`dist_checkpointing.load` on two ranks, each asking for half of every tensor along one axis or the other."""
    source = make_checkpoint(tmp_path / "source", FP8_MODEL, "fp8")
    from_hugging_face(source, tmp_path / "checkpoint", ImportOptions(), QUIET)
    there = tensors_of(source)
    layer = "model.layers.1."
    fc1 = [
        torch.cat([there[f"{layer}mlp.experts.{e}.{part}_proj.weight"].view(torch.uint8) for part in ("gate", "up")])
        for e in range(4)
    ]
    expected = {
        "embedding.word_embeddings.weight": there["model.embed_tokens.weight"],
        "decoder.layers.1.self_attention.linear_proj.weight": there[layer + "self_attn.o_proj.weight"],
        "decoder.layers.1.mlp.router.expert_bias": there[layer + "mlp.gate.e_score_correction_bias"],
        "decoder.layers.1.mlp.experts.experts.linear_fc1.weight": torch.stack(fc1).view(torch.float8_e4m3fn),
        "mtp.layers.0.eh_proj.weight": there["model.layers.2.eh_proj.weight"],
    }
    wanted = {key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for key, tensor in expected.items()}
    for axis in (0, 1):
        halves = ranks.run(
            "tests.distributed.convert_checks:load_halves",
            2,
            folder=str(tmp_path / "checkpoint"),
            wanted=wanted,
            axis=axis,
        )
        for key, tensor in expected.items():
            is_cut = axis < tensor.dim() and tensor.shape[axis] % 2 == 0
            found = torch.cat([half[key] for half in halves], axis) if is_cut else halves[0][key]
            assert torch.equal(found, tensor.contiguous().view(torch.uint8)), key


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint in a few files; take a copy."""
    folder = tmp_path_factory.mktemp("small") / "source"
    return make_checkpoint(folder, MODELS["deepseek_v3"], "bf16", max_shard_size=30_000)


def change_bytes(path: Path, at: int, new: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(new)


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """A change of the tensors of a folder, which becomes a single file."""

    def apply(folder: Path) -> None:
        tensors = tensors_of(folder)
        change(tensors)
        for path in folder.glob("model*"):
            path.unlink()
        save_file(tensors, folder / "model.safetensors")

    return apply


def edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, **fields}))

    return apply


def _poison(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[2]
    change_bytes(shard, shard.stat().st_size - 8, b"\xc0\x7f")


def _lose_and_add(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    tensors["model.layers.9.extra"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.zeros(25, dtype=torch.bfloat16)


def _mix(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.experts.5.up_proj.weight"] = torch.zeros(16, 24)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(24, 40, dtype=torch.int8)
    for part in ("gate", "up"):
        tensors[f"model.layers.2.mlp.experts.1.{part}_proj.weight"] = torch.zeros(16, 24)


def _truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 3)


BAD_SOURCES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "nan": (_poison, ["model-00003-of", "NaN or infinite"]),
    "truncated": (_truncate, ["model-00002-of", "truncated"]),
    "missing shard": (lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), ["model-00002-of", "missing"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json"]),
    "another config": (edit_json("config.json", hidden_size=32), ["expected", "model.embed_tokens.weight"]),
    "an unsupported config": (edit_json("config.json", hidden_act="gelu"), ["hidden_act"]),
    "fp8 only in the config": (
        edit_json(
            "config.json", quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        ),
        ["no tensor is"],
    ),
    "a path out of the folder": (
        edit_json("model.safetensors.index.json", weight_map={"model.norm.weight": "../model.safetensors"}),
        ["model.safetensors.index.json", "'../model.safetensors'"],
    ),
    "other tensors": (
        rewrite(_lose_and_add),
        ["experts.5.up_proj.weight: missing", "model.layers.9.extra: not a tensor", "model.norm.weight: shape [25]"],
    ),
    "other dtypes": (
        rewrite(_mix),
        ["experts.5.up_proj.weight F32", "down_proj.weight I8", "experts.1.gate_proj.weight: would be F32"],
    ),
}


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_bad_source_is_refused_by_name(small: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(small, source)
    damage, told = BAD_SOURCES[kind]
    damage(source)
    with pytest.raises((ValueError, OSError)) as refusal:
        from_hugging_face(source, tmp_path / "out", ImportOptions(), QUIET)
    assert all(text in str(refusal.value) for text in told), refusal.value
    assert not (tmp_path / "out").exists()
    if kind != "nan":
        assert not (tmp_path / "out.partial").exists()  # nothing was begun


def test_a_head_of_its_own_is_another_model(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", FP8_MODEL, "bf16")
    rewrite(lambda tensors: tensors["model.layers.2.shared_head.head.weight"].add_(1))(source)
    with pytest.raises(ValueError, match=r"shared_head\.head\.weight should repeat lm_head\.weight"):
        from_hugging_face(source, tmp_path / "out", ImportOptions(), QUIET)
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_in_a_folder_of_ours_is_named(converted: Path, tmp_path: Path) -> None:
    exported = to_hugging_face(converted, tmp_path / "exported", ExportOptions(), QUIET).folder
    shard = sorted(exported.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{shard.name}: model\.\S+ is not what manifest\.jsonl says"):
        from_hugging_face(exported, tmp_path / "out", ImportOptions(), QUIET)
    assert not (tmp_path / "out").exists()


def test_fp8_that_is_not_finite_is_named(tmp_path: Path) -> None:
    for suffix, value in (("", 0x7F), ("", 0xFF), ("_scale_inv", 0x7F)):
        source = make_checkpoint(tmp_path / "source", FP8_MODEL, "fp8")
        name = "model.layers.1.mlp.experts.2.down_proj.weight" + suffix

        def poison(tensors: dict[str, torch.Tensor], name: str = name, value: int = value) -> None:
            flat = tensors[name].view(-1).view(torch.uint8)
            flat[-4:] = value if tensors[name].dtype == torch.float8_e4m3fn else torch.tensor([0, 0, 0xC0, value])

        rewrite(poison)(source)
        with pytest.raises(ValueError) as refusal:
            from_hugging_face(source, tmp_path / "out", ImportOptions(), QUIET)
        assert f"model.safetensors: {name}: " in str(refusal.value) and "NaN or infinite" in str(refusal.value)
        shutil.rmtree(source)
        shutil.rmtree(tmp_path / "out.partial")


def test_what_does_not_go_together(tmp_path: Path, small: Path) -> None:
    fp8 = make_checkpoint(tmp_path / "fp8", FP8_MODEL, "fp8", config={"rope_interleave": False})
    with pytest.raises(ValueError, match="--fp8 keep: with rope_interleave=false"):
        from_hugging_face(fp8, tmp_path / "out", ImportOptions(), QUIET)
    with pytest.raises(ValueError, match="--dtype bf16: the source is FP8"):
        from_hugging_face(fp8, tmp_path / "out", ImportOptions(dtype="bf16"), QUIET)
    with pytest.raises(ValueError, match=r"--max-memory 100MB is too little for 4 workers and .* MB are needed|MB"):
        from_hugging_face(small, tmp_path / "out", ImportOptions(), Resources(4, 10**8, True))
    shutil.rmtree(tmp_path / "out.partial")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        from_hugging_face(small, tmp_path / "out", ImportOptions(), QUIET)


@pytest.fixture(scope="module")
def converted(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a checkpoint; take a copy."""
    folder = tmp_path_factory.mktemp("converted") / "checkpoint"
    from_hugging_face(small, folder, ImportOptions(), QUIET)
    return folder


def flip_a_weight(folder: Path) -> None:
    part = folder / "__0_0.distcp"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)


def _without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a flipped bit": (flip_a_weight, ["__0_0.distcp: ", "damaged"]),
    "truncated": (lambda f: os.truncate(f / "__0_0.distcp", 5000), ["__0_0.distcp has 5000 bytes"]),
    "a missing part": (_without("__0_0.distcp"), ["__0_0.distcp is missing"]),
    "no description": (_without("checkpoint.json"), ["no whole checkpoint"]),
    "a changed configuration": (edit_json("hugging_face/config.json", rope_theta=5), ["hugging_face/config.json"]),
    "another model": (edit_json("checkpoint.json", model={"num_layers": 3}), ["does not hold this model", "expected"]),
    "an unknown field": (edit_json("checkpoint.json", model={"wings": 3}), ["wings"]),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_by_name(converted: Path, tmp_path: Path, kind: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(converted, checkpoint)
    damage, told = BAD_CHECKPOINTS[kind]
    damage(checkpoint)
    with pytest.raises((ValueError, OSError)) as refusal:
        to_hugging_face(checkpoint, tmp_path / "out", ExportOptions(), QUIET)
    assert all(text in str(refusal.value) for text in told), refusal.value
    assert not (tmp_path / "out").exists()


def test_nan_in_a_checkpoint_is_named(converted: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(converted, checkpoint)
    change_element(checkpoint, "decoder.final_layernorm.weight", (3,), float("nan"))
    with pytest.raises(ValueError, match=r"\.distcp: decoder\.final_layernorm\.weight \(model\.norm\.weight\).*\[3\]"):
        to_hugging_face(checkpoint, tmp_path / "out", ExportOptions(), QUIET)


def test_verify_names_what_was_changed(converted: Path, tmp_path: Path) -> None:
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    shutil.copytree(converted, checkpoint)
    to_hugging_face(checkpoint, exported, ExportOptions(), QUIET)
    assert main(["convert", "verify", str(checkpoint), "--quiet"]) == 0
    assert main(["convert", "verify", str(exported), "--quiet"]) == 0
    assert verify(exported, QUIET).num_tensors == len(tensors_of(exported))
    flip_a_weight(checkpoint)
    (problem,) = verify(checkpoint, QUIET).problems
    assert problem.startswith("__0_0.distcp: model.") and problem.endswith("its bytes differ (sha256)")
    (problem,) = file_problems(checkpoint, read_description(checkpoint)["files"])
    assert re.fullmatch(r"__0_0\.distcp was changed or is damaged in decoder\.\S+: its crc32 is not .*", problem)
    shard = sorted(exported.glob("*.safetensors"))[0]
    change_bytes(shard, shard.stat().st_size - 2, b"\x00\x00")
    (problem,) = verify(exported, QUIET).problems
    assert problem.startswith(f"{shard.name}: model.") and main(["convert", "verify", str(exported), "--quiet"]) == 2
    (exported / "generation_config.json").write_text("{}")
    assert any("generation_config.json" in problem for problem in verify(exported, QUIET).problems)
    with pytest.raises(FileNotFoundError, match=MANIFEST):
        verify(tmp_path, QUIET)
