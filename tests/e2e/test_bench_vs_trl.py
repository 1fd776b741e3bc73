"""The pieces of the comparison with TRL that need no TRL, at tiny lengths; no figure is looked at."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1_megatron.config.load import load_config
from r1_megatron.config.schema import RunConfig
from r1_megatron.config.validate import check_config
from tools import trl_side
from tools.bench_vs_trl import EP2, ONE_RANK, OPTIONS, Bench, Goal, report, require_peer
from tools.rl_model import CHANNEL, END_WEIGHT
from tools.rl_workload import Workload, read_prompts, reward

TINY = Workload(
    num_prompts=2, samples_per_prompt=2, min_prompt_tokens=3, max_prompt_tokens=5, new_tokens=4, long_new_tokens=6
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("bench"), peer_python="", workload=TINY)
    bench.prepare()
    return bench


def test_both_sides_hold_the_same_model_and_draw_full_length_completions(bench):
    found = bench.our_rollouts(EP2, "full", TINY.new_tokens, repeats=2)
    num_tokens = TINY.num_completions * TINY.new_tokens
    assert [call["tokens"] for call in found["calls"]] == [num_tokens] * 2
    assert all(call["seconds"] > 0 for call in found["calls"])
    assert found["difference"] < 1e-4 and found["difference_replayed"] < 1e-4
    assert trl_side.score(str(bench.folder / "full"), found["samples"])["max"] < 1e-4
    prompts = read_prompts(bench.folder / "prompts.jsonl")
    peers = trl_side.generate(str(bench.folder / "full"), TINY, prompts, TINY.new_tokens, repeats=1)
    assert [call["tokens"] for call in peers["calls"]] == [num_tokens]


def test_a_step_of_ours_is_read_from_its_metrics(bench):
    bench.our_steps(ONE_RANK)
    figures = bench.figures[ONE_RANK.name]
    assert all(len(figures[name]) == 2 and min(figures[name]) > 0 for name in ("step", "rollout", "train"))
    assert max(figures["replayed"]) < 1e-4
    assert figures["memory"][0] > 100e6  # a rank that has imported torch


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_makes_a_valid_run_of_its_own(bench, option):
    cfg = load_config(bench.write_config(ONE_RANK, "full", TINY.new_tokens, OPTIONS[option]))
    check_config(cfg)
    ((section, (name, value)),) = ((k, *v.items()) for k, v in OPTIONS[option].items() if k != "rl")
    assert getattr(getattr(cfg, section), name) == value != getattr(getattr(RunConfig(), section), name)


def test_the_end_token_alone_reads_its_channel(bench):
    for name, end_weight in END_WEIGHT.items():
        weights = load_file(bench.folder / name / "model.safetensors")
        assert np.flatnonzero(weights["lm_head.weight"][:, CHANNEL]).tolist() == [0]
        assert weights["lm_head.weight"][0].tolist() == pytest.approx([end_weight] + 255 * [0.0])
        assert not weights["model.layers.1.mlp.experts.3.down_proj.weight"][CHANNEL].any()
        assert not weights["model.layers.1.mlp.gate.weight"][:, CHANNEL].any()


def test_the_reward_tells_completions_apart():
    assert reward(["", "", ""], ["w2 w4", "w2 w3 w5 w7", ""]) == [1.0, 0.25, 0.0]


def test_goals_are_judged_and_the_missed_one_is_shown(bench, capsys):
    made = Bench(bench.folder, "", TINY)
    for name, rollout in (("1 rank, 2 threads", 900.0), ("DP2", 1000.0), ("generate", 200.0)):
        for model in END_WEIGHT:
            made.note(f"{name}, {model}", rollout=rollout, tokens=24)
    made.note("compared", difference=2e-3, replayed=2e-4)
    full, tailed = report(made, ["rollout"])
    assert full.ours == "1000 tok/s (DP2)" and full.ratio == 5.0 and full.met is False
    assert tailed.goal is None and tailed.met is None
    shown = capsys.readouterr().out
    assert "| NO |" in shown.replace("  ", " ") and "log-probability: 2.0e-04 (limit 1e-04: NO)" in shown
    assert "near ties show: 2.0e-03" in shown
    assert Goal("", "", "", 0.67, 1 / 1.5).met


def test_without_trl_it_says_what_to_install():
    with pytest.raises(SystemExit, match=r"pip install 'r1_megatron\[bench\]'"):
        require_peer("/bin/false")
