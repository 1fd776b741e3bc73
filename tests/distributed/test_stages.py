"""Whole stages on several ranks: no layout changes the answer, and whatever goes wrong says so."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1_megatron.config.schema import BenchmarkConfig, RewardTermConfig
from r1_megatron.planner.flops import model_flops
from r1_megatron.telemetry.run_folder import last_checkpoint
from tests.distributed.layouts import LAYOUTS, layout, world_size
from tests.distributed.stage_checks import MODEL
from tests.e2e.runs import MEASURED
from tests.rank_pool import RankPool
from tests.torch_dist import tensors_of

STAGES = "tests.distributed.stage_checks"
TP2PP2 = layout(tp=2, pp=2)

# Everything GRPO can do, in one run, with all that makes rollouts fast: groups that go on in the next step, drafts,
# prompts in chunks, a cache that sequences have to make room in.
EVERYTHING = {
    "model": {"mtp_num_layers": 1},
    "rl": {
        "num_minibatches": 2,
        "inner_epochs": 2,
        "kl_coef": 0.05,
        "reference_refresh_steps": 2,
        "tis_cap": 2.0,
        "clip_ratio_high": 0.28,
        "clip_ratio_dual": 3.0,
        "entropy_coef": 0.01,
        "aggregation": "sequence_mean",
        "advantage_normalization": "none",
        "zero_variance_groups": "drop",
    },
    "rollout": {
        "over_sampling_prompts": 2,
        "speculative_tokens": 1,
        "max_prefill_tokens": 8,
        "cache_tokens": 64,
    },
    "sampling": {"temperature": 0.8, "top_p": 0.95},
}
OPTIONS = {
    "plain": {"rollout": {"router_replay": False}},
    "everything": EVERYTHING,
    # Ways to compute the same.
    "overlapped": {**EVERYTHING, "train": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "recomputed": {
        "model": {"mtp_num_layers": 1},
        "train": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    },
}
PARALLEL = {name: LAYOUTS[name] for name in ("dp2", "ep2", "tp2", "pp2", "pp2vpp2", "cp2")} | {"tp2pp2": TP2PP2}
# Not the policy's doing: clocks and memory, and noise around zero.
OTHER = (*MEASURED, "rollout/", "training/", "actor/ppo_kl", "nonfinite")


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Runs:
    """Runs of this module by name and layout, each made once."""

    def __init__(self, ranks: RankPool, folder: Path):
        self._ranks, self._folder, self._done = ranks, folder, {}

    def grpo(self, options: str, name: str) -> tuple[list[dict], list[dict[int, list[int]]], list[float]]:
        """Rows of ``metrics.jsonl``; per step, the tokens of all replicas' samples; per update, the divergence."""
        if (options, name) not in self._done:
            parallel = LAYOUTS["one"] if name == "one" else PARALLEL[name]
            folder = self._folder / f"{options}_{name}"
            answers = self._ranks.run(
                f"{STAGES}:run_grpo",
                world_size(parallel),
                timeout_s=300.0,
                folder=str(folder),
                parallel=parallel,
                sections=OPTIONS[options],
            )
            samples: list[dict[int, list[int]]] = [{} for _ in answers[0]["samples"]]
            for answer in answers:
                for step, mine in zip(samples, answer["samples"]):
                    assert all(step.setdefault(request, tokens) == tokens for request, tokens in mine.items())
            self._done[options, name] = rows_of(folder), samples, answers[0]["kl"]
        return self._done[options, name]


@pytest.fixture(scope="module")
def runs(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("runs"))


# ------------------------------------------------------------------------------------- parallelism changes no answer


@pytest.mark.parametrize("options", ["plain", "everything"])
def test_one_rank_does_what_the_options_say(runs: Runs, options: str) -> None:
    rows, samples, kl = runs.grpo(options, "one")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [len(step) for step in samples] == [16, 16, 16]
    updates = 4 if options == "everything" else 1
    for row in rows:
        assert row["train/updates"] == updates and row["train/skipped_updates"] == 0
        assert row["training/rollout_probs_diff_max"] <= 1e-4
        assert row["critic/rewards/min"] < row["critic/rewards/max"]
        assert row["response_length/min"] < row["response_length/max"] <= 12
        assert row["actor/grad_norm"] > 0 and row["actor/entropy"] > 1
    rates = [row["actor/lr"] for row in rows]
    assert rates[0] > rates[1] > rates[2] > 0
    if options == "everything":
        # Four updates a step. The reference is where the run started, until it is replaced after step 2. (What then is
        # left of the divergence: tokens of an earlier version keep its experts, and the reference routes for itself.)
        assert len(kl) == 12
        assert kl[0] == pytest.approx(0, abs=1e-9) and kl[8] < 0.1 * max(kl[:8])
        assert min(kl[1:8]) > 1e-3 and min(kl[9:]) > 1e-6


