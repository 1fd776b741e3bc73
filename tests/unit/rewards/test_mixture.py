"""Terms that count for some sources, for some steps, for a part of the response."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from r1_megatron.config.schema import RewardConfig, RewardTermConfig, RunConfig
from r1_megatron.rewards.base import RewardError, build_rewards
from r1_megatron.rewards.extract import reasoning_of, summary_of
from r1_megatron.rewards.mixture import counts_at
from r1_megatron.stages.evaluate import num_right, verdicts
from r1_megatron.stages.step_report import StepReport, num_ungraded
from r1_megatron.telemetry.catalogue import undocumented
from r1_megatron.telemetry.metrics import Metrics
from r1_megatron.types import GradedGroup, Prompt, Rollout

RIGHT = "<think>a</think><answer>17</answer>"
WRONG = "<think>a</think><answer>18</answer>"
PLUGIN = """
def length(prompts, completions, labels, metadata):
    return [float(len(text)) for text in completions]

def says_nan(prompts, completions, labels, metadata):
    assert all(m == {"mine": True} for m in metadata), metadata
    return [1.0] * len(completions)
"""


@pytest.fixture(autouse=True)
def plugin(tmp_path, monkeypatch):
    (tmp_path / "part_rewards.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)


def prompt(index: int, source: str, text: str = "q", **metadata) -> Prompt:
    return Prompt(index, text, (1,), label=17, metadata=metadata, source=source)


def test_every_source_has_its_own_mixture():
    """A term pays the completions of its sources, at its weight, and is not asked about the others."""
    cfg = RewardConfig(
        (
            RewardTermConfig("accuracy", 1.0, sources=("math",)),
            RewardTermConfig("accuracy", 0.25, sources=("sums", "chains")),
            RewardTermConfig("format", 0.5),
            RewardTermConfig("part_rewards:says_nan", 2.0, sources=("chat",)),
        )
    )
    prompts = [prompt(0, "math"), prompt(1, "sums"), prompt(2, "chat", mine=True), prompt(3, "chains"), prompt(4, "")]
    with build_rewards(cfg) as grader:
        total, components, num_failed = grader.grade(prompts, [RIGHT] * 5, step=1)
    assert total.tolist() == [1.5, 0.75, 2.5, 0.75, 0.5] and num_failed == 0
    nan = np.nan
    np.testing.assert_array_equal(components["accuracy"], [1, nan, nan, nan, nan])
    np.testing.assert_array_equal(components["accuracy_2"], [nan, 1, nan, 1, nan])
    np.testing.assert_array_equal(components["says_nan"], [nan, nan, 1, nan, nan])
    np.testing.assert_array_equal(components["format"], [1] * 5)


@pytest.mark.parametrize(
    ("first", "last", "counts"), [(0, None, [0, 1, 2, 3, 4]), (3, None, [3, 4]), (2, 3, [2, 3]), (0, 1, [0, 1])]
)
def test_a_term_counts_from_its_first_to_its_last_step(first, last, counts):
    term = RewardTermConfig("format", 1.0, from_step=first, until_step=last)
    assert [step for step in range(5) if counts_at(term, step)] == counts
    with build_rewards(RewardConfig((RewardTermConfig("accuracy"), term))) as grader:
        totals = [grader.grade([prompt(0, "x")], [RIGHT], step=step).total[0] for step in range(5)]
    assert totals == [2.0 if step in counts else 1.0 for step in range(5)]


def test_a_preference_of_the_last_steps_leaves_the_others_as_they_are():
    """RL 2 of DeepSeek-R1: helpfulness on the summary, harmlessness on everything, both in the last steps only."""
    late = {"from_step": 1301, "sources": ("chat",)}
    cfg = RewardConfig(
        (
            RewardTermConfig("format"),
            RewardTermConfig("part_rewards:length", 1.0, on="summary", **late),
            RewardTermConfig("part_rewards:length", 1.0, **late),
        )
    )
    with build_rewards(cfg) as grader:
        before = grader.grade([prompt(0, "chat"), prompt(1, "math")], [RIGHT] * 2, step=1300)
        after = grader.grade([prompt(0, "chat"), prompt(1, "math")], [RIGHT] * 2, step=1301)
    assert before.total.tolist() == [1.0, 1.0] and np.isnan(before.components["length"]).all()
    assert after.total.tolist() == [1.0 + len("17") + len(RIGHT), 1.0]


@pytest.mark.parametrize(
    ("text", "prompt_text", "summary", "reasoning"),
    [
        (RIGHT, "", "17", "a"),
        ("a</think>\n b", "…<think>\n", "b", "a"),
        ("a</think>\n b", "", "b", "a"),
        ("<think>a", "", "", "a"),
        ("a", "…<think>", "", "a"),
        ("just an answer", "", "just an answer", ""),
        ("<answer> b </answer>", "", "b", ""),
        ("<think>a</think>So: <answer>b</answer>", "", "So: <answer>b</answer>", "a"),
        ("<think>a</think><answer>b", "", "<answer>b", "a"),
        ("<think>a</think>b</think>c", "", "c", "a</think>b"),
        ("</think>a<think>", "", "a<think>", ""),
        ("", "", "", ""),
        ("", "<think>", "", ""),
        ("</think>" * 100_000, "", "", "</think>" * 99_999),
    ],
)
def test_parts_of_a_response(text, prompt_text, summary, reasoning):
    assert summary_of(text, prompt_text) == summary
    assert reasoning_of(text, prompt_text) == reasoning


def test_values_that_the_stage_gives_are_weighed_like_any_other():
    cfg = RewardConfig(
        (RewardTermConfig("format", 0.5, sources=("b",)), RewardTermConfig("accuracy", 2.0, sources=("a",)))
    )
    prompts = [prompt(0, "a"), prompt(1, "b"), prompt(2, "a")]
    with build_rewards(cfg) as grader:
        given = {1: np.array([0.25, np.nan, -1.0])}
        total, components, _ = grader.grade(prompts, [WRONG] * 3, step=1, given=given)
        assert total.tolist() == [0.5, 0.5, -2.0]
        np.testing.assert_array_equal(components["accuracy"], [0.25, np.nan, -1.0])
        with pytest.raises(RewardError, match=r"'accuracy' returned nan, expected a finite number, at prompt 0"):
            grader.grade(prompts, [WRONG] * 3, step=1, given={1: np.full(3, np.nan)})


def group(source: str = "x", **components: list[float]) -> GradedGroup:
    rollout = Rollout(0, np.array([1, 2]), 1, np.zeros(1, np.float32), None, "stop", 0, text="t")
    count = len(next(iter(components.values())))
    values = {name: np.array(values) for name, values in components.items()}
    return GradedGroup(prompt(0, source), (rollout,) * count, np.nansum(list(values.values()), axis=0), values)


nan = float("nan")


@pytest.mark.parametrize(
    ("components", "right"),
    [
        ({"accuracy": [1, 0, 0.5], "format": [1, 1, 1]}, [1, 0, 0]),
        ({"format": [1, 1], "countdown": [0, 1]}, [0, 1]),
        ({"accuracy": [1, nan, nan], "countdown": [nan, 1, nan], "helpful": [9, 9, 9]}, [1, 1, nan]),
        ({"accuracy": [nan, 0], "accuracy_2": [1, nan], "accuracy_of_mine": [1, 1]}, [1, 0]),
        ({"format": [1], "language_consistency": [1], "judge": [0.5]}, [0]),
        ({"format": [1, 0], "token_count": [0.2, 1]}, [1, 0]),
        ({"judge": [1, nan], "other": [0, 0], "format": [1, 1]}, [1, 0]),
    ],
)
def test_who_says_what_is_right(components, right):
    graded = group(**components)
    np.testing.assert_array_equal(verdicts(graded), right)
    assert num_right(graded) == np.nansum(right)


POLICY = SimpleNamespace(flops=SimpleNamespace(forward=lambda num_tokens, context=0: 0.0))


def test_means_are_of_those_that_a_term_counts_for():
    """In metrics and in samples.jsonl; and those for which none counts are counted."""
    graded = [group(accuracy=[1.0, nan, nan], format=[nan, 1.0, nan]), group(accuracy=[0.0], format=[nan])]
    run = SimpleNamespace(cfg=RunConfig(), engine=SimpleNamespace(metrics={}), policy=POLICY)
    report, metrics = StepReport(cast(Any, run)), Metrics()
    report._of_rollouts(metrics, graded)
    found = metrics.result()
    assert (found["reward/accuracy/mean"], found["reward/format/mean"], found["reward/ungraded"]) == (0.5, 1.0, 1.0)
    rows = list(report.sample_rows([graded]))
    assert [row["components"] for row in rows] == [{"accuracy": 1.0}, {"format": 1.0}, {}, {"accuracy": 0.0}]
    assert num_ungraded(group(accuracy=[nan], overlong=[-1.0])) == 1


def test_sources_that_the_mixture_names_have_means_of_their_own():
    terms = (RewardTermConfig("accuracy", sources=("math/algebra", "chat")), RewardTermConfig("format"))
    run = SimpleNamespace(cfg=RunConfig(reward=RewardConfig(terms)), engine=SimpleNamespace(metrics={}), policy=POLICY)
    metrics = Metrics()
    groups = [group("math/algebra", accuracy=[1, 0]), group("math/algebra", accuracy=[1]), group("other", format=[1])]
    StepReport(cast(Any, run))._of_rollouts(metrics, groups)
    found = {name: value for name, value in metrics.result().items() if name.startswith("source/")}
    assert found == {
        "source/math_algebra/rewards/mean": pytest.approx(2 / 3),
        "source/math_algebra/response_length/mean": 1.0,
    }
    assert undocumented(found) == []
