"""What contradicts itself in how long a stage learns from rows, and in the section ``distill``."""

from __future__ import annotations

from collections.abc import Iterator

from r1_megatron.config.schema import RunConfig, TrainConfig


def supervised_problems(cfg: RunConfig) -> Iterator[str]:
    """One sentence per problem of a stage that learns from rows."""
    name, steps = f"{cfg.rows_section}.epochs", cfg.train.steps
    if cfg.epochs is not None and steps != TrainConfig.steps:
        yield (
            f"{name}({cfg.epochs}) and train.steps({steps}) both say how long the run is. Leave train.steps out "
            f"(its default: {TrainConfig.steps}), or set {name}=null."
        )
    if cfg.is_supervised and cfg.sft.max_tokens is not None and cfg.sft.max_tokens < 2:
        yield f"sft.max_tokens={cfg.sft.max_tokens} has to be at least 2, or null: the model's positions."
    if cfg.stage != "distill":
        return
    student, load = cfg.distill.student, cfg.checkpoint.load
    if student is not None and load is not None:
        yield (
            f"distill.student({student}) and checkpoint.load({load}) both say where the student starts. Set one of "
            "them to null."
        )
    if cfg.data.source not in ("jsonl", "mixture"):
        yield (
            f"stage=distill learns from a teacher's samples, and data.source={cfg.data.source} writes traces of its "
            'own. Set data.source=jsonl and data.path to rows of "prompt" and "response", or stage=sft.'
        )
