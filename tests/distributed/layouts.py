"""The parallel layouts that every multi-process test chooses from."""

from __future__ import annotations

from dataclasses import replace

from r1_megatron.config.schema import ParallelConfig


def layout(
    tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1, dp: int = 1, etp: int = 1, cp: int = 1
) -> ParallelConfig:
    """A layout on the CPU. Experts are spread over the ranks of a stage: tp * cp * dp is a multiple of ep."""
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        device="cpu",
        timeout_s=300.0,
    )


def world_size(parallel: ParallelConfig) -> int:
    p = parallel
    dense = p.tensor_model_parallel_size * p.context_parallel_size * p.data_parallel_size
    return dense * p.pipeline_model_parallel_size


LAYOUTS = {
    "one": layout(),
    "dp2": layout(dp=2),
    "tp2": layout(tp=2),
    "pp2": layout(pp=2),
    "pp2vpp2": layout(pp=2, vpp=2),
    "ep2": layout(ep=2, dp=2),
    "tp2ep2": layout(tp=2, ep=2),
    "tp2etp2": layout(tp=2, etp=2),
    "tp2pp2ep2": layout(tp=2, pp=2, ep=2),
    "eight": layout(tp=2, pp=2, vpp=2, ep=2, dp=2),
}
LAYOUTS["cp2"] = layout(cp=2)
LAYOUTS["tp2cp2"] = layout(tp=2, cp=2)
LAYOUTS["cp2dp2ep4"] = layout(cp=2, dp=2, ep=4)
LAYOUTS["pp2cp2ep2"] = layout(pp=2, cp=2, ep=2)
LAYOUTS["pp4"] = layout(pp=4)
LAYOUTS["tp2ep2etp2"] = layout(tp=2, ep=2, etp=2, dp=2)
LAYOUTS["tp2dp2ep4"] = layout(tp=2, dp=2, ep=4)
# One layer on the first rank, three on the last; stages as Megatron's layout string says, MTP and loss by themselves.
LAYOUTS["pp2_uneven"] = replace(layout(pp=2), num_layers_in_first_pipeline_stage=1)
LAYOUTS["pp2_string"] = replace(layout(pp=2), pipeline_model_parallel_layout="Et|t|tt|mL")

# Which checks of train_checks.py run on which layout: the gradients everywhere, the rest where it could break.
PLAN = {
    "one": (
        "family_gradients",
        "family_mtp",
        "family_replay",
        "family_logprobs",
        "family_bias",
        "family_students",
        "family_objectives",
        "offload",
        "gradients",
        "host_reads",
        "rope",
        "full_rank_query",
        "sequential_experts",
        "tied_embeddings",
        "mtp",
        "mtp_recomputed",
        "mtp_left_alone",
        "aux_loss",
        "recompute",
        "packing",
        "logprobs",
        "plain_logits",
        "router_replay",
        "grpo",
        "trajectory",
        "trajectory_plain",
        "learning_rates",
        "balancing_bias",
        "nonfinite",
        "nonfinite_stop",
        "bf16",
        "papers",
    ),
    "dp2": (
        "family_logprobs",
        "offload",
        "gradients",
        "balance",
        "host_reads",
        "one_rank_has_no_sample",
        "aux_loss",
        "packing",
        "trajectory",
        "trajectory_overlapped",
        "balancing_bias",
        "nonfinite",
        "nonfinite_stop",
        "papers",
    ),
    "tp2": (
        "family_gradients",
        "family_mtp",
        "family_students",
        "gradients",
        "host_reads",
        "tied_embeddings",
        "mtp_recomputed",
        "recompute",
        "packing",
        "logprobs",
        "plain_logits",
        "trajectory",
        "balancing_bias",
        "papers",
    ),
    "pp2": (
        "family_gradients",
        "family_replay",
        "gradients",
        "host_reads",
        "tied_embeddings",
        "mtp",
        "mtp_left_alone",
        "packing",
        "logprobs",
        "router_replay",
        "grpo",
        "trajectory",
        "trajectory_overlapped",
        "nonfinite",
        "papers",
    ),
    # Every sequence lies on several ranks.
    "cp2": (
        "family_gradients",
        "family_mtp",
        "family_replay",
        "family_students",
        "gradients",
        "mtp_recomputed",
        "recompute",
        "grpo",
        "trajectory_overlapped",
    ),
    "tp2cp2": ("gradients", "mtp", "aux_loss", "router_replay"),
    "cp2dp2ep4": ("gradients", "one_rank_has_no_sample", "family_logprobs", "balancing_counts"),
    "pp2cp2ep2": ("gradients", "family_replay", "logprobs"),
    "pp2vpp2": (
        "gradients",
        "mtp",
        "aux_loss",
        "recompute",
        "logprobs",
        "router_replay",
        "trajectory",
        "nonfinite_stop",
    ),
    "ep2": (
        "family_gradients",
        "family_replay",
        "family_logprobs",
        "family_bias",
        "gradients",
        "balance",
        "host_reads",
        "one_rank_has_no_sample",
        "aux_loss",
        "recompute",
        "router_replay",
        "trajectory",
        "trajectory_overlapped",
        "balancing_bias",
        "nonfinite",
    ),
    "tp2ep2": ("gradients", "router_replay", "balancing_bias", "balancing_counts"),
    "tp2etp2": ("gradients",),
    "tp2ep2etp2": ("gradients", "sequential_experts", "one_rank_has_no_sample", "recompute", "trajectory"),
    "pp4": ("gradients", "router_replay"),
    "pp2_uneven": ("gradients", "mtp", "router_replay"),
    "pp2_string": ("mtp", "mtp_left_alone", "mtp_recomputed"),
    "tp2dp2ep4": ("gradients", "balance", "one_rank_has_no_sample", "trajectory"),
    "tp2pp2ep2": (
        "family_gradients",
        "family_replay",
        "family_logprobs",
        "gradients",
        "aux_loss",
        "recompute",
        "logprobs",
        "router_replay",
        "grpo",
        "trajectory",
        "nonfinite",
    ),
    "eight": (
        "family_mtp",
        "family_bias",
        "gradients",
        "balance",
        "tied_embeddings",
        "mtp",
        "logprobs",
        "router_replay",
        "trajectory_overlapped",
        "bf16",
    ),
}


def with_check(check: str) -> list[str]:
    """The layouts whose plan has this check."""
    return [name for name, checks in PLAN.items() if check in checks]
