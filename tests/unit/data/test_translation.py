"""Stories told in the other language: a dictionary that is not the task's agrees, the noise is what it says."""

from __future__ import annotations

import random
import re

import pytest

from r1_megatron.config.schema import TokenizerConfig
from r1_megatron.data.tasks import build_task
from r1_megatron.data.tokenizers import build_tokenizer
from r1_megatron.rewards.accuracy import accuracy_reward
from r1_megatron.rewards.format import format_reward
from r1_megatron.rewards.language import language_consistency

TASK = build_task("translation", {}, 600, 200, seed=1)
DICTIONARY = {
    "Tom": "小明", "Anna": "小红", "Ben": "小华", "Mia": "小丽", "apples": "苹果", "eggs": "鸡蛋", "balloons": "气球",
    "oranges": "橘子", "cups": "杯子", "boxes": "盒子", "has": "有", "owns": "拿着", "At first": "原来",
    "buys": "又买了", "finds": "又找到", "receives": "又得到", "sells": "卖掉了", "loses": "丢失了", "breaks": "摔坏了",
}  # fmt: skip


def content(text: str) -> list[str]:
    """Numbers and words in their order, in Chinese; what has no counterpart is left out."""
    known = "|".join([*DICTIONARY, *DICTIONARY.values(), r"\d+"])
    return [DICTIONARY.get(word, word) for word in re.findall(known, text)]


def test_answers_say_the_same_in_the_other_language():
    rng = random.Random(0)
    for problem in (*TASK.train, *TASK.eval):
        prompt, label, trace = TASK.prompt_text(problem), TASK.label(problem), TASK.demonstration(problem, rng)
        language, text = prompt.split(": ", 1)
        assert language == TASK.metadata(problem)["language"] != problem.language
        assert sorted(content(text)) == sorted(content(label)), (text, label)
        numbers = [re.findall(r"\d+", written) for written in (text, label)]
        assert numbers[0] == numbers[1] == [str(n) for n in (problem.start, *map(abs, problem.changes))]
        assert accuracy_reward([""], [trace], [label], [{}], method="exact") == [1.0]
        assert format_reward([""], [trace], [None], [{}]) == [1.0]
        assert language_consistency([prompt], [trace], [None], [TASK.metadata(problem)]) == [1.0]


def test_every_prompt_has_one_answer_and_no_story_of_held_out_numbers_is_learned():
    prompts = [TASK.prompt_text(problem) for problem in (*TASK.train, *TASK.eval)]
    assert len(set(prompts)) == len(prompts) == 800
    stories = build_task("bilingual", {}, 600, 200, seed=2)
    learned = {(problem.start, *problem.changes) for task in (TASK, stories) for problem in task.train}
    assert not learned & {(problem.start, *problem.changes) for task in (TASK, stories) for problem in task.eval}


def test_noise_has_the_stated_rate():
    rng = random.Random(0)
    untranslated = wrong = broken = sentences = 0
    for problem in TASK.train:
        language = TASK.metadata(problem)
        label = TASK.label(problem)
        mixed = TASK.demonstration(problem, rng, mixed_fraction=0.3)
        parts = [part for part in re.split(r"[.。]", re.sub("</?(think|answer)>", "", mixed)) if part.strip()]
        untranslated += sum(bool(re.search("[a-zA-Z]", part)) != (language["language"] == "en") for part in parts)
        sentences += len(parts)
        corrupt = TASK.demonstration(problem, rng, corrupt_fraction=0.3)
        differ = [a != b for a, b in zip(re.findall(r"\d+", corrupt), re.findall(r"\d+", label), strict=True)]
        wrong += sum(differ)
        assert accuracy_reward([""], [corrupt], [label], [{}], method="exact") == [float(not any(differ))]
        broken += format_reward([""], [TASK.demonstration(problem, rng, malformed_fraction=0.5)], [None], [{}]) == [0.0]
    bound = 3 * (0.21 / sentences) ** 0.5
    assert abs(untranslated / sentences - 0.3) < bound and abs(wrong / sentences - 0.3) < bound
    assert 0.5 - 3 * (0.25 / 600) ** 0.5 < broken / 600 < 0.5 + 3 * (0.25 / 600) ** 0.5
    with pytest.raises(ValueError, match=r"sft.corrupt_fraction=-1"):
        TASK.demonstration(TASK.train[0], rng, corrupt_fraction=-1)


def test_written_by_the_bilingual_tokenizer():
    tokenizer = build_tokenizer(TokenizerConfig("bilingual"))
    rng = random.Random(0)
    for problem in TASK.train:
        for text in (TASK.prompt_text(problem), TASK.demonstration(problem, rng, 0.3, 0.3, 0.3)):
            tokens = tokenizer.encode(text)
            assert tokenizer.decode(tokens) == text and tokenizer.unk_id not in tokens and len(tokens) < 100


def test_bad_options_name_the_task():
    with pytest.raises(ValueError, match=r"task_options of translation: languages=\['de'\]"):
        build_task("translation", {"languages": ["de"]}, 10, 5, 1)
