"""Accuracy: the literal path in this process, math-verify in a worker, hostile answers on both."""

from __future__ import annotations

import builtins
import threading
from fractions import Fraction

import pytest

from r1_megatron.config.schema import RewardConfig, RewardTermConfig
from r1_megatron.rewards import accuracy
from r1_megatron.rewards.accuracy import accuracy_reward, settle
from r1_megatron.rewards.base import RewardError, build_rewards
from r1_megatron.types import Prompt


def tagged(answer: str) -> str:
    return f"<think>hm</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("17", 17, 1.0),
        (" 17 ", "17", 1.0),
        ("+17", 17, 1.0),
        ("017", 17, 1.0),
        ("17.0", 17, 1.0),
        ("$17$", 17, 1.0),
        (r"\boxed{17}", 17, 1.0),
        ("1,234", 1234, 1.0),
        ("-3", -3, 1.0),
        ("0.5", 0.5, 1.0),
        ("18", 17, 0.0),
        ("8+9", 17, 0.0),  # JSON numbers take a literal, not a calculation.
        ("1 7", 17, 0.0),
        ("1,7", 17, 0.0),
        ("17 or 18", 17, 0.0),
        ("", 17, 0.0),
        ("１７", 17, 0.0),  # full-width digits
        ("1e1", 10, 0.0),
        ("nan", 17, 0.0),
        ("inf", 17, 0.0),
        ("9" * 100_000, 17, 0.0),
        ("(" * 10_000, 17, 0.0),
        ("10^10^10", "17", 0.0),
        ("99999999!", "17", 0.0),
        ("9^{9^{9^{9}}}", "17", 0.0),
        ("2^{99999}", "17", 0.0),
        ("x" * 2000, "17", 0.0),
    ],
)
def test_settled_without_computer_algebra(answer, label, expected):
    assert settle(tagged(answer), label) == expected


def test_large_whole_numbers_are_compared_exactly():
    assert settle(tagged("9007199254740993"), 9007199254740992) == 0.0
    assert settle(tagged("9007199254740993"), 9007199254740993) == 1.0


@pytest.mark.parametrize("answer", [r"x^2y^3z^4", r"x^{2}+y^{3}+z^{4}", r"2^{10}", r"\frac{1}{2}", "10!"])
def test_ordinary_mathematics_is_not_taken_for_an_explosion(answer):
    assert settle(tagged(answer), "17") is None
    assert settle(tagged(answer), "17", "exact") == 0.0


@pytest.mark.parametrize("label", [None, True, [1], {"a": 1}, "", "  "])
def test_a_label_that_is_none_is_an_error_of_the_data(label):
    with pytest.raises(ValueError, match="label"):
        settle(tagged("1"), label)


EQUAL = [(r"\frac{1}{2}", "1/2"), ("0.5", r"\frac12"), ("(x+1)^2", "x^2+2x+1"), (r"2\sqrt{2}", r"\sqrt{8}")]
DIFFERENT = [(r"\frac{1}{3}", "1/2"), ("(x+1)^2", "x^2+1"), (r"\}{", "1/2"), (r"\text{print(1)}", "1/2")]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.5", (1, 2)),
        (r"\frac{1}{2}", (1, 2)),
        (r"\frac12", (1, 2)),
        (r"\tfrac1{2}", (1, 2)),
        (r"-\dfrac{ 3 }{-6}", (1, 2)),
        ("x = 2/4", (1, 2)),
        (r"1\frac{1}{2}", (3, 2)),
        (r"-1\frac12", (-3, 2)),
        ("1,234.5", (2469, 2)),
        (r"\frac{1}{0}", None),
        (r"\frac{x}{2}", None),
        (r"\frac{1}{2}+1", None),
        (r"1\frac{-1}{2}", None),
        (r"\frac{" + "9" * 41 + "}{2}", None),
        ("１/２", None),
        ("1/2/3", None),
        ("", None),
    ],
)
def test_rational_numbers(text, value):
    assert accuracy.parse_rational(text) == (None if value is None else Fraction(*value))


