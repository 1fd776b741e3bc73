"""The winners are the groups that are done first by their samples alone, and nobody draws what it need not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from r1_megatron.rollout.race import Race, first_done


def lockstep(lengths: np.ndarray, num_winners: int) -> tuple[list[int], int]:
    """A decoder with room for everybody: a token of every sample at a time, groups looked at in order.

    ``lengths [groups, samples]``. Answers the winners and how many tokens have been drawn then.
    """
    for drawn in itertools.count():
        done = [group for group, samples in enumerate(lengths) if (samples <= drawn).all()]
        if len(done) >= num_winners:
            earlier = [group for group in done if (lengths[group] < drawn).all()]
            now = [group for group in done if group not in earlier]
            return sorted(earlier + now[: num_winners - len(earlier)]), drawn
    raise AssertionError


@pytest.mark.parametrize("seed", range(40))
def test_first_done_is_what_a_lockstep_decoder_finishes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, rng.integers(1, 30), (rng.integers(1, 12), rng.integers(1, 5)))
    for num_winners in range(1, len(lengths) + 1):
        of_groups = {place: int(samples.max()) for place, samples in enumerate(lengths)}
        assert first_done(of_groups, num_winners) == lockstep(lengths, num_winners)


class Replica:
    """Draws the samples of some groups in an order and at a pace of its own, no further than it may."""

    def __init__(self, race: Race, lengths: dict[int, np.ndarray], rng: np.random.Generator):
        self.race, self.lengths, self.rng = race, lengths, rng
        self.drawn = {index: np.zeros_like(samples) for index, samples in lengths.items()}
        self.most = {index: 1 << 30 for index in lengths}

    def work_left(self) -> list[tuple[int, int]]:
        return [
            (index, sample)
            for index, samples in self.lengths.items()
            for sample, length in enumerate(samples)
            if self.drawn[index][sample] < min(length, self.most[index])
        ]

    def draw(self) -> None:
        """Some tokens of some samples; a few too many where it cannot stop at once."""
        left = self.work_left()
        for i in self.rng.permutation(len(left))[: self.rng.integers(1, 8)]:
            index, sample = left[i]
            more = self.rng.integers(1, 6)
            self.drawn[index][sample] = min(self.drawn[index][sample] + more, self.lengths[index][sample])

    def report(self) -> list[int]:
        done = {index: int(n.max()) for index, n in self.lengths.items() if (self.drawn[index] == n).all()}
        return self.race.report(done)

    def hear(self, reports: list[int]) -> None:
        if self.race.hear(reports):
            for index, lengths in self.lengths.items():
                drawn = self.drawn[index]
                ended = int(drawn[drawn == lengths].max(initial=-1))
                under_way = int(drawn[drawn < lengths].max(initial=-1))
                most = self.race.most_tokens(index, ended=ended, under_way=under_way)
                assert most <= self.most[index], "the finish only comes nearer"
                self.most[index] = most


@pytest.mark.parametrize("keeps_rest", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_the_race_ends_the_same_in_any_order(seed: int, keeps_rest: bool) -> None:
    rng = np.random.default_rng(seed)
    num_groups, num_replicas = int(rng.integers(1, 12)), int(rng.integers(1, 4))
    # Carried groups may have nothing left to draw.
    lengths = {10 + 3 * g: rng.integers(0, 1 + int(40 * rng.random() ** 2), 3) for g in range(num_groups)}
    num_winners = int(rng.integers(1, num_groups + 1))
    places, finish = lockstep(np.array(list(lengths.values())), num_winners)
    winners = {list(lengths)[place] for place in places}
    replicas = []
    for replica in range(num_replicas):
        mine = dict(list(lengths.items())[replica::num_replicas])
        replicas.append(Replica(Race(list(lengths), num_winners, keeps_rest=keeps_rest), mine, rng))

    def meet() -> bool:
        left = any(replica.work_left() for replica in replicas)
        reports = np.array([replica.report() for replica in replicas]).max(0).tolist()
        for replica in replicas:
            replica.hear(reports)
        return left

    meet()
    while True:
        for replica in replicas:
            for _ in range(rng.integers(0, 4)):
                replica.draw()
        if not meet():
            break
    for replica in replicas:
        assert set(replica.race.winners) == winners and replica.race.finish == finish
        for index, samples in replica.lengths.items():
            drawn = replica.drawn[index]
            assert index not in winners or (drawn == samples).all()
            assert not keeps_rest or (drawn >= np.minimum(samples, finish)).all(), "what goes on has come to the finish"
