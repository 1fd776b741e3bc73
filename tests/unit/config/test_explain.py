"""The arithmetic of `explain`, computed by hand for one run of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1_megatron.config.explain import explain
from r1_megatron.config.load import load_config
from r1_megatron.config.validate import check_config

ROOT = Path(__file__).parents[3]


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_grpo_on_five_hundred_ranks():
    cfg = load_config(ROOT / "slurm/r1_zero_671b.yaml")
    lines = lines_of(explain(cfg))
    for expected in (
        "r1_zero_671b: grpo on 512 ranks",
        "dense layers tp(4) * pp(8) * cp(1) * dp(16) = 512 ranks",
        "experts etp(1) * ep(32) * edp(2) = 64 ranks of each pipeline stage, 8 of 256 experts a rank",
        "parameters 682,636,472,320 (683 B), of which 36.6 B work on a token",
        "pp rank 0 embedding, layers 0-7; 2.82 B parameters a rank",
        "pp ranks 1-6 8 layers each; 3.39 B parameters a rank",
        "pp rank 7 layers 56-60, 1 MTP module, head and loss; 3.03 B parameters a rank",
        "samples 512 prompts * 16 samples = 8,192",
        "per dp rank 32 prompts, at most 512 samples of 16,777,216 tokens",
        "tokens 8,192 samples * 32,768 = 268,435,456 at most",
        # 576 * 2 * 8 * 3 * 2**20 bytes = 27 * 2**30
        "cache per rank (kv_lora 512 + rope 64) * 2 bytes * 8 layers * 3,145,728 tokens (rollout.cache_tokens) = 27.0 "
        "GiB at most",
        "minibatches 512 prompts / 16 = 32 prompts, 512 sequences",
        "per dp rank the sequences are dealt to dp(16) by their work",
        "updates 16 minibatches * 1 epoch = 16 optimizer steps; 512 steps make 8,192",
        "reference KL 0.001 to the starting policy, replaced every 25 steps = 400 updates",
        "ratio of every token, clipped to [-9, 11] (the lower limit never binds), advantages (r - mean) / std, "
        "sequence_mean",
    ):
        assert expected in lines, explain(cfg)


def test_a_dense_student(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("")
    overrides = ["model.preset=r1_distill_qwen_7b", "parallel.tensor_model_parallel_size=2", "train.bf16=true"]
    overrides += ["rollout.max_sequences=32", "data.max_prompt_tokens=64", "sampling.max_new_tokens=64"]
    lines = lines_of(explain(load_config(path, overrides)))
    for expected in (
        "shape r1_distill_qwen_7b: qwen2, 28 layers, hidden 3584, 28 heads in 4 groups",
        "parameters 7,615,616,512 (7.62 B), of which 7.07 B work on a token",
        "cache per rank 2 * 2 heads * 128 * 2 bytes * 28 layers * 32 sequences * 128 tokens = 112.0 MiB at most",
    ):
        assert expected in lines, lines
    assert not any(line.startswith("experts ") for line in lines)
    lines = lines_of(explain(load_config(path, [*overrides, "rollout.cache_tokens=2048"])))
    expected = "2 * 2 heads * 128 * 2 bytes * 28 layers * 2,048 tokens (rollout.cache_tokens) = 56.0 MiB at most"
    assert f"cache per rank {expected}" in lines, lines


def test_uneven_deals_are_said(tmp_path: Path):
    """7 prompts, of which 6 are learned from, 2 ranks: one rank gets 4, the other 3."""
    path = tmp_path / "run.yaml"
    path.write_text("")
    cfg = load_config(
        path,
        [
            "rollout={prompts_per_step: 6, over_sampling_prompts: 1, samples_per_prompt: 2, max_sequences: 3}",
            "rl.num_minibatches=2",
            "rl.inner_epochs=3",
            "parallel={tensor_model_parallel_size: 2, data_parallel_size: 2, pipeline_model_parallel_size: 2}",
            "parallel.virtual_pipeline_model_parallel_size=2",
            "data.max_prompt_tokens=10",
            "sampling.max_new_tokens=15",
            "train={micro_batch_tokens: 60, lr_decay_style: cosine, lr_warmup_steps: 3}",
        ],
    )
    check_config(cfg)
    lines = lines_of(explain(cfg))
    for expected in (
        "interleaving vpp(2) model chunks on every pipeline rank",
        "sequence parallel on, because tp > 1",
        "pp rank 0 embedding, layers 0 + 2; 138 k parameters a rank",  # 130 * 64 + 32,976 + 96,464 = 137,760
        "samples 7 prompts * 2 samples = 14; the 6 groups that are done first are learned from, the others go on in "
        "the next step",
        "per dp rank 3 or 4 prompts, at most 8 samples of 200 tokens",
        "in flight 3 sequences per dp rank (rollout.max_sequences=3)",
        "cache per rank (kv_lora 32 + rope 16) * 4 bytes * 2 layers * 3 sequences * 25 tokens = 28.1 KiB at most",
        "per dp rank the sequences are dealt to dp(2) by their work",
        "microbatches up to 60 packed tokens each: 2 per minibatch if all are longest",
        "updates 2 minibatches * 3 epochs = 6 optimizer steps; 100 steps make 600",
        "learning rate 0.0001 after 3 warm-up steps, cosine to 0 over 100 steps",
    ):
        assert expected in lines, explain(cfg)


@pytest.mark.parametrize(("drafts", "layers"), [(0, 2), (1, 3)])
def test_drafts_take_a_layer_of_cache(tmp_path: Path, drafts: int, layers: int):
    path = tmp_path / "run.yaml"
    path.write_text("")
    cfg = load_config(
        path,
        [
            "model.mtp_num_layers=1",
            f"rollout.speculative_tokens={drafts}",
            "parallel={pipeline_model_parallel_size: 2}",
        ],
    )
    assert any(f"* 4 bytes * {layers} layers *" in line for line in lines_of(explain(cfg)))


def test_a_dynamic_token_budget(tmp_path: Path):
    """Two sequences of 1,024 tokens fit into what is the least of a dynamic budget; 192 samples on one rank."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "train: {micro_batch_tokens: null}\ndata: {max_prompt_tokens: 24}\nsampling: {max_new_tokens: 1000}"
    )
    text = (
        "as many packed tokens as the longest sequence of the step (2,048 at least) each: 96 per minibatch if all are"
    )
    assert any(text in line for line in lines_of(explain(load_config(path))))


