"""What a run that goes on may change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from r1_megatron.config.load import ConfigError, dump_config
from r1_megatron.config.resume import changed_course
from r1_megatron.config.schema import RewardConfig, RewardTermConfig, RunConfig

RUN = RunConfig()


def test_nothing_changed() -> None:
    assert changed_course(dump_config(RUN), RUN) == []


def test_layout_length_and_speed_may_change() -> None:
    changed = replace(
        RUN,
        name="again",
        output_dir="elsewhere",
        parallel=replace(RUN.parallel, tensor_model_parallel_size=8, pipeline_model_parallel_size=2),
        train=replace(RUN.train, steps=9999, micro_batch_tokens=1, share_prompts=False, recompute_granularity="full"),
        checkpoint=replace(RUN.checkpoint, interval=7, keep_last=3),
        evaluate=replace(RUN.evaluate, interval=5),
        rollout=replace(RUN.rollout, max_sequences=7, speculative_tokens=1, cuda_graphs=False),
        profile=replace(RUN.profile, steps=(3,)),
    )
    assert changed_course(dump_config(RUN), changed) == []


@pytest.mark.parametrize(
    "section, field, value, said",
    [
        ("train", "lr", 0.5, "train.lr=0.5, the run has 0.0001"),
        ("model", "num_layers", 7, "model.num_layers=7, the run has 4"),
        ("data", "seed", 2, "data.seed=2, the run has 1"),
        ("sampling", "stop", ("x",), "sampling.stop=('x',), the run has ()"),
        ("rl", "reference_refresh_steps", 3, "rl.reference_refresh_steps=3, the run has null"),
        ("rollout", "router_replay", True, "rollout.router_replay=true, the run has null"),
    ],
)
def test_what_the_run_computes_may_not(section: str, field: str, value: object, said: str) -> None:
    changed = replace(RUN, **{section: replace(getattr(RUN, section), **{field: value})})
    assert changed_course(dump_config(RUN), changed) == [said]


def test_the_length_may_not_where_a_reward_counts_in_the_last_steps() -> None:
    terms = (RewardTermConfig("accuracy"), RewardTermConfig("format", last_steps=5))
    before = replace(RUN, reward=RewardConfig(terms))
    longer = replace(before, train=replace(RUN.train, steps=120))
    assert changed_course(dump_config(before), longer) == ["train.steps=120, the run has 100"]
    assert changed_course(dump_config(before), before) == []


def test_a_configuration_of_another_version_says_so() -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        changed_course("model: {colour: red}", RUN)
