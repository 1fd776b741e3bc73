"""Parallelism does not change the answer: training on every layout against Transformers and autograd in float64.

The batch is 16 sequences of 6 to 40 tokens with signed weights, dealt unevenly to the data-parallel ranks, packed into
several microbatches. Transformers' own float32 gradients are 3e-6 away from float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from r1_megatron.config.algorithms import ALGORITHMS
from tests.distributed.layouts import LAYOUTS, with_check, world_size
from tests.rank_pool import RankPool
from tests.tiny import TINY

GRADIENT_ERROR = 1e-5
Measured = Callable[[str, str], list[dict[str, Any]]]


def layouts(check: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("layout", with_check(check))


def assert_exact(answers: list[dict[str, Any]], gradient: float = GRADIENT_ERROR, loss: float = 1e-6) -> None:
    for rank, answer in enumerate(answers):
        assert answer["error"] <= gradient, f"rank {rank}: {answer['name']} is {answer['error']:.1e} off"
        assert answer["loss_error"] <= loss
        assert answer["count"] >= 10


@layouts("gradients")
def test_gradients(measured: Measured, layout: str) -> None:
    answers = measured(layout, "gradients")
    assert_exact(answers)
    assert answers[0]["microbatches"] >= 3
    padded = [answer["padded_gradient"] for answer in answers if "padded_gradient" in answer]
    assert bool(padded) == ("tp2" in layout or layout == "eight")
    assert not any(padded)


@layouts("sequential_experts")
def test_sequential_experts(measured: Measured, layout: str) -> None:
    assert_exact(measured(layout, "sequential_experts"))


@layouts("one_rank_has_no_sample")
def test_a_rank_without_samples(measured: Measured, layout: str) -> None:
    assert_exact(measured(layout, "one_rank_has_no_sample"))


def test_plain_rope(measured: Measured) -> None:
    assert_exact(measured("one", "rope"))


def test_full_rank_query(measured: Measured) -> None:
    assert_exact(measured("one", "full_rank_query"))


@layouts("tied_embeddings")
def test_tied_embeddings(measured: Measured, layout: str) -> None:
    assert_exact(measured(layout, "tied_embeddings"))


@layouts("mtp")
def test_multi_token_prediction(measured: Measured, layout: str) -> None:
    """Main and MTP loss together, against an MTP module made of Transformers' own layers; and what a run reports."""
    answers = measured(layout, "mtp")
    assert_exact(answers)
    assert all(answer["mtp_loss_error"] <= 1e-6 for answer in answers)


@layouts("mtp_recomputed")
def test_multi_token_prediction_recomputed(measured: Measured, layout: str) -> None:
    assert_exact(measured(layout, "mtp_recomputed"))


@layouts("mtp_left_alone")
def test_multi_token_prediction_can_be_left_alone(measured: Measured, layout: str) -> None:
    assert all(answer["mtp_gradient"] == 0.0 for answer in measured(layout, "mtp_left_alone"))


@layouts("aux_loss")
def test_sequence_wise_balance_loss(measured: Measured, layout: str) -> None:
    assert_exact(measured(layout, "aux_loss"))


@layouts("recompute")
def test_recomputation(measured: Measured, layout: str) -> None:
    answers = measured(layout, "recompute")
    assert_exact(answers)
    assert answers[0]["ways"] == 5


@layouts("packing")
def test_packed_equals_unpacked(measured: Measured, layout: str) -> None:
    for answer in measured(layout, "packing"):
        alone, packed = answer["microbatches"]
        assert alone >= 4 * packed
        assert answer["error"] <= 3e-6
        assert answer["loss_error"] <= 1e-6


@layouts("balance")
def test_balanced_equals_unbalanced(measured: Measured, layout: str) -> None:
    """Where a sample is worked on changes nothing; the work of all ranks and microbatches becomes about the same."""
    answers = measured(layout, "balance")
    for answer in answers:
        assert answer["error"] <= 3e-6
        assert answer["loss_error"] <= 1e-6

    def spread(name: str) -> float:
        """Of the ranks' work, the largest against the mean."""
        loads = [sum(answer[name]) for answer in answers]
        return max(loads) * len(loads) / sum(loads)

    assert spread("work_alone") > 1.2
    assert spread("work") < 1.03
    assert len({len(answer["work"]) for answer in answers}) == 1


@layouts("host_reads")
def test_the_host_does_not_wait_in_a_pass(measured: Measured, layout: str) -> None:
    """What is left is megatron-core's: the unfused permutation selects by a mask, the dispatcher's split sizes have to
    be on the host for an exchange (it waits once a layer). Pipeline stages know shapes beforehand."""
    expected = {"moe_utils.permute"}
    if layout == "ep2":
        expected |= {"device.sort", "device.to_host"}
    for answer in measured(layout, "host_reads"):
        assert set(answer["places"]) == expected