# TP2 PP2 does everything that TP2 does, too.
@pytest.mark.parametrize(
    "name, options", [(name, "plain") for name in PARALLEL] + [(n, "everything") for n in PARALLEL if n != "tp2"]
)
def test_no_layout_changes_the_answer(runs: Runs, name: str, options: str) -> None:
    """Same samples, token by token, in every step, and the same numbers to rounding.

    After an update the weights of two layouts differ in the last bits, so a draw that falls between two tokens to
    1e-6 could go either way. With these seeds none does.
    """
    assert_same(runs.grpo(options, "one"), runs.grpo(options, name))


@pytest.mark.parametrize(
    "options, name, reference", [("overlapped", "dp2", "everything"), ("recomputed", "pp2vpp2", "plain")]
)
def test_no_way_to_compute_changes_the_answer(runs: Runs, options: str, name: str, reference: str) -> None:
    """Overlapped communication; full recompute, and a multi-token-prediction layer, which GRPO leaves alone."""
    assert_same(runs.grpo(reference, "one"), runs.grpo(options, name))


PROFILED = {"profile": {"steps": (2,), "peak_tflops": 0.5}, "train": {"steps": 3}, "rl": {"kl_coef": 0.1}}


@pytest.mark.parametrize("name", ["pp2vpp2", "ep2"])
def test_a_profiled_step(runs: Runs, ranks: RankPool, tmp_path: Path, name: str) -> None:
    """A trace of every rank and a table, of that step alone; nothing is computed otherwise."""
    parallel = PARALLEL[name]
    folder = str(tmp_path / "run")
    answers = ranks.run(f"{STAGES}:run_grpo", 2, folder=folder, parallel=parallel, sections=PROFILED)
    _, samples, _ = runs.grpo("plain", "one")
    assert {**answers[0]["samples"][0], **answers[1]["samples"][0]} == samples[0]
    profile = tmp_path / "run/profile"
    assert sorted(path.name for path in profile.iterdir()) == [
        *("step_2.json", "step_2.txt"),
        *(f"step_2_rank_{rank}.json.gz" for rank in (0, 1)),
    ]
    found = json.loads((profile / "step_2.json").read_text())
    for rank in found["ranks"]:
        phases = rank["phases"]
        assert list(phases) == [
            *("rollout", "reward", "annotate", "annotate/pack", "annotate/logprobs"),
            *("train", "train/pack", "train/forward_backward", "train/reduce", "train/optimizer"),
            *("evaluation", "checkpoint"),
        ]
        whole = {path: seconds for path, seconds in phases.items() if "/" not in path}
        assert 0.5 * rank["step"] < sum(whole.values()) <= rank["step"]
        for parent in ("annotate", "train"):
            assert sum(s for path, s in phases.items() if path.startswith(f"{parent}/")) <= phases[parent]
        assert rank["passes"] == pytest.approx(phases["train/forward_backward"] + phases["annotate/logprobs"])
        assert 0 <= rank["waiting"] <= rank["passes"]
        assert 0 < rank["communication"] <= rank["step"]
        assert ("pipeline: receive" in rank["communication_kinds"]) == (name == "pp2vpp2")
    # A stage waits for its neighbour; without a pipeline nobody does.
    assert (found["bubble_share"] > 0) == (name == "pp2vpp2")
    rows = rows_of(tmp_path / "run")
    sampled = {request: len(tokens) for answer in answers for request, tokens in answer["samples"][1].items()}
    lengths = [sampled[request] for request in sorted(sampled)]
    assert len(lengths) == 16 and rows[1]["perf/train_tokens"] == sum(lengths)
    # All of a prompt but its last token, for all of its four samples but one.
    prompts = {request: length for answer in answers for request, length in answer["prompt_lens"][1].items()}
    shared = [prompts[request] - 1 if i % 4 else 0 for i, request in enumerate(sorted(prompts))]
    assert rows[1]["perf/shared_tokens"] == sum(shared) > 0
    assert rows[1]["perf/train_flops"] == model_flops(MODEL).training(lengths, shared)
    # Token by token: what each costs behind those before it.
    cost, drawn = model_flops(MODEL), 0
    for i, request in enumerate(sorted(prompts)):
        places = range(prompts[request] if i % 4 else 0, sampled[request] - 1)
        drawn += sum(cost.per_token + cost.per_pair * (place + 1) for place in places)
    assert rows[1]["perf/rollout_flops"] == drawn
    assert found["metrics"]["perf/train_flops"] == rows[1]["perf/train_flops"]
    assert found["mfu"] == pytest.approx(rows[1]["perf/mfu"])
    assert "MFU of training" in (profile / "step_2.txt").read_text()


