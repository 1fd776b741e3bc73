"""Recipes and algorithms: the papers' numbers, what fills what, where a value is from, what contradicts itself."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from r1_megatron.config.algorithms import ALGORITHMS
from r1_megatron.config.explain import explain
from r1_megatron.config.load import ConfigError, dump_config, load_config, load_with_sources
from r1_megatron.config.reading import recipe_names
from r1_megatron.config.schema import LengthSwitch, RLConfig, RunConfig, SamplingConfig
from r1_megatron.config.validate import validate_config
from r1_megatron.pipeline.check import checked_pipeline
from r1_megatron.planner.hardware import find_gpu
from r1_megatron.planner.plan import make_plan
from r1_megatron.planner.workload import workload
from r1_megatron.topology import Topology

ROOT = Path(__file__).resolve().parents[3]


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# ----- recipes

# arXiv 2501.12948v2, appendix B.4, in updates of 512 outputs; a step here makes 16 of them.
R1_ZERO: dict[str, Any] = {
    "stage": "grpo",
    "sampling.temperature": 1.0,
    "rollout.samples_per_prompt": 16,
    "rl.kl_coef": 0.001,
    "rl.kl_estimator": "k3",
    "rl.inner_epochs": 1,
    "rl.num_minibatches": 16,
    "rl.advantage_normalization": "std",
    "train.lr": 3e-6,
    "train.lr_decay_style": "constant",
}
# The clip range is published for the first stage alone.
RL_1 = {**R1_ZERO, "rl.clip_ratio_low": 10.0, "rl.clip_ratio_high": 10.0}
COLD_START = {"stage": "sft", "sft.batch_size": 128, "sft.epochs": 2, "train.lr": 5e-5, "train.min_lr": 5e-6}
COLD_START |= {"train.lr_decay_style": "cosine", "sft.max_tokens": 32768}
PUBLISHED = {
    "r1_zero": R1_ZERO,
    "rl_1": RL_1,
    "rl_2": {**R1_ZERO, "sampling.temperature": 0.7},
    "cold_start": COLD_START,
    "sft_2": COLD_START,
    # Section 3.1: 66,000 pairs, whose mean scores differ by more than 1.
    "reward_model": {
        "stage": "reward_model",
        "model.head": "value",
        "reward_model.objective": "pairs",
        "reward_model.batch_size": 256,
        "reward_model.epochs": 1,
        "reward_model.max_tokens": 8192,
        "data.min_score_difference": 1.0,
        "train.lr": 6e-6,
    },
    "distill": {
        "stage": "distill",
        "sft.batch_size": 64,
        "sft.epochs": 2,
        "sft.max_tokens": 32768,
        "train.lr_decay_style": "cosine",
    },
}


# Of the recipes' numbers those that are ours, because the paper does not say them of the stage; why: the recipes.
OURS: dict[str, dict[str, Any]] = {
    "r1_zero": {"rl.clip_ratio_low": 10.0, "rl.clip_ratio_high": 10.0, "rl.ratio_level": "token"},
    "rl_1": {"train.steps": 650, "data.max_prompt_tokens": 2048, "sampling.max_new_tokens": 30720},
    "rl_2": {"rl.clip_ratio_low": 10.0, "rl.clip_ratio_high": 10.0, "train.steps": 106},
    "cold_start": {"data.template": "r1_zero", "data.max_prompt_tokens": 2048},
    "sft_2": {"data.template": "r1_zero", "data.max_prompt_tokens": 2048},
    "reward_model": {"data.template": "r1_zero", "train.lr_decay_style": "constant"},
    "distill": {"train.lr": 5e-5, "train.min_lr": 5e-6, "data.template": "r1_zero", "data.max_prompt_tokens": 2048},
}


def value(cfg: RunConfig, name: str) -> Any:
    for part in name.split("."):
        cfg = getattr(cfg, part)
    return cfg


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_papers_numbers(name: str, tmp_path: Path):
    cfg = load_config(f"recipe:{name}")
    assert {field: value(cfg, field) for field in PUBLISHED[name]} == PUBLISHED[name]
    again = write(tmp_path, dump_config(cfg))
    assert load_config(again) == cfg
    assert recipe_names() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", OURS)
def test_what_is_ours_in_a_recipe_is_said(name: str):
    assert OURS.keys() == PUBLISHED.keys() and not OURS[name].keys() & PUBLISHED[name].keys()
    cfg = load_config(f"recipe:{name}")
    assert {field: value(cfg, field) for field in OURS[name]} == OURS[name]


def test_the_batches_and_lengths_of_reinforcement():
    zero, first, second = (load_config(f"recipe:{name}") for name in ("r1_zero", "rl_1", "rl_2"))
    for cfg in (zero, first, second):
        outputs = cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt
        assert outputs == 8192 and outputs // cfg.rl.num_minibatches == 32 * 16 == 512
        assert cfg.rl.reference_refresh_steps * cfg.rl.num_minibatches == 400
        assert cfg.data.max_prompt_tokens + cfg.sampling.max_new_tokens == 32768
    assert zero.train.steps * 16 == 10_400
    # 8.2k updates are done before the limit changes.
    assert [zero.data.max_prompt_tokens + zero.sampling.at(step).max_new_tokens for step in (1, 512, 513, 650)] == [
        32768, 32768, 65536, 65536,
    ]  # fmt: skip
    assert 512 * 16 == 8192 and zero.longest_sequence == 65536 == 2 * first.longest_sequence
    assert abs(second.train.steps * 16 - 1700) <= 16
    late = [term for term in second.reward.terms if term.function == "reward_model"]
    assert [term.last_steps * 16 for term in late if term.last_steps] == [400, 400]
    for steps in (106, 200):  # whatever train.steps is changed to
        begins = {term.from_step for term in second.reward.over(steps).terms if term.function == "reward_model"}
        assert begins == {steps - 24}
    # A prompt belongs to one of the two sets; rules judge neither.
    assert [(term.on, term.sources) for term in late] == [("summary", ("helpful",)), ("response", ("safety",))]
    assert second.reward.terms[0].sources == ("reasoning",)
    for cfg in (first, second):
        (language,) = [term for term in cfg.reward.terms if term.function == "language_consistency"]
        assert (language.on, language.weight) == ("reasoning", 1.0)


def test_both_reward_models_of_the_paper_are_the_recipe(tmp_path: Path):
    """On DeepSeek-V3, whose preset has a multi-token-prediction module: a value model has none."""
    text = "inherits: recipe:reward_model\nmodel: {preset: deepseek_v3_671b}\ndata: {source: jsonl, path: x.jsonl}"
    helpful = load_config(write(tmp_path, text))
    safe = load_config(tmp_path / "run.yaml", ["reward_model.objective=pointwise"])
    for cfg, sequences in ((helpful, 512), (safe, 256)):
        assert validate_config(cfg, check_files=False) == []
        assert (cfg.num_steps, cfg.epochs, cfg.rows_per_step) == (None, 1, sequences)
        assert workload(cfg).longest == 8192 and workload(cfg).sequences == sequences
    told = " ".join(explain(helpful).split())
    assert "256 pairs * 2 sequences = 512 a step, dealt to dp(1) ranks by their work; 1 epoch, and the last" in told
    assert "the value at the last token, of 8,192 at most; starts from random weights" in told
    long = load_config(tmp_path / "run.yaml", ["train.steps=7"])
    (problem,) = validate_config(long, check_files=False)
    assert problem.startswith("reward_model.epochs(1) and train.steps(7) both say how long the run is.")


def test_the_recipes_follow_one_another():
    """Whoever goes on with a checkpoint, or learns from its responses, writes prompts as it does."""
    chain = [load_config(f"recipe:{name}") for name in ("r1_zero", "cold_start", "rl_1", "sft_2", "rl_2", "distill")]
    assert {(cfg.data.template, cfg.data.max_prompt_tokens) for cfg in chain} == {("r1_zero", 2048)}
    assert load_config("recipe:reward_model").data.template == "r1_zero"


def test_a_supervised_row_has_32k_tokens_at_most(tmp_path: Path):
    text = "inherits: recipe:cold_start\nmodel: {preset: deepseek_v3_671b}\ndata: {source: jsonl, path: x.jsonl}"
    path = write(tmp_path, text)
    large, small = load_config(path), load_config(path, ["model.max_position_embeddings=4096"])
    assert (large.longest_row, small.longest_row) == (32768, 4096)
    assert workload(large).longest == 32768 and "longest row 32,768 tokens" in " ".join(explain(large).split())
    (problem,) = validate_config(load_config(path, ["sft.max_tokens=1"]), check_files=False)
    assert problem == "sft.max_tokens=1 has to be at least 2, or null: the model's positions."


def test_distillation_ends_at_a_tenth():
    cfg = load_config("recipe:distill")
    assert cfg.train.min_lr == pytest.approx(cfg.train.lr / 10)


def test_the_large_jobs_are_the_recipes(tmp_path: Path):
    """The files of slurm/ repeat none of the numbers: what they set differs, and for a reason."""
    for name, recipe, own in (
        ("r1_zero_671b", "r1_zero", {"train.steps": 512, "sampling.length_switches": ()}),
        ("sft_671b", "cold_start", {"sft.epochs": None}),
    ):
        cfg, sources = load_with_sources(ROOT / "slurm" / f"{name}.yaml")
        filled = dict(sources)[f"recipe:{recipe}"]
        _, mine = sources[-1]
        assert {field: value(cfg, field) for field in filled.keys() & mine.keys()} == own
        published = PUBLISHED[recipe].keys() - own.keys()
        assert {field: value(cfg, field) for field in published} == {f: PUBLISHED[recipe][f] for f in published}


def test_the_pipeline_of_the_large_job_is_the_whole_recipe():
    """Each node has its recipe's numbers, whatever file its layout is from, and fits its GPUs."""
    nodes = checked_pipeline(ROOT / "slurm" / "r1_671b_pipeline.yaml", check_files=False).nodes
    recipes = {
        "zero": "r1_zero", "reasoning": "rl_1", "sft_2": "sft_2", "helpful": "reward_model", "r1": "rl_2",
        "qwen_7b": "distill", "llama_8b": "distill",
    }  # fmt: skip
    for name, recipe in recipes.items():
        cfg = nodes[name].config
        assert {field: value(cfg, field) for field in PUBLISHED[recipe]} == PUBLISHED[recipe], name
    reasoning, r1, rl_2 = nodes["reasoning"].config, nodes["r1"].config, load_config("recipe:rl_2")
    assert reasoning.reward == load_config("recipe:rl_1").reward and reasoning.sampling.length_switches == ()
    # The recipe's terms, but for where the reward models lie.
    assert [replace(term, options={}) for term in r1.reward.terms] == [
        replace(term, options={}) for term in rl_2.reward.terms
    ]
    assert [str(reference) for reference in nodes["r1"].references][:2] == [
        "${helpful.reward_model}", "${safe.reward_model}",
    ]  # fmt: skip
    safe = nodes["safe"].config
    assert replace(safe.reward_model, objective="pairs") == nodes["helpful"].config.reward_model
    ranks = {512: 11, 256: 2, 32: 4}
    counted = Counter(Topology.from_config(node.config.parallel).world_size for node in nodes.values())
    assert counted == ranks
    for node in nodes.values():
        assert make_plan(node.config, find_gpu("h100-80gb"), with_remedy=False, with_time=False).fits, node.name


