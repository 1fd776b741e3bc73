"""What reward terms say about steps, sources and the part of a response they see."""

from __future__ import annotations

from collections.abc import Iterator

from r1_megatron.config.schema import RewardTermConfig, RunConfig
from r1_megatron.config.validate_data import task_sources

# Ours that read the tags of a whole response.
_OF_WHOLE_RESPONSES = ("accuracy", "code", "countdown", "format", "token_count")


def reward_mixture_problems(cfg: RunConfig) -> Iterator[str]:
    """Terms that never count, steps without a term, and terms that see too little of a response."""
    last = cfg.train.steps if cfg.stage in ("grpo", "ppo") else None  # others grade, but do not learn from it
    for index, term in enumerate(cfg.reward.terms):
        name = f"reward.terms.{index}"
        if term.from_step < 0:
            yield f"{name}.from_step={term.from_step} has to be at least 0."
        if term.until_step is not None and term.until_step < max(term.from_step, 1):
            yield (
                f"{name}.until_step={term.until_step} comes before its first step, {max(term.from_step, 1)}: the term "
                f"would never count. Set until_step={max(term.from_step, 1)} or more, or null."
            )
        yield from _last_steps(cfg, term, name)
        if last is not None and term.from_step > last:
            yield (
                f"{name}.from_step={term.from_step} is behind the last step, train.steps={last}: the term would never "
                f"count. Set it to {last} or less."
            )
        if "" in term.sources or len(set(term.sources)) < len(term.sources):
            yield f"{name}.sources={list(term.sources)}: different names are needed, none of them empty."
        # Rows of files may name any source.
        tasks, has_files = task_sources(cfg.data), "jsonl" in (cfg.data.source, *(s.kind for s in cfg.data.sources))
        if term.sources and not has_files and not set(term.sources) & set(tasks):
            yield (
                f"{name}.sources={list(term.sources)}, but all prompts are of data.source={', '.join(tasks)}: the term "
                f"would never count. Set sources=[{', '.join(tasks)}], or []."
            )
        if term.on != "response" and term.function in _OF_WHOLE_RESPONSES:
            yield (f"{name}.on={term.on}: {term.function} judges a response as a whole. Set on=response.")
    yield from _gaps(cfg, last)


def _last_steps(cfg: RunConfig, term: RewardTermConfig, name: str) -> Iterator[str]:
    steps, given = cfg.train.steps, term.last_steps
    if given is None or cfg.stage in ("reject", "reward_model"):  # validate_reject.py; the other one grades nothing
        return
    if term.from_step > 0 or term.until_step is not None:
        yield (
            f"{name}: last_steps={given} and from_step={term.from_step}, until_step={term.until_step} both say when "
            "the term counts. Leave out last_steps, or the other two."
        )
    elif cfg.num_steps is None:
        yield (
            f"{name}.last_steps={given} is counted back from train.steps, and {cfg.rows_section}.epochs({cfg.epochs}) "
            "says how long the run is. Set from_step, or leave both out."
        )
    elif not 1 <= given <= steps:
        yield f"{name}.last_steps={given} has to be between 1 and train.steps={steps}, or null."


def _gaps(cfg: RunConfig, last: int | None) -> Iterator[str]:
    """The first stretch of steps for which no term counts, whatever the source."""
    if last is None or not cfg.reward.terms:
        return
    terms = cfg.graded_by.terms
    spans = sorted((max(t.from_step, 1), last if t.until_step is None else t.until_step) for t in terms)
    covered = 0
    for begin, end in [*spans, (last + 1, last + 1)]:
        if begin > covered + 1:
            yield (
                f"reward.terms: none counts in steps {covered + 1} to {min(begin - 1, last)} (from_step, until_step, "
                "last_steps): nothing would be learned there. Let one of them count."
            )
            return
        covered = max(covered, end)
