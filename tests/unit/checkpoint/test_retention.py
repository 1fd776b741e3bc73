"""Which checkpoints of a run are whole, newest, best; and which go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from r1_megatron.checkpoint import retention
from r1_megatron.config.schema import CheckpointConfig

METRIC = "eval/sampled_accuracy"


def save(folder: Path, name: str, step: int, score: float | None = None, **more: Any) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    evaluation = {} if score is None else {METRIC: score}
    description = {"step": step, "state": {}, "evaluation": evaluation, **more}
    (path / "checkpoint.json").write_text(json.dumps(description))
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_is_the_latest_step_that_a_run_can_go_on_from(tmp_path: Path) -> None:
    assert retention.newest_to_resume(tmp_path / "nothing") is None
    save(tmp_path, "step_000010", 10)
    save(tmp_path, "step_000020", 20)
    save(tmp_path, "step_000030.partial", 30)
    (tmp_path / "step_000040").mkdir()
    (tmp_path / "at_failure").mkdir()
    (tmp_path / "at_failure" / "checkpoint.json").write_text('{"step": 50}')
    newest = retention.newest_to_resume(tmp_path)
    assert newest is not None and newest.path.name == "step_000020"
    save(tmp_path, "step_000020_rollout", 20, rollouts_in_flight=[{"begun": 3, "finished": 1}])
    newest = retention.newest_to_resume(tmp_path)
    assert newest is not None and newest.path.name == "step_000020_rollout"
    earlier = retention.before(tmp_path, newest)
    assert earlier is not None and earlier.path.name == "step_000020"
    assert retention.prepare(tmp_path) == ["step_000030.partial"]
    assert "step_000030.partial" not in names(tmp_path)


def test_a_description_that_cannot_be_read_is_no_start(tmp_path: Path) -> None:
    save(tmp_path, "step_000010", 10)
    (save(tmp_path, "step_000020", 20) / "checkpoint.json").write_text("{cut")
    newest = retention.newest_to_resume(tmp_path)
    assert newest is not None and newest.step == 10
    assert [saved.path.name for saved in retention.saved_checkpoints(tmp_path)] == ["step_000020", "step_000010"]
    assert retention.unreadable(tmp_path) == [tmp_path / "step_000020"]
    retention.make_room(tmp_path, newest)
    assert names(tmp_path) == {"step_000010", "damaged_step_000020"}


def test_final_gives_way_to_a_run_that_goes_on(tmp_path: Path) -> None:
    save(tmp_path, "step_000010", 10)
    save(tmp_path, "final", 20)
    start = retention.newest_to_resume(tmp_path)
    assert start is not None
    moved = retention.make_room(tmp_path, start)
    assert moved.path == tmp_path / "step_000020" and names(tmp_path) == {"step_000010", "step_000020"}


def test_what_was_damaged_is_put_aside(tmp_path: Path) -> None:
    start = retention.Saved(save(tmp_path, "step_000010", 10), {"step": 10, "state": {}})
    save(tmp_path, "step_000020", 20, 0.9)
    retention.make_room(tmp_path, start)
    assert names(tmp_path) == {"step_000010", "damaged_step_000020"}
    save(tmp_path, "step_000020", 20, 0.5)
    newest = retention.newest_to_resume(tmp_path)
    assert newest is not None and newest.path.name == "step_000020", "what was put aside is no start any more"
    assert newest == retention.result(tmp_path)
    retention.make_room(tmp_path, newest)
    retention.apply_retention(tmp_path, CheckpointConfig())
    assert names(tmp_path) == {"step_000010", "damaged_step_000020", "step_000020", "best"}
    assert (tmp_path / "best").readlink() == Path("step_000020")
    retention.make_room(tmp_path, None)
    assert names(tmp_path) == {"damaged_step_000010", "damaged_step_000020", "damaged_step_000020_2", "best"}


def test_weights_alone_are_in_the_way_of_a_run_that_comes_to_their_names(tmp_path: Path) -> None:
    for name, step in (("step_000000", 0), ("step_000010", 10), ("final", 20), ("at_failure_2", 30)):
        save(tmp_path, name, step)
        (tmp_path / name / "checkpoint.json").write_text(json.dumps({"step": step}))
    start = retention.Saved(save(tmp_path, "step_000015", 15), {"step": 15, "state": {}})

    def in_the_way(start: retention.Saved | None) -> list[str]:
        return [saved.path.name for saved in retention.in_the_way(tmp_path, start)]

    assert in_the_way(None) == ["step_000010", "final"]
    assert in_the_way(start) == ["final"]
    assert in_the_way(retention.Saved(start.path, {"step": 25, "state": {}})) == ["final"]
    result = retention.result(tmp_path)
    assert result is not None and result.path.name == "final"


def test_where_a_run_broke_off_is_no_start_and_in_nobodys_way(tmp_path: Path) -> None:
    for name in ("at_failure", "at_failure_2"):
        save(tmp_path, name, 5, 0.9)
        (tmp_path / name / "checkpoint.json").write_text(json.dumps({"step": 5, "evaluation": {METRIC: 0.9}}))
    save(tmp_path, "at_failure_3", 5)
    (tmp_path / "at_failure_3/checkpoint.json").write_text("{cut")
    assert retention.newest_to_resume(tmp_path) is None and retention.result(tmp_path) is None
    assert retention.in_the_way(tmp_path, None) == [] and retention.unreadable(tmp_path) == []
    assert retention.make_room(tmp_path, None) is None
    assert retention.free_name(tmp_path, retention.AT_FAILURE) == "at_failure_4"
    save(tmp_path, "step_000001", 1, 0.5)
    retention.apply_retention(tmp_path, CheckpointConfig())
    assert names(tmp_path) == {"at_failure", "at_failure_2", "at_failure_3", "step_000001", "best"}
    assert (tmp_path / "best").readlink() == Path("step_000001")


@pytest.mark.parametrize(
    "options, kept, best",
    [
        ({}, {1, 2, 3, 4, 5}, 2),
        ({"keep_last": 2}, {4, 5}, None),
        ({"keep_last": 1, "keep_best": 1}, {2, 5}, 2),
        ({"keep_last": 1, "keep_best": 2}, {2, 4, 5}, 2),
        ({"keep_last": 1, "keep_best": 1, "best_mode": "min"}, {1, 5}, 1),
        ({"keep_last": 1, "keep_best": 1, "best_metric": "eval/other"}, {5}, None),
    ],
)
def test_the_last_and_the_best_stay(tmp_path: Path, options: dict, kept: set[int], best: int | None) -> None:
    for step, score in ((1, 0.1), (2, 0.9), (3, None), (4, 0.5), (5, 0.3)):
        save(tmp_path, retention.step_name(step), step, score)
    save(tmp_path, "at_failure", 0)
    removed = retention.apply_retention(tmp_path, CheckpointConfig(**options))
    assert {*removed} == {retention.step_name(step) for step in {1, 2, 3, 4, 5} - kept}
    expected = {retention.step_name(step) for step in kept} | {"at_failure"}
    assert names(tmp_path) - {"best"} == expected
    if best is not None:
        assert (tmp_path / "best").resolve().name == retention.step_name(best)


def test_the_link_to_the_best_moves(tmp_path: Path) -> None:
    save(tmp_path, "step_000001", 1, 0.5)
    retention.apply_retention(tmp_path, CheckpointConfig())
    assert (tmp_path / "best").readlink() == Path("step_000001")
    save(tmp_path, "final", 2, 0.7)
    retention.apply_retention(tmp_path, CheckpointConfig())
    assert (tmp_path / "best").readlink() == Path("final")


def test_names_that_are_taken_get_a_number(tmp_path: Path) -> None:
    assert retention.free_name(tmp_path, "at_failure") == "at_failure"
    (tmp_path / "at_failure").mkdir()
    (tmp_path / "at_failure_2").mkdir()
    assert retention.free_name(tmp_path, "at_failure") == "at_failure_3"
