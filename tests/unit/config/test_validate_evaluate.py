"""What `evaluate.benchmarks` may say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1_megatron.config.load import load_config
from r1_megatron.config.resume import changed_course
from r1_megatron.config.schema import BenchmarkConfig, CheckpointConfig, DataConfig, EvaluateConfig, RunConfig
from r1_megatron.config.validate import validate_config

AIME = {"format": "aime", "path": "data/aime.jsonl"}


def asking(*benchmarks: dict[str, Any], **sections: Any) -> RunConfig:
    cfg = RunConfig(stage="evaluate", checkpoint=CheckpointConfig(load="base"), **sections)
    return replace(cfg, evaluate=EvaluateConfig(benchmarks=tuple(BenchmarkConfig(**one) for one in benchmarks)))


def test_a_file_says_it_all(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "evaluate: {benchmarks: [{format: aime, path: a.jsonl, cons_at: [16, 64], samples_per_prompt: 64}]}"
    )
    (benchmark,) = load_config(path, ["evaluate.benchmarks.0.temperature=1"]).evaluate.benchmarks
    assert benchmark == BenchmarkConfig("aime", "a.jsonl", cons_at=(16, 64), samples_per_prompt=64, temperature=1.0)


def test_benchmarks_need_nothing_of_the_data_section() -> None:
    data = DataConfig(source="jsonl")
    problems = validate_config(asking(AIME, data=data), check_files=False)
    assert not [problem for problem in problems if problem.startswith("data.")]
    held_out = validate_config(asking(AIME, {"format": "held_out"}, data=data), check_files=False)
    assert any("data.path" in problem for problem in held_out)


@pytest.mark.parametrize(
    "benchmark, said",
    [
        ({"format": "held_out", "path": "x.jsonl"}, ".path is set, but prompts of format=held_out"),
        ({"format": "gsm8k"}, ".path: format=gsm8k needs a file"),
        ({**AIME, "name": "a b"}, ".name='a b' has to consist of letters"),
        ({**AIME, "num_prompts": 0}, ".num_prompts=0 has to be null or at least 1"),
        ({**AIME, "max_new_tokens": 65}, ".max_new_tokens(65) exceeds sampling.max_new_tokens(64)"),
        ({**AIME, "samples_per_prompt": 0}, ".samples_per_prompt=0 has to be at least 1"),
        ({**AIME, "temperature": 0.0}, "there is greedy=true"),
        ({**AIME, "top_p": 0.0}, ".top_p=0 has to be in (0, 1]"),
        ({**AIME, "pass_at": (2, 17)}, ".pass_at: [17] are not within 1 and samples_per_prompt(16)"),
        ({**AIME, "cons_at": (0,)}, ".cons_at: [0]"),
        ({**AIME, "question": "Solve it!"}, "has no {problem} in it"),
        ({"format": "prompts", "path": "x.jsonl", "question": "{problem}"}, "rows of format=prompts are whole prompts"),
        ({**AIME, "sources": ["math"]}, ".sources: rows of format=aime have no source"),
        ({"format": "held_out", "template": "none"}, "held-out prompts have data.template(compact)"),
        ({"format": "livecodebench", "path": "x.jsonl"}, "Set reward.timeout_s=300 or more"),
        ({"format": "livecodebench", "path": "x.jsonl", "cons_at": (2,)}, "programs do not vote"),
    ],
)
def test_what_cannot_be_asked_is_said(benchmark: dict[str, Any], said: str) -> None:
    problems = validate_config(asking(AIME | {"name": "other"}, benchmark), check_files=False)
    assert any(problem.startswith("evaluate.benchmarks.1.") and said in problem for problem in problems), problems


def test_two_of_one_name_and_files_that_are_not_there(tmp_path: Path) -> None:
    problems = validate_config(asking(AIME, AIME))
    assert any("2 of them are called aime" in problem for problem in problems)
    assert any("evaluate.benchmarks.1.path: data/aime.jsonl does not exist" in problem for problem in problems)
    cfg = asking(AIME)
    assert not any("aime.jsonl" in p for p in validate_config(replace(cfg, stage="grpo"))), "training does not read it"


def test_training_may_go_on_with_other_benchmarks_and_an_evaluation_not() -> None:
    from r1_megatron.config.load import dump_config

    before, after = asking(AIME), asking(AIME, {"format": "held_out"})
    assert [text.split("=")[0] for text in changed_course(dump_config(before), after)] == ["evaluate.benchmarks"]
    other = replace(before, checkpoint=CheckpointConfig(load="other"))
    assert changed_course(dump_config(before), other) == ["checkpoint.load=other, the run has base"]
    faster = replace(before, evaluate=replace(before.evaluate, block_prompts=3))
    assert changed_course(dump_config(before), faster) == []
    training = (replace(cfg, stage="grpo") for cfg in (before, after))
    assert changed_course(dump_config(next(training)), next(training)) == []
