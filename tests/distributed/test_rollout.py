"""Generation on every layout: the training forward's log-probabilities and routing, and the same samples everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from r1_megatron.config.schema import SamplingConfig
from tests.distributed import rollout_checks as checks
from tests.distributed.layouts import LAYOUTS, layout, world_size
from tests.rank_pool import RankPool

# Largest difference of a log-probability between rollout and training forward, in nats.
TOLERANCE = 1e-4
# A sample may differ between layouts only where something was this close to coming out otherwise.
TIE = 1e-6
CASES: dict[str, dict[str, Any]] = {
    **{name: {"parallel": parallel} for name, parallel in LAYOUTS.items() if name != "one"},
    # The string places a multi-token-prediction layer, which sampling leaves out.
    "pp2_string": {"parallel": LAYOUTS["pp2_string"], "model": replace(checks.MODEL, mtp_num_layers=1)},
    "ep2_uneven": {"parallel": LAYOUTS["ep2"], "uneven": True},
    "tp2ep4_uneven": {"parallel": layout(tp=2, ep=4, dp=2), "uneven": True},
    "eight_ep4_uneven": {"parallel": layout(tp=2, pp=2, vpp=2, ep=4, dp=2), "uneven": True},
    "pp2_three_groups": {"parallel": LAYOUTS["pp2"], "pipeline_groups": 3},
    # A first stage of the embedding alone and a stage more than there are layers for.
    "pp4_uneven_stages": {"parallel": replace(layout(pp=4), pipeline_model_parallel_layout="E|tt|t|tL")},
}


# Memory for one sequence of 56 tokens and a little more, and prompts of up to 33 tokens in forwards of 8.
TIGHT = {"cache_tokens": 64, "max_prefill_tokens": 8, "page_size": 4}
TIGHT_CASES: dict[str, dict[str, Any]] = {
    **{name: {"parallel": LAYOUTS[name]} for name in ("one", "pp2vpp2", "tp2ep2")},
    "ep2_uneven": CASES["ep2_uneven"],
    "pp2_three_groups": CASES["pp2_three_groups"],
}


def run(ranks: RankPool, **case: Any) -> list[dict[str, Any]]:
    return ranks.run(checks.check_rollouts, world_size(case["parallel"]), timeout_s=150, **case)


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> dict[float, dict[str, Any]]:
    """One rank's answers by temperature."""
    return {t: run(ranks, parallel=LAYOUTS["one"], temperature=t)[0] for t in (1.0, 0.7)}


