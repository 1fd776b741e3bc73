"""Benchmarks as they are published, JSONL or parquet, to problems.

====================  ==================================================================  ============================
format                keys of a row                                                       label
====================  ==================================================================  ============================
aime                  ``problem``, ``answer``                                             a whole number, 0 to 999
math500               ``problem``, ``answer``, ``subject``, ``level``                     the answer, LaTeX
gsm8k                 ``question``, ``answer``                                            what follows ``####``
gpqa                  ``Question``, ``Correct Answer``, ``Incorrect Answer 1`` to ``3``,  the letter of the right one
                      or ``question``, ``options`` (four), ``answer`` (letter or number)
livecodebench         ``question_content``, ``starter_code``, ``public_test_cases``,      the tests
                      ``private_test_cases``, ``metadata``, ``difficulty``
====================  ==================================================================  ============================

Capitals of the keys do not matter, and ``question`` may stand for ``problem``. The options of a question of GPQA are
shuffled by a hash of its text: the same way in every evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from r1_megatron.config.schema import BenchmarkConfig, RunConfig
from r1_megatron.data.rows import find_files, raise_problems, read_rows
from r1_megatron.data.tasks.base import stable_hash
from r1_megatron.evaluation.unit_tests import read_tests
from r1_megatron.rewards.accuracy import parse_number

# Graded by the run's own reward; the others by themselves.
BY_REWARD = ("held_out", "prompts")
LETTERS = "ABCD"
# Held-out prompts are drawn with another seed than training prompts of the same number.
HELD_OUT_SEED = 7919

_STEP_BY_STEP = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
QUESTIONS = {
    # What DeepSeek-R1's model card recommends for mathematics.
    "aime": _STEP_BY_STEP,
    "math500": _STEP_BY_STEP,
    "gsm8k": _STEP_BY_STEP,
    # As in simple-evals, by which the R1 paper asks it.
    "gpqa": "Answer the following multiple choice question. The last line of your response should be of the following "
    "format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering.\n\n"
    "{problem}",
    "livecodebench": "{problem}",
}
# Keys by which results are broken down, in any format, if a row or its metadata has them.
GROUPS = ("source", "language", "subject", "level", "domain", "difficulty", "platform")


@dataclass(frozen=True)
class Problem:
    """One problem of a benchmark.

    Attributes:
        index: place in the file, from 0; it seeds the samples.
        key: a hash of question and label, the same wherever the problem stands: by it evaluations are compared.
        question: what is asked, without a template.
        groups: value by name, of :data:`GROUPS`.
    """

    index: int
    key: str
    question: str
    label: Any
    groups: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


def benchmarks_of(cfg: RunConfig) -> tuple[BenchmarkConfig, ...]:
    """What an evaluation asks: its benchmarks, or the held-out prompts as training does."""
    evaluate, sampling = cfg.evaluate, cfg.sampling
    return evaluate.benchmarks or (
        BenchmarkConfig(
            format="held_out",
            num_prompts=evaluate.num_prompts,
            samples_per_prompt=evaluate.samples_per_prompt,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        ),
    )


def seed_of(cfg: RunConfig, benchmark: BenchmarkConfig) -> int:
    """Of a benchmark's samples: no two have the same, and what else is asked does not change it."""
    if benchmark.is_as_in_training:
        return cfg.seed + HELD_OUT_SEED
    return stable_hash("evaluate", cfg.seed, benchmark.title) >> 2


class _Wrong(Exception):
    """What is wrong with a row, behind "line 7: "."""


# The text of the problem, the label, metadata for the grading.
_Read = tuple[str, Any, dict[str, Any]]


def load_problems(benchmark: BenchmarkConfig) -> list[Problem]:
    """The problems of a file of one of :data:`QUESTIONS`'s formats; the first ``num_prompts``.

    Raises:
        ValueError: names every bad line (the first 20 of them), what is wrong with it and the format's keys.
    """
    assert benchmark.path is not None, "validated"
    read, problems, complaints, seen = _READERS[benchmark.format], [], [], {}
    question = benchmark.question or QUESTIONS[benchmark.format]
    for where, row, _, _ in read_rows(find_files(benchmark.path, "evaluate.benchmarks"), complaints):
        try:
            text, label, metadata = read(_Row(row))
        except _Wrong as wrong:
            complaints.append(f"{where}: {wrong}")
            continue
        key = problem_key(text, label)
        if key in seen:
            complaints.append(f"{where}: the same problem as {seen[key]}. Remove one of them")
            continue
        seen[key] = where
        # Not str.format: problems are full of braces.
        asked = question.replace("{problem}", text)
        problems.append(Problem(len(problems), key, asked, label, groups_of(row), metadata))
    raise_problems(f"evaluate.benchmarks ({benchmark.title}, format {benchmark.format}): {benchmark.path}", complaints)
    if not problems:
        raise ValueError(f"evaluate.benchmarks ({benchmark.title}): {benchmark.path} has no rows. Give at least one.")
    return problems[: benchmark.num_prompts]


