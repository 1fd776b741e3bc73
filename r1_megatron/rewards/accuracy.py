r"""Accuracy reward: is the final answer the label?

The answer is the last ``<answer>...</answer>`` behind the reasoning, else the last ``\boxed{}`` there. Two ways to
compare:

* ``exact``: the answer is a number literal and equals the label as a rational number, or it is the same text. Bounded
  work, done in the training process.
* ``math``: besides, the math-verify library decides whether two pieces of LaTeX mean the same. That is computer
  algebra on text that a policy wrote: it runs in a worker process which is killed when it takes too long, and it is
  reached through the LaTeX grammar only, because the plain-expression path of that library ends in Python's ``eval``.
  It rounds to six digits and takes the last of several formulae, so two rational numbers are compared here, exactly,
  and an answer of several formulae between dollars is wrong.

``auto`` takes ``exact`` for labels that are JSON numbers (then ``8+9`` is not an answer to ``17``) and ``math`` for
labels that are text.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from r1_megatron.rewards.extract import final_answer

Method = Literal["auto", "exact", "math"]
METHODS = ("auto", "exact", "math")
# Longer answers are wrong: no label is.
MAX_LENGTH = 1000
MAX_NUMBER_LENGTH = 40
# Seconds for one math-verify step, whole seconds because it sets an alarm clock.
STEP_TIMEOUT_S = 3

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?", re.ASCII)
_INTEGER = r"\s*[+-]?\d{1,40}\s*"
_FRACTION = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<whole>\d{0,40})\s*\\[dt]?frac\s*"
    rf"(?:(?P<digits>\d)\s*(?P<digit>\d)|(?:\{{(?P<over>{_INTEGER})\}}|(?P<short>\d))\s*\{{(?P<under>{_INTEGER})\}})"
    rf"|(?P<slash_over>{_INTEGER})/(?P<slash_under>{_INTEGER})",
    re.ASCII,
)
_NAMED = re.compile(r"[A-Za-z]\s*=\s*")
_DOLLARS = re.compile(r"(?<!\\)\$+")
_HAS_MATHEMATICS = re.compile(r"[\d\\]|(?<![A-Za-z])[B-HJ-Zb-z](?![A-Za-z])")
# What makes computer algebra run for ever: powers and factorials of big numbers, towers of powers.
_EXPLOSIVE = re.compile(r"(\^|\*\*)[\s{(+-]*\d{4}|\d{3}\)?\s*!|!\s*!|\^[\s{(]*\d+[\s})]*\^", re.ASCII)


def accuracy_reward(
    prompts: Sequence[str],
    completions: Sequence[str],
    labels: Sequence[Any],
    metadata: Sequence[dict[str, Any]],
    method: Method = "auto",
) -> list[float]:
    """1 where the final answer equals the label, else 0.

    Raises:
        ValueError: a label is neither text nor a number (an error of the data, not of the policy).
    """
    return [
        _grade(completion, label, method, prompt)
        for prompt, completion, label in zip(prompts, completions, labels, strict=True)
    ]


def settle(completion: str, label: Any, method: Method = "auto", prompt: str = "") -> float | None:
    """The reward where a comparison of text and numbers decides it; ``None`` where it takes computer algebra."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {METHODS}")
    if isinstance(label, bool) or not isinstance(label, (str, int, float)):
        raise ValueError(f"label {label!r:.100} is a {type(label).__name__}, expected text or a number")
    expected = str(label).strip()
    if not expected:
        raise ValueError("the label is empty text")
    answer = final_answer(completion, prompt)
    if not answer or len(answer) > MAX_LENGTH:
        return 0.0
    answer = _strip_dollars(answer)
    expected = _strip_dollars(expected)
    if answer == expected:
        return 1.0
    answer_number, expected_number = parse_number(answer), parse_number(expected)
    if answer_number is not None and expected_number is not None:
        return float(answer_number == expected_number)
    if method == "exact" or (method == "auto" and not isinstance(label, str)):
        return 0.0
    if not answer or _EXPLOSIVE.search(answer) or _is_several(answer):
        return 0.0
    return None


def _grade(completion: str, label: Any, method: Method, prompt: str) -> float:
    settled = settle(completion, label, method, prompt)
    if settled is not None:
        return settled
    answer = final_answer(completion, prompt)
    assert answer is not None
    return float(_same_mathematics(_strip_dollars(str(label).strip()), _strip_dollars(answer)))


def parse_number(text: str) -> Fraction | None:
    """A decimal number literal (ASCII digits, optional sign, thousands commas, decimals), exactly; else ``None``."""
    if len(text) > MAX_NUMBER_LENGTH or not _NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", ""))


def parse_rational(text: str) -> Fraction | None:
    r"""A number literal, ``\frac{a}{b}``, ``a/b`` or a mixed number of whole ones, exactly; ``x =`` in front is left
    out; else ``None``."""
    text = _NAMED.sub("", text.strip(), count=1) if _NAMED.match(text.strip()) else text.strip()
    number = parse_number(text)
    if number is not None or len(text) > 4 * MAX_NUMBER_LENGTH:
        return number
    match = _FRACTION.fullmatch(text)
    if match is None:
        return None
    over = match["digits"] or match["over"] or match["short"] or match["slash_over"]
    under = match["digit"] or match["under"] or match["slash_under"]
    if int(under) == 0 or (match["whole"] and (int(over) < 0 or int(under) < 0)):
        return None
    value = int(match["whole"] or 0) + Fraction(int(over), int(under))
    return -value if match["sign"] == "-" else value


def _is_several(answer: str) -> bool:
    """Whether dollars part it into several formulae; an escaped one is a currency."""
    parts = _DOLLARS.split(answer)
    return len(parts) > 3 or sum(_HAS_MATHEMATICS.search(part) is not None for part in parts) > 1


def _strip_dollars(text: str) -> str:
    for fence in ("$$", "$"):
        if text.startswith(fence) and text.endswith(fence) and len(text) > 2 * len(fence):
            return text[len(fence) : -len(fence)].strip()
    return text


def _same_mathematics(expected: str, answer: str) -> bool:
    rationals = parse_rational(expected), parse_rational(answer)
    if None not in rationals:
        return rationals[0] == rationals[1]
    import math_verify
    from math_verify.errors import TimeoutException

    # Its time limit is SIGALRM, which only the main thread can set; elsewhere the caller's limit has to do.
    limit = STEP_TIMEOUT_S if threading.current_thread() is threading.main_thread() else None
    grammar = [math_verify.LatexExtractionConfig()]
    try:
        gold, target = (
            math_verify.parse(f"${text}$", extraction_config=grammar, parsing_timeout=limit)
            for text in (expected, answer)
        )
        return bool(gold and target) and math_verify.verify(gold, target, timeout_seconds=limit)
    except (TimeoutException, RecursionError):  # The first is a BaseException.
        return False
