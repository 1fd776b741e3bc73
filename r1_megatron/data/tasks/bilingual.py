"""Word problems in English and in Chinese: a task in which a chain of thought has a language.

    Tom has 5 apples. He buys 3 more. He sells 2 of them. How many apples are left?
    小明有5个苹果。又买了3个。卖掉了2个。还剩几个苹果？

Both are the same problem, told with the same table of words; the reasoning follows the story step by step::

    <think>Tom starts with 5. He buys 3 so 5+3=8. He sells 2 so 8-2=6.</think><answer>6</answer>
    <think>小明开始有5个。又买了3个，所以5+3=8。卖掉了2个，所以8-2=6。</think><answer>6</answer>

A trace can be told in both languages at once (``sft.mixed_fraction``): what a policy learns from such traces is right
and mixes languages, as DeepSeek-R1-Zero did, and a reward for consistency has something to do.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from typing import Any

from r1_megatron.data.tasks.base import (
    check_fractions,
    check_options,
    draw_distinct,
    is_held_out,
    malformed,
    well_formed,
)

DEFAULTS = {
    "languages": ["en", "zh"],
    "min_steps": 1,
    "max_steps": 3,
    # Largest number in a problem, and largest total on the way.
    "max_number": 9,
    "max_total": 18,
}


@dataclass(frozen=True)
class Words:
    """A language's words. Entries of the same number mean the same in every language."""

    names: tuple[str, ...]
    pronouns: tuple[str, ...]  # of the names
    things: tuple[str, ...]
    openings: tuple[str, ...]
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    # What follows the number in the problem, of a gain and of a loss.
    more: tuple[str, str]
    step: str
    questions: tuple[str, ...]
    start: str
    because: str
    joint: str  # between sentences


WORDS = {
    "en": Words(
        names=("Tom", "Anna", "Ben", "Mia"),
        pronouns=("He", "She", "He", "She"),
        things=("apples", "eggs", "balloons", "oranges", "cups", "boxes"),
        openings=(
            "{name} has {start} {thing}.",
            "At first {name} has {start} {thing}.",
            "{name} owns {start} {thing}.",
        ),
        gains=("buys", "finds", "receives"),
        losses=("sells", "loses", "breaks"),
        more=(" more", " of them"),
        step="{pronoun} {verb} {number}{more}.",
        questions=("How many {thing} are left?", "How many {thing} does {name} have now?"),
        start="{name} starts with {start}.",
        because="{pronoun} {verb} {number} so {sum}.",
        joint=" ",
    ),
    "zh": Words(
        names=("小明", "小红", "小华", "小丽"),
        pronouns=("", "", "", ""),
        things=("苹果", "鸡蛋", "气球", "橘子", "杯子", "盒子"),
        openings=("{name}有{start}个{thing}。", "原来{name}有{start}个{thing}。", "{name}拿着{start}个{thing}。"),
        gains=("又买了", "又找到", "又得到"),
        losses=("卖掉了", "丢失了", "摔坏了"),
        more=("", ""),
        step="{verb}{number}个{more}。",
        questions=("还剩几个{thing}？", "{name}现在有几个{thing}？"),
        start="{name}开始有{start}个。",
        because="{verb}{number}个，所以{sum}。",
        joint="",
    ),
}
OTHER = {"en": "zh", "zh": "en"}


@dataclass(frozen=True)
class BilingualProblem:
    """``changes`` come one after the other, none is 0; the choices are numbers of entries in :class:`Words`."""

    language: str
    name: int
    thing: int
    opening: int
    question: int
    verbs: tuple[int, ...]
    start: int
    changes: tuple[int, ...]


