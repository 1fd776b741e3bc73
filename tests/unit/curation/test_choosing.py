"""Which responses are kept, why the others are not, and the pairs that are made of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from r1_megatron.config.schema import JudgeConfig, PairConfig, RejectConfig, RewardTermConfig
from r1_megatron.curation.candidates import Candidate, Comparison, Judgement, right_by_rule
from r1_megatron.curation.choosing import choose, pairs_by_judge, pairs_by_reward, pairs_to_compare
from r1_megatron.curation.duplicates import build_duplicates
from r1_megatron.curation.tally import Tally, bin_of

CFG = RejectConfig(duplicate_similarity=None)


def candidate(sample: int, text: str = "", right: bool | None = True, **fields) -> Candidate:
    values = {"num_tokens": 10, "reward": 1.0, "unfit": ""} | fields
    return Candidate(7, sample, text or f"response {sample}", components={}, right=right, **values)


def chosen(candidates: list[Candidate], cfg: RejectConfig = CFG, votes: dict | None = None, seed: int = 1):
    judged = {(7, sample): Judgement(7, sample, cast) for sample, cast in (votes or {}).items()}
    duplicates = build_duplicates(cfg.duplicates, cfg.duplicate_similarity, cfg.duplicate_ngram)
    return choose(candidates, judged, duplicates, cfg, JudgeConfig(votes=2, min_share=0.6), seed)


@pytest.mark.parametrize(
    ("values", "right"),
    [
        ((1.0, 1.0, 0.0), True),
        ((1.0, 0.4, 1.0), False),
        ((0.9, 0.5, 1.0), False),
        ((math.nan, 0.5, 1.0), True),  # does not count for this source: the others decide
        ((math.nan, math.nan, 1.0), False),  # nobody says that it is right
    ],
)
def test_rules(values: tuple[float, ...], right: bool) -> None:
    terms = [RewardTermConfig("a", at_least=1.0), RewardTermConfig("b", at_least=0.5), RewardTermConfig("c")]
    assert right_by_rule(terms, values) is right


def test_every_reason_in_its_order() -> None:
    candidates = [
        candidate(0, right=False, unfit="over_long"),
        candidate(1, unfit="over_long"),
        candidate(2, right=None, unfit="code_block"),
        candidate(3, right=None),
        candidate(4, right=None),
        candidate(5, right=None),
        candidate(6, right=None),
        candidate(7, right=None),
        candidate(8, "the same"),
        candidate(9, "The  same"),
    ]
    votes = {3: (1, 1), 4: (1, 0), 5: (None, None), 6: ()}
    assert chosen(candidates, replace(CFG, prefer="shortest", max_per_prompt=9), votes) == {
        0: "wrong",
        1: "over_long",
        2: "code_block",
        3: "",
        4: "judged_wrong",
        5: "no_verdict",
        6: "unasked",
        7: "unasked",
        8: "",
        9: "duplicate",
    }


def test_quotas_prefer_as_asked() -> None:
    candidates = [
        candidate(0, num_tokens=9, reward=1.0),
        candidate(1, num_tokens=5, reward=1.0),
        candidate(2, num_tokens=5, reward=2.0),
        candidate(3, num_tokens=30, reward=3.0),
    ]

    def kept(**options) -> list[int]:
        found = chosen(candidates, replace(CFG, **options))
        assert sorted(found) == [0, 1, 2, 3] and set(found.values()) <= {"", "over_quota"}
        return [sample for sample, reason in found.items() if not reason]

    assert kept() == [0, 1, 2, 3]
    assert kept(max_per_prompt=2, prefer="shortest") == [1, 2]
    assert kept(max_per_prompt=2, prefer="reward") == [2, 3]
    assert len(kept(max_per_prompt=2, prefer="random")) == 2


def test_a_random_choice_follows_the_seed_and_no_order() -> None:
    cfg = replace(CFG, max_per_prompt=1)
    candidates = [candidate(sample) for sample in range(16)]
    found = [chosen(candidates, cfg, seed=seed) for seed in range(8)]
    assert chosen(candidates[::-1], cfg, seed=3) == found[3]
    assert len({next(s for s, reason in one.items() if not reason) for one in found}) > 3


def test_of_duplicates_the_preferred_one_stays() -> None:
    candidates = [candidate(0, "Same", num_tokens=12), candidate(1, "same", num_tokens=11)]
    assert chosen(candidates, replace(CFG, max_per_prompt=2, prefer="shortest")) == {0: "duplicate", 1: ""}


def test_pairs_by_reward() -> None:
    candidates = [
        candidate(0, reward=1.0),
        candidate(1, reward=0.0, right=False),
        candidate(2, reward=-1.0, right=False, unfit="unfinished"),
        candidate(3, reward=0.9),
        candidate(4, reward=0.1, right=False, num_tokens=25),
    ]
    reasons = chosen(candidates)
    cfg = PairConfig(by="reward", per_prompt=5, min_difference=0.5)
    pairs = [(p.chosen, p.rejected) for p in pairs_by_reward(candidates, reasons, cfg)]
    assert pairs == [(0, 1), (3, 4)]  # a truncated one teaches nothing but its length
    one = pairs_by_reward(candidates, reasons, replace(cfg, per_prompt=1))[0]
    assert (one.scores_chosen, one.scores_rejected) == ((1.0,), (0.0,))
    near = pairs_by_reward(candidates, reasons, replace(cfg, max_length_ratio=2.0))
    assert [(p.chosen, p.rejected) for p in near] == [(0, 1)]
    assert pairs_by_reward(candidates, reasons, replace(cfg, min_difference=1.0)) == []


def test_pairs_to_compare_are_readable_different_and_of_like_length() -> None:
    candidates = [
        candidate(0, right=False),
        candidate(1, num_tokens=19),
        candidate(2, num_tokens=40),
        candidate(3, unfit="repetition"),
        candidate(4, "response 0"),
    ]
    cfg = PairConfig(by="judge", per_prompt=9, max_length_ratio=2.0)
    found = [pairs_to_compare(candidates, cfg, seed) for seed in range(10)]
    # 40 tokens are too many beside 19, sample 3 is not readable, 0 and 4 say the same.
    assert {frozenset(pair) for pairs in found for pair in pairs} == {frozenset({0, 1}), frozenset({1, 4})}
    assert all(len(pairs) == 1 for pairs in found)
    assert pairs_to_compare(candidates[::-1], cfg, 3) == found[3]


def test_pairs_by_judge() -> None:
    cfg = PairConfig(by="judge", min_difference=1.0)
    clear = Comparison(7, (2, 5), ((0.0, 0.0), (2.0, 1.0)), in_order=1)
    one_sided = Comparison(7, (0, 1), ((2.0, 0.0), (0.0, 2.0)), in_order=1)  # always the first place
    unheard = Comparison(7, (3, 4), ((2.0, 2.0), (0.0, 0.0)), in_order=2)  # one order has no verdict
    (pair,) = pairs_by_judge([clear, one_sided, unheard], cfg)
    assert (pair.chosen, pair.rejected) == (5, 2)
    assert (pair.scores_chosen, pair.scores_rejected) == ((2.0, 1.0), (0.0, 0.0))
    assert pairs_by_judge([clear], replace(cfg, min_difference=1.5)) == []  # has to exceed it


def test_counts_add_up() -> None:
    tally = Tally()
    tally.add("math", [True, True, False, False], {0: "", 1: "duplicate", 2: "wrong", 3: "wrong"}, kept_tokens=12)
    tally.add("code", [False, False, False, False], dict.fromkeys(range(4), "wrong"), kept_tokens=0)
    plain = tally.plain()
    assert plain["all"] == {
        "prompts": 2,
        "sampled": 8,
        "right": 2,
        "kept": 1,
        "acceptance": 1 / 8,
        "mean_kept_tokens": 12.0,
        "dropped": {"duplicate": 1, "wrong": 6},
    }
    for counts in (plain["all"], *plain["by_source"].values(), *plain["by_share_right"].values()):
        assert counts["kept"] + sum(counts["dropped"].values()) == counts["sampled"]
    assert list(plain["by_share_right"]) == ["0", "(0.25, 0.5]"]


def test_bins_hold_every_share_once() -> None:
    for num in (1, 3, 8, 64):
        names = [bin_of(right, num) for right in range(num + 1)]
        assert names[0] == "0" and names[-1] == "1" and "0" not in names[1:] and "1" not in names[:-1]
    assert [bin_of(right, 4) for right in (1, 2, 3)] == ["(0, 0.25]", "(0.25, 0.5]", "(0.5, 0.75]"]
    assert bin_of(63, 64) == "(0.75, 1)"


def test_an_empty_response_is_no_half_of_a_pair() -> None:
    """A policy may end at once; rows of pairs need text (`data/formats.py`)."""
    empty, good = candidate(0, " \n", reward=0.0), candidate(1, "good", reward=1.0)
    assert pairs_by_reward([empty, good], {0: "wrong", 1: ""}, PairConfig(min_difference=0.5)) == []
    assert pairs_to_compare([empty, good], PairConfig(), seed=1) == []