def problem_key(text: str, label: Any) -> str:
    return f"{stable_hash('problem', text, label):016x}"


def groups_of(row: Mapping[str, Any], source: str = "") -> dict[str, str]:
    """The values of :data:`GROUPS` among the keys of a row and its metadata."""
    inner = row.get("metadata")
    found = {**(inner if isinstance(inner, dict) else {}), **row}
    by_name = {str(key).lower(): value for key, value in found.items()}
    if "domain" not in by_name and "high-level domain" in by_name:
        by_name["domain"] = by_name["high-level domain"]
    if source:
        by_name.setdefault("source", source)
    return {name: str(by_name[name]) for name in GROUPS if isinstance(by_name.get(name), (str, int))}


class _Row:
    """A row whose keys' capitals do not matter."""

    def __init__(self, row: Mapping[str, Any]):
        self._values = {key.lower(): value for key, value in row.items()}
        self._names = sorted(row)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, *names: str) -> Any:
        """The value of the first name that there is."""
        for name in names:
            if name in self._values:
                return self._values[name]
        raise _Wrong(f"no {' or '.join(map(repr, names))} among the keys {self._names}")

    def text(self, *names: str) -> str:
        value = self.get(*names)
        if not isinstance(value, str) or not value.strip():
            raise _Wrong(f"{names[0]!r} is {value!r:.60}, expected text")
        return value.strip()


def _read_aime(row: _Row) -> _Read:
    answer = row.get("answer")
    number = parse_number(str(answer).strip()) if not isinstance(answer, bool) else None
    if number is None or number.denominator != 1 or not 0 <= number <= 999:
        raise _Wrong(f"'answer' is {answer!r:.60}, expected a whole number from 0 to 999")
    return row.text("problem", "question"), str(int(number)), {}


def _read_math(row: _Row) -> _Read:
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise _Wrong(f"'answer' is {answer!r:.60}, expected text")
    return row.text("problem", "question"), answer.strip(), {}


def _read_gsm8k(row: _Row) -> _Read:
    _, found, label = row.text("answer").rpartition("####")
    label = label.strip().replace(",", "")
    if not found or parse_number(label) is None:
        raise _Wrong(f"'answer' ends with {row.text('answer')[-40:]!r}, expected '#### ' and a number")
    return row.text("question", "problem"), label, {}


def _read_gpqa(row: _Row) -> _Read:
    if "correct answer" in row:
        options = [row.text("correct answer"), *(row.text(f"incorrect answer {i}") for i in (1, 2, 3))]
        right = options[0]
    else:
        options = row.get("options", "choices")
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise _Wrong("'options' is no list of texts")
        answer = row.get("answer")
        place = LETTERS.find(answer.strip().upper() or "?") if isinstance(answer, str) else answer
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(options):
            raise _Wrong(f"'answer' is {answer!r:.60}, expected a letter, A to D, or a place from 0")
        right = options[place]
    if len(options) != len(LETTERS) or len(set(options)) != len(options):
        raise _Wrong(f"{len(set(options))} different options, expected {len(LETTERS)}")
    question = row.text("question", "problem")
    shuffled = sorted(options, key=lambda option: stable_hash("options", question, option))
    listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, shuffled))
    return f"{question}\n\n{listed}", LETTERS[shuffled.index(right)], {}


def _read_livecodebench(row: _Row) -> _Read:
    question = row.text("question_content", "question")
    starter = row.get("starter_code") if "starter_code" in row else ""
    try:
        tests = read_tests(
            [row.get(name) for name in ("public_test_cases", "private_test_cases") if name in row],
            row.get("metadata") if "metadata" in row else None,
        )
    except ValueError as error:
        raise _Wrong(str(error)) from None
    if starter:
        how = "Write a Python solution that completes this code, and enclose it in a code block."
        how += f"\n\n```python\n{starter}\n```"
    else:
        how = "Write a Python program that reads from standard input and writes to standard output, and enclose it in "
        how += "a code block.\n\n```python\n# your code\n```"
    return f"{question}\n\n{how}", tests.label, tests.metadata


_READERS: dict[str, Callable[[_Row], _Read]] = {
    "aime": _read_aime,
    "math500": _read_math,
    "gsm8k": _read_gsm8k,
    "gpqa": _read_gpqa,
    "livecodebench": _read_livecodebench,
}
