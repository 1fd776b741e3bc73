"""Everything in a configuration that contradicts itself, found before anything starts.

Each function looks at one concern and yields a sentence per problem: the formula, the values, the remedy. Nothing
stops at the first one. What only a running job can know (the GPU, the tokenizer's vocabulary, the prompts) is checked
where it is read.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from r1_megatron.config.load import ConfigError
from r1_megatron.config.schema import REWARD_NAMES, RolloutConfig, RunConfig
from r1_megatron.config.validate_code import code_reward_problems
from r1_megatron.config.validate_data import TASK_TOKENIZERS, data_file_problems, data_problems, task_sources
from r1_megatron.config.validate_evaluate import evaluation_file_problems, evaluation_problems
from r1_megatron.config.validate_model import model_problems
from r1_megatron.config.validate_precision import precision_problems
from r1_megatron.config.validate_preflight import preflight_problems
from r1_megatron.config.validate_reject import missing_files, reject_problems
from r1_megatron.config.validate_resilience import resilience_problems
from r1_megatron.config.validate_reward import reward_mixture_problems
from r1_megatron.config.validate_rl import rl_problems
from r1_megatron.config.validate_supervised import supervised_problems
from r1_megatron.config.validate_value_models import value_model_problems
from r1_megatron.topology import place_layers, placement_problems, topology_problems
from r1_megatron.topology import validate as parallel_problems

# megatron-core's list (TransformerConfig.recompute_modules).
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe", "moe_act", "shared_experts")
# What megatron-core 0.16.1 recomputes by a function that it only has with Transformer Engine.
RECOMPUTE_MODULES_CUDA = ("layernorm",)
# Names of parts that dense students do not have.
RECOMPUTE_MODULES_DEEPSEEK = ("mla_up_proj", "moe", "moe_act", "shared_experts")


def check_config(cfg: RunConfig, world_size: int | None = None, check_files: bool = True) -> None:
    """Raise :class:`ConfigError` with all problems of :func:`validate_config`, if there are any."""
    problems = validate_config(cfg, world_size, check_files)
    if problems:
        raise ConfigError(problems, f"the configuration of run {cfg.name!r}")


def validate_config(cfg: RunConfig, world_size: int | None = None, check_files: bool = True) -> list[str]:
    """All problems of a configuration; empty: none.

    Args:
        world_size: ranks of the job, compared with the layout; ``None``: not compared (the layout decides).
        check_files: also ask this machine: do the files exist, are optional packages installed. Switch it off to check
            a cluster's configuration on a laptop.
    """
    problems = [
        *parallel_problems(cfg.parallel, cfg.model.num_layers, cfg.model.mtp_num_layers, world_size),
        *_numbers(cfg),
        *model_problems(cfg),
        *value_model_problems(cfg),
        *_batch(cfg),
        *_over_sampling(cfg),
        *_sampling(cfg),
        *_reward(cfg),
        *code_reward_problems(cfg),
        *reward_mixture_problems(cfg),
        *rl_problems(cfg),
        *_optimizer(cfg),
        *_offload(cfg),
        *_recompute(cfg),
        *_experts(cfg),
        *precision_problems(cfg),
        *_data(cfg),
        *evaluation_problems(cfg),
        *_checkpoint(cfg),
        *supervised_problems(cfg),
        *_profile(cfg),
        *resilience_problems(cfg),
        *reject_problems(cfg),
        *preflight_problems(cfg.preflight),
    ]
    if check_files:
        problems += _machine(cfg)
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Ranges of single numbers.

_AT_LEAST_ONE = {
    "model": (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
        "num_moe_experts",
        "moe_ffn_hidden_size",
        "moe_router_topk",
        "original_max_position_embeddings",
    ),
    "data": ("max_prompt_tokens", "num_train", "num_eval"),
    "sampling": ("max_new_tokens",),
    "rollout": ("prompts_per_step", "samples_per_prompt", "max_sequences", "max_prefill_tokens"),
    "rl": ("num_minibatches", "inner_epochs", "max_resamples"),
    "train": ("steps",),
    "sft": ("batch_size",),
    "reward_model": ("batch_size",),
    "evaluate": ("samples_per_prompt",),
    "resilience": ("straggler_steps", "max_roll_backs"),
}
_AT_LEAST_ONE_OR_NULL = {
    "model": ("q_lora_rank", "num_query_groups", "head_dim", "moe_router_num_groups", "moe_router_group_topk"),
    "rollout": ("cache_tokens", "pipeline_groups", "max_carry_steps"),
    "rl": ("reference_refresh_steps", "overlong_buffer_tokens"),
    "train": ("lr_decay_steps", "micro_batch_tokens", "recompute_num_layers"),
    "checkpoint": ("keep_last",),
    "sft": ("epochs",),
    "reward_model": ("epochs",),
}
_NOT_NEGATIVE = {
    "": ("seed",),
    "model": (
        "moe_shared_expert_intermediate_size",
        "first_k_dense_replace",
        "moe_router_bias_update_rate",
        "moe_aux_loss_coeff",
        "mtp_num_layers",
        "mtp_loss_scaling_factor",
        "mscale",
        "mscale_all_dim",
    ),
    "data": ("seed",),
    "sampling": ("temperature", "top_k"),
    "rollout": ("over_sampling_prompts", "speculative_tokens"),
    "rl": (
        "clip_ratio_low",
        "clip_ratio_high",
        "kl_coef",
        "entropy_coef",
        "overlong_penalty",
    ),
    "critic": ("min_lr", "lr_warmup_steps", "warmup_steps"),
    "reward_model": ("margin", "margin_per_score"),
    "train": ("min_lr", "lr_warmup_steps", "weight_decay", "clip_grad"),
    "sft": ("held_out_rows",),
    "evaluate": ("interval", "num_prompts"),
    "checkpoint": ("interval", "keep_best"),
    "resilience": ("max_restarts", "max_reward_restarts"),
    "telemetry": ("num_samples",),
}
_POSITIVE = {
    "model": (
        "layernorm_epsilon",
        "init_method_std",
        "rotary_base",
        "rotary_scaling_factor",
        "beta_fast",
        "beta_slow",
        "moe_router_topk_scaling_factor",
    ),
    "parallel": ("timeout_s",),
    "resilience": ("disk_full_wait_s",),
    "reward": ("timeout_s",),
    "rl": ("advantage_epsilon",),
    "critic": ("lr",),
    "train": ("lr", "adam_eps"),
}
_POSITIVE_OR_NULL = {
    "critic": ("value_clip",),
    "rl": ("tis_cap", "probs_diff_limit"),
    "profile": ("peak_tflops",),
    "telemetry": ("sample_interval_s",),
}
_FRACTION = {
    "ppo": ("gamma", "gae_lambda"),
    "sft": ("corrupt_fraction", "malformed_fraction", "mixed_fraction"),
}


def _numbers(cfg: RunConfig) -> Iterator[str]:
    for table, fits, rule in (
        (_AT_LEAST_ONE, lambda x: x >= 1, "at least 1"),
        (_AT_LEAST_ONE_OR_NULL, lambda x: x is None or x >= 1, "null or at least 1"),
        (_NOT_NEGATIVE, lambda x: x >= 0, "at least 0"),
        (_POSITIVE, lambda x: x > 0, "greater than 0"),
        (_POSITIVE_OR_NULL, lambda x: x is None or x > 0, "null or greater than 0"),
        (_FRACTION, lambda x: 0 <= x <= 1, "between 0 and 1"),
    ):
        for section, names in table.items():
            for name in names:
                value = getattr(getattr(cfg, section) if section else cfg, name)
                if not fits(value):
                    yield f"{section}{'.' if section else ''}{name}={value} has to be {rule}."


# ---------------------------------------------------------------------------------------------------------------------
# Batches and sequences.


def _batch(cfg: RunConfig) -> Iterator[str]:
    """The prompts of a step are cut into minibatches, and each minibatch is dealt over the data-parallel ranks."""
    dp, r = cfg.parallel.data_parallel_size, cfg.rollout
    if cfg.is_supervised and cfg.sft.batch_size < dp:
        yield (
            f"sft.batch_size({cfg.sft.batch_size}) has to be at least parallel.data_parallel_size({dp}): every "
            f"data-parallel rank needs a row."
        )
    if cfg.is_rl:
        minibatches = cfg.rl.num_minibatches
        if minibatches >= 1 and r.prompts_per_step % minibatches:
            yield (
                f"rollout.prompts_per_step({r.prompts_per_step}) does not divide into rl.num_minibatches({minibatches})"
                f": {r.prompts_per_step} % {minibatches} = {r.prompts_per_step % minibatches}."
            )
        elif minibatches >= 1 and r.prompts_per_step // minibatches < dp:
            yield (
                f"rollout.prompts_per_step({r.prompts_per_step}) / rl.num_minibatches({minibatches}) = "
                f"{r.prompts_per_step // minibatches} prompts per minibatch, fewer than "
                f"parallel.data_parallel_size({dp}). Set rollout.prompts_per_step={dp * minibatches} or more."
            )
    groups = cfg.parallel.pipeline_model_parallel_size if r.pipeline_groups is None else r.pipeline_groups
    if groups > r.max_sequences:
        yield (
            f"rollout.max_sequences({r.max_sequences}) is less than the {groups} groups of sequences in flight "
            f"(rollout.pipeline_groups, or one per pipeline stage): every group needs a sequence."
        )
    longest = cfg.longest_sequence
    if r.cache_tokens is not None and 1 <= r.cache_tokens < longest:
        yield (
            f"rollout.cache_tokens({r.cache_tokens}) is less than one sequence, which could never end: "
            f"data.max_prompt_tokens({cfg.data.max_prompt_tokens}) + sampling.max_new_tokens("
            f"{cfg.sampling.longest}) = {longest} tokens. Set rollout.cache_tokens={longest} or more."
        )


def _over_sampling(cfg: RunConfig) -> Iterator[str]:
    """Options of over-sampling, where there is something to over-sample."""
    r, defaults = cfg.rollout, RolloutConfig()
    if r.over_sampling_prompts and (cfg.learns_from_rows or cfg.stage == "reject"):
        yield (
            f"rollout.over_sampling_prompts={r.over_sampling_prompts}: stage={cfg.stage} samples nothing that it "
            "learns from. Set it to 0."
        )
    if r.over_sampling_prompts == 0:
        for name in ("unfinished", "max_carry_steps"):
            value = getattr(r, name)
            if value != getattr(defaults, name):
                yield (
                    f"rollout.{name}={_yaml(value)} says what becomes of unfinished groups, and with "
                    "rollout.over_sampling_prompts=0 every step waits for all of its groups. Set the latter above 0, "
                    f"or rollout.{name}={_yaml(getattr(defaults, name))}."
                )
    elif r.unfinished == "drop" and r.max_carry_steps != defaults.max_carry_steps:
        yield (
            f"rollout.max_carry_steps={_yaml(r.max_carry_steps)} bounds how long groups go on, and "
            f"rollout.unfinished=drop lets none. Set rollout.unfinished=continue, or "
            f"rollout.max_carry_steps={_yaml(defaults.max_carry_steps)}."
        )


def _sampling(cfg: RunConfig) -> Iterator[str]:
    s, m = cfg.sampling, cfg.model
    if not 0 < s.top_p <= 1:
        yield f"sampling.top_p={s.top_p} has to be in (0, 1]; 1 switches it off."
    if not 0 <= s.min_p <= 1:
        yield f"sampling.min_p={s.min_p} has to be in [0, 1]; 0 switches it off."
    longest = cfg.longest_sequence
    if longest > m.max_position_embeddings:
        yield (
            f"data.max_prompt_tokens({cfg.data.max_prompt_tokens}) + sampling.max_new_tokens({s.longest}) = "
            f"{longest} tokens, but model.max_position_embeddings={m.max_position_embeddings}."
        )
    if "" in s.stop:
        yield "sampling.stop holds an empty string, which would stop every response at once."
    limit, step = s.max_new_tokens, 1
    for index, switch in enumerate(s.length_switches):
        if switch.from_step <= step or switch.max_new_tokens <= limit:
            yield (
                f"sampling.length_switches.{index}: from step {switch.from_step} on {switch.max_new_tokens} tokens, "
                f"after {limit} from step {step} on: both have to rise, so that what is on its way fits the new limit."
            )
        limit, step = switch.max_new_tokens, switch.from_step
    outside = [token for token in s.stop_token_ids if not 0 <= token < m.vocab_size]
    if outside:
        yield f"sampling.stop_token_ids: {outside} are not in the vocabulary, 0 to {m.vocab_size - 1}."
    if cfg.is_rl and s.temperature == 0:
        yield (
            "sampling.temperature=0 is greedy: all samples of a prompt would be equal and nothing be learned. "
            "Set it above 0 (the paper: 1)."
        )


# Rewards of ours that read one task's labels only.
_REWARD_OF_SOURCE = {
    "chain_sum": "accuracy",
    "countdown": "countdown",
    "bilingual": "accuracy",
    "translation": "accuracy",
}


def _reward(cfg: RunConfig) -> Iterator[str]:
    """Every stage grades: supervised fine-tuning does at its end, on the held-out prompts."""
    if not cfg.reward.terms:
        yield "reward.terms is empty: name at least one reward function."
    if cfg.reward.timeout_s >= cfg.parallel.timeout_s:
        yield (
            f"reward.timeout_s({cfg.reward.timeout_s:g}) has to be less than parallel.timeout_s("
            f"{cfg.parallel.timeout_s:g}): the other ranks wait for the rewards."
        )
    tasks = task_sources(cfg.data)
    for index, term in enumerate(cfg.reward.terms):
        if not term.function.strip():
            yield f"reward.terms.{index}.function is empty."
        elif ":" not in term.function and term.function not in REWARD_NAMES:
            yield (
                f"reward.terms.{index}.function={term.function} is unknown. Ours are {', '.join(REWARD_NAMES)}; a "
                "plug-in is package.module:function."
            )
        elif term.function in _REWARD_OF_SOURCE.values():
            asked = {name: _REWARD_OF_SOURCE[task] for name, task in tasks.items() if name in (term.sources or tasks)}
            foreign = [name for name, right in asked.items() if right != term.function]
            if foreign:
                rest = [name for name in asked if name not in foreign]
                remedy = f"Set its sources=[{', '.join(rest)}]" if rest else f"Use {asked[foreign[0]]}"
                yield (
                    f"reward.terms.{index}.function={term.function} cannot read the labels of data.source="
                    f"{', '.join(foreign)}. {remedy}."
                )


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer step.


def _optimizer(cfg: RunConfig) -> Iterator[str]:
    t = cfg.train
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(t, name) < 1:
            yield f"train.{name}={getattr(t, name)} has to be in [0, 1)."
    if t.min_lr > t.lr:
        yield f"train.min_lr({t.min_lr:g}) exceeds train.lr({t.lr:g})."
    if cfg.trains and (cfg.num_steps is not None or t.lr_decay_steps is not None):
        decay = t.steps if t.lr_decay_steps is None else t.lr_decay_steps
        if t.lr_warmup_steps >= decay:
            yield (
                f"train.lr_warmup_steps({t.lr_warmup_steps}) has to be less than train."
                f"{'steps' if t.lr_decay_steps is None else 'lr_decay_steps'}({decay})."
            )
    if t.overlap_param_gather and not (t.use_distributed_optimizer and t.overlap_grad_reduce):
        yield (
            f"train.overlap_param_gather=true needs train.use_distributed_optimizer, which is "
            f"{_yaml(t.use_distributed_optimizer)}, and train.overlap_grad_reduce, which is "
            f"{_yaml(t.overlap_grad_reduce)}. Set both to true."
        )


def _offload(cfg: RunConfig) -> Iterator[str]:
    if cfg.train.offload and cfg.parallel.device == "cpu":
        yield (
            "train.offload=true moves memory from a GPU to the host, but parallel.device=cpu. Set train.offload=false."
        )


def _recompute(cfg: RunConfig) -> Iterator[str]:
    """megatron-core's rules for activation recomputation."""
    t = cfg.train
    kind = t.recompute_granularity
    if kind != "full":
        for name in ("recompute_method", "recompute_num_layers"):
            if getattr(t, name) is not None:
                yield (
                    f"train.{name}={getattr(t, name)} belongs to train.recompute_granularity=full, which is "
                    f"{_yaml(kind)}. Set one of them to match."
                )
    else:
        if t.recompute_method is None or t.recompute_num_layers is None:
            yield (
                "train.recompute_granularity=full needs train.recompute_method (uniform or block) and "
                "train.recompute_num_layers (1 recomputes layer by layer)."
            )
        most = _most_layers_in_a_chunk(cfg)
        if t.recompute_num_layers is not None and most is not None and t.recompute_num_layers > most:
            yield (
                f"train.recompute_num_layers({t.recompute_num_layers}) exceeds the {most} layers of the largest "
                f"pipeline stage."
            )
    if kind != "selective" and t.recompute_modules:
        yield (
            f"train.recompute_modules={list(t.recompute_modules)} belongs to train.recompute_granularity=selective, "
            f"which is {_yaml(kind)}."
        )
    if kind == "selective":
        if not t.recompute_modules:
            yield f"train.recompute_granularity=selective needs recompute_modules: {', '.join(RECOMPUTE_MODULES)}."
        unknown = [name for name in t.recompute_modules if name not in RECOMPUTE_MODULES]
        if unknown:
            yield f"train.recompute_modules: {unknown} are not among {', '.join(RECOMPUTE_MODULES)}."
        if cfg.model.is_dense_student:
            foreign = [name for name in t.recompute_modules if name in RECOMPUTE_MODULES_DEEPSEEK]
            if foreign:
                yield (
                    f"train.recompute_modules: {foreign} belong to experts and latent attention, which "
                    f"model.architecture={cfg.model.architecture} has not. On every device there are: core_attn, mlp."
                )
        needs_cuda = [name for name in t.recompute_modules if name in RECOMPUTE_MODULES_CUDA]
        if needs_cuda and not (cfg.parallel.device == "cuda" and t.bf16):
            yield (
                f"train.recompute_modules: {needs_cuda} need Transformer Engine's layers, so parallel.device=cuda, "
                f"which is {cfg.parallel.device}, and train.bf16=true, which is {_yaml(t.bf16)}. Elsewhere use "
                "core_attn, mla_up_proj, mlp, moe, moe_act, shared_experts."
            )


