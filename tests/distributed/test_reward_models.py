"""Stage ``reward_model`` from rows to a score that Transformers computes, too, and that pays in GRPO."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch

from r1_megatron.checkpoint.convert.to_hf import to_hugging_face
from r1_megatron.config.schema import RewardConfig, RewardTermConfig, RunConfig, TrainConfig
from r1_megatron.config.validate import validate_config
from tests.distributed.layouts import LAYOUTS, world_size
from tests.rank_pool import RankPool

CHECKS = "tests.distributed.reward_model_checks"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose better answer has even digits, the other one odd ones; and the same answers as rows with a label."""
    folder, draw = tmp_path_factory.mktemp("pairs"), random.Random(5)

    def answer(digits: str) -> str:
        return "".join(draw.choice(digits) for _ in range(draw.randint(1, 6)))

    for name, count in (("train", 192), ("eval", 64)):
        pairs = [(answer("0123456789") + "=", answer("02468"), answer("13579")) for _ in range(count)]
        rows = [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        safe = [
            {"prompt": p, "response": text, "label": label}
            for p, *two in pairs
            for text, label in zip(two, (True, False))
        ]
        (folder / f"{name}_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in safe))
    return folder


@pytest.fixture(scope="module")
def trained(ranks: RankPool, files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run under several layouts."""
    made = {}
    for name in ("one", "tp2", "pp2"):
        made[name] = tmp_path_factory.mktemp(name) / "run"
        arguments = {"folder": str(made[name]), "parallel": LAYOUTS[name], "files": str(files)}
        ranks.run(f"{CHECKS}:train", world_size(LAYOUTS[name]), timeout_s=200.0, **arguments)
    return made


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_what_is_preferred_under_every_layout(trained: dict[str, Path]):
    losses = {}
    for name, folder in trained.items():
        rows = metrics_of(folder)
        losses[name] = [row["reward_model/loss"] for row in rows if "reward_model/loss" in row]
        first, last = (row for row in rows if "eval/accuracy" in row)
        assert first["eval/accuracy"] == 0.5 and first["eval/loss"] == pytest.approx(math.log(2))
        assert last["eval/accuracy"] > 0.9 and last["eval/margin"] > 1, last
    assert losses["tp2"] == pytest.approx(losses["one"], abs=2e-3) and len(losses["one"]) == 16
    assert losses["pp2"] == pytest.approx(losses["one"], abs=2e-3)


def test_a_run_that_was_asked_to_end_goes_on_bit_for_bit(
    ranks: RankPool, files: Path, trained: dict[str, Path], tmp_path: Path
):
    arguments = {"folder": str(tmp_path / "run"), "parallel": LAYOUTS["pp2"], "files": str(files)}
    ranks.run(f"{CHECKS}:train", 2, timeout_s=100.0, stop_after=5, **arguments)
    assert len(metrics_of(tmp_path / "run")) == 6
    ranks.run(f"{CHECKS}:train", 2, timeout_s=100.0, **arguments)
    exact = ("reward_model/loss", "reward_model/margin", "actor/grad_norm", "eval/score")
    ours, theirs = (
        [{name: row.get(name) for name in exact} for row in metrics_of(folder)]
        for folder in (tmp_path / "run", trained["pp2"])
    )
    assert ours == theirs


@pytest.mark.parametrize("layout", ["ep2", "tp2", "pp2"])
def test_it_learns_which_rows_are_safe(ranks: RankPool, files: Path, tmp_path: Path, layout: str):
    sections = {
        "data": {"path": str(files / "train_rows.jsonl"), "eval_path": str(files / "eval_rows.jsonl")},
        "reward_model": {"objective": "pointwise", "batch_size": 32},
    }
    where = {"parallel": LAYOUTS[layout], "folder": str(tmp_path), "files": str(files)}
    ranks.run(f"{CHECKS}:train", 2, sections=sections, timeout_s=100.0, **where)
    first, last = (row for row in metrics_of(tmp_path) if "eval/accuracy" in row)
    assert first["eval/accuracy"] == 0.5 and first["eval/loss"] == pytest.approx(math.log(2))
    assert last["eval/accuracy"] > 0.9 and "eval/margin" not in last


def test_an_epoch_ends_with_the_pairs_that_are_left(ranks: RankPool, files: Path, tmp_path: Path):
    """191 of 192 pairs, then one, which one of two data-parallel ranks has."""
    sections = {"reward_model": {"batch_size": 191, "epochs": 1}, "train": {"steps": TrainConfig.steps}}
    where = {"parallel": LAYOUTS["ep2"], "folder": str(tmp_path), "files": str(files)}
    ranks.run(f"{CHECKS}:train", 2, sections=sections, timeout_s=100.0, **where)
    rows = [row for row in metrics_of(tmp_path) if "reward_model/epoch" in row]
    assert [row["reward_model/epoch"] for row in rows] == [191 / 192, 1.0]
    assert all(math.isfinite(row["reward_model/loss"]) for row in rows)
    before = {"reward_model/accuracy": 0.5, "reward_model/loss": pytest.approx(math.log(2))}
    assert {name: rows[0][name] for name in before} == before
    assert rows[1]["reward_model/accuracy"] in (0.0, 0.5, 1.0), "the mean over one pair"


def test_its_scores_are_those_of_transformers(ranks: RankPool, trained: dict[str, Path], tmp_path: Path):
    """Exported as a sequence classifier; and asked as a reward term under other layouts, its weights on the host."""
    from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

    checkpoint = trained["tp2"] / "checkpoints" / "final"
    to_hugging_face(checkpoint, tmp_path / "hf")
    exact = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", **exact).eval()
    assert type(model).__name__ == "DeepseekV3ForSequenceClassification" and model.config.num_labels == 1
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    texts = [("12=", "2468"), ("12=", "7"), ("12=", ""), ("907=", "113355"), ("4=", "86")]

    def tokens_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    expected = []
    for prompt, response in texts:
        tokens = [*tokens_of(prompt), *tokens_of(response), tokenizer.eos_token_id]
        with torch.no_grad():
            expected.append(model(torch.tensor([tokens])).logits.item())
    assert max(expected) - min(expected) > 1
    arguments = {"checkpoint": str(checkpoint), "texts": texts}
    for layout, on_host in (("one", True), ("pp2", False), ("ep2", False)):
        where = {"folder": str(tmp_path / layout), "parallel": LAYOUTS[layout], "on_host": on_host}
        for found in ranks.run(f"{CHECKS}:scores", world_size(LAYOUTS[layout]), **where, **arguments):
            assert found == pytest.approx(expected, abs=2e-5), layout


def test_it_pays_in_grpo_from_its_first_step_on(ranks: RankPool, trained: dict[str, Path], tmp_path: Path):
    checkpoint = str(trained["one"] / "checkpoints" / "final")
    graded, *_ = ranks.run(
        f"{CHECKS}:run_grpo", 2, folder=str(tmp_path), parallel=LAYOUTS["tp2"], checkpoint=checkpoint
    )
    assert all(math.isnan(one["score"]) for one in graded if one["step"] == 1)
    paid = [one for one in graded if one["step"] == 2]
    assert len(paid) == 16 and all(math.isfinite(one["score"]) for one in paid)
    assert metrics_of(tmp_path)[-1]["reward/reward_model/mean"] == pytest.approx(sum(one["score"] for one in paid) / 16)


def test_a_policy_is_no_reward_model(ranks: RankPool, files: Path, tmp_path: Path):
    term = {"function": "reward_model", "options": {"checkpoint": str(tmp_path / "policy")}}
    ranks.run("tests.distributed.value_checks:save_policy", 1, folder=str(tmp_path / "policy"), parallel=LAYOUTS["one"])
    problems = validate_config(RunConfig(reward=RewardConfig((RewardTermConfig(**term),))))
    assert any("holds a model that writes" in problem for problem in problems), problems