def assert_same(expected_run, found_run) -> None:
    expected, expected_samples, expected_kl = expected_run
    found, samples, kl = found_run
    assert samples == expected_samples
    assert kl == pytest.approx(expected_kl, rel=1e-3, abs=1e-7)  # second order in differences of 1e-2
    assert len(found) == len(expected)
    for row, goal in zip(found, expected):
        names = [key for key in goal if not key.startswith(OTHER)]
        assert names == [key for key in row if not key.startswith(OTHER)]
        assert {key: row[key] for key in names} == pytest.approx({key: goal[key] for key in names}, rel=1e-4, abs=1e-7)
        assert row["training/rollout_probs_diff_max"] <= 1e-4


def test_evaluation_does_not_depend_on_the_layout(ranks: RankPool, tmp_path: Path) -> None:
    """Nor on an interruption: one that was asked to end goes on under another layout and draws what is missing."""
    ranks.run(f"{STAGES}:run_sft", 1, folder=str(tmp_path / "sft"), parallel=LAYOUTS["one"])
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join(json.dumps({"problem": f"{i}+{i + 1}+3+4=", "answer": 2 * i + 8}) + "\n" for i in range(8)))
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i}+0+0+{i}=", "label": 2 * i, "metadata": {"level": i % 2}} for i in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmarks = (
        BenchmarkConfig("held_out", samples_per_prompt=2, temperature=1.0, top_p=1.0, num_prompts=16),
        BenchmarkConfig("aime", str(sums), question="{problem}", samples_per_prompt=4, pass_at=(2,), cons_at=(3, 4)),
        BenchmarkConfig("prompts", str(prompts), samples_per_prompt=3, greedy=False, max_new_tokens=9),
    )
    num_asked = 2 * 16 + 2 * 8 + 6

    def evaluate(name: str, layout: str, **options) -> int:
        parallel = TP2PP2 if layout == "tp2pp2" else LAYOUTS[layout]
        found = ranks.run(
            f"{STAGES}:run_evaluate",
            world_size(parallel),
            folder=str(tmp_path / name),
            parallel=parallel,
            checkpoint=str(tmp_path / "sft/checkpoints/final"),
            benchmarks=benchmarks,
            **options,
        )
        return sum(found) // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size)

    assert evaluate("one", "one") == num_asked
    assert evaluate("tp2pp2", "tp2pp2") == num_asked
    kept = evaluate("again", "cp2dp2ep4", stop_after=9)
    assert 0 < kept < num_asked and not (tmp_path / "again/evaluation.json").exists()
    assert evaluate("again", "one") == num_asked - kept
    one, *others = (tmp_path / name for name in ("one", "tp2pp2", "again"))
    for folder in others:
        for file in ("evaluation.json", "evaluation.md", "completions.jsonl"):
            assert (folder / file).read_text() == (one / file).read_text(), (folder, file)
    (row,), (other,) = rows_of(one), rows_of(others[0])
    assert {k: v for k, v in other.items() if k != "time"} == {k: v for k, v in row.items() if k != "time"}
    assert (row["step"], row["eval/num_prompts"]) == (3, 16) and row["eval/sampled_length"] > 1
    found = json.loads((one / "evaluation.json").read_text())
    held_out, aime, plain = found["benchmarks"]
    assert held_out["figures"]["pass@1"]["value"] == row["eval/sampled_accuracy"]
    assert list(aime["figures"]) == ["pass@1", "pass@2", "cons@3", "cons@4", "greedy"]
    assert row["eval/sums/pass@2"] == aime["figures"]["pass@2"]["value"]
    assert (
        row["eval/prompts/term:format"]
        == plain["figures"]["term:format"]["value"]
        == plain["figures"]["pass@1"]["value"]
    )
    assert list(plain["groups"]["level"]) == ["0", "1"] and plain["groups"]["level"]["1"]["num_problems"] == 3
    assert len({(line["benchmark"], line["pass"]) for line in completions_of(one)}) == 5
    assert all(
        len(line["texts"]) == 4
        for line in completions_of(one)
        if line["pass"] == "sampled" and "sums" in line["benchmark"]
    )


