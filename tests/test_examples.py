"""Every YAML that we ship loads, validates and explains itself. (The scripts of slurm/: tests/slurm.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from r1_megatron.config.explain import explain
from r1_megatron.config.load import dump_config, load_config
from r1_megatron.config.validate import check_config, validate_config
from r1_megatron.config.value_models import value_model
from r1_megatron.pipeline.check import checked_pipeline
from r1_megatron.topology import Topology

ROOT = Path(__file__).parents[1]
SHIPPED = sorted([*ROOT.glob("examples/**/*.yaml"), *ROOT.glob("slurm/**/*.yaml")])
PIPELINES = [path for path in SHIPPED if path.stem.endswith("_pipeline")]
FILES = [path for path in SHIPPED if path not in PIPELINES]
RANKS = {
    "chain_sum_base": 2,
    "chain_sum_ppo": 1,
    "chain_sum_reject": 1,
    "chain_sum_reward_model": 1,
    "chain_sum_student": 1,
    "chain_sum_zero": 1,
    "chain_sum_zero_tp2": 2,
    "chain_sum_zero_ep2": 2,
    "chain_sum_zero_pp2": 2,
    "chain_sum_zero_tp2pp2": 4,
    "evaluate_671b": 512,
    "moonlight_8gpu_zero": 8,
    "r1_zero_671b": 512,
    "r1_zero_671b_128gpus": 128,
    "r1_zero_671b_256gpus": 256,
    "r1_zero_671b_512gpus": 512,
    "r1_zero_671b_1024gpus": 1024,
    "sft_671b": 256,
    "smoke_cpu": 4,
}


SMALL = ("chain_sum", "countdown", "bilingual", "three_tasks")
AFTER_BASE = re.compile(r"_(zero|ppo|reject).*")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_loads_validates_and_explains(path: Path, tmp_path: Path):
    cfg = load_config(path)
    check_config(cfg, check_files=False)
    assert cfg.name in explain(cfg)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(cfg), encoding="utf-8")
    assert load_config(resolved) == cfg


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_says_its_command_and_has_a_run_folder_of_its_own(path: Path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    nodes = RANKS.get(path.stem, 0) // 8
    script = name_of(path.with_suffix(".sh")).replace(f"_{8 * nodes}gpus", "")
    said = (f"# r1-megatron train {name_of(path)}", f"# sbatch {script}", f"# sbatch --nodes={nodes} {script}")
    assert first in said
    cfg = load_config(path)
    assert cfg.name == path.stem and cfg.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", PIPELINES, ids=name_of)
def test_a_pipeline_checks_and_explains_its_nodes(path: Path):
    pipeline = checked_pipeline(path, check_files=False)
    said = (f"# r1-megatron pipeline run {name_of(path)}", f"# sbatch {name_of(path.with_suffix('.sh'))}")
    assert path.read_text(encoding="utf-8").splitlines()[0] in said
    assert pipeline.name == path.stem and str(pipeline.output_dir) == f"runs/{path.stem}"
    for node in pipeline.nodes.values():
        assert node.name in explain(node.config)


def test_layouts_are_what_the_names_say():
    found = {path.stem: Topology.from_config(load_config(path).parallel).world_size for path in FILES}
    assert RANKS.items() <= found.items()


def test_the_reward_model_learns_the_pairs_that_rejection_sampling_writes():
    cfg, reject, base = (
        load_config(ROOT / "examples" / f"chain_sum_{name}.yaml") for name in ("reward_model", "reject", "base")
    )
    assert cfg.data.path == f"{reject.output_dir}/preferences.jsonl" and reject.reject.pairs.by == "reward"
    assert cfg.checkpoint.load == reject.checkpoint.load == f"{base.output_dir}/checkpoints/final"
    assert cfg.model == value_model(base.model)
    assert (cfg.tokenizer, cfg.data.template) == (reject.tokenizer, reject.data.template)
    assert cfg.reward_model.max_tokens == reject.longest_sequence


@pytest.mark.parametrize("path", [p for p in FILES if p.stem.startswith(SMALL) and "reward" not in p.stem], ids=name_of)
def test_small_examples_need_nothing_but_the_base_run(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """On this machine only the base's checkpoint is missing; vocabulary, prompts and traces fit the stated limits."""
    from r1_megatron.config.schema import SFTConfig
    from r1_megatron.data.demonstrations import build_demonstrations
    from r1_megatron.data.prompts import build_prompts
    from r1_megatron.data.tokenizers import build_tokenizer

    monkeypatch.chdir(tmp_path)
    cfg = load_config(path)
    problems = validate_config(cfg)
    if cfg.checkpoint.load is None:
        assert problems == []
    else:
        base = load_config(ROOT / "examples" / f"{AFTER_BASE.sub('', path.stem)}_base.yaml")
        assert cfg.checkpoint.load == f"{base.output_dir}/checkpoints/final"
        assert len(problems) == 1 and problems[0].startswith("checkpoint.load")
        assert (cfg.model, cfg.data, cfg.tokenizer) == (base.model, base.data, base.tokenizer)
    tokenizer = build_tokenizer(cfg.tokenizer)
    assert cfg.model.vocab_size == tokenizer.vocab_size
    train, held_out, _ = build_prompts(cfg.data, tokenizer, cfg.model.vocab_size)
    sources = cfg.data.sources or (cfg.data,)
    assert len(train) == sum(source.num_train for source in sources)
    assert len(held_out) == sum(source.num_eval for source in sources)
    traces = build_demonstrations(cfg.data, SFTConfig(), tokenizer, cfg.model.vocab_size, 1024)
    for trace in map(traces.at, range(200)):
        assert len(trace.tokens) - trace.prompt_len <= cfg.sampling.max_new_tokens
