"""Seconds of a critic and of reward models against products counted by hand: a dense model on GPUs whose memory and
links take no time, so that nothing but products and attention is left."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from r1_megatron.config.load import load_config
from r1_megatron.config.schema import (
    CriticConfig,
    ModelConfig,
    ParallelConfig,
    RewardConfig,
    RewardModelConfig,
    RewardTermConfig,
    RLConfig,
    RunConfig,
    TrainConfig,
)
from r1_megatron.config.value_models import value_model, with_value_head
from r1_megatron.planner.hardware import find_gpu
from r1_megatron.planner.plan import make_plan
from r1_megatron.planner.show import plan_data, show_plan
from r1_megatron.planner.throughput import plan_time
from r1_megatron.planner.workload import Workload, workload

ROOT = Path(__file__).parents[3]
H100 = find_gpu("h100-80gb")
NOTHING_BUT_PRODUCTS = replace(
    H100, memory_bandwidth=math.inf, nvlink_bandwidth=math.inf, network_bandwidth=math.inf, host_bandwidth=50e9
)
HIDDEN, FFN, HEADS, VOCABULARY = 4096, 11008, 32, 32000
MODEL = ModelConfig(
    architecture="llama", num_layers=2, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
    vocab_size=VOCABULARY, max_position_embeddings=8192,
)  # fmt: skip
# 2 minibatches of 4 sequences of 1,024 tokens, each cut into 2 packs, learned from twice.
LENGTH, SEQUENCES = 1024, 8
CFG = RunConfig(
    stage="ppo", model=MODEL, parallel=ParallelConfig(device="cuda"), train=TrainConfig(bf16=True),
    rl=RLConfig(num_minibatches=2, inner_epochs=2, kl_coef=0.0),
)  # fmt: skip
LOAD = Workload(
    SEQUENCES, updates=4, mean_prompt=0, mean_response=LENGTH, longest=LENGTH, pack=2 * LENGTH, microbatches=2,
    annotations=1, replicas=1,
)  # fmt: skip


def products(layers: int, length: int = LENGTH) -> float:
    """Seconds of a sequence's products in linear layers: query, key, value and output, gate, up and down."""
    return 2 * length * layers * (4 * HIDDEN**2 + 3 * HIDDEN * FFN) / (0.70 * H100.bf16_flops)


def attention(layers: int, length: int = LENGTH) -> float:
    """Seconds, at the peak, of a query with the keys up to it, and of these weights with the values."""
    return layers * length * (length + 1) / 2 * 2 * (2 * HIDDEN) / H100.bf16_flops


def head(length: int = LENGTH, columns: int = 1) -> float:
    return 2 * length * HIDDEN * columns / (0.70 * H100.bf16_flops)


def asked(layers: int, length: int = LENGTH) -> float:
    """With a head of one number."""
    return products(layers, length) + head(length) + attention(layers, length) / 0.60


def learned(layers: int) -> float:
    """A backward pass has twice the products, and 2.5 times those of attention, at a lower rate."""
    return asked(layers) + 2 * products(layers) + 2 * head() + 2.5 * attention(layers) / 0.48


def seconds(cfg: RunConfig, load: Workload = LOAD) -> dict[str, float]:
    time = plan_time(cfg, NOTHING_BUT_PRODUCTS, load)
    found = {other.name: other.seconds for other in time.others}
    assert time.total - time.rollout - time.annotate - time.train == pytest.approx(sum(found.values()) + 2.0)
    return found | {"train": time.train}


def test_a_critic_is_asked_once_and_learns_as_often_as_the_policy():
    found = seconds(CFG)
    assert found["the critic's values"] == pytest.approx(SEQUENCES * asked(2))
    # 4 updates of 4 sequences.
    assert found["training of the critic"] == pytest.approx(16 * learned(2))
    # The policy's head is an output layer, forward and backward.
    assert found["train"] == pytest.approx(16 * (learned(2) + 3 * head(columns=VOCABULARY - 1)))
    assert seconds(replace(CFG, stage="grpo")).keys() == {"train"}


def test_a_critic_of_its_own_shape():
    found = seconds(replace(CFG, critic=CriticConfig(model=replace(MODEL, num_layers=6))))
    assert found["the critic's values"] == pytest.approx(SEQUENCES * asked(6))
    assert found["training of the critic"] == pytest.approx(16 * learned(6))


def test_a_critic_in_two_stages_waits_as_the_policy_does():
    """One layer a stage; 4 packs of 2 sequences and one more to fill it; an update of 2 packs takes 3. Sending from one
    to the other takes a few microseconds whatever the links are."""
    found = seconds(replace(CFG, parallel=ParallelConfig(device="cuda", pipeline_model_parallel_size=2)))
    assert found["the critic's values"] == pytest.approx((4 + 1) * 2 * asked(1), rel=0.02)
    assert found["training of the critic"] == pytest.approx(4 * (2 + 1) * 2 * learned(1), rel=0.02)


