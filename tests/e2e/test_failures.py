"""Runs that end badly, through the command line: who is named, what is left, and that nobody stays behind."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.runs import (
    all_gone,
    family_of,
    prepare,
    rank_processes,
    rows_of,
    start,
    train,
    wait_for_steps,
)

ENDLESS = ("train.steps=100000", "evaluate.num_prompts=0")
PP2 = ("parallel.pipeline_model_parallel_size=2",)
DP2 = ("parallel.data_parallel_size=2",)
# Seconds after which a run whose end has come is over, with room for a busy machine.
SOON_S = 30.0


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return prepare(tmp_path)


def whole(folder: Path) -> int:
    """All files are whole; answers the number of steps."""
    rows_of(folder / "samples.jsonl")
    return sum("train/updates" in row for row in rows_of(folder / "metrics.jsonl"))


def ends_soon(process) -> tuple[str, str]:
    begin = time.monotonic()
    shown, errors = process.communicate(timeout=120)
    assert time.monotonic() - begin < SOON_S
    return shown, errors


def test_a_rank_killed_in_the_middle_of_training(work: Path) -> None:
    process = start(work, "output_dir=run", *PP2, *ENDLESS, "checkpoint.interval=1000")
    try:
        wait_for_steps(process, work / "run/metrics.jsonl", 2)
        family = family_of(process)
        rank_processes(process)[1].kill()
        _, errors = ends_soon(process)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGKILL
    assert "error: rank 1 was killed by SIGKILL" in errors and "out-of-memory" in errors
    assert "All ranks have ended." in errors
    assert len(family) >= 3  # two ranks and the plug-in's worker at least
    assert all_gone(family)
    assert whole(work / "run") >= 2
    launched = json.loads((work / "run/launch.json").read_text())
    assert launched["exit_code"] == 137 and "rank 1 was killed by SIGKILL" in launched["failure"]


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(work: Path) -> None:
    process = start(work, "output_dir=run", *DP2, *ENDLESS)
    try:
        wait_for_steps(process, work / "run/metrics.jsonl", 2)
        family = family_of(process)
        process.send_signal(signal.SIGINT)
        shown, errors = ends_soon(process)
    finally:
        process.kill()
    assert process.returncode == 130
    num_steps = whole(work / "run")
    checkpoint = f"run/checkpoints/step_{num_steps:06d}"
    assert num_steps >= 2 and (work / checkpoint / "checkpoint.json").is_file()
    assert "SIGINT: ending at the next good moment, with a checkpoint." in shown
    assert f"ended by SIGINT. Run folder: run. Last whole checkpoint: {checkpoint}." in errors
    assert "r1-megatron report run" in errors and "Traceback" not in errors
    assert all_gone(family)


def test_ctrl_c_twice_ends_at_once(work: Path) -> None:
    process = start(work, "output_dir=run", *DP2, *ENDLESS, "rollout.prompts_per_step=64")
    try:
        wait_for_steps(process, work / "run/metrics.jsonl", 1)
        family = family_of(process)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        _, errors = ends_soon(process)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "ended by SIGINT. Run folder: run. Last whole checkpoint: " in errors and "Traceback" not in errors
    assert all_gone(family)
    assert whole(work / "run") >= 1


def test_a_reward_that_raises_in_the_middle_of_training(work: Path) -> None:
    """Ends with the function, the sample and the remedy; a corrected start elsewhere is not hindered."""
    terms = 'reward.terms=[{function: "own_rewards:variety", options: {fail_at_call: 3}}]'
    code, shown, errors = train(work, "output_dir=run", *PP2, *ENDLESS, terms)
    assert code == 1
    assert "error: ranks 0, 1 failed: reward 'own_rewards:variety' raised LookupError" in errors
    assert "Last whole checkpoint: run/checkpoints/at_failure" in errors
    assert "the table of answers is gone" in errors and "own_rewards.py" in errors
    assert "at prompt " in errors and "Mend the function or the data, or set reward.on_error=zero." in errors
    assert "Traceback" not in errors
    assert whole(work / "run") == 2 and "step      2/100000" in shown


def test_a_reward_that_cannot_be_imported(work: Path) -> None:
    code, shown, errors = train(work, "output_dir=run", 'reward.terms=[{function: "own_rewards:varieti"}]')
    assert code == 1 and "step" not in shown.split("run folder")[1]
    assert "reward.terms[0] (own_rewards:varieti)" in errors and "has no function 'varieti'" in errors
    assert not (work / "run/checkpoints").exists()


def test_a_checkpoint_that_is_not_there_is_said_before_anything_starts(work: Path) -> None:
    code, shown, errors = train(work, "output_dir=run", "checkpoint.load=runs/base/checkpoints/final")
    assert code == 2 and shown == ""
    assert "checkpoint.load: runs/base/checkpoints/final does not exist" in errors
    assert not (work / "run").exists()


def test_a_folder_that_is_no_checkpoint(work: Path) -> None:
    """Found by the ranks, named once, without a traceback; the folder of the run can be used again."""
    (work / "base/final").mkdir(parents=True)
    code, _, errors = train(work, "output_dir=run", "checkpoint.load=base/final")
    assert code == 1
    assert errors.startswith("error: rank 0 failed: checkpoint.load: base/final has no checkpoint.json")
    assert "Traceback" not in errors