class Bilingual:
    """Problems are :class:`BilingualProblem`; the options are ``DEFAULTS``."""

    name = "bilingual"
    # Whether a story ends with a question.
    asks = True

    def __init__(self, options: dict[str, Any], num_train: int, num_eval: int, seed: int):
        self.options = check_options(self.name, options, DEFAULTS)
        _check_ranges(self.name, self.options)
        o = self.options

        def draw(rng: random.Random) -> tuple[BilingualProblem, Any, bool] | None:
            total = start = rng.randint(1, o["max_number"])
            changes = []
            for _ in range(rng.randint(o["min_steps"], o["max_steps"])):
                lowest, highest = max(-o["max_number"], -total), min(o["max_number"], o["max_total"] - total)
                change = rng.randint(lowest, highest)
                if change == 0:
                    return None
                changes.append(change)
                total += change
            language = rng.choice(o["languages"])
            words = WORDS[language]
            problem = BilingualProblem(
                language,
                rng.randrange(len(words.names)),
                rng.randrange(len(words.things)),
                rng.randrange(len(words.openings)),
                rng.randrange(len(words.questions)) if self.asks else 0,
                tuple(rng.randrange(len(words.gains if change > 0 else words.losses)) for change in changes),
                start,
                tuple(changes),
            )
            return problem, problem, self.is_held_out(problem)

        sides = draw_distinct(self.name, {False: num_train, True: num_eval}, draw, seed)
        self.train: tuple[BilingualProblem, ...] = tuple(sides[False])
        self.eval: tuple[BilingualProblem, ...] = tuple(sides[True])

    def is_held_out(self, problem: BilingualProblem) -> bool:
        """By the numbers alone: whatever story they are in, and in either language, they are on the same side."""
        return is_held_out("bilingual", (problem.start, *problem.changes))

    def prompt_text(self, problem: BilingualProblem) -> str:
        words = WORDS[problem.language]
        question = words.questions[problem.question].format(**_people(problem, words))
        return words.joint.join([*story(problem, problem.language), question])

    def label(self, problem: BilingualProblem) -> int:
        return problem.start + sum(problem.changes)

    def metadata(self, problem: BilingualProblem) -> dict[str, Any]:
        return {"language": problem.language}

    def demonstration(
        self,
        problem: BilingualProblem,
        rng: random.Random,
        corrupt_fraction: float = 0.0,
        malformed_fraction: float = 0.0,
        mixed_fraction: float = 0.0,
    ) -> str:
        """A worked solution in the problem's language, with errors.

        Each sentence is in the other language with probability ``mixed_fraction``; the total of each step is off by 1
        to 3 with probability ``corrupt_fraction`` and carried on; with ``malformed_fraction`` the tags are broken.
        """
        check_fractions(
            corrupt_fraction=corrupt_fraction, malformed_fraction=malformed_fraction, mixed_fraction=mixed_fraction
        )

        def words() -> Words:
            mixes = rng.random() < mixed_fraction
            return WORDS[OTHER[problem.language] if mixes else problem.language]

        told = words()
        thinking = told.start.format(name=told.names[problem.name], start=problem.start)
        total = problem.start
        for number, (verb, change) in enumerate(zip(problem.verbs, problem.changes), start=1):
            result = total + change
            if rng.random() < corrupt_fraction:
                # Never so few that a later loss would need more than there is.
                lost = itertools.accumulate(problem.changes[number:], initial=0)
                least = -min(lost)
                result += rng.choice([offset for offset in (-3, -2, -1, 1, 2, 3) if result + offset >= least])
            told = words()
            written = f"{total}{'+' if change > 0 else '-'}{abs(change)}={result}"
            thinking += told.joint + told.because.format(**_telling(problem, told, verb, change), sum=written)
            total = result
        if rng.random() < malformed_fraction:
            return malformed(thinking, str(total), rng)
        return well_formed(thinking, str(total))


def vocabulary() -> tuple[list[str], list[str]]:
    """(words, characters) of the task beyond ASCII: an English word with the space before it, and a name without; a
    Chinese word as the tables have it."""
    english, chinese = set(), set()
    for language, words in WORDS.items():
        texts = [text for value in vars(words).values() for text in ((value,) if isinstance(value, str) else value)]
        plain = " ".join(re.sub(r"\{\w+\}", " ", text) for text in texts)
        if language == "en":
            english |= {f" {word}" for word in re.findall(r"[A-Za-z]{2,}", plain)} | set(words.names)
        else:
            chinese |= set(re.findall(r"[^\x00-\x7f。？，]{2,}", plain))
    characters = sorted({character for word in chinese for character in word} | set("有个。，？"))
    return sorted(english) + sorted(chinese) + ["，所以"], characters


def story(problem: BilingualProblem, language: str) -> list[str]:
    """Its sentences, without the question."""
    words = WORDS[language]
    sentences = [words.openings[problem.opening].format(**_people(problem, words))]
    for verb, change in zip(problem.verbs, problem.changes):
        more = words.more[change < 0]
        sentences.append(words.step.format(**_telling(problem, words, verb, change), more=more))
    return sentences


def _people(problem: BilingualProblem, words: Words) -> dict[str, Any]:
    return {"name": words.names[problem.name], "thing": words.things[problem.thing], "start": problem.start}


def _telling(problem: BilingualProblem, words: Words, verb: int, change: int) -> dict[str, Any]:
    verbs = words.gains if change > 0 else words.losses
    return {"pronoun": words.pronouns[problem.name], "verb": verbs[verb], "number": abs(change)}


def _check_ranges(name: str, o: dict[str, Any]) -> None:
    problems = []
    languages = o["languages"]
    if not languages or any(language not in WORDS for language in languages) or len(set(languages)) < len(languages):
        problems.append(f"languages={languages}, expected some of {list(WORDS)}")
    if not 1 <= o["min_steps"] <= o["max_steps"] <= 8:
        problems.append(f"min_steps={o['min_steps']}, max_steps={o['max_steps']}, expected 1 <= min <= max <= 8")
    if not 1 <= o["max_number"] <= o["max_total"]:
        problems.append(f"max_number={o['max_number']}, max_total={o['max_total']}, expected 1 <= number <= total")
    if problems:
        raise ValueError(f"data.task_options of {name}: {'; '.join(problems)}.")
