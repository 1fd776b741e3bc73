"""Which of a prompt's responses are kept, and why the others are not; which of them make preference pairs.

The order of the reasons is the order in which they are asked, and a response is counted under the first one::

    wrong -> unfit (a filter's name) -> unasked, judged_wrong, no_verdict -> duplicate, near_duplicate -> over_quota
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from r1_megatron.config.schema import JudgeConfig, PairConfig, RejectConfig
from r1_megatron.curation.candidates import Candidate, Comparison, Judgement
from r1_megatron.curation.duplicates import Duplicates
from r1_megatron.curation.judging import average, swapped_mean
from r1_megatron.data.tasks.base import stable_hash

KEPT = ""


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, the better one first, with the scores that say so: one per order asked, or one by
    reward."""

    prompt: int
    chosen: int
    rejected: int
    scores_chosen: tuple[float, ...]
    scores_rejected: tuple[float, ...]


def is_right(candidate: Candidate, judgement: Judgement | None, judge: JudgeConfig) -> bool:
    """By rule, or by the judge's votes where it decides; a response that it was not asked about is not right."""
    if candidate.right is not None:
        return candidate.right
    return judgement is not None and bool(judgement.votes) and judgement.share_right() >= judge.min_share


def reason_against(candidate: Candidate, judgement: Judgement | None, judge: JudgeConfig) -> str:
    """Why a response is not good by itself; empty: it is."""
    if candidate.right is False:
        return "wrong"
    if candidate.unfit:
        return candidate.unfit
    if candidate.right or is_right(candidate, judgement, judge):
        return KEPT
    if judgement is None or not judgement.votes:
        return "unasked"
    return "no_verdict" if all(vote is None for vote in judgement.votes) else "judged_wrong"


def choose(
    candidates: Sequence[Candidate],
    judgements: Mapping[tuple[int, int], Judgement],
    duplicates: Duplicates,
    reject: RejectConfig,
    judge: JudgeConfig,
    seed: int,
) -> dict[int, str]:
    """By sample, why it is not kept (`KEPT`: it is). ``candidates`` are all responses to one prompt."""
    reasons = {c.sample: reason_against(c, judgements.get(c.key), judge) for c in candidates}
    good = [c for c in candidates if reasons[c.sample] == KEPT]
    num_kept = 0
    for candidate in sorted(good, key=lambda c: _preference(c, reject.prefer, seed)):
        if found := duplicates.find(candidate.prompt, candidate.response):
            reasons[candidate.sample] = found
        elif reject.max_per_prompt is not None and num_kept >= reject.max_per_prompt:
            reasons[candidate.sample] = "over_quota"
        else:
            num_kept += 1
            duplicates.add(candidate.prompt, candidate.response)
    return reasons


def _preference(candidate: Candidate, prefer: str, seed: int) -> tuple[float, ...]:
    """The smallest comes first; ties go to the smaller number of the sample."""
    if prefer == "shortest":
        return candidate.num_tokens, candidate.sample
    if prefer == "reward":
        return -candidate.reward, candidate.num_tokens, candidate.sample
    return stable_hash("keep", seed, candidate.prompt, candidate.sample), candidate.sample


# ----------------------------------------------------------------------------------------------------------- pairs


def pairs_to_compare(candidates: Sequence[Candidate], cfg: PairConfig, seed: int) -> list[tuple[int, int]]:
    """Samples of a prompt that the judge is to compare: readable ones with different texts and comparable lengths,
    drawn by the seed, each once."""
    fit = sorted((c for c in candidates if not c.unfit), key=lambda c: stable_hash("pair", seed, c.prompt, c.sample))
    return _match(fit, cfg)


def pairs_by_judge(comparisons: Sequence[Comparison], cfg: PairConfig) -> list[Pair]:
    """Pairs whose scores, averaged over both orders, differ by more than ``min_difference``."""
    pairs = []
    for c in comparisons:
        means = [swapped_mean(scores, c.in_order) for scores in c.scores]
        if means[0] is None or means[1] is None or abs(means[0] - means[1]) <= cfg.min_difference:
            continue
        better = 0 if means[0] > means[1] else 1
        by_order = [(average(s[: c.in_order]), average(s[c.in_order :])) for s in c.scores]
        pairs.append(Pair(c.prompt, c.samples[better], c.samples[1 - better], by_order[better], by_order[1 - better]))
    return pairs


def pairs_by_reward(candidates: Sequence[Candidate], reasons: Mapping[int, str], cfg: PairConfig) -> list[Pair]:
    """A kept response before one that is worse by more than ``min_difference`` of reward: best with worst first."""
    best = sorted((c for c in candidates if reasons[c.sample] == KEPT), key=lambda c: (-c.reward, c.sample))
    worst = sorted((c for c in candidates if c.unfit != "unfinished"), key=lambda c: (c.reward, c.sample))
    pairs, used = [], set()
    for chosen, rejected in itertools.product(best, worst):
        free = not {chosen.sample, rejected.sample} & used
        enough = chosen.reward - rejected.reward > cfg.min_difference
        if free and enough and _comparable(chosen, rejected, cfg) and len(pairs) < cfg.per_prompt:
            used |= {chosen.sample, rejected.sample}
            pairs.append(Pair(chosen.prompt, chosen.sample, rejected.sample, (chosen.reward,), (rejected.reward,)))
    return pairs


def _match(ordered: Sequence[Candidate], cfg: PairConfig) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    used: set[int] = set()
    for first, second in itertools.combinations(ordered, 2):
        free = not {first.sample, second.sample} & used and first.response != second.response
        if free and _comparable(first, second, cfg) and len(pairs) < cfg.per_prompt:
            used |= {first.sample, second.sample}
            pairs.append((first.sample, second.sample))
    return pairs


def _comparable(a: Candidate, b: Candidate, cfg: PairConfig) -> bool:
    """Neither is empty, which no reward model learns from, nor too long beside the other."""
    if not (a.response.strip() and b.response.strip()):
        return False
    shorter, longer = sorted((a.num_tokens, b.num_tokens))
    return cfg.max_length_ratio is None or longer <= cfg.max_length_ratio * max(shorter, 1)
