"""Contradictions of rejection sampling and its judge: each is refused with its values and a remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1_megatron.config.schema import (
    CheckpointConfig,
    FilterConfig,
    JudgeConfig,
    JudgeSamplingConfig,
    MixConfig,
    PairConfig,
    RewardConfig,
    RewardTermConfig,
    RolloutConfig,
    RunConfig,
)
from r1_megatron.config.validate import validate_config
from r1_megatron.config.validate_reject import missing_files, reject_problems

OK = RunConfig(
    stage="reject",
    checkpoint=CheckpointConfig(load="runs/base"),
    reward=RewardConfig(terms=(RewardTermConfig("accuracy", at_least=1.0),)),
)
JUDGED = replace(OK, judge=JudgeConfig("judge.txt", max_prompt_tokens=512))
# YAML that gives some of the judge's sampling keeps the rest of its defaults.
SAMPLING = JudgeSamplingConfig()


def changed(cfg: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return replace(cfg, **{name: replace(getattr(cfg, name), **options) for name, options in sections.items()})


@pytest.mark.parametrize(
    "cfg", [OK, JUDGED, changed(JUDGED, judge={"votes": 3, "sampling": replace(SAMPLING, temperature=0.6)})]
)
def test_accepted(cfg: RunConfig) -> None:
    assert list(reject_problems(cfg)) == []
    assert [problem for problem in validate_config(cfg, check_files=False) if "reject" in problem] == []


@pytest.mark.parametrize(
    "cfg, said",
    [
        (changed(OK, checkpoint={"load": None}), "stage=reject needs checkpoint.load"),
        (changed(OK, reward={"terms": (RewardTermConfig("accuracy"),)}), "nothing says which responses to a prompt"),
        (
            changed(JUDGED, reward={"terms": (RewardTermConfig("format"),)}, judge={"sources": ("math",)}),
            "prompts of other sources than judge.sources are right",
        ),
        (
            changed(OK, reward={"terms": (RewardTermConfig("accuracy", at_least=1.0, from_step=3),)}),
            "from_step=3, until_step=None, last_steps=None: stage=reject has no steps of learning",
        ),
        (changed(OK, reject={"max_per_prompt": 0}), "reject.max_per_prompt=0 has to be at least 1"),
        (changed(OK, reject={"filters": FilterConfig(max_repetition=1.5)}), "max_repetition=1.5 has to be above 0"),
        (changed(OK, reject={"prefer": "shortest"}), "reject.max_per_prompt=null keeps them all"),
        (changed(OK, reject={"mix": (MixConfig("", count=1),)}), "reject.mix.0.path is empty"),
        (changed(OK, reject={"mix": (MixConfig("a"),)}), "count=None and weight=None; exactly one"),
        (changed(OK, reject={"mix": (MixConfig("a", 3, 0.5),)}), "count=3 and weight=0.5; exactly one"),
        (changed(OK, reject={"mix": (MixConfig("a", 3), MixConfig("a", 4))}), "names ['a'] twice"),
        (changed(OK, reject={"mix": (MixConfig("a", weight=-1.0),)}), "weight=-1.0 has to be greater than 0"),
        (
            changed(OK, reject={"pairs": PairConfig(by="reward")}, rollout={"samples_per_prompt": 1}),
            "compares responses to the same prompt, and rollout.samples_per_prompt=1",
        ),
        (changed(JUDGED, reject={"pairs": PairConfig(by="judge")}), "by=judge, which needs one"),
        (changed(OK, reject={"pairs": PairConfig(by="reward", prompt_path="p")}), "Set both or neither"),
        (changed(OK, judge={"load": "runs/judge"}), "nobody asks the judge"),
        (changed(JUDGED, judge={"votes": 4}), "judge.sampling.temperature=0 is the same vote 4 times"),
        (changed(JUDGED, judge={"right": "RIGHT", "wrong": "NOT RIGHT"}), "neither may be empty or part of the other"),
        (changed(JUDGED, judge={"max_prompt_tokens": 4000}), "= 5024 tokens, but model.max_position_embeddings=4096"),
        (changed(JUDGED, rollout={"cache_tokens": 1000}), "less than one sequence of the judge"),
        (changed(OK, rollout={"over_sampling_prompts": 2}), "stage=reject samples nothing that it learns from"),
    ],
)  # fmt: skip
def test_refused(cfg: RunConfig, said: str) -> None:
    problems = validate_config(cfg, check_files=False)
    assert len(problems) == 1 and said in problems[0], problems


def test_other_stages_do_not_hear_of_it() -> None:
    assert list(reject_problems(replace(changed(JUDGED, judge={"votes": 4}), stage="grpo"))) == []
    assert RolloutConfig().samples_per_prompt > 1


def test_the_judge_decides_how_long_a_sequence_is() -> None:
    assert OK.longest_sample == OK.data.max_prompt_tokens + OK.sampling.max_new_tokens
    assert JUDGED.longest_sample == 512 + 1024
    assert replace(JUDGED, stage="grpo").longest_sample == OK.longest_sample


def test_files_of_the_judge_are_looked_at(tmp_path: Path) -> None:
    prompt = tmp_path / "judge.txt"
    prompt.write_text("Is {response} right?")
    cfg = changed(
        JUDGED,
        judge={"prompt_path": str(prompt), "load": str(tmp_path / "none")},
        reject={
            "pairs": PairConfig(by="judge", prompt_path=str(tmp_path / "missing.txt")),
            "mix": (MixConfig(str(tmp_path), count=1),),
        },
    )
    problems = "\n".join(missing_files(cfg))
    assert "judge.prompt_path: " in problems and "has no {question} and no {reference}" in problems
    assert "reject.pairs.prompt_path: " in problems and "cannot be read as UTF-8 text" in problems
    assert "judge.load: " in problems and "is no folder" in problems
    assert "reject.mix.0.path: " in problems and "is no file" in problems
    assert len(problems.splitlines()) == 4