def _experts(cfg: RunConfig) -> Iterator[str]:
    """The expert implementations do not all run everywhere."""
    t = cfg.train
    if t.moe_experts == "transformer_engine" and (cfg.parallel.device == "cpu" or not t.bf16):
        yield (
            "train.moe_experts=transformer_engine needs CUDA and train.bf16=true; here parallel.device="
            f"{cfg.parallel.device} and train.bf16={_yaml(t.bf16)}. Use grouped or auto."
        )
    if "moe_act" in t.recompute_modules and t.moe_experts == "sequential":
        yield (
            "train.recompute_modules: moe_act does not go with train.moe_experts=sequential. Recompute moe instead, "
            "or use grouped experts, which never keep the activation."
        )


def _most_layers_in_a_chunk(cfg: RunConfig) -> int | None:
    layers, mtp = cfg.model.num_layers, cfg.model.mtp_num_layers
    if topology_problems(cfg.parallel) or placement_problems(cfg.parallel, layers, mtp):
        return None
    return max(len(chunk.layers) for rank in place_layers(cfg.parallel, layers, mtp) for chunk in rank)


# ---------------------------------------------------------------------------------------------------------------------
# Data, files, and what this machine has.


def _data(cfg: RunConfig) -> Iterator[str]:
    yield from data_problems(cfg)
    if cfg.stage == "evaluate" and cfg.evaluate.num_prompts == 0 and not cfg.evaluate.benchmarks:
        yield "stage=evaluate with evaluate.num_prompts=0 has nothing to do. Set it to at least 1, or name benchmarks."
    if cfg.seed >= 1 << 62:
        yield f"seed={cfg.seed} has to be less than 2**62."
    if cfg.stage == "evaluate" and cfg.checkpoint.load is None:
        yield "stage=evaluate needs checkpoint.load: the checkpoint to be evaluated."
    if not cfg.output_dir.strip():
        yield "output_dir is empty: name the folder of the run."