def completions_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def test_supervised_losses_do_not_depend_on_the_layout(ranks: RankPool, tmp_path: Path) -> None:
    """One epoch of 20 rows, 8 a step: the last step has the 4 that are left, which are fewer than some layouts' ranks
    could share evenly."""
    sections = {
        "model": {"mtp_num_layers": 1},
        "data": {"num_train": 20},
        "train": {"lr": 3e-3, "steps": 100},
        "sft": {"epochs": 1, "held_out_rows": 5},
    }
    layouts = {"one": LAYOUTS["one"], "tp2pp2": TP2PP2, "pp2cp2ep2": LAYOUTS["pp2cp2ep2"]}
    for name, parallel in layouts.items():
        folder = str(tmp_path / name)
        ranks.run(f"{STAGES}:run_sft", world_size(parallel), folder=folder, parallel=parallel, sections=sections)
    one, *others = (rows_of(tmp_path / name) for name in layouts)
    assert [row.pop("eval/loss") for row in one[3:]] == pytest.approx([others[0][3]["eval/loss"]], rel=1e-4)
    one, others = one[:3], [rows[:3] for rows in others]
    assert [row["step"] for row in one] == [1, 2, 3]
    assert [row["sft/epoch"] for row in one] == [0.4, 0.8, 1.0]
    assert one[2]["train/loss"] < one[0]["train/loss"]
    for key in ("train/loss", "sft/loss", "sft/mtp_loss", "actor/grad_norm", "actor/lr", "train/num_tokens"):
        for rows in others:
            assert [row[key] for row in rows] == pytest.approx([row[key] for row in one], rel=1e-4)
    assert all(row["train/skipped_updates"] == 0 for row in one)


def test_supervised_rows_come_from_a_file(ranks: RankPool, tmp_path: Path) -> None:
    """A prompt may come twice, and be longer than a rollout's may; a bad line is named."""
    rows = [("3+4=", "<answer>7</answer>"), ("3+4=", "7"), ("1+1+1+1+1+1+1+1=", "8")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in rows))
    (answer,) = ranks.run(f"{STAGES}:run_sft_on_rows", 1, folder=str(tmp_path / "run"), rows=str(path))
    assert answer == ("", "no error")
    assert len(rows_of(tmp_path / "run")) == 3
    path.write_text('{"prompt": "3+4="}\n')
    (answer,) = ranks.run(f"{STAGES}:run_sft_on_rows", 1, folder=str(tmp_path / "refused"), rows=str(path))
    assert answer[0] == "ValueError" and "line 1: no 'response'" in answer[1]


def test_a_run_that_is_asked_to_end_saves_first(ranks: RankPool, tmp_path: Path) -> None:
    """One rank hears of it; all end after the same step, with a checkpoint."""
    ranks.run(f"{STAGES}:stopped_grpo", 2, folder=str(tmp_path), parallel=LAYOUTS["pp2"])
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoints/step_000002/checkpoint.json").is_file()
    assert not (tmp_path / "checkpoints/final").exists()


@pytest.mark.parametrize("name", ["one", "ep2"])
def test_a_step_in_which_every_group_is_dropped_updates_nothing(ranks: RankPool, tmp_path: Path, name: str) -> None:
    parallel = LAYOUTS[name]
    sections = {"rl": {"overlong": "keep", "zero_variance_groups": "drop", "kl_coef": 0.1}, "train": {"steps": 2}}
    answers = ranks.run(
        f"{STAGES}:run_grpo", world_size(parallel), folder=str(tmp_path), parallel=parallel, sections=sections
    )
    assert len(answers[0]["samples"]) == 2 and answers[0]["kl"] == []
    for row in rows_of(tmp_path):
        assert row["rl/dropped_groups"] == 4
        assert (row["train/updates"], row["train/skipped_updates"]) == (0, 0)
        assert "train/loss" not in row
    assert (tmp_path / "checkpoints/final/checkpoint.json").is_file()


# ------------------------------------------------------------------------------------------------------- NaN and Inf


def spoil(ranks: RankPool, folder: Path, name: str, kind: str, on_nonfinite: str) -> list[dict]:
    parallel = LAYOUTS[name]
    options = {"folder": str(folder), "parallel": parallel, "kind": kind, "on_nonfinite": on_nonfinite}
    answers = ranks.run(f"{STAGES}:nonfinite", world_size(parallel), timeout_s=120.0, **options)
    for answer in answers:
        assert answer["unchanged"] and answer["num_tensors"] > 100
    return answers