def test_several_parents(tmp_path: Path):
    """The later win; what they inherit themselves comes before them."""
    write(tmp_path, "inherits: recipe:rl_1\nseed: 1\nrl: {kl_coef: 0.5}", "a.yaml")
    write(tmp_path, "seed: 2\ntrain: {lr: 7.0e-6}", "b.yaml")
    cfg = load_config(write(tmp_path, "inherits: [a.yaml, b.yaml]\nname: mine"))
    assert (cfg.seed, cfg.rl.kl_coef, cfg.train.lr, cfg.rollout.prompts_per_step) == (2, 0.5, 7e-6, 512)
    # The same file over two ways is no circle.
    write(tmp_path, "inherits: b.yaml\nname: c", "c.yaml")
    assert load_config(write(tmp_path, "inherits: [b.yaml, c.yaml]", "d.yaml")).name == "c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inherits: recipe:r1_zer", "there is no recipe:r1_zer. Did you mean recipe:r1_zero?"),
        ("inherits: [recipe:xyz]", "Known: cold_start, distill, r1_zero, reward_model, rl_1, rl_2, sft_2."),
        ("rl: {algorithm: dappo}", 'rl.algorithm: "dappo" is not a choice. Did you mean dapo?'),
    ],
)
def test_unknown_names_are_problems(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)