@pytest.mark.parametrize(
    ("policy_loss", "ratio"),
    [
        ("ppo", "ratio of every token, clipped to [0.8, 1.28], advantages (r - mean) / std, token_mean"),
        (
            "cispo",
            "ratio CISPO: of every token, weighs it without a gradient, at most 1.28, advantages (r - mean) / std, "
            "token_mean",
        ),
        ("gspo", "ratio GSPO: of a sequence, clipped to [0.8, 1.28], advantages (r - mean) / std, token_mean"),
    ],
)
def test_policy_losses_are_told_apart(tmp_path: Path, policy_loss: str, ratio: str):
    path = tmp_path / "run.yaml"
    path.write_text("rl: {clip_ratio_high: 0.28, kl_estimator: unbiased}")
    cfg = load_config(path, [f"rl.policy_loss={policy_loss}"])
    check_config(cfg)
    lines = lines_of(explain(cfg))
    assert ratio in lines, explain(cfg)
    assert "reference KL 0.001 (unbiased estimator) to the starting policy, never replaced" in lines


@pytest.mark.parametrize("stage", ["sft", "evaluate", "grpo"])
def test_every_stage_is_explained_in_aligned_columns(stage: str):
    cfg = load_config(ROOT / "examples/chain_sum_base.yaml", [f"stage={stage}"])
    text = explain(cfg)
    assert text.startswith(f"chain_sum_base: {stage} on 2 ranks\n")
    assert ("minibatches" in text) == (stage == "grpo") and ("rows" in text) == (stage == "sft")
    columns = {len(line) - len(line[2:].split("  ", 1)[1].lstrip()) for line in text.splitlines() if line[:2] == "  "}
    assert len(columns) == 1


def test_where_values_and_scores_come_from():
    """Stage ppo with a reward model among its terms, and the training of one."""
    ppo = load_config(ROOT / "examples/chain_sum_ppo.yaml")
    critic = (
        "critic the policy's shape under a value head, from runs/chain_sum_base/checkpoints/final; every token's value "
        "once a step, before the first update; learning rate 0.001, constant; learns alone in the first 5 steps"
    )
    assert critic in lines_of(explain(ppo))
    own = load_config(ROOT / "examples/chain_sum_ppo.yaml", ["critic.model={preset: demo, num_layers: 2}"])
    assert any("critic demo under a value head, from random weights" in line for line in lines_of(explain(own)))
    lines = lines_of(explain(load_config("recipe:rl_2")))
    assert (
        "reward.terms.3 runs/reward_helpful/checkpoints/final scores the summary at its last token, in its own "
        "template and tokenizer, of helpful, from step 82 on"
    ) in lines
    trained = lines_of(explain(load_config(ROOT / "examples/chain_sum_reward_model.yaml")))
    assert (
        "pairs 32 pairs * 2 sequences = 64 a step, dealt to dp(1) ranks by their work; 10 epochs, and the last step "
        "takes what is left"
    ) in trained
    assert any(
        "score the value at the last token, of 64 at most; starts from runs/chain_sum_base" in x for x in trained
    )
