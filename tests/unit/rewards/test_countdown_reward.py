"""The Countdown verifier against a brute-force reference, and against text that tries to break it."""

from __future__ import annotations

import ast
import operator
import random
from fractions import Fraction

import pytest

from r1_megatron.rewards.countdown import ExpressionError, countdown_reward, evaluate

LABEL = {"numbers": [3, 7, 12], "target": 16}


def reward(answer: str, label=LABEL) -> float:
    return countdown_reward(["3,7,12=16"], [f"<think>x</think><answer>{answer}</answer>"], [label], [{}])[0]


def reference(expression: str) -> Fraction | None:
    """Value by Python's own grammar, over its syntax tree; ``None`` for a division by zero."""
    operations = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        assert isinstance(node, ast.BinOp)
        return operations[type(node.op)](value(node.left), value(node.right))

    try:
        return value(ast.parse(expression, mode="eval").body)
    except ZeroDivisionError:
        return None


def random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        return str(rng.randrange(13))
    left, right = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    text = f"{left}{rng.choice(['+', ' - ', '*', '/'])}{right}"
    return f"({text})" if rng.random() < 0.5 else text


def test_value_equals_an_independent_evaluation():
    rng = random.Random(0)
    num_zero_divisions = 0
    for _ in range(500):
        expression = random_expression(rng, 4)
        if len(expression) > 256:
            continue
        expected = reference(expression)
        if expected is None:
            num_zero_divisions += 1
            with pytest.raises(ExpressionError, match="division by zero"):
                evaluate(expression)
        else:
            assert evaluate(expression) == expected, expression
    assert num_zero_divisions > 10


@pytest.mark.parametrize(
    "answer", ["12+7-3", "(12 + 7) - 3", "7+(12-3)", "12−3+7", "\n7 - 3 + 12 ", "((12)+(7)) – 3", "12*(7-3)/3*1"][:-1]
)
def test_right_answers(answer):
    assert reward(answer) == 1.0


def test_unicode_operators_and_exact_fractions():
    assert reward("8÷(3−8÷3)", {"numbers": [3, 3, 8, 8], "target": 24}) == 1.0  # Floating point gives 23.999...
    assert reward("6 × 4 ⋅ 1", {"numbers": [1, 4, 6], "target": 24}) == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        "16",  # the target itself
        "12+7",  # a number left out
        "12+7-3+3-3",  # a number used again
        "12+7-3=16",
        "-3+12+7",  # unary minus is no operator of the game
        "12+7-3.0",
        "1 2+7-3",
        "12+7-3)",
        "(12+7-3",
        "",
        "()",
        "12+7-",
        "12 7 3",
        "12+7**3",
        "12//7-3",
        "１２+７-３",  # full-width digits
        "12+٧-3",  # Arabic-Indic seven
        "12+7-3 # because",
        "__import__('os').system('true')",
        "12+7-3 if True else 0",
        "nan",
        "3/(7-7)*12",
        "9**9**9**9",
        "9" * 5000,
        "(" * 10_000 + "12+7-3" + ")" * 10_000,
        "(" * 100 + "12+7-3" + ")" * 100,
        "1" + "+1" * 5000,
        "12+7-3\x00",
    ],
)
def test_wrong_and_hostile_answers(answer):
    assert reward(answer) == 0.0


def test_only_the_last_answer_counts():
    text = "<answer>12+7-3</answer> no: <answer>12+7+3</answer>"
    assert countdown_reward([""], [text], [LABEL], [{}]) == [0.0]
    assert countdown_reward([""], ["12+7-3"], [LABEL], [{}]) == [0.0]


def test_operators_may_be_restricted():
    label = {"numbers": [2, 3], "target": 6, "operators": "+-"}
    assert reward("2*3", label) == 0.0
    assert reward("2*3", {**label, "operators": "+*"}) == 1.0


def test_division_by_zero_of_given_numbers():
    assert reward("3/(7-7)", {"numbers": [3, 7, 7], "target": 0}) == 0.0


@pytest.mark.parametrize(
    "label", [None, 16, "16", {}, {"numbers": [], "target": 1}, {"numbers": [1, "2"], "target": 3}, {"numbers": [1]}]
)
def test_a_label_of_another_shape_is_an_error_of_the_data(label):
    with pytest.raises(ValueError, match=r"expected {'numbers'"):
        reward("1", label)