# ----- algorithms


def test_an_algorithm_fills_what_is_left_out(tmp_path: Path):
    write(tmp_path, "rl: {algorithm: grpo, kl_coef: 0.5}", "base.yaml")
    path = write(tmp_path, "inherits: base.yaml\nrl: {clip_ratio_high: 0.3}")
    rl = load_config(path, ["rl.overlong=mask", "rl.algorithm=dapo"]).rl
    expected = RLConfig(**{**ALGORITHMS["dapo"], "algorithm": "dapo"})
    assert rl == replace(expected, kl_coef=0.5, clip_ratio_high=0.3, overlong="mask")
    without = load_config(path, ["rl.algorithm=null"]).rl
    assert without == replace(RLConfig(), kl_coef=0.5, clip_ratio_high=0.3)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_contradicts_nothing(tmp_path: Path, name: str):
    cfg = load_config(write(tmp_path, ""), [f"rl.algorithm={name}"])
    assert validate_config(cfg) == []
    assert set(ALGORITHMS[name]) <= {field.name for field in fields(RLConfig)}
    text = " ".join(explain(cfg, load_with_sources(tmp_path / "run.yaml", [f"rl.algorithm={name}"])[1]).split())
    assert f"rl.algorithm={name} rl.advantage_baseline" in text


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("dapo", "prompts whose samples are all worth the same are replaced, 8 times a step at most"),
        ("rloo", "ratio of a sequence, the product of its tokens', clipped to [0.8, 1.2], advantages r - mean of the "
         "others, sequence_mean reference KL 0.03 (k1 estimator) to the starting policy, taken off the reward, never"),
        ("reinforce_plus_plus", "clipped to [0.8, 1.2], advantages r, normalised over the step, token_mean"),
        ("reinforce_plus_plus_baseline", "advantages r - mean, normalised over the step, token_mean reference KL 0.001 "
         "(k2 estimator) to the starting policy, never replaced"),
    ],
)  # fmt: skip
def test_explain_tells_algorithms_apart(tmp_path: Path, name: str, told: str):
    assert told in " ".join(explain(load_config(write(tmp_path, ""), [f"rl.algorithm={name}"])).split())


