"""Whether a configuration may go on with a run that another one began."""

from __future__ import annotations

import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from r1_megatron.config.load import load_config
from r1_megatron.config.schema import RunConfig

# What decides how fast, where and how long a run goes and what is kept of it, but not what it computes. (A layout
# changes the order of sums: the curve stays the same within rounding.)
_FREE_SECTIONS = ("parallel", "checkpoint", "telemetry", "profile", "resilience", "preflight")
_FREE = (
    "name",
    "output_dir",
    "evaluate.interval",
    "reward.timeout_s",
    "reward.on_error",
    "rl.probs_diff_limit",
    "rl.on_probs_diff",
    "rollout.max_sequences",
    "rollout.cache_tokens",
    "rollout.max_prefill_tokens",
    "rollout.pipeline_groups",
    "rollout.speculative_tokens",
    "rollout.cuda_graphs",
    "train.steps",
    "train.use_distributed_optimizer",
    "train.overlap_grad_reduce",
    "train.overlap_param_gather",
    "train.moe_experts",
    "train.moe_token_dispatcher_type",
    "train.moe_deepep_num_sms",
    "train.moe_permute_fusion",
    "train.moe_shared_expert_overlap",
    "train.gradient_accumulation_fusion",
    "train.batch_p2p_comm",
    "train.overlap_p2p_comm_warmup_flush",
    "train.micro_batch_tokens",
    "train.share_prompts",
    "train.recompute_granularity",
    "train.recompute_method",
    "train.recompute_num_layers",
    "train.recompute_modules",
    "train.offload",
    "train.on_nonfinite",
)


# Training does not look at these; an evaluation is nothing but them, and the checkpoint.
_FREE_IN_TRAINING = ("evaluate.benchmarks", "evaluate.block_prompts", "checkpoint.load")


def changed_course(begun: str, cfg: RunConfig) -> list[str]:
    """The fields in which ``cfg`` differs from the configuration that a run began with (its ``config.yaml``'s text) and
    that change what the run computes; ``field=value, the run has value`` each. Empty: the run may go on.

    Raises:
        ConfigError: the text is no configuration of this version.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(begun)
        file.flush()
        before = load_config(Path(file.name))
    return [
        f"{name}={_show(new)}, the run has {_show(old)}"
        for name, old, new in _differences(before, cfg)
        if not _is_free(name, cfg.stage) or (name == "train.steps" and _counts_back(before, cfg))
    ]


def course_of(cfg: RunConfig) -> dict[str, Any]:
    """What ``cfg`` says, beyond the defaults, of what a whole run computes: values by dotted field."""
    return {
        name: value
        for name, _, value in _differences(RunConfig(), cfg)
        if name == "train.steps" or not _is_free(name, cfg.stage)
    }


def _counts_back(*configs: RunConfig) -> bool:
    """Whether a reward term counts in the last steps: with another number of steps those are others."""
    return any(term.last_steps is not None for cfg in configs if cfg.is_rl for term in cfg.reward.terms)


def _is_free(name: str, stage: str) -> bool:
    if name in _FREE_IN_TRAINING:
        return stage != "evaluate" or name == "evaluate.block_prompts"
    return name in _FREE or name.split(".")[0] in _FREE_SECTIONS


def _differences(before: Any, after: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for field in fields(after):
        old, new, name = getattr(before, field.name), getattr(after, field.name), prefix + field.name
        if is_dataclass(new):
            found += _differences(old, new, f"{name}.")
        elif old != new:
            found.append((name, old, new))
    return found


def _show(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000) if not isinstance(value, tuple) else str(value)
    return text.removesuffix("...\n").strip()
