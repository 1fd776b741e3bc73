"""Hostile responses never crash, hang or fool a reward. Every case of the table says what is right, and why.

The table: ``hostile_text.py`` and ``hostile_code.py``. The whole of each reward's part is one batch, as a policy that
has gone wrong would send it: what one response does may not touch another's score.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from r1_megatron.config.schema import RewardConfig, RewardTermConfig
from r1_megatron.rewards.base import build_rewards
from r1_megatron.rewards.sandbox.isolation import SandboxError
from r1_megatron.rewards.sandbox.probe import find_sandbox
from r1_megatron.types import Prompt
from tests.unit.rewards import hostile_code, hostile_text

TABLE = {
    "accuracy": hostile_text.ACCURACY,
    "countdown": hostile_text.COUNTDOWN,
    "format": hostile_text.FORMAT,
    "language_consistency": hostile_text.LANGUAGE,
    "token_count": hostile_text.TOKEN_COUNT,
    "code": hostile_code.CASES,
}
OPTIONS = {
    "code": {"time_s": 1, "memory_mb": 256, "disk_mb": 4, "parallel": 4},
    "token_count": {"schedule": [[1, 100]], "tolerance": 50},
}


def test_the_table_is_long_enough_and_names_are_unique():
    assert sum(map(len, TABLE.values())) >= 150
    for cases in TABLE.values():
        assert len({case.name for case in cases}) == len(cases)


def _language(reward: str, case: hostile_code.Case) -> dict[str, str]:
    """The label of a case for ``language_consistency`` is the language that is asked for."""
    return {"language": case.label if reward == "language_consistency" and isinstance(case.label, str) else "en"}


@pytest.mark.parametrize("reward", TABLE)
def test_scores(reward: str):
    if reward == "code":
        try:
            find_sandbox()
        except SandboxError as error:
            pytest.skip(str(error))
    cases = TABLE[reward]
    term = RewardTermConfig(reward, options=OPTIONS.get(reward, {}))
    with build_rewards(RewardConfig((term,), timeout_s=300)) as grader:
        prompts = [Prompt(i, "", (), case.label, metadata=_language(reward, case)) for i, case in enumerate(cases)]
        grades = grader.grade(prompts, [case.response for case in cases], step=1, num_tokens=[100] * len(cases))
    wrong = [
        f"{case.name}: {score}, expected {case.score}, because {case.why}"
        for case, score in zip(cases, grades.total)
        if score != case.score
    ]
    assert not wrong, "\n".join(wrong)
    assert not Path("/tmp/r1-megatron-injected").exists()