@layouts("family_gradients")
def test_a_prompt_computed_once(measured: Measured, layout: str) -> None:
    """Samples of common prompts, against each of them alone; with the balance loss, plain and recomputed."""
    for way in ("plain", "full", "selective"):
        answers = [answer[way] for answer in measured(layout, "family_gradients")]
        assert_exact(answers)
        assert all(0 < answer["computed"] < 0.9 * answer["tokens"] for answer in answers)
        assert all(answer["longest"] <= 60 for answer in answers)


@layouts("family_mtp")
def test_a_prompt_computed_once_with_multi_token_prediction(measured: Measured, layout: str) -> None:
    answers = measured(layout, "family_mtp")
    assert_exact(answers)
    assert all(answer["computed"] < 0.95 * answer["tokens"] for answer in answers)


@layouts("family_replay")
def test_a_prompt_computed_once_with_replayed_experts(measured: Measured, layout: str) -> None:
    """Where the prompt's own experts are not the same, it is computed again."""
    answers = measured(layout, "family_replay")
    assert_exact(answers)
    assert all(answer["computed"] < 0.95 * answer["tokens"] for answer in answers)
    assert all(answer["pending"] == 0 and answer["logprob_error"] <= 3e-5 for answer in answers)


@layouts("family_logprobs")
def test_logprobs_of_a_prompt_computed_once(measured: Measured, layout: str) -> None:
    assert all(answer["error"] <= 3e-5 for answer in measured(layout, "family_logprobs"))


@layouts("family_bias")
def test_balancing_bias_of_a_prompt_computed_once(measured: Measured, layout: str) -> None:
    assert all(answer["error"] == 0.0 for answer in measured(layout, "family_bias"))


@layouts("family_students")
def test_students_compute_a_prompt_once(measured: Measured, layout: str) -> None:
    for answer in measured(layout, "family_students"):
        assert_exact(list(answer.values()))


@layouts("family_objectives")
def test_objectives_do_not_see_that_a_prompt_is_computed_once(measured: Measured, layout: str) -> None:
    for answer in measured(layout, "family_objectives"):
        assert_exact(list(answer.values()))


@layouts("logprobs")
def test_logprobs_of_policy_and_reference(measured: Measured, layout: str) -> None:
    """At temperature 0.7; the policy is bit-unchanged after another's weights were swapped in and out."""
    for answer in measured(layout, "logprobs"):
        assert max(answer["error"], answer["reference_error"], answer["error_afterwards"]) <= 3e-5
        assert answer["unchanged"]