def _checkpoint(cfg: RunConfig) -> Iterator[str]:
    c = cfg.checkpoint
    if c.keep_best and not cfg.evaluate.interval:
        yield (
            f"checkpoint.keep_best={c.keep_best} compares evaluations, and evaluate.interval=0 makes none on the "
            "way. Set evaluate.interval (checkpoints at its multiples have a score), or checkpoint.keep_best=0."
        )
    if c.keep_best and not c.best_metric.startswith("eval/"):
        yield (
            f"checkpoint.best_metric={c.best_metric} is no result of an evaluation. Name one of metrics.jsonl's, "
            "for instance eval/sampled_accuracy or eval/greedy_accuracy."
        )


def _profile(cfg: RunConfig) -> Iterator[str]:
    steps = list(cfg.profile.steps)
    if steps and not cfg.trains:
        yield f"profile.steps={steps}: stage={cfg.stage} has no steps to be profiled. Set profile.steps=[]."
    outside = [step for step in steps if not 1 <= step <= cfg.train.steps]
    if outside and cfg.trains and cfg.num_steps is not None:
        yield f"profile.steps: {outside} are not among the steps of the run, 1 to train.steps({cfg.train.steps})."
    port = cfg.telemetry.prometheus_port
    if port is not None and not 0 <= port <= 65535:
        yield f"telemetry.prometheus_port={port} is no port. Set one of 1024 to 65535, 0 for any free one, or null."
    if port is not None and not cfg.telemetry.prometheus_host:
        yield "telemetry.prometheus_host is empty. Set 127.0.0.1 for this machine alone, or 0.0.0.0 for all networks."