def assert_parity(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        assert answer["diff"] <= TOLERANCE
        assert answer["misrouted"] == 0
    assert sum(answer["num_routed"] for answer in answers) > 0


def assert_same_samples(ranks: RankPool, one: dict[str, Any], answers: list[dict[str, Any]], temperature: float):
    """All ranks of a replica agree; together the replicas drew what one rank drew, or a tie explains the difference."""
    samples: dict[int, list[int]] = {}
    for answer in answers:
        for request, tokens in answer["samples"].items():
            assert samples.setdefault(request, tokens) == tokens, f"ranks disagree on request {request}"
    assert samples.keys() == one["samples"].keys()
    prompts = {prompt.index: list(prompt.tokens) for prompt in checks.some_prompts(5)}
    for request, expected in one["samples"].items():
        if samples[request] == expected:
            continue
        prompt = prompts[request // 2**20]
        pairs = zip(samples[request][len(prompt) :], expected[len(prompt) :])
        common = next(i for i, (a, b) in enumerate(pairs) if a != b)
        (gap,) = ranks.run(
            checks.gap_at_divergence,
            1,
            prompt=prompt,
            common=expected[len(prompt) : len(prompt) + common],
            request=request,
            temperature=temperature,
        )
        print(f"request {request} differs from its response token {common} on; the closest call was {gap:.1e}")
        assert gap <= TIE


def test_one_rank(alone: dict[float, dict[str, Any]]) -> None:
    for answer in alone.values():
        assert_parity([answer])
        assert 0 < answer["num_stopped"] < len(answer["samples"]) == 15
    # The draws are keyed, the laws are not the same.
    assert alone[1.0]["samples"] != alone[0.7]["samples"]


@pytest.mark.parametrize("name", CASES)
def test_layout(ranks: RankPool, alone: dict[float, dict[str, Any]], name: str) -> None:
    answers = run(ranks, **CASES[name])
    assert_parity(answers)
    assert_same_samples(ranks, alone[1.0], answers, 1.0)


@pytest.mark.parametrize("name", ["tp2ep2", "pp2vpp2", "ep2"])
def test_through_the_modules(ranks: RankPool, alone: dict[float, dict[str, Any]], name: str) -> None:
    answers = run(ranks, parallel=LAYOUTS[name], modules=True)
    assert_parity(answers)
    assert_same_samples(ranks, alone[1.0], answers, 1.0)


def test_experts_one_by_one(ranks: RankPool, alone: dict[float, dict[str, Any]]) -> None:
    """Their layers go through the modules, all others are walked."""
    answers = run(ranks, parallel=LAYOUTS["ep2"], experts="sequential")
    assert_parity(answers)
    assert_same_samples(ranks, alone[1.0], answers, 1.0)


@pytest.mark.parametrize("name", ["ep2_uneven", "tp2dp2ep4", "tp2ep2etp2"])
def test_experts_over_replicas(ranks: RankPool, alone: dict[float, dict[str, Any]], name: str) -> None:
    """Rows that go to all ranks or only to those of their experts give the same bits, and one rank's values."""
    every, counted = (run(ranks, **CASES[name], counted=counted) for counted in (False, True))
    for a, b in zip(every, counted):
        assert a["samples"] == b["samples"] and a["logprobs"] == b["logprobs"]
    one = alone[1.0]
    for request, logprobs in ((r, p) for answer in every for r, p in answer["logprobs"].items()):
        assert logprobs == pytest.approx(one["logprobs"][request], abs=1e-5, rel=0)


def test_experts_across_tensor_parallel_groups(ranks: RankPool) -> None:
    """Ranks that exchange tokens are parts of two tensor-parallel groups, so that the whole stage is coupled."""
    model = replace(checks.MODEL, num_moe_experts=12)
    (one,) = run(ranks, parallel=LAYOUTS["one"], model=model)
    spread = run(ranks, parallel=layout(tp=2, dp=3, ep=3), model=model, uneven=True)
    assert_parity(spread)
    assert {k: v for answer in spread for k, v in answer["samples"].items()} == one["samples"]


@pytest.mark.parametrize("name", TIGHT_CASES)
def test_little_memory_and_short_forwards(ranks: RankPool, alone: dict[float, dict[str, Any]], name: str) -> None:
    """Sequences give up their places, prompts come in chunks: the samples are those of one rank with plenty."""
    answers = run(ranks, **TIGHT_CASES[name], **TIGHT)
    assert_parity(answers)
    assert_same_samples(ranks, alone[1.0], answers, 1.0)
    plenty = alone[1.0]["metrics"]
    assert plenty["rollout/preemptions"] == 0 and plenty["rollout/cache_pages_peak"] > 10
    tight = answers[-1]["metrics"]
    assert tight["rollout/preemptions"] > 0 and tight["rollout/cache_pages_peak"] == 16
    assert 1 <= tight["rollout/batch_mean"] < plenty["rollout/batch_mean"] <= 10


@pytest.mark.parametrize("options", [{"page_size": 1}, {"page_size": 64}, {"max_prefill_tokens": 1}], ids=str)
def test_pages_and_chunks_of_any_size(
    ranks: RankPool, alone: dict[float, dict[str, Any]], options: dict[str, int]
) -> None:
    answers = run(ranks, parallel=LAYOUTS["one"], **options)
    assert_parity(answers)
    assert_same_samples(ranks, alone[1.0], answers, 1.0)
    assert answers[0]["metrics"]["rollout/preemptions"] == 0


@pytest.mark.parametrize("name", ["tp2ep2", "pp2vpp2"])
def test_layout_at_another_temperature(ranks: RankPool, alone: dict[float, dict[str, Any]], name: str) -> None:
    answers = run(ranks, parallel=LAYOUTS[name], temperature=0.7)
    assert_parity(answers)
    assert_same_samples(ranks, alone[0.7], answers, 0.7)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tp2", {"q_lora_rank": None, "rope_type": "rope"}),
        ("tp2", {"vocab_size": 259, "share_embeddings_and_output_weights": True, "init_method_std": 0.05}),
        ("pp2", {"mtp_num_layers": 1}),
        ("ep2", {"moe_router_num_groups": None, "moe_router_group_topk": None}),
    ],
    ids=["no_q_lora_rope", "padded_tied_vocabulary", "mtp", "no_expert_groups"],
)
def test_model_variants(ranks: RankPool, name: str, change: dict[str, Any]) -> None:
    model = replace(checks.MODEL, **change)
    (one,) = run(ranks, parallel=LAYOUTS["one"], model=model)
    spread = run(ranks, parallel=LAYOUTS[name], model=model)
    assert_parity([one])
    assert_parity(spread)
    assert {k: v for answer in spread for k, v in answer["samples"].items()} == one["samples"]