@pytest.mark.parametrize("kind", ["weights", "gradient", "parameter"])
@pytest.mark.parametrize("name", ["one", "dp2", "pp2vpp2"])
def test_nonfinite_numbers_end_the_run_and_are_named(ranks: RankPool, tmp_path: Path, name: str, kind: str) -> None:
    answers = spoil(ranks, tmp_path, name, kind, "stop")
    message = answers[0]["message"]
    assert all(answer["message"] == message for answer in answers)
    assert message.startswith("step 2: ")
    if kind == "parameter":
        assert "decoder.layers.2.self_attention.linear_proj.weight itself is not finite" in message
    else:
        assert f"in microbatch 1 of data-parallel rank {1 if name == 'dp2' else 0}, " in message
    if kind == "gradient":
        assert "the gradient of decoder.layers.2.self_attention.linear_proj.weight is not finite" in message
    if kind == "weights":
        assert "the loss is nan" in message and "first bad gradient: " in message
    assert "train.on_nonfinite=skip" in message
    assert [row["step"] for row in rows_of(tmp_path)] == [1]
    kept = json.loads((tmp_path / "checkpoints/at_failure/checkpoint.json").read_text())
    assert (kept["step"], kept["policy_version"]) == (1, 1)


@pytest.mark.parametrize("name", ["one", "dp2"])
def test_the_plain_optimizer_writes_no_nan_either(ranks: RankPool, tmp_path: Path, name: str) -> None:
    options = {"parallel": LAYOUTS[name], "kind": "gradient", "on_nonfinite": "stop", "distributed": False}
    for answer in ranks.run(f"{STAGES}:nonfinite", world_size(LAYOUTS[name]), folder=str(tmp_path), **options):
        assert answer["unchanged"] and "the gradient of decoder.layers.2" in answer["message"]


def test_bf16_keeps_the_selection_biases_exact(ranks: RankPool) -> None:
    """Rounded to bf16 they would choose other experts."""
    (answers,) = ranks.run(f"{STAGES}:biases_in_bf16", 1)
    assert answers == [("torch.float32 torch.float32 torch.bfloat16", True)] * 3


@pytest.mark.parametrize("kind", ["weights", "gradient"])
@pytest.mark.parametrize("name", ["one", "dp2", "pp2vpp2"])
def test_nonfinite_numbers_can_be_skipped(ranks: RankPool, tmp_path: Path, name: str, kind: str) -> None:
    """The step counts as skipped, and the learning rate goes on where it would have been."""
    for answer in spoil(ranks, tmp_path, name, kind, "skip"):
        assert answer["message"] is None and answer["versions"] == [1, 1, 2]
    rows = rows_of(tmp_path)
    assert [row["train/skipped_updates"] for row in rows] == [0, 1, 0]
    assert [row["train/updates"] for row in rows] == [1, 0, 1]
    assert "actor/lr" not in rows[1]  # means over updates: there was none
    assert [row["actor/lr"] for row in (rows[0], rows[2])] == pytest.approx([0.9e-4, 0.8e-4])
    assert all(row["actor/grad_norm"] > 0 and "nonfinite" not in row for row in (rows[0], rows[2]))


# -------------------------------------------------------------------------------------- rollout against training


def test_a_difference_between_rollout_and_training_ends_the_run(ranks: RankPool, tmp_path: Path) -> None:
    answers = ranks.run(
        f"{STAGES}:failure_of_grpo",
        2,
        folder=str(tmp_path),
        parallel=LAYOUTS["pp2"],
        sections={"rl": {"probs_diff_limit": 1e-12}},
    )
    for kind, message in answers:
        assert kind == "RolloutMismatchError"
        assert "step 1: training/rollout_probs_diff_max=" in message
        assert "rl.probs_diff_limit=1e-12" in message and "rollout.router_replay=false" in message
    assert len(rows_of(tmp_path)) == 1


def test_a_difference_between_rollout_and_training_may_only_warn(ranks: RankPool, tmp_path: Path) -> None:
    sections = {"rl": {"probs_diff_limit": 1e-12, "on_probs_diff": "warn"}, "train": {"steps": 2}}
    answers = ranks.run(
        f"{STAGES}:failure_of_grpo", 1, folder=str(tmp_path), parallel=LAYOUTS["one"], sections=sections
    )
    assert answers == [("", "no error")]
    assert all(row["training/rollout_probs_diff_max"] > 1e-12 for row in rows_of(tmp_path))
    assert len(rows_of(tmp_path)) == 2


