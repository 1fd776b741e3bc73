"""The first groups to be done: more are begun than a step learns from, and drawing stops early.

A step waits for its longest sample. With over-sampling it begins more groups than it needs, learns from those that are
done first, and the others go on in the next step, or are thrown away (APRIL, arXiv 2509.18521; partial rollouts: Kimi
k1.5, arXiv 2501.12599, section 2.6.2). Who is first must not depend on lanes, replicas or clocks, so it is defined on
the samples alone:

* the *length* of a group is the largest number of tokens that one of its samples draws in this step;
* the *winners* are the groups with the smallest (length, place in the step): those that a decoder with room for all
  samples at once would have done first;
* the *finish* is the length of the last winner. What goes on later goes on from there: every other sample keeps as many
  tokens of this step as it draws, but no more than the finish.

Ranks tell each other from time to time which groups are done. Among any done groups, the last of the best ``n`` comes
no earlier than the last winner, so that nobody needs to draw past it; and it falls to the last winner, for every other
group ends by being done or by having drawn past it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from r1_megatron.rollout.in_flight import InFlight

# Ranks tell each other every so many rounds which groups are done.
RACE_ROUNDS = 8


def first_done(lengths: Mapping[int, int], num_winners: int) -> tuple[list[int], int]:
    """The places of the winners, in order, and the finish, of groups by their place. At least ``num_winners``."""
    assert len(lengths) >= num_winners >= 1, f"{len(lengths)} groups cannot have {num_winners} winners"
    ranked = sorted(lengths, key=lambda place: (lengths[place], place))[:num_winners]
    return sorted(ranked), lengths[ranked[-1]]


class Race:
    """The groups of a step on their way to the finish. A fresh one for every step, the same on all ranks.

    Args:
        groups: prompt indices of all replicas' groups, in the order of the step.
        num_winners: of them, at least one.
        keeps_rest: the others go on later, so they are drawn up to the finish; else they stop as soon as they have
            lost.

    ``rest`` is filled by ``Engine.generate``: this replica's unfinished business, none with ``keeps_rest=False``.
    """

    def __init__(self, groups: Sequence[int], num_winners: int, *, keeps_rest: bool):
        assert 1 <= num_winners <= len(groups), f"{num_winners} winners of {len(groups)} groups"
        self.groups, self.num_winners, self.keeps_rest = list(groups), num_winners, keeps_rest
        self.rest: list[InFlight] = []
        self._places = {index: place for place, index in enumerate(self.groups)}
        self._done: dict[int, int] = {}  # lengths by place
        self._last: tuple[int, int] | None = None  # length and place of the last winner, as far as it is known

    def report(self, lengths: Mapping[int, int]) -> list[int]:
        """What a rank has to say, one number per group: 1 + the length of those that are done, 0 for the others.

        ``lengths``: of its own done groups, by prompt index.
        """
        return [1 + lengths.get(index, -1) for index in self.groups]

    def hear(self, reports: Sequence[int]) -> bool:
        """The largest of all ranks' reports, number by number. Answers whether some may now draw less than before."""
        self._done = {place: said - 1 for place, said in enumerate(reports) if said}
        if len(self._done) < self.num_winners:
            return False
        before, (winners, length) = self._last, first_done(self._done, self.num_winners)
        self._last = length, max(place for place in winners if self._done[place] == length)
        return self._last != before or not self.keeps_rest

    @property
    def winners(self) -> list[int]:
        """Prompt indices in the order of the step, when all is drawn."""
        return [self.groups[place] for place in first_done(self._done, self.num_winners)[0]]

    @property
    def finish(self) -> int:
        """The length of the last winner, when all is drawn."""
        return first_done(self._done, self.num_winners)[1]

    def most_tokens(self, index: int, *, ended: int = -1, under_way: int = -1) -> int:
        """The tokens that samples of a group may draw in this step, for all that is known when enough groups are done.

        ``ended``, ``under_way``: the most that those of them have drawn which are done, or are not; -1: there is none.
        """
        assert self._last is not None
        length, place = self._last
        if self.keeps_rest:
            return length
        longest = length - (self._places[index] > place)  # of a winner
        return 0 if max(ended, under_way + 1) > longest else longest
