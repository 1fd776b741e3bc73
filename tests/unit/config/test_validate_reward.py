"""Reward terms that would never count, or judge what they do not see."""

from __future__ import annotations

import pytest

from r1_megatron.config.schema import DataConfig, RewardConfig, RewardTermConfig, RunConfig, SFTConfig, TrainConfig
from r1_megatron.config.validate import validate_config
from r1_megatron.rewards.mixture import counts_at


def problems(*terms: RewardTermConfig, stage="grpo", source="chain_sum") -> list[str]:
    cfg = RunConfig(
        stage=stage,
        train=TrainConfig(steps=10),
        data=DataConfig(source=source),
        reward=RewardConfig(terms),
    )
    return [problem for problem in validate_config(cfg, check_files=False) if problem.startswith("reward.")]


def test_mixtures_that_make_sense():
    assert not problems(
        RewardTermConfig("accuracy", until_step=4, sources=("chain_sum", "other")),
        RewardTermConfig("my:judge", from_step=5, on="summary"),
    )
    assert not problems(RewardTermConfig("accuracy", from_step=500), stage="sft")
    for stage in ("grpo", "evaluate", "sft"):
        assert not problems(RewardTermConfig("accuracy"), RewardTermConfig("format", last_steps=10), stage=stage)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ([RewardTermConfig("accuracy"), RewardTermConfig("format", from_step=-1)], "from_step=-1 has to be at least 0"),
        ([RewardTermConfig("accuracy"), RewardTermConfig("format", until_step=0)], "comes before its first step, 1"),
        (
            [RewardTermConfig("accuracy"), RewardTermConfig("format", from_step=4, until_step=3)],
            "until_step=3 comes before its first step, 4",
        ),
        (
            [RewardTermConfig("accuracy"), RewardTermConfig("format", from_step=11)],
            "from_step=11 is behind the last step, train.steps=10",
        ),
        ([RewardTermConfig("accuracy"), RewardTermConfig("format", sources=("",))], "different names are needed"),
        (
            [RewardTermConfig("accuracy"), RewardTermConfig("format", sources=("math",))],
            "prompts are of data.source",
        ),
        ([RewardTermConfig("accuracy", on="summary")], "accuracy judges a response as a whole"),
        ([RewardTermConfig("accuracy", from_step=3)], "none counts in steps 1 to 2"),
        ([RewardTermConfig("accuracy", until_step=8)], "none counts in steps 9 to 10"),
        ([RewardTermConfig("accuracy", last_steps=8)], "none counts in steps 1 to 2"),
        ([RewardTermConfig("accuracy"), RewardTermConfig("format", last_steps=0)], "last_steps=0 has to be between 1"),
        ([RewardTermConfig("accuracy"), RewardTermConfig("format", last_steps=11)], "and train.steps=10, or null"),
        (
            [RewardTermConfig("accuracy"), RewardTermConfig("format", last_steps=3, from_step=4)],
            "last_steps=3 and from_step=4, until_step=None both say when",
        ),
        (
            [RewardTermConfig("accuracy"), RewardTermConfig("format", last_steps=3, until_step=8)],
            "last_steps=3 and from_step=0, until_step=8 both say when",
        ),
        (
            [RewardTermConfig("accuracy", until_step=3), RewardTermConfig("format", from_step=6)],
            "none counts in steps 4 to 5",
        ),
    ],
)
def test_what_would_never_count(terms, said):
    found = problems(*terms)
    assert any(said in problem for problem in found), found


def test_the_last_steps_of_a_run_whose_rows_say_how_long_it_is():
    terms = (RewardTermConfig("accuracy"), RewardTermConfig("format", last_steps=3))
    cfg = RunConfig(stage="sft", sft=SFTConfig(epochs=2), reward=RewardConfig(terms))
    (problem,) = [p for p in validate_config(cfg, check_files=False) if p.startswith("reward.")]
    assert "last_steps=3 is counted back from train.steps, and sft.epochs(2) says how long" in problem


def test_the_last_steps_are_counted_back_from_train_steps():
    """In every stage from its own: an evaluation grades with the terms of its checkpoint's step, by the same count."""
    terms = (RewardTermConfig("accuracy", from_step=2, until_step=7), RewardTermConfig("format", last_steps=3))
    for stage in ("grpo", "evaluate"):
        cfg = RunConfig(stage=stage, train=TrainConfig(steps=10), reward=RewardConfig(terms))
        whole, late = cfg.graded_by.terms
        assert whole == terms[0] and (late.from_step, late.last_steps) == (8, None)
        assert [step for step in range(12) if counts_at(late, step)] == [8, 9, 10, 11]
    assert cfg.graded_by.over(99) == cfg.graded_by
