"""Translation: the stories of ``bilingual`` told in the other language, as a task without reasoning.

    zh: Tom has 5 apples. He sells 2 of them.  ->  <think></think><answer>小明有5个苹果。卖掉了2个。</answer>

The entries of the two tables of words answer each other one by one, so there is one right translation. It stands for
what DeepSeek-R1 learns beside reasoning (arXiv 2501.12948v2, appendix B.3: writing, questions about facts, translation,
with no chain of thought where a question needs none), and for prompts whose answers a reward model judges.
"""

from __future__ import annotations

import random
from typing import Any

from r1_megatron.data.tasks.base import check_fractions, malformed, well_formed
from r1_megatron.data.tasks.bilingual import OTHER, WORDS, Bilingual, BilingualProblem, story

_DIGITS = "123456789"


class Translation(Bilingual):
    """Problems are :class:`BilingualProblem`, whose language is the one that is translated from; the options are those
    of ``bilingual``."""

    name = "translation"
    asks = False

    def prompt_text(self, problem: BilingualProblem) -> str:
        told = WORDS[problem.language].joint.join(story(problem, problem.language))
        return f"{OTHER[problem.language]}: {told}"

    def label(self, problem: BilingualProblem) -> str:
        target = OTHER[problem.language]
        return WORDS[target].joint.join(story(problem, target))

    def metadata(self, problem: BilingualProblem) -> dict[str, Any]:
        """The language of the answer."""
        return {"language": OTHER[problem.language]}

    def demonstration(
        self,
        problem: BilingualProblem,
        rng: random.Random,
        corrupt_fraction: float = 0.0,
        malformed_fraction: float = 0.0,
        mixed_fraction: float = 0.0,
    ) -> str:
        """The translation, with errors: each sentence stays as it was with probability ``mixed_fraction`` and has a
        wrong number with ``corrupt_fraction``; with ``malformed_fraction`` the tags are broken."""
        check_fractions(
            corrupt_fraction=corrupt_fraction, malformed_fraction=malformed_fraction, mixed_fraction=mixed_fraction
        )
        target = OTHER[problem.language]
        written = []
        for here, there in zip(story(problem, problem.language), story(problem, target)):
            sentence = here if rng.random() < mixed_fraction else there
            wrong = rng.random() < corrupt_fraction
            written.append(_with_wrong_number(sentence, rng) if wrong else sentence)
        answer = WORDS[target].joint.join(written)
        if rng.random() < malformed_fraction:
            return malformed("", answer, rng)
        return well_formed("", answer)


def _with_wrong_number(sentence: str, rng: random.Random) -> str:
    """Every sentence has one number; another first digit makes it a wrong one."""
    place = next(i for i, character in enumerate(sentence) if character.isdigit())
    digit = rng.choice([digit for digit in _DIGITS if digit != sentence[place]])
    return sentence[:place] + digit + sentence[place + 1 :]