@layouts("plain_logits")
def test_logits_without_labels(measured: Measured, layout: str) -> None:
    for answer in measured(layout, "plain_logits"):
        assert answer["shape"][2] == -(-TINY.vocab_size // (2 if layout == "tp2" else 1))
        assert answer["error"] <= 1e-5


@layouts("router_replay")
def test_router_replay(measured: Measured, layout: str) -> None:
    """Random experts forced everywhere: gradients (router included) as float64 with the same experts."""
    for recompute in ("plain", "full", "moe"):
        answers = [answer[recompute] for answer in measured(layout, "router_replay")]
        assert_exact(answers)
        assert all(answer["pending"] == 0 for answer in answers)
        assert all(answer["logprob_error"] <= 3e-5 for answer in answers)


@layouts("grpo")
def test_policy_gradient(measured: Measured, layout: str) -> None:
    """Two-sided and dual clip, KL, entropy, truncated importance sampling, temperature 0.7."""
    assert_exact(measured(layout, "grpo"))


@layouts("papers")
def test_every_algorithm_is_its_paper(measured: Measured, layout: str) -> None:
    """From rewards and completions to the gradients of the model, with ratios on both sides of all clips.

    Old log-probabilities are float32, too, and RLOO's ratio is a product over the sequence.
    """
    for answer in measured(layout, "papers"):
        assert answer.keys() == ALGORITHMS.keys()
        assert_exact(list(answer.values()), gradient=3e-5, loss=5e-6)


def test_clips_bind_in_the_references_of_the_papers(references: Path) -> None:
    """Of tokens, CISPO's upper one too; of GSPO's sequences, and RLOO's."""
    log_ratios = torch.load(references, weights_only=True, mmap=True)["papers"]["log_ratios"]
    for sizes, low, high in (
        (torch.cat(log_ratios), 0.8, 1.28),
        (torch.cat(log_ratios), 1.0, 6.0),
        (torch.stack([values.mean() for values in log_ratios]), 1 - 3e-4, 1 + 4e-4),
        (torch.stack([values.sum() for values in log_ratios]), 0.8, 1.2),
    ):
        assert sizes.exp().min() < low and sizes.exp().max() > high


@pytest.mark.parametrize(
    ("layout", "check"),
    [
        (layout, check)
        for check in ("trajectory", "trajectory_overlapped", "trajectory_plain")
        for layout in with_check(check)
    ],
)
def test_optimizer_trajectory(measured: Measured, layout: str, check: str) -> None:
    """Five steps of AdamW with warm-up, clipping at every step and decay of matrices only.

    Adam divides by the root of the squared gradient: where that is near zero, rounding decides the update's sign. So
    weights are compared by norm, relative to how far they moved.
    """
    for answer in measured(layout, check):
        assert answer["steps"] == 5
        assert answer["loss_error"] <= 1e-5
        assert answer["norm_error"] <= 1e-5
        assert answer["weight_error"] <= 1e-3, answer["name"]


@layouts("offload")
def test_offload_between_phases(measured: Measured, layout: str) -> None:
    for answer in measured(layout, "offload"):
        assert answer["bf16_same"] and answer["fp32_same"]
        # Two moments of every parameter of this rank's share; in bf16 master weights, too. The reference is elsewhere.
        dp = 2.001 if layout == "dp2" else 1  # the ranks' shares differ by some numbers
        assert answer["fp32_freed"] >= 8 / dp * answer["parameters"]
        assert answer["bf16_freed"] >= 12 / dp * answer["parameters"]


def test_learning_rate(measured: Measured) -> None:
    """Linear warm-up to 1e-3 over 4 steps, decay to 1e-4 at step 10."""
    (rates,) = measured("one", "learning_rates")
    warm_up = [1e-3 * step / 4 for step in range(1, 5)]
    progress = [step / 6 for step in range(1, 7)] + [1.0, 1.0]
    assert rates["constant"] == pytest.approx(warm_up + [1e-3] * 8)
    assert rates["linear"] == pytest.approx(warm_up + [1e-3 - 9e-4 * p for p in progress])
    assert rates["cosine"] == pytest.approx(warm_up + [1e-4 + 9e-4 * (1 + math.cos(math.pi * p)) / 2 for p in progress])


@layouts("balancing_bias")
def test_balancing_bias(measured: Measured, layout: str) -> None:
    """One update of the selection biases, bit for bit."""
    answers = measured(layout, "balancing_bias")
    assert all(answer["error"] == 0.0 for answer in answers)
    assert max(answer["routers"] for answer in answers) > 0


@layouts("balancing_counts")
def test_padding_is_not_balanced(measured: Measured, layout: str) -> None:
    answers = measured(layout, "balancing_counts")
    assert answers[0]["padding"] > 0
    assert answers[0]["counted"] == answers[0]["expected"]


@layouts("nonfinite")
def test_a_nan_on_one_rank_skips_the_step_everywhere(measured: Measured, layout: str) -> None:
    for answer in measured(layout, "nonfinite"):
        for kind in ("gradient", "loss"):
            assert not answer[f"{kind}_updated"]
            assert answer[f"{kind}_unchanged"]
            assert answer[f"{kind}_version"] == 1
        assert answer["same_afterwards"]
        assert answer["same_rates"]


@layouts("nonfinite_stop")
def test_a_nan_is_named(measured: Measured, layout: str) -> None:
    answers = measured(layout, "nonfinite_stop")
    culprit = 1 if layout == "dp2" else 0
    for answer in answers:
        for key, case in answer.items():
            assert "step 0" in case["message"], (key, case)
            assert f"microbatch 1 of data-parallel rank {culprit}" in case["message"], (key, case)
            assert ("the loss is nan" if "loss" in key else "the gradient of ") in case["message"], (key, case)
            assert case["unchanged"], key
    assert all(answer == answers[0] for answer in answers)


@layouts("bf16")
def test_bf16(measured: Measured, layout: str) -> None:
    """bfloat16 keeps 8 bits, 0.4 %; four layers of it make 5 % of the gradient and 0.02 nats a token here."""
    for answer in measured(layout, "bf16"):
        assert answer["gradient_error"] <= 0.08
        assert answer["error"] <= 0.12, answer["name"]
        assert answer["nll_error_mean"] <= 0.04
        assert answer["nll_error_max"] <= 0.3


def test_initial_weights_do_not_depend_on_the_layout(ranks: RankPool, tmp_path: Path) -> None:
    """Bit for bit, whatever the vocabulary is padded to."""

    def run(layout: str) -> list[dict[str, Any]]:
        parallel = LAYOUTS[layout]
        check = "tests.distributed.train_checks:initial_weights"
        return ranks.run(check, world_size(parallel), parallel=parallel, path=str(tmp_path / "initial.pt"))

    (alone,) = run("one")
    for layout in ("pp2vpp2", "tp2ep2", "tp2pp2ep2"):
        answers = run(layout)
        assert not any(answer["different"] for answer in answers), layout
        assert {name for answer in answers for name in answer["names"]} == set(alone["names"])
