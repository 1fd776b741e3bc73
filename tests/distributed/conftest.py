"""References computed once, and one pool call per layout for all that is measured on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.layouts import LAYOUTS, PLAN, world_size
from tests.distributed.references import write_references
from tests.rank_pool import RankPool


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("references") / "references.pt"
    write_references(path)
    return path


@pytest.fixture(scope="session")
def measured(ranks: RankPool, references: Path) -> Callable[[str, str], list[dict[str, Any]]]:
    """``measured(layout, check)``: what each rank answered.

    The first question about a layout runs all its checks in one call. If that fails, every check runs by itself, so
    that one failure does not hide the others.
    """
    answers: dict[tuple[str, str], Any] = {}

    def run(layout: str, checks: Sequence[str], timeout_s: float) -> None:
        parallel = LAYOUTS[layout]
        try:
            found = ranks.run(
                "tests.distributed.train_checks:run",
                world_size(parallel),
                timeout_s=timeout_s,
                parallel=parallel,
                path=str(references),
                names=checks,
            )
        except Exception as error:
            if len(checks) == 1:
                answers[layout, checks[0]] = error
                return
            for check in checks:
                run(layout, [check], timeout_s=90.0)
        else:
            answers.update({(layout, check): [answer[check] for answer in found] for check in checks})

    def ask(layout: str, check: str) -> list[dict[str, Any]]:
        if (layout, check) not in answers:
            run(layout, PLAN[layout], timeout_s=300.0)
        if isinstance(answers[layout, check], Exception):
            raise answers[layout, check]
        return answers[layout, check]

    return ask
