"""What is found wrong with a pipeline before anything starts; and what makes a node another one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from r1_megatron.config.load import ConfigError
from r1_megatron.config.schema import Stage
from r1_megatron.pipeline.artefacts import MAKES, PAIRS, ROWS, kinds_taken
from r1_megatron.pipeline.check import checked_pipeline
from r1_megatron.pipeline.figures import read_figures
from r1_megatron.pipeline.read import read_pipeline
from r1_megatron.pipeline.store import Store

SFT = {"config": {"stage": "sft"}}


def problems_of(tmp_path: Path, tree: dict[str, Any], *overrides: str) -> list[str]:
    path = tmp_path / "p.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    try:
        checked_pipeline(path, overrides)
    except ConfigError as error:
        return error.problems
    return []


# Nodes, as YAML, and what is said about them.
PROBLEMS = [
    ("{base: {config: {stage: sft}}, zero: {config: {checkpoint: {load: '${base.checkpoint}'}}}}", []),
    ("{zero: {config: {checkpoint: {load: '${base.checkpoint}'}}}, base: {config: {stage: sft}}}", []),
    (
        "{a: {config: {checkpoint: {load: '${b.checkpoint}'}}}, b: {config: {checkpoint: {load: '${a.checkpoint}'}}}}",
        ["nodes.a: the nodes need each other in a circle: a -> b -> a."],
    ),
    (
        "{basis: {config: {stage: sft}}, zero: {config: {checkpoint: {load: '${base.checkpoint}'}}}}",
        ["there is no node base. Did you mean basis?"],
    ),
    (
        "{a: {config: {stage: evaluate, checkpoint: {load: .}}}, b: {config: {checkpoint: {load: '${a.checkpoint}'}}}}",
        ["stage=evaluate makes no checkpoint, but evaluation."],
    ),
    (
        "{a: {config: {stage: sft}}, b: {config: {stage: sft, data: {source: jsonl, path: '${a.checkpoint}'}}}}",
        ["data.path=${a.checkpoint} is a checkpoint, expected rows."],
    ),
    (
        "{a: {config: {stage: sft}}, "
        "b: {config: {data: {source: jsonl, path: '${a.checkpoint}'}, evaluate: {num_prompts: 0}}}}",
        ["data.path=${a.checkpoint}: stage=grpo takes nothing of another node there."],
    ),
    (
        "{a: {config: {stage: sft}}, b: {config: {name: '${a.checkpoint}', checkpoint: {load: 'x/${a.checkpoint}'}}}}",
        ["name is the pipeline's to choose"],
    ),
    (
        "{a: {config: {stage: sft}}, b: {config: {checkpoint: {load: 'x/${a.checkpoint}'}}}}",
        ["nothing before or behind it"],
    ),
    (
        "{a: {config: {stage: sft}}, b: {config: {model: {num_layers: 3}, checkpoint: {load: '${a.checkpoint}'}}}}",
        ["a holds another model: model.num_layers=3, there 4"],
    ),
    ("{a: {like: b}, b: {like: a}}", ["like each other in a circle", "like each other in a circle"]),
    ("{base: {like: bas}}", ["There is no node bas. Did you mean base?"]),
    ("{base: {file: nowhere.yaml}}", ["nowhere.yaml: cannot be read"]),
    ("{base: {config: {stage: sft, output_dir: x}}}", ["output_dir is the pipeline's to choose"]),
    ("{base: {config: {stage: sft, train: {weight_decay: -1.0}}}}", ["train.weight_decay=-1.0 has to be at least 0"]),
    ("{base: {config: {stage: sft, train: {lrr: 1.0}}}}", ["train.lrr: unknown key. Did you mean train.lr?"]),
    ("{base: {config: {stage: sft}, confg: {}}}", ["nodes.base.confg: unknown key. Did you mean config?"]),
    (
        "{base: {config: {stage: distill, data: {source: jsonl, path: nowhere.jsonl}}}}",
        ["data.path: nowhere.jsonl does not exist"],
    ),
    ("{base: {config: {stage: distill}}}", ["data.source=chain_sum writes traces of its own"]),
    ("{base: {config: {stage: sft, sft: {epochs: 2}, train: {steps: 7}}}}", ["sft.epochs(2) and train.steps(7) both"]),
]


@pytest.mark.parametrize(("nodes", "expected"), PROBLEMS)
def test_problems(tmp_path: Path, nodes: str, expected: list[str]) -> None:
    found = problems_of(tmp_path, {"nodes": yaml.safe_load(nodes)})
    assert len(found) == len(expected), found
    assert all(text in problem for text, problem in zip(expected, found)), found


def test_all_problems_are_told_together(tmp_path: Path) -> None:
    tree = {
        "nodse": {},
        "code": "whatever",
        "nodes": {
            "base": {"config": {"stage": "sft", "train": {"weight_decay": -1.0}}},
            "zero": {"config": {"train": {"lrr": 1}}},
            "rl": {"config": {"checkpoint": {"load": "${nobody.checkpoint}"}, "rollout": {"samples_per_prompt": 1}}},
        },
        "compare": {"Base": "${base.checkpoint}"},
    }
    found = problems_of(tmp_path, tree, "zeor.train.steps=1")
    for text in ("nodse", "code=whatever", "train.weight_decay=-1.0", "train.lrr", "no node nobody",
                 "samples_per_prompt=1", "expected an evaluation", "Did you mean zero?"):  # fmt: skip
        assert sum(text in problem for problem in found) == 1, text
    assert len(found) == 8


def test_a_file_its_sections_and_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("stage: sft\nname: other\noutput_dir: runs/other\ntrain: {lr: 0.1, steps: 7}\n")
    tree = {
        "defaults": {"train": {"lr": 0.3, "weight_decay": 0.5}},
        "nodes": {"base": {"file": "run.yaml", "config": {"train": {"steps": 8}}}, "more": {"like": "base"}},
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(tree))
    pipeline = checked_pipeline(tmp_path / "p.yaml", ["more.train.steps=9", "output_dir=elsewhere"])
    base, more = pipeline.nodes.values()
    assert (base.config.train.lr, base.config.train.steps, base.config.train.weight_decay) == (0.1, 8, 0.5)
    assert more.config.train.steps == 9 and (base.config.name, more.config.name) == ("base", "more")
    assert str(pipeline.output_dir) == "elsewhere"


def test_a_recipe_is_a_file(tmp_path: Path) -> None:
    config = {"model": {"preset": "demo"}, "data": {"source": "chain_sum"}, "tokenizer": {"kind": "chain_sum"}}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"nodes": {"zero": {"file": "recipe:r1_zero", "config": config}}}))
    pipeline, _ = read_pipeline(tmp_path / "p.yaml")
    assert pipeline.nodes["zero"].config.train.lr == 3e-6  # DeepSeek-R1, arXiv 2501.12948v2, appendix B


def test_what_rejection_sampling_says(tmp_path: Path) -> None:
    counts = {"prompts": 9, "sampled": 61440, "right": 130, "kept": 14, "dropped": {"wrong": 1}}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "counts": {"all": counts}}))
    figures = read_figures(tmp_path, "reject").figures
    assert [str(figure) for figure in figures] == ["sampled 61,440", "right 130", "kept 14"]


def test_what_an_evaluation_says(tmp_path: Path) -> None:
    figures = {"pass@1": {"value": 0.5, "low": 0.4, "high": 0.6}, "greedy": {"value": 0.75, "low": 0.7, "high": 0.8}}
    benchmarks = [{"name": "sums", "figures": figures}, {"name": "stories", "figures": figures}]
    (tmp_path / "evaluation.json").write_text(json.dumps({"benchmarks": benchmarks}))
    found = read_figures(tmp_path, "evaluate")
    assert found.brief() == "sums pass@1 50.0% [40.0, 60.0], stories pass@1 50.0% [40.0, 60.0]"
    each = "pass@1 50.0% [40.0, 60.0], greedy 75.0% [70.0, 80.0]"
    assert found.by_benchmark() == {"sums": each, "stories": each}


def test_pairs_are_learned_from_and_held_out() -> None:
    assert kinds_taken("reward_model", "data.path") == kinds_taken("reward_model", "data.eval_path") == (PAIRS,)
    assert kinds_taken("sft", "data.path") == (ROWS,) and kinds_taken("sft", "data.eval_path") == ()


def test_every_stage_makes_something() -> None:
    assert set(get_args(Stage)) <= set(MAKES)


CHANGES = [
    ("telemetry.num_samples=7", False),
    ("parallel.data_parallel_size=2", False),
    ("checkpoint.interval=5", False),
    ("train.micro_batch_tokens=4096", False),
    ("train.steps=101", True),
    ("train.lr=2e-4", True),
    ("seed=7", True),
    ("data.seed=7", True),
    ("sft.batch_size=64", True),
    ("model.hidden_size=128", True),
    ("stage=grpo", True),
]


@pytest.mark.parametrize(("change", "is_another"), CHANGES)
def test_what_makes_a_node_another_one(tmp_path: Path, change: str, is_another: bool) -> None:
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"nodes": {"base": SFT}}))

    def key(*overrides: str) -> str:
        pipeline = checked_pipeline(tmp_path / "p.yaml", [f"output_dir={tmp_path}/run", *overrides])
        return Store(pipeline).job(pipeline.nodes["base"], {}).key

    assert (key() != key(f"base.{change}")) == is_another


def test_files_and_code_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "held.jsonl", "my_rewards.py"):
        (tmp_path / name).write_text("{}")
    config = {
        "stage": "sft",
        "data": {"source": "jsonl", "path": "rows.jsonl", "eval_path": "held.jsonl"},
        "reward": {"terms": [{"function": "my_rewards:score"}]},
    }
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"nodes": {"base": {"config": config}}}))

    def job(*overrides: str):
        pipeline = checked_pipeline("p.yaml", ["output_dir=run", *overrides])
        return Store(pipeline).job(pipeline.nodes["base"], {})

    assert {each.field for each in job().inputs} == {"data.path", "data.eval_path", "reward.terms.0.function"}
    keys = [job().key]
    for name in ("rows.jsonl", "held.jsonl", "my_rewards.py"):
        (tmp_path / name).write_text("{ }")
        keys.append(job().key)
    (tmp_path / "rows.jsonl").rename(tmp_path / "other.jsonl")
    assert job("base.data.path=other.jsonl").key == keys[-1]  # what is in it counts, not what it is called
    (tmp_path / "other.jsonl").rename(tmp_path / "rows.jsonl")
    keys += [job(f"code={policy}").key for policy in ("version", "source")]
    for name in ("part_1.jsonl", "part_2.jsonl"):
        (tmp_path / name).write_text(name)
        keys.append(job("base.data.path=part_*.jsonl").key)
    assert len(set(keys)) == len(keys)


def test_the_driver_starts_without_torch() -> None:
    code = "import sys, r1_megatron.cli.pipeline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