def test_ties_are_rare(ranks: RankPool, alone: dict[float, dict[str, Any]]) -> None:
    """The measure behind the allowance of `assert_same_samples` is not small by itself."""
    prompt = checks.some_prompts(5)[3]
    tokens = alone[1.0]["samples"][prompt.index * 2**20]
    (gap,) = ranks.run(
        checks.gap_at_divergence,
        1,
        prompt=list(prompt.tokens),
        common=tokens[len(prompt.tokens) : -1],
        request=prompt.index * 2**20,
        temperature=1.0,
    )
    assert 10 * TIE < gap < 1


def test_coupled_ranks_run_the_same_forwards(ranks: RankPool, alone: dict[float, dict[str, Any]]) -> None:
    """Data-parallel rank 0 has no prompt at all and feeds padding as long as its expert peer samples, no longer."""
    answers = run(ranks, **CASES["ep2_uneven"])
    assert len(answers[0]["samples"]) == 0 and len(answers[1]["samples"]) == 15
    forwards = [answer["metrics"]["rollout/num_forwards"] for answer in (*answers, alone[1.0])]
    assert forwards[0] == forwards[1] == forwards[2] > 0
    # Without experts in common a rank that has nothing to do runs nothing.
    answers = run(ranks, parallel=LAYOUTS["dp2"], uneven=True)
    assert [answer["metrics"]["rollout/num_forwards"] > 0 for answer in answers] == [False, True]


@pytest.mark.parametrize("name", ["one", "tp2"])
def test_bf16_with_replayed_routing(ranks: RankPool, name: str) -> None:
    """In bfloat16 a near tie of the router can go either way; on the rollout's own experts the two forwards agree."""
    for answer in run(ranks, parallel=LAYOUTS[name], bf16=True, replay=True):
        assert answer["diff"] < 0.2
        assert answer["misrouted"] == 0


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingConfig(max_new_tokens=10, temperature=0.0),
        SamplingConfig(max_new_tokens=10, temperature=1.3, top_k=20, top_p=0.9, min_p=0.02),
    ],
    ids=["greedy", "truncated"],
)
def test_engine_draws_what_a_loop_without_cache_draws(ranks: RankPool, sampling: SamplingConfig) -> None:
    (worst,) = ranks.run(checks.check_full_forward, 1, sampling=sampling)
    assert worst <= TOLERANCE


def test_stop_strings(ranks: RankPool) -> None:
    ((num_cut, num_samples),) = ranks.run(checks.check_stop_strings, 1)
    assert 3 <= num_cut <= num_samples == 24


@pytest.mark.parametrize("name", ["one", "tp2ep2"])
def test_generation_and_training_do_not_disturb_each_other(ranks: RankPool, name: str) -> None:
    answers = ranks.run(checks.check_beside_training, world_size(LAYOUTS[name]), parallel=LAYOUTS[name])
    for answer in answers:
        first, second, third, other = answer["draws"]
        assert first == second == third != other
        assert answer["modes"][0] is False and all(answer["modes"][1:]), "each chunk keeps its mode"
        assert answer["replay_diff"] <= TOLERANCE
        assert answer["released"]
    if name == "one":
        assert answers[0]["gradient"] > 0
        rows = 10 * 64  # 56 tokens are four pages
        latents, routing = 4 * rows * (32 + 16) * 4, rows * 3 * 4
        assert answers[0]["bytes"] == latents + routing


def test_errors(ranks: RankPool) -> None:
    (told,) = ranks.run(checks.check_errors, 1)
    expected = {
        "token": "prompt 2: token ids [260, -1] are outside [0, 260)",
        "empty": "prompt 3 is empty",
        "long": "prompt 1: 41 tokens + sampling.max_new_tokens(16) = 57, but a sequence may have 56 tokens",
        "new_tokens": "2 tokens + sampling.max_new_tokens(55) = 57",
        "twice": "prompt 1: the index must be in [0, 2**43) and stand once",
        "samples": "samples_per_prompt=0",
        "options": "top_p=0.0 must be in (0, 1]",
        "stop_ids": "sampling.stop_token_ids: [260] are outside the vocabulary [0, 260)",
        "positions": "data.max_prompt_tokens(40) + sampling.max_new_tokens(16) = 56, but model.max_position",
        "memory": "rollout.cache_tokens=55 is less than one sequence, which could never end",
        "slots": "rollout.max_sequences=2 is less than the 3 groups in flight",
    }
    for case, text in expected.items():
        assert told[case].startswith("ValueError: ") and text in told[case], told[case]
    assert told["nan"].startswith("FloatingPointError: ") and "request 1048576 (prompt 1)" in told["nan"]


def test_fused_norms(ranks: RankPool) -> None:
    (worst,) = ranks.run(checks.check_fused_norms, 1)
    assert worst <= 1e-5
