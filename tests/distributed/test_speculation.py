"""Drafts change no sample, on any layout and in any memory, and are what the training forward's own layer predicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from r1_megatron.config.schema import SamplingConfig
from tests.distributed import in_flight_checks, race_checks
from tests.distributed import speculation_checks as checks
from tests.distributed.layouts import LAYOUTS, world_size
from tests.distributed.rollout_checks import SAMPLING
from tests.distributed.speculation_checks import ACCEPTANCE, PER_DRAW
from tests.rank_pool import RankPool

# Largest difference of a log-probability, in nats, and of a logit.
TOLERANCE = 1e-5
TIGHT = {"cache_tokens": 64, "max_prefill_tokens": 8, "page_size": 4}
# A vocabulary that the tokenizer knows, and digits that end a sample.
WORDS = {
    "model": replace(checks.MODEL, vocab_size=104),
    "sampling": SamplingConfig(max_new_tokens=20, stop=("7", "12", "3")),
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"parallel": LAYOUTS[name]} for name in ("one", "tp2", "pp2vpp2", "tp2pp2ep2", "pp2_string")},
    "ep2_uneven": {"parallel": LAYOUTS["ep2"], "uneven": True},
    **{f"{name}_tight": {"parallel": LAYOUTS[name], **TIGHT} for name in ("one", "pp2", "tp2ep2")},
    "pages_of_one": {"parallel": LAYOUTS["one"], "page_size": 1},
    "greedy": {"parallel": LAYOUTS["one"], "sampling": replace(SAMPLING, temperature=0.0)},
    "truncated": {"parallel": LAYOUTS["one"], "sampling": replace(SAMPLING, temperature=1.3, top_k=20, top_p=0.9)},
    "stop_strings": {"parallel": LAYOUTS["one"], **WORDS},
    **{f"{n}_new": {"parallel": LAYOUTS["one"], "sampling": replace(SAMPLING, max_new_tokens=n)} for n in (1, 2, 3)},
}


@pytest.mark.parametrize("name", CASES)
def test_samples_are_the_same(ranks: RankPool, name: str) -> None:
    case = CASES[name]
    answers = ranks.run(checks.check_same_samples, world_size(case["parallel"]), timeout_s=150, **case)
    for answer in answers:
        assert answer["differing"] == [] and answer["diff"] <= TOLERANCE
        before, after = answer["metrics"]
        assert after["rollout/num_tokens"] == before["rollout/num_tokens"]
        assert ("tight" in name) == (after["rollout/preemptions"] > 0)
    plain, drafting = answers[-1]["metrics"]
    print(f"{name}: {drafting[ACCEPTANCE]:.3f} accepted, {drafting[PER_DRAW]:.2f} tokens a draw")
    if "new" not in name:
        assert sum(answer["num_stopped"] for answer in answers) > 0
    if "sampling" not in case:  # the drafting layer is not trained: that the noise is the same makes it guess
        assert 0.1 < drafting[ACCEPTANCE] < 1 < drafting[PER_DRAW]
        assert drafting["rollout/num_forwards"] < plain["rollout/num_forwards"]


def test_a_stopped_rollout_goes_on(ranks: RankPool, tmp_path: Path) -> None:
    """What is under way when a run is stopped, drafts aside, goes on as without them."""
    options = {"model": checks.MODEL, "speculative_tokens": 1, "stops": ((2, 1), (5, 1))}
    for name in ("one", "pp2"):
        layout = LAYOUTS[name]
        folder = str(tmp_path / name)
        answers = ranks.run(
            in_flight_checks.check_stopped, world_size(layout), parallel=layout, folder=folder, **options
        )
        assert all(answer["diff"] <= 1e-4 and answer["training_diff"] <= 1e-4 for answer in answers)
        assert sum(answer["unfinished"] for answer in answers) > 0


def test_a_race_with_two_tokens_a_draw(ranks: RankPool, tmp_path: Path) -> None:
    """Winners, finish and what goes on are what brute force makes of the whole samples."""
    layout = LAYOUTS["one"]
    options = {"model": checks.MODEL, "max_sequences": 6, "speculative_tokens": 1}
    (answer,) = ranks.run(race_checks.check_race, 1, parallel=layout, folder=str(tmp_path), **options)
    assert answer["drawn"] < answer["drawn_to_the_end"]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_drafts_are_those_of_the_training_forward(ranks: RankPool, temperature: float) -> None:
    """megatron-core's own layer, on whole sequences, has the same logits wherever a draft came from: shared prompts,
    prompts in chunks, single tokens and accepted drafts."""
    ((worst, compared, wrong),) = ranks.run(checks.check_draft_logits, 1, temperature=temperature)
    print(f"{compared} drafts, logits within {worst:.1e}, {wrong} drawn otherwise")
    assert compared > 100 and worst <= 10 * TOLERANCE and wrong == 0


@pytest.mark.parametrize(
    ("name", "temperature"), [("one", 1.0), ("one", 0.0), ("tp2", 1.0), ("pp2", 1.0), ("ep2", 1.0)]
)
def test_perfect_drafts_are_all_accepted(ranks: RankPool, name: str, temperature: float) -> None:
    """16 tokens in nine draws: the first one comes with the prompt, without a draft, and so does one more."""
    layout = LAYOUTS[name]
    for answer in ranks.run(checks.check_perfect_drafts, world_size(layout), parallel=layout, temperature=temperature):
        assert answer["differing"] == []
        assert answer[ACCEPTANCE] == 1 and answer[PER_DRAW] == pytest.approx(16 / 9)
        assert answer["rollout/num_forwards"] < 0.7 * answer["plain_forwards"]


def test_what_cannot_draft_is_refused(ranks: RankPool) -> None:
    (told,) = ranks.run(checks.check_refused, 1)
    assert "this model is built of Transformer Engine's. Set it to 0." in told["modules"]
    assert "the stage that draws tokens has no multi-token-prediction layer" in told["no layer"]
