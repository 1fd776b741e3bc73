"""Which sequences share a microbatch, on which data-parallel rank: an even amount of work under a token budget.

The work of a sequence grows faster than its length, so ranks with as many tokens as each other still wait for the one
that has the longest sequences. Here the plan of a whole step, for all ranks, is made from the lengths alone: every rank
computes the same one. What a plan keeps:

1. every sequence is in it once;
2. a microbatch holds at most ``max_tokens`` together; only a sequence that is longer itself is alone in one;
3. all ranks run the same number of microbatches, a multiple of ``multiple``, at least one, and as few as were found to
   do; those that nothing is left for are empty;
4. a rank's microbatches come with the most work first, and list their sequences longest first.

Longest processing time first (Graham, "Bounds on multiprocessing timing anomalies", 1969): the sequences by falling
work, each to the place with the least so far that has room.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from r1_megatron.config.schema import DYNAMIC_TOKENS

# A rank's microbatches, each as the indices of its sequences.
Plan = list[list[int]]


def plan_step(
    lengths: Sequence[int],
    work: Callable[[int], float],
    *,
    max_tokens: int | None,
    num_ranks: int = 1,
    multiple: int = 1,
    lockstep: bool = False,
) -> list[Plan]:
    """The microbatches of every data-parallel rank (the invariants are listed above).

    Args:
        lengths: tokens of each sequence of the step, of all ranks together, in an order that all ranks share.
        work: the cost of a sequence of so many tokens, in any unit; must grow with the length.
        max_tokens: ``None``: those of the longest sequence, and `DYNAMIC_TOKENS` at least.
        multiple: the pipeline size for megatron-core's interleaved schedule.
        lockstep: ranks wait for each other in every microbatch (an expert-parallel exchange spans them), so that all
            microbatches should be alike. Otherwise they meet once a step and a rank's sum is what counts; its
            microbatches are evened out among themselves.
    """
    works = [work(length) for length in lengths]
    return plan_units(lengths, works, token_budget(lengths, max_tokens), num_ranks, multiple, lockstep)


def token_budget(lengths: Sequence[int], max_tokens: int | None) -> int:
    """The most tokens of a microbatch, ``max_tokens`` as in :func:`plan_step`."""
    return max([DYNAMIC_TOKENS, *lengths]) if max_tokens is None else max_tokens


def plan_units(
    tokens: Sequence[int], works: Sequence[float], max_tokens: int, num_ranks: int, multiple: int, lockstep: bool
) -> list[Plan]:
    """:func:`plan_step` of anything that stays together: ``tokens`` and ``works`` of each unit."""
    assert max_tokens >= 1 and all(number >= 1 for number in tokens), (max_tokens, min(tokens, default=1))
    load = np.array(works, dtype=np.float64)
    count = -(-_fewest(tokens, max_tokens) // (num_ranks * multiple)) * multiple
    while (filled := _fill(tokens, load, max_tokens, (count, num_ranks), lockstep)) is None:
        count += multiple
    return _aligned(filled, load, num_ranks) if lockstep else _sorted(filled, load, num_ranks)


def _fewest(lengths: Sequence[int], max_tokens: int) -> int:
    """A number of microbatches that no plan can do with less of: at most k fit into one of those that are longer than
    1 / (k + 1) of the budget."""
    total = sum(min(length, max_tokens) for length in lengths)
    longer = [sum(length * (k + 1) > max_tokens for length in lengths) for k in range(1, 8)]
    return max(1, -(-total // max_tokens), *(-(-number // k) for k, number in enumerate(longer, 1)))


def _fill(
    lengths: Sequence[int], works: np.ndarray, max_tokens: int, shape: tuple[int, int], lockstep: bool
) -> Plan | None:
    """The sequences of each place, ``shape`` = (microbatches, ranks) flattened; ``None`` if some found no room."""
    num_ranks = shape[1]
    places: Plan = [[] for _ in range(shape[0] * num_ranks)]
    tokens, load = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    for index in sorted(range(len(lengths)), key=lambda i: (-works[i], i)):
        has_room = (tokens + lengths[index] <= max_tokens) | (tokens == 0)
        if not has_room.any():
            return None
        if not lockstep:
            rank = np.where(has_room.any(0), load.sum(0), np.inf).argmin()
            has_room &= np.arange(num_ranks) == rank
        place = int(np.where(has_room, load, np.inf).argmin())
        places[place].append(index)
        tokens.flat[place] += lengths[index]
        load.flat[place] += works[index]
    return places


def _sorted(places: Plan, works: np.ndarray, num_ranks: int) -> list[Plan]:
    """Each rank's own places, the most work first."""
    return [sorted(places[rank::num_ranks], key=lambda place: -works[place].sum()) for rank in range(num_ranks)]


def _aligned(places: Plan, works: np.ndarray, num_ranks: int) -> list[Plan]:
    """Places of about the same work at the same time on all ranks; of those the larger to whom has had less."""
    ordered = sorted(places, key=lambda place: -works[place].sum())
    plans: list[Plan] = [[] for _ in range(num_ranks)]
    load = np.zeros(num_ranks)
    for start in range(0, len(ordered), num_ranks):
        for rank, place in zip(np.argsort(load, kind="stable"), ordered[start : start + num_ranks]):
            plans[rank].append(place)
            load[rank] += works[place].sum()
    return plans