def test_a_critic_on_the_host_comes_and_goes():
    found = seconds(replace(CFG, train=TrainConfig(bf16=True, offload=True)))
    parameters = VOCABULARY * HIDDEN + 2 * (4 * HIDDEN**2 + 3 * HIDDEN * FFN + 2 * HIDDEN) + 2 * HIDDEN
    # bf16 weights; master weights and two moments in fp32.
    assert found["the critic to the host and back"] == pytest.approx(2 * parameters * (2 + 12) / 50e9)


@pytest.fixture
def reward_model(tmp_path: Path) -> str:
    (tmp_path / "checkpoint.json").write_text(json.dumps({"model": asdict(value_model(replace(MODEL, num_layers=3)))}))
    return str(tmp_path)


def graded_by(*terms: RewardTermConfig, stage: str = "grpo", offload: bool = False) -> RunConfig:
    train = TrainConfig(bf16=True, offload=offload)
    return replace(CFG, stage=stage, reward=RewardConfig(terms), train=train)


def test_each_term_of_a_reward_model_is_a_pass_over_what_is_graded(reward_model: str):
    whole = RewardTermConfig("reward_model", options={"checkpoint": reward_model})
    late = replace(whole, on="summary", from_step=82, sources=("general",))
    cut = RewardTermConfig("reward_model", options={"checkpoint": reward_model, "max_tokens": 512})
    found = seconds(graded_by(RewardTermConfig("accuracy"), whole, late, cut))
    assert found["reward.terms.1"] == found["reward.terms.2"] == pytest.approx(SEQUENCES * asked(3))
    assert found["reward.terms.3"] == pytest.approx(SEQUENCES * asked(3, 512))
    # Those of a critic's run, too; a run on rows grades nothing.
    assert "reward.terms.0" in seconds(graded_by(whole, stage="ppo"))
    assert seconds(graded_by(whole, stage="sft")).keys() == {"train"}


def test_a_reward_model_on_the_host_comes(reward_model: str):
    term = RewardTermConfig("reward_model", options={"checkpoint": reward_model})
    here, there = (seconds(graded_by(term, offload=offload))["reward.terms.0"] for offload in (False, True))
    parameters = VOCABULARY * HIDDEN + 3 * (4 * HIDDEN**2 + 3 * HIDDEN * FFN + 2 * HIDDEN) + 2 * HIDDEN
    assert there - here == pytest.approx(2 * parameters / 50e9)


def test_a_reward_model_that_is_not_here_is_named():
    term = RewardTermConfig("reward_model", options={"checkpoint": "nowhere"})
    (other,) = plan_time(graded_by(term), H100, LOAD).others
    assert other.seconds == 0 and "unknown: nowhere is not here" in other.how


@pytest.mark.parametrize(
    ("objective", "max_tokens", "packs"),
    [
        ("pairs", 1024, 4),  # 8 pairs are 16 sequences, of which 4,096 tokens hold 4
        ("pairs", 1300, 8),  # 3 sequences would fit, and a pair stays together
        ("pairs", 3000, 8),  # a pair of its own
        ("pointwise", 1300, 3),  # 8 rows by 3
        ("pairs", None, 8),  # two to a pack
    ],
)
def test_pairs_stay_together(objective, max_tokens: int | None, packs: int):
    cfg = with_value_head(
        replace(
            CFG,
            stage="reward_model",
            reward_model=RewardModelConfig(objective=objective, batch_size=8, max_tokens=max_tokens),
            train=TrainConfig(bf16=True, micro_batch_tokens=4096),
        )
    )
    load = workload(cfg)
    assert (load.sequences, load.microbatches) == (16 if objective == "pairs" else 8, packs)
    assert load.longest == (max_tokens or 2048) and load.pack == max(4096, 6000 if max_tokens == 3000 else 0)
    if (objective, max_tokens) == ("pairs", 1024):
        time = plan_time(cfg, NOTHING_BUT_PRODUCTS, load)
        assert time.train == pytest.approx(16 * learned(2)) and time.rollout == 0 == time.of()


def test_a_plan_tells_what_they_take():
    moonlight = ROOT / "examples" / "moonlight_8gpu_zero.yaml"
    more = ["stage=ppo", "rl.zero_variance_groups=keep", "train.optimizer_cpu_offload=true"]
    term = "{function: reward_model, sources: [chat], from_step: 9, options: {checkpoint: x, preset: demo}}"
    plan = make_plan(load_config(moonlight, [*more, f"reward.terms=[{{function: accuracy}}, {term}]"]), H100)
    assert plan.fits, plan.problems
    shown, data = show_plan(plan), plan_data(plan)["seconds"]
    for said in (
        "+ reward models ",
        "+ the critic's values ",
        "+ training of the critic ",
        "packs of the step * ",
        "; from step 9 on, as if all prompts were of chat",
        "s forward and backward + ",
    ):
        assert said in shown, shown
    assert [other["kind"] for other in data["other_models"]] == ["values", "critic", "reward_model"]
    parts = data["rollout"] + data["annotate"] + data["train"] + sum(one["seconds"] for one in data["other_models"])
    assert data["step"] == pytest.approx(parts + 2.0)
