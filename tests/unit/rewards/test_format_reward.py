from __future__ import annotations

import pytest

from r1_megatron.rewards.extract import boxed_answer, final_answer, tagged_answer
from r1_megatron.rewards.format import format_reward


def reward(completion: str, prompt: str = "User: 1+1= Assistant:") -> float:
    return format_reward([prompt], [completion], [None], [{}])[0]


@pytest.mark.parametrize(
    "completion",
    [
        "<think>a</think><answer>b</answer>",
        " \n<think>\na\n</think>\n\n<answer> b </answer>\n",
        "<think></think><answer></answer>",
        "<think>1 < 2 > 0 </thin></think><answer>b</answer>",
    ],
)
def test_well_formed(completion):
    assert reward(completion) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "b",
        "<think>a</think>",
        "<answer>b</answer>",
        "<answer>b</answer><think>a</think>",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer>",
        "<think>a<answer>b</answer></think>",
        "</think>a<think><answer>b</answer>",
        "<think>a</think></answer>b<answer>",
        "<think>a</think>so<answer>b</answer>",
        "x<think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer>.",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>b</answer>",
        "<think><think>a</think><answer>b</answer>",
        "<Think>a</Think><Answer>b</Answer>",
        "<think>" * 20_000,
    ],
)
def test_malformed(completion):
    assert reward(completion) == 0.0


def test_the_prompt_may_have_opened_the_thinking():
    assert reward("a</think><answer>b</answer>", "<|Assistant|><think>\n") == 1.0
    assert reward("<think>a</think><answer>b</answer>", "<|Assistant|><think>\n") == 0.0
    assert reward("a</think><answer>b</answer>") == 0.0


def test_extraction():
    assert tagged_answer("<answer>1</answer> <answer> 2 </answer> <answer>3") == "2"
    assert tagged_answer("</answer><answer>") is None
    assert boxed_answer(r"\boxed{1} \boxed{\frac{1}{2}} }") == r"\frac{1}{2}"
    assert boxed_answer(r"\boxed{\frac{1}{2}") is None
    assert final_answer(r"<think>\boxed{1}</think> so \boxed{2}") == "2"
    assert final_answer(r"<think>\boxed{1}</think> so 2") is None
    assert final_answer(r"<think></think><answer>It is $\boxed{7}$.</answer>") == "7"
    assert final_answer("\\boxed{" * 10_000) is None