def test_nan_is_above_every_limit() -> None:
    from r1_megatron.stages.grpo import RolloutMismatchError, check_rollout_match

    run = SimpleNamespace(cfg=SimpleNamespace(rl=SimpleNamespace(probs_diff_limit=1.0, on_probs_diff="stop")))
    check_rollout_match(run, 1, {"training/rollout_probs_diff_max": 0.5})
    check_rollout_match(run, 1, {})
    with pytest.raises(RolloutMismatchError, match="step 4"):
        check_rollout_match(run, 4, {"training/rollout_probs_diff_max": math.nan})


def test_no_update_hides_the_nan_of_another() -> None:
    from r1_megatron.stages.step_report import largest

    assert math.isnan(largest([1.0, math.nan])) and math.isnan(largest([math.nan, 1.0]))
    assert largest([1.0, 3.0, 2.0]) == 3.0


# ------------------------------------------------------------------------------------------------------------ rewards

PLUGINS = "tests.distributed.plugin_rewards"


def reward(function: str, **options) -> dict:
    return {"terms": (RewardTermConfig(f"{PLUGINS}:{function}"),), **options}


@pytest.mark.parametrize(
    "function, said",
    [
        ("raises", "raised KeyError: 'no such label'"),
        ("answers_nan", "returned nan, expected a finite number"),
        ("answers_too_few", "returned 0 values for 1 completions"),
        ("hangs", "gave no answer within"),
    ],
)
def test_a_reward_that_misbehaves_ends_the_run(ranks: RankPool, tmp_path: Path, function: str, said: str) -> None:
    sections = {"reward": reward(function, timeout_s=2.0)}
    [(kind, message)] = ranks.run(
        f"{STAGES}:failure_of_grpo", 1, folder=str(tmp_path), parallel=LAYOUTS["one"], sections=sections
    )
    assert kind == "GradingError"
    assert f"reward '{PLUGINS}:{function}'" in message and said in message
    assert "at prompt " in message and "completion " in message
    assert "set reward.on_error=zero" in message
    assert rows_of(tmp_path) == []


def test_a_reward_that_misbehaves_on_one_rank_of_two(ranks: RankPool, tmp_path: Path) -> None:
    """The last pipeline stage grades; both ranks hear of it. Nothing was learned yet, so nothing is saved."""
    options = {"folder": str(tmp_path), "sections": {"reward": reward("raises", timeout_s=5.0)}}
    answers = ranks.run(f"{STAGES}:failure_of_grpo", 2, timeout_s=60.0, parallel=LAYOUTS["pp2"], **options)
    assert answers[0] == answers[1] and answers[0][0] == "GradingError"
    assert not (tmp_path / "checkpoints").exists()


def test_rewards_that_fail_can_count_zero(ranks: RankPool, tmp_path: Path) -> None:
    sections = {"reward": reward("dislikes_odd_lengths", on_error="zero"), "rl": {"overlong": "keep"}}
    parallel = LAYOUTS["dp2"]
    ranks.run(f"{STAGES}:run_grpo", 2, folder=str(tmp_path), parallel=parallel, sections=sections)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert all(sample["reward"] == (len(sample["response"]) + 1) % 2 for sample in samples)
    for row in rows_of(tmp_path):
        assert 0 < row["reward/failed"] < 16
        assert row["reward/failed"] == pytest.approx(16 * (1 - row["critic/rewards/mean"]))


# -------------------------------------------------------------------------------------------------------- checkpoints

RESHARDED = [
    ("tp2", "pp2vpp2"),
    ("tp2", "ep2"),
    ("tp2", "one"),
    ("ep2", "tp2pp2ep2"),
    ("pp2vpp2", "tp2etp2"),
]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory):
    """Checkpoints by the layout (and the expert module) that wrote them."""
    folder = tmp_path_factory.mktemp("saved")

    def get(name: str, experts: str = "auto") -> str:
        path = folder / f"{name}_{experts}" / "final"
        if not path.exists():
            options = {"folder": str(path), "parallel": LAYOUTS[name], "experts": experts}
            ranks.run(f"{STAGES}:save_named", world_size(LAYOUTS[name]), **options)
        return str(path)

    return get


@pytest.mark.parametrize("written, read", RESHARDED)
def test_a_checkpoint_is_read_under_another_layout(ranks: RankPool, saved, written: str, read: str) -> None:
    """Bit for bit, every tensor of every rank, the selection biases included."""
    answers = ranks.run(
        f"{STAGES}:load_named", world_size(LAYOUTS[read]), folder=saved(written), parallel=LAYOUTS[read]
    )
    names = set()
    for answer in answers:
        assert answer["wrong"] == []
        assert answer["description"].items() >= {"format": 1, "step": 5, "stage": "sft", "policy_version": 5}.items()
        names.update(answer["names"])
    assert sum("expert_bias" in name for name in names) == 3
    assert {f"decoder.layers.3.mlp.experts.local_experts.{i}.linear_fc1.weight" for i in range(8)} <= names