def test_explain_says_when_responses_may_be_longer(tmp_path: Path):
    cfg = load_config(write(tmp_path, ""), ["sampling.length_switches=[{from_step: 9, max_new_tokens: 1000}]"])
    told = "prompt 256 + response 1,000 = 1,256 tokens at most (responses: 64, 1,000 from step 9 on)"
    assert told in " ".join(explain(cfg).split())


def test_explain_says_where_values_are_from(tmp_path: Path):
    path = write(tmp_path, "inherits: recipe:rl_1\nmodel: {preset: demo}\nrl: {algorithm: dapo}\ntrain: {lr: 1.0e-6}")
    cfg, sources = load_with_sources(path, ["rl.clip_ratio_high=0.28", "data.source=jsonl"])
    assert [source for source, _ in sources] == [
        "model.preset=demo", "rl.algorithm=dapo", "recipe:r1_zero", "recipe:rl_1", str(path), "override",
    ]  # fmt: skip
    text = " ".join(explain(cfg, sources).split())
    filled, recipe, own = (text.partition(name)[2] for name in ("rl.algorithm=dapo", "recipe:r1_zero", str(path)))
    assert 'rl.zero_variance_groups "resample"' in filled.split("recipe:r1_zero")[0]
    assert "rl.clip_ratio_high" not in filled.split("recipe:r1_zero")[0], "a recipe has said something else"
    assert "rl.num_minibatches 16" in recipe and "train.lr" not in recipe.split("recipe:rl_1")[0]
    assert own.startswith(" train.lr 1e-06 (recipe:r1_zero: 3e-06) override rl.clip_ratio_high 0.28 (recipe:r1_zero: ")
    assert "where values are from" not in explain(cfg)


