"""Which prompts a benchmark asks of those there are."""

from __future__ import annotations

import pytest

from r1_megatron.config.schema import BenchmarkConfig
from r1_megatron.stages.benchmarks import of_sources
from r1_megatron.types import Prompt

PROMPTS = [Prompt(i, f"{i}?", (i,), i, {}, source=("math", "chat", "math")[i % 3]) for i in range(9)]


@pytest.mark.parametrize(
    ("benchmark", "indices"),
    [
        ({}, range(9)),
        ({"num_prompts": 4}, range(4)),
        ({"sources": ("chat",)}, (1, 4, 7)),
        ({"sources": ("chat", "math"), "num_prompts": 2}, (0, 1)),
        ({"sources": ("chat",), "num_prompts": 2}, (1, 4)),
    ],
)
def test_prompts_of_some_sources(benchmark, indices):
    found = of_sources(PROMPTS, BenchmarkConfig(format="held_out", **benchmark))
    assert [prompt.label for prompt in found] == list(indices)
    assert [prompt.index for prompt in found] == list(range(len(found)))


def test_none_of_a_source():
    with pytest.raises(ValueError, match=r"no prompt is of sources=\['chats'\]. Those there are: chat, math\."):
        of_sources(PROMPTS, BenchmarkConfig(format="held_out", name="chats", sources=("chats",)))
