"""What contradicts itself in the data, one case per sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from r1_megatron.config.load import load_config
from r1_megatron.config.validate import validate_config
from r1_megatron.config.validate_data import data_files

MIXTURE = ["data.source=mixture", "tokenizer.kind=bilingual"]
BOTH = "data.sources=[{kind: chain_sum}, {kind: bilingual}]"
CASES = [
    ([f"{BOTH}"], r"data.sources names 2 sources, but data.source=chain_sum. Set data.source=mixture"),
    (["data.source=mixture"], r"data.source=mixture needs data.sources"),
    ([*MIXTURE, BOTH, "data.path=x"], r"data.path is set, but data.source=mixture. Set it in an entry"),
    (
        [*MIXTURE, "data.sources=[{kind: chain_sum, weight: 1}, {kind: bilingual}]"],
        r"weights are \[1.0, None\]. Give one",
    ),
    ([*MIXTURE, "data.sources=[{kind: chain_sum, weight: 0}]"], r"data.sources.0.weight=0 has to be greater than 0"),
    ([*MIXTURE, "data.sources=[{kind: chain_sum}, {kind: chain_sum}]"], r"two are called chain_sum"),
    ([*MIXTURE, "data.sources=[{}]"], r"data.sources.0.kind=jsonl needs data.sources.0.path"),
    ([*MIXTURE, "data.sources=[{kind: bilingual, path: x}]"], r"data.sources.0.path is set, but data.sources.0.kind="),
    ([*MIXTURE, "data.sources=[{path: x, task_options: {a: 1}}]"], r"task_options are those of a procedural task"),
    ([*MIXTURE, "data.sources=[{kind: bilingual, num_eval: 0}]"], r"data.sources.0.num_eval=0 has to be at least 1"),
    ([*MIXTURE, "data.sources=[{path: x}]"], r"data.sources: none has an eval_path"),
    (["data.source=mixture", BOTH], r"tokenizer.kind=chain_sum is built for .* is of bilingual. Set .*kind=bilingual"),
    (["data.streaming=true"], r"data.streaming=true reads files, and there are none"),
    (["data.decontaminate_ngram=0"], r"data.decontaminate_ngram=0 has to be at least 1"),
    (["data.min_score_difference=-1"], r"data.min_score_difference=-1 has to be at least 0"),
    (["sft.mixed_fraction=0.5"], r"only bilingual and translation have two; the data is of chain_sum. Set it to 0"),
    (["sft.mixed_fraction=1.5", "data.source=bilingual"], r"sft.mixed_fraction=1.5 has to be between 0 and 1"),
    (
        ["data.template=chat"],
        r"data.template=chat needs a tokenizer with a chat template, and tokenizer.kind=chain_sum",
    ),
    ([*MIXTURE, BOTH, "reward.terms=[{function: accuracy, sources: [countdown]}]"], r"all prompts are of data.source="),
    (
        [*MIXTURE, "data.sources=[{kind: countdown}, {kind: bilingual}]"],
        r"function=accuracy cannot read the labels of data.source=countdown. Set its sources=\[bilingual\]",
    ),
    (["data.decontaminate=[no/such.jsonl]"], r"data.decontaminate.0: no/such.jsonl does not exist"),
]


def config(*overrides: str, folder: Path):
    (folder / "run.yaml").write_text("output_dir: runs/x\n")
    return load_config(folder / "run.yaml", overrides)


@pytest.mark.parametrize(("overrides", "message"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_each_contradiction_is_named(tmp_path: Path, overrides: list[str], message: str):
    problems = validate_config(config(*overrides, folder=tmp_path))
    assert any(re.search(message, problem) for problem in problems), problems


def test_what_fits_has_no_problems(tmp_path: Path):
    (tmp_path / "part-0.jsonl").write_text("{}\n")
    files = f"{{name: files, path: {tmp_path}/part-*.jsonl}}"
    for overrides in (
        [*MIXTURE, BOTH],
        [
            *MIXTURE,
            f"data.sources=[{{kind: chain_sum, weight: 3}}, {files[:-1]}, weight: 0.5}}]",
            "data.streaming=true",
        ],
        ["data.source=bilingual", "tokenizer.kind=bilingual"],
        ["data.source=jsonl", f"data.path={tmp_path}/part-*.jsonl", "evaluate.num_prompts=0"],
    ):
        cfg = config(*overrides, folder=tmp_path)
        assert validate_config(cfg) == [], overrides
    assert data_files(cfg) == {"data.path": f"{tmp_path}/part-*.jsonl"}