CASES = [
    (["rollout.samples_per_prompt=1"], r"advantage of a single one is 0 .*reinforce_plus_plus"),
    (["rl.advantage_baseline=none"], r"normalization=std divides by the spread of a group"),
    (["rl.algorithm=reinforce_plus_plus", "rl.zero_variance_groups=drop"], r"every group says something"),
    (["rl.ratio_level=sequence", "rl.policy_loss=gspo"], r"that of gspo is the geometric mean"),
    (["rl.ratio_level=sequence", "rl.policy_loss=cispo"], r"that of cispo is every token's"),
    (["rl.algorithm=rloo", "parallel.context_parallel_size=2"], r"ratio_level=sequence multiplies whole sequences"),
    (["rl.kl_estimator=k1"], r"kl_estimator=k1 in the loss .* pulls nowhere"),
    (["rl.kl_estimator=unbiased", "rl.kl_in=reward"], r"corrects a gradient"),
    (["rl.algorithm=dapo", "rollout.over_sampling_prompts=2"], r"resample waits for all groups"),
    (["rl.max_resamples=3"], r"zero_variance_groups=keep samples none"),
    (["rl.algorithm=dapo", "rl.max_resamples=0"], r"max_resamples=0 has to be at least 1"),
    (["rl.algorithm=dapo", "sampling.max_new_tokens=4"], r"a fifth of sampling.max_new_tokens\(4\), which is no token"),
    (["sampling.length_switches=[{from_step: 5, max_new_tokens: 64}]"], r"switches.0: .*after 64 from step 1 on"),
    (["sampling.length_switches=[{from_step: 1, max_new_tokens: 65}]"], r"both have to rise"),
    (
        ["sampling.length_switches=[{from_step: 9, max_new_tokens: 80}, {from_step: 7, max_new_tokens: 90}]"],
        r"switches.1: from step 7 on 90 tokens, after 80 from step 9",
    ),
    (["sampling.length_switches=[{from_step: 9, max_new_tokens: 9000}]"], r"= 9256 tokens, but"),
    (
        ["sampling.length_switches=[{from_step: 9, max_new_tokens: 100}]", "rollout.cache_tokens=330"],
        r"cache_tokens\(330\) is less than one sequence.*Set rollout.cache_tokens=356",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_each_contradiction_is_named(tmp_path: Path, overrides: list[str], message: str):
    problems = validate_config(load_config(write(tmp_path, ""), overrides))
    assert any(re.search(message, problem) for problem in problems), problems


@pytest.mark.parametrize(
    "overrides",
    [
        ["rl.algorithm=reinforce_plus_plus", "rollout.samples_per_prompt=1"],
        ["rl.algorithm=rloo", "rl.kl_coef=0"],
        ["rl.algorithm=grpo", "rl.ratio_level=sequence", "rl.zero_variance_groups=resample", "rl.max_resamples=1"],
        [
            "rl.algorithm=reinforce_plus_plus",
            "parallel.context_parallel_size=2",
            "parallel.tensor_model_parallel_size=2",
        ],
        ["sampling.length_switches=[{from_step: 2, max_new_tokens: 65}, {from_step: 900, max_new_tokens: 66}]"],
    ],
)
def test_what_is_no_contradiction(tmp_path: Path, overrides: list[str]):
    assert validate_config(load_config(write(tmp_path, ""), overrides)) == []


# ----- lengths by step


def test_the_limit_of_a_step():
    sampling = SamplingConfig(max_new_tokens=8, length_switches=(LengthSwitch(3, 12), LengthSwitch(5, 20)))
    assert [sampling.at(step).max_new_tokens for step in range(7)] == [8, 8, 8, 12, 12, 20, 20]
    assert sampling.longest == 20 and sampling.at(9) == SamplingConfig(max_new_tokens=20)


def test_the_planner_counts_the_longest(tmp_path: Path):
    path = write(tmp_path, "")
    switched = load_config(path, ["sampling.length_switches=[{from_step: 9, max_new_tokens: 500}]"])
    longest = load_config(path, ["sampling.max_new_tokens=500"])
    assert workload(switched) == workload(longest) != workload(load_config(path))


def test_the_planner_counts_the_forward_of_kl_in_the_reward(tmp_path: Path):
    """Reference and old log-probabilities, though there is one update."""
    path = write(tmp_path, "")
    grpo, rloo = (workload(load_config(path, [f"rl.algorithm={name}"])).annotations for name in ("grpo", "rloo"))
    assert (grpo, rloo) == (1, 2)
