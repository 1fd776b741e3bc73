"""Runs of elements as boxes: every element once, in order, and few boxes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from r1_megatron.checkpoint.optimizer_state import boxes_of_run


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2), (2, 2, 3, 2)])
def test_every_run_of_every_shape(shape: tuple[int, ...]) -> None:
    size = torch.Size(shape).numel()
    flat = torch.arange(size)
    whole = flat.view(shape)
    for start, stop in itertools.combinations(range(size + 1), 2):
        boxes = list(boxes_of_run(start, stop, shape))
        assert len(boxes) <= max(2 * len(shape) - 1, 1)
        parts = [whole[tuple(slice(b, e) for b, e in zip(begin, end))].reshape(-1) for begin, end in boxes]
        assert torch.equal(torch.cat(parts), flat[start:stop]), (start, stop, boxes)
        assert all(len(part) for part in parts)


def test_an_empty_run_has_no_boxes() -> None:
    assert list(boxes_of_run(5, 5, (3, 4))) == []


def test_runs_of_a_large_tensor() -> None:
    rng = random.Random(3)
    shape = (61, 37, 11)
    marks = torch.zeros(shape, dtype=torch.int8)
    cuts = [0, *sorted(rng.sample(range(1, marks.numel()), 40)), marks.numel()]
    for start, stop in itertools.pairwise(cuts):
        for begin, end in boxes_of_run(start, stop, shape):
            marks[tuple(slice(b, e) for b, e in zip(begin, end))] += 1
    assert (marks == 1).all()