@pytest.mark.parametrize(
    "written, read",
    [(("sequential", "ep2"), ("grouped", "tp2etp2")), (("grouped", "tp2etp2"), ("sequential", "ep2"))],
    ids=["sequential to grouped", "grouped to sequential"],
)
def test_expert_modules_read_each_others_checkpoints(ranks: RankPool, saved, written, read) -> None:
    experts, layout = read
    options = {"folder": saved(written[1], written[0]), "parallel": LAYOUTS[layout], "experts": experts}
    for answer in ranks.run(f"{STAGES}:load_named", world_size(LAYOUTS[layout]), **options):
        assert answer["wrong"] == []
        assert any("local_experts" in name for name in answer["names"])


def test_a_load_without_memory_does_not_blame_the_checkpoint(ranks: RankPool, saved) -> None:
    answers = ranks.run(f"{STAGES}:load_without_memory", 2, folder=saved("ep2"), parallel=LAYOUTS["dp2"])
    assert answers == [("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB.")] * 2


def test_a_checkpoint_is_never_overwritten(ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "final"
    for kind, message in ranks.run(f"{STAGES}:save_twice", 2, folder=str(folder), parallel=LAYOUTS["dp2"]):
        assert kind == "FileExistsError"
        assert f"{folder} exists already. Choose another output_dir or remove it." in message
    assert json.loads((folder / "checkpoint.json").read_text())["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("name", ["one", "pp2"])
def test_a_save_without_room_says_so_and_leaves_nothing(ranks: RankPool, tmp_path: Path, name: str) -> None:
    folder, parallel = tmp_path / "final", LAYOUTS[name]
    answers = ranks.run(f"{STAGES}:save_without_room", world_size(parallel), folder=str(folder), parallel=parallel)
    for kind, message in answers:
        assert kind == "NotWrittenError"
        assert f"the checkpoint {folder} could not be written" in message and "GB are free there" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("on", [0, 1])
def test_a_rank_that_cannot_add_its_files_ends_the_save_on_all(ranks: RankPool, tmp_path: Path, on: int) -> None:
    folder = tmp_path / "final"
    options = {"folder": str(folder), "parallel": LAYOUTS["pp2"], "on": on}
    for kind, message in ranks.run(f"{STAGES}:save_with_a_rank_that_fails", 2, timeout_s=60.0, **options):
        assert kind == "NotWrittenError"
        assert f"the checkpoint {folder} could not be written (OSError: [Errno 28] No space left on device" in message
        assert "Make room, or choose another output_dir" in message
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_file_can_be_written_is_said_on_all_ranks(ranks: RankPool, tmp_path: Path) -> None:
    """Only rank 0 meets it, in the first file that it writes."""
    folder = tmp_path / "final"
    options = {"folder": str(folder), "parallel": LAYOUTS["pp2"], "limit": 100, "on": 0}
    (tmp_path / "file").touch()
    for kind, message in ranks.run(f"{STAGES}:save_without_room", 2, timeout_s=60.0, **options):
        assert kind == "NotWrittenError"
        assert f"the checkpoint {folder} cannot be written ([Errno 27] File too large). Make room, or choose" in message
    options |= {"folder": str(tmp_path / "file/final")}
    for kind, message in ranks.run(f"{STAGES}:save_without_room", 2, timeout_s=60.0, **options):
        assert kind == "NotWrittenError" and "file/final cannot be written ([Errno 20] Not a directory" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["dp2", "tp2pp2ep2"])
def test_a_disk_with_a_byte_too_few_is_said_before_anything_is_written(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    """What a checkpoint needs are the bytes of its tensors, each counted once, however many ranks hold a copy."""
    folder, parallel = tmp_path / "final", LAYOUTS[name]

    def save(free: int) -> list[tuple[str, str]]:
        check = f"{STAGES}:save_where_few_bytes_are_free"
        return ranks.run(check, world_size(parallel), folder=str(folder), parallel=parallel, free=free)

    assert set(save(1 << 40)) == {("", "")}
    size = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    shutil.rmtree(folder)
    [(kind, message)] = set(save(size - 1))
    assert kind == "NotWrittenError"
    gigabytes = f"{size / 1e9:.3f} GB"
    assert f"the checkpoint {folder} needs {gigabytes}, but {gigabytes} are free in {tmp_path}. " in message
    assert "Nothing was written. Make room there, or choose another output_dir." in message
    assert list(tmp_path.iterdir()) == []
    assert set(save(size)) == {("", "")}


def test_an_interrupted_save_is_never_taken_for_whole(ranks: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "final"
    [(kind, message)] = ranks.run(f"{STAGES}:interrupted_save", 1, folder=str(folder), parallel=LAYOUTS["one"])
    assert kind == "FileNotFoundError"
    assert f"checkpoint.load: {folder} was never finished (final.partial is all there is)" in message
    assert last_checkpoint(tmp_path) is None


@pytest.fixture(scope="module")
def trained(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a real run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    ranks.run(f"{STAGES}:run_sft", 1, folder=str(folder), parallel=LAYOUTS["one"], sections={"train": {"steps": 1}})
    return folder / "checkpoints/final"


def copied(source: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, folder / "final"))


def refused(ranks: RankPool, folder: Path, kind: str, model: dict | None = None, name: str = "one") -> str:
    answers = ranks.run(
        f"{STAGES}:failure_of_load",
        world_size(LAYOUTS[name]),
        folder=str(folder),
        parallel=LAYOUTS[name],
        model=model,
    )
    assert {answer[0] for answer in answers} == {kind}, answers
    assert str(folder) in answers[0][1] and "checkpoint.load" in answers[0][1]
    return answers[0][1]


def test_the_checkpoint_of_a_run_loads(ranks: RankPool, trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path)
    parallel = LAYOUTS["ep2"]
    assert ranks.run(f"{STAGES}:failure_of_load", 2, folder=str(folder), parallel=parallel) == [("", "no error")] * 2


def test_a_folder_that_is_missing(ranks: RankPool, tmp_path: Path) -> None:
    message = refused(ranks, tmp_path / "nowhere", "FileNotFoundError")
    assert "does not exist. Run the stage that writes it first." in message


def test_a_folder_that_is_no_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    message = refused(ranks, tmp_path / "final", "FileNotFoundError", name="dp2")
    assert "has no checkpoint.json: it is no complete checkpoint" in message


# What is done to a checkpoint, and what its refusal says.
DAMAGES = {
    "a data file is missing": (r"__0_0\.distcp is missing", lambda folder: (folder / "__0_0.distcp").unlink()),
    "a data file is cut": (
        r"__0_0\.distcp has \d+ bytes, written were \d+",
        lambda folder: cut(folder / "__0_0.distcp"),
    ),
    "a bit is flipped": (
        r"__0_0\.distcp was changed or is damaged in \S+weight: its sha256",
        lambda folder: flip(folder / "__0_0.distcp"),
    ),
    "the index is missing": (r"\.metadata is missing", lambda folder: (folder / ".metadata").unlink()),
    "the index is cut": (r"\.metadata has \d+ bytes", lambda folder: cut(folder / ".metadata")),
    "the common part is cut": (r"common\.pt has \d+ bytes", lambda folder: cut(folder / "common.pt")),
    "the description is cut": (r"checkpoint\.json is not readable", lambda folder: cut(folder / "checkpoint.json")),
}


def flip(path: Path) -> None:
    """One bit in the middle of a tensor."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(ranks: RankPool, trained: Path, tmp_path: Path, damage: str) -> None:
    folder = copied(trained, tmp_path)
    DAMAGES[damage][1](folder)
    message = refused(ranks, folder, "DamagedCheckpoint")
    assert "damaged" in message and "Load an earlier checkpoint" in message
    assert re.search(DAMAGES[damage][0], message), message


@pytest.mark.parametrize(
    "name, model",
    [
        ("one", {"hidden_size": 32}),
        ("one", {"num_layers": 3}),  # every tensor it asks for is there: still another model
        ("pp2", {"num_layers": 6}),
        ("one", {"num_moe_experts": 4, "moe_router_num_groups": None, "moe_router_group_topk": None}),
        ("one", {"q_lora_rank": None}),
    ],
    ids=["width", "fewer layers", "more layers", "fewer experts", "full-rank query"],
)
def test_the_checkpoint_of_another_model(
    ranks: RankPool, trained: Path, tmp_path: Path, name: str, model: dict
) -> None:
    message = refused(ranks, copied(trained, tmp_path), "ValueError", model, name)
    field, value = next(iter(model.items()))
    assert f"model.{field}={'null' if value is None else value}" in message
