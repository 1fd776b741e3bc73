"""Hugging Face to a checkpoint, into the model of a layout, out again, and back: bit for bit the same files."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from r1_megatron.checkpoint.convert import ExportOptions, ImportOptions, Resources, from_hugging_face, to_hugging_face
from r1_megatron.checkpoint.convert.manifest import MANIFEST
from r1_megatron.config.schema import ModelConfig
from tests.distributed import round_trip_checks as checks
from tests.distributed.layouts import LAYOUTS, layout, world_size
from tests.rank_pool import RankPool
from tests.unit.checkpoint.variants import FP8_MODEL, MODELS
from tools.make_checkpoint import make_checkpoint

QUIET = Resources(workers=1, quiet=True)
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
# Every kind of model, in a dtype; the vocabulary of 67 does not divide.
SOURCES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"dtype": "bf16", "config": {"rope_interleave": False}},
    "full_rank_query": {"dtype": "fp32"},
    "full_rank_query_bias": {"dtype": "bf16"},
    "attention_bias": {"dtype": "fp32", "fused": True},
    "tied": {"dtype": "bf16"},
    "no_experts": {"dtype": "fp32"},
    "all_experts": {"dtype": "bf16", "fused": True},
    "mtp": {"dtype": "fp32"},
    "qwen2": {"dtype": "bf16"},
    "qwen2_tied": {"dtype": "fp32"},
    "qwen3": {"dtype": "bf16"},
    "llama": {"dtype": "fp32"},
    "llama_bias": {"dtype": "bf16"},
}


def model_of(name: str) -> ModelConfig:
    model = replace(MODELS["deepseek_v3" if name == "mtp" else name], num_layers=4)
    if name == "no_experts":
        model = replace(model, first_k_dense_replace=4)
    return replace(model, mtp_num_layers=1) if name == "mtp" else model


def without_experts() -> list[str]:
    return [name for name in SOURCES if model_of(name).is_dense_student or name == "no_experts"]


def files_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<name>/source`` and ``<name>/checkpoint`` of every model."""
    folder = tmp_path_factory.mktemp("round_trip")
    for name, options in SOURCES.items():
        source = make_checkpoint(folder / name / "source", model_of(name), **options)
        from_hugging_face(source, folder / name / "checkpoint", ImportOptions(), QUIET)
    return folder


@pytest.mark.parametrize("name", ["tp2pp2ep2", "pp2vpp2", "tp2etp2"])
def test_mixtures_of_experts(ranks: RankPool, imported: Path, name: str) -> None:
    names = [source for source in SOURCES if source not in without_experts()]
    round_trip(ranks, imported, LAYOUTS[name], names, name)


@pytest.mark.parametrize(
    "parallel", [layout(tp=2, pp=2), layout(pp=2, vpp=2), layout(dp=2)], ids=["tp2pp2", "pp2vpp2", "dp2"]
)
def test_models_without_experts(ranks: RankPool, imported: Path, parallel: Any) -> None:
    sizes = (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    round_trip(ranks, imported, parallel, without_experts(), "written_{}_{}".format(*sizes))


def round_trip(ranks: RankPool, folder: Path, parallel: Any, names: list[str], target: str) -> None:
    models = {name: (model_of(name), DTYPES[SOURCES[name]["dtype"]]) for name in names}
    options = {"parallel": parallel, "folder": str(folder), "checkpoints": models, "target": target}
    ranks.run(checks.load_and_save, world_size(parallel), **options)
    for name in names:
        back = folder / name / f"back_{target}"
        to_hugging_face(folder / name / target, back, ExportOptions(), QUIET)
        assert files_of(back) == files_of(folder / name / "source"), name


@pytest.mark.parametrize("kept", ["keep", "dequantize"])
def test_fp8(ranks: RankPool, tmp_path: Path, kept: str) -> None:
    """Through a bf16 model and back: the FP8 export is the source, the bf16 export the released cast."""
    source = make_checkpoint(tmp_path / "fp8" / "source", FP8_MODEL, "fp8")
    from_hugging_face(source, tmp_path / "fp8" / "checkpoint", ImportOptions(fp8=kept), QUIET)
    parallel = LAYOUTS["tp2pp2ep2"]
    options = {"checkpoints": {"fp8": (FP8_MODEL, "bfloat16")}, "target": "trained", "folder": str(tmp_path)}
    ranks.run(checks.load_and_save, world_size(parallel), parallel=parallel, **options)
    for target, how in (("back", "source"), ("bf16", "dequantize")):
        to_hugging_face(tmp_path / "fp8" / "trained", tmp_path / target, ExportOptions(fp8=how), QUIET)
    assert files_of(tmp_path / "back") == files_of(source)
    there, cast = tensors(source), tensors(tmp_path / "bf16")
    assert cast.keys() == {name for name in there if not name.endswith("_scale_inv")}
    for name, found in cast.items():
        expected = there[name]
        if f"{name}_scale_inv" in there:
            scales = there[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            rows, columns = expected.shape
            expected = (expected.float() * scales[:rows, :columns]).bfloat16()
        assert found.dtype == expected.dtype and torch.equal(found, expected), name


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