def _machine(cfg: RunConfig) -> Iterator[str]:
    wanted = {
        "tokenizer.path": None if cfg.tokenizer.kind in TASK_TOKENIZERS else cfg.tokenizer.path,
        # A run that goes on has checkpoints of its own.
        "checkpoint.load": None if _goes_on(cfg) else cfg.checkpoint.load,
        "distill.student": cfg.distill.student,
    }
    yield from data_file_problems(cfg)
    for name, path in wanted.items():
        if path is not None and not Path(path).exists():
            yield f"{name}: {path} does not exist (seen from {Path.cwd()})."
    load = wanted["checkpoint.load"]
    if load is not None and Path(load).is_file():
        yield f"checkpoint.load: {cfg.checkpoint.load} is a file; a checkpoint is a folder."
    if Path(cfg.output_dir).is_file():
        yield f"output_dir: {cfg.output_dir} is a file; a folder is needed."
    yield from evaluation_file_problems(cfg)
    if cfg.telemetry.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        yield (
            f"telemetry.wandb_project={cfg.telemetry.wandb_project}, but wandb is not installed. Run "
            f"pip install 'r1_megatron[track]', or set it to null."
        )
    yield from missing_files(cfg)


def _goes_on(cfg: RunConfig) -> bool:
    resumes = cfg.checkpoint.resume and cfg.trains
    return resumes and any(Path(cfg.output_dir, "checkpoints").glob("*/checkpoint.json"))


def _yaml(value: str | bool | int | None) -> str:
    """Booleans and null as YAML spells them."""
    return value if isinstance(value, str) else json.dumps(value)