def test_math_verify_decides_latex():
    texts, labels = zip(*EQUAL, *DIFFERENT, strict=True)
    values = accuracy_reward([""] * len(texts), [tagged(t) for t in texts], labels, [{}] * len(texts))
    assert values == [1.0] * len(EQUAL) + [0.0] * len(DIFFERENT)


def test_math_verify_works_outside_the_main_thread():
    values: list[float] = []
    thread = threading.Thread(
        target=lambda: values.extend(accuracy_reward([""], [tagged(r"\frac{1}{2}")], ["1/2"], [{}]))
    )
    thread.start()
    thread.join(60)
    assert values == [1.0]


@pytest.mark.parametrize(
    "answer", ["__import__('os').system('true')", "exec('1')", "().__class__", "1+1", "x.real", "lambda: 0"]
)
def test_no_answer_reaches_eval(answer, monkeypatch):
    accuracy_reward([""], [tagged(r"\frac{1}{2}")], ["1/3"], [{}])  # Imports may compile code.

    def refuse(*_, **__):
        raise AssertionError("eval of model output")

    import sympy.parsing.sympy_parser as sympy_parser

    monkeypatch.setattr(sympy_parser, "eval_expr", refuse)
    monkeypatch.setattr(builtins, "eval", refuse)
    accuracy_reward([""], [tagged(answer)], ["1/3"], [{}])


def prompt(label, index=0) -> Prompt:
    return Prompt(index=index, text="q", tokens=(1,), label=label)


def test_grader_uses_the_worker_only_where_it_must(monkeypatch):
    with build_rewards(RewardConfig(terms=(RewardTermConfig("accuracy"),))) as grader:
        worker = grader._terms["accuracy"][1]._worker
        total, _, num_failed = grader.grade([prompt(17), prompt(17)], [tagged("17"), tagged("8+9")])
        assert total.tolist() == [1.0, 0.0] and num_failed == 0
        assert worker._process is None
        total, _, _ = grader.grade([prompt("1/2")] * 2, [tagged(r"\frac12"), tagged(r"\frac13")])
        assert total.tolist() == [1.0, 0.0]
        assert worker._process is not None


def test_an_answer_that_never_ends_is_wrong_and_fails_nothing(tmp_path, monkeypatch):
    """The worker's function is replaced by one that hangs on one answer and dies on another."""
    (tmp_path / "stuck_algebra.py").write_text(
        "import os\n"
        "def grade(prompts, completions, labels, metadata):\n"
        "    while 'hang' in completions[0]: pass\n"
        "    if 'die' in completions[0]: os._exit(9)\n"
        "    return [1.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("r1_megatron.rewards.terms.ANSWER_TIMEOUT_S", 1.5)
    with build_rewards(RewardConfig(terms=(RewardTermConfig("accuracy"),))) as grader:
        grader._terms["accuracy"][1]._worker._function = "stuck_algebra:grade"
        answers = ["fine_1", "hang", "die", "fine_2"]
        total, _, num_failed = grader.grade([prompt("z")] * 4, [tagged(answer) for answer in answers])
    assert total.tolist() == [1.0, 0.0, 0.0, 1.0] and num_failed == 0


def test_a_bad_label_names_the_prompt():
    with (
        build_rewards(RewardConfig(terms=(RewardTermConfig("accuracy"),))) as grader,
        pytest.raises(RewardError, match=r"'accuracy'.*label None.*prompt 42 .*completion 1 of 2"),
    ):
        grader.grade([prompt(17, 41), prompt(None, 42)], [tagged("17"), tagged("17")])


def test_methods():
    assert accuracy.METHODS == ("auto", "exact", "math")
    assert settle(tagged("8+9"), 17, "math") is None
    with pytest.raises(ValueError, match="expected one of"):
        settle(tagged("1"), 1, "sometimes")
