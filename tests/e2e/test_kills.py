"""A run that is killed goes on as if it had never stopped. `python -m tests.e2e.kills` does the same more often."""

from __future__ import annotations

import random
from pathlib import Path

from tests.e2e.kills import OPTIONS, differences, killed_run, reference_run
from tests.e2e.runs import prepare

EP2 = ("parallel.data_parallel_size=2", "parallel.expert_model_parallel_size=2")


def test_killed_in_a_save_in_a_step_and_somewhere(tmp_path: Path) -> None:
    work, options = prepare(tmp_path), (*OPTIONS, *EP2)
    reference = reference_run(work, options)
    kills = list(killed_run(work, options, ["in a save", "in a step"], random.Random(5)))
    assert len(kills) == 2
    assert kills[0].newest < kills[0].steps_logged, "the checkpoint that was being written is not taken for whole"
    assert differences(work / "runs" / "killed", reference) == []
    starts = sorted(path.name for path in (work / "runs" / "killed" / "starts").iterdir())
    assert starts == ["1", "2"]
