"""What contradicts itself in the sections ``reject`` and ``judge``, and in what they take from other sections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from r1_megatron.config.schema import MixConfig, RunConfig

VERDICT_FIELDS = ("question", "reference", "response")
COMPARISON_FIELDS = ("question", "response_a", "response_b")


def reject_problems(cfg: RunConfig) -> Iterator[str]:
    """One sentence per problem: the values and the remedy. Of other stages only numbers are looked at."""
    yield from _numbers(cfg)
    if cfg.stage != "reject":
        return
    if cfg.checkpoint.load is None:
        yield "stage=reject needs checkpoint.load: the checkpoint that is sampled."
    yield from _right(cfg)
    for index, term in enumerate(cfg.reward.terms):
        if term.from_step > 1 or term.until_step is not None or term.last_steps is not None:
            yield (
                f"reward.terms.{index}: from_step={term.from_step}, until_step={term.until_step}, last_steps="
                f"{term.last_steps}: stage=reject has no steps of learning, all terms count. Leave them out, or it."
            )
    yield from _selection(cfg)
    yield from _pairs(cfg)
    yield from _judge(cfg)


def missing_files(cfg: RunConfig) -> Iterator[str]:
    """Files that are named and not there, and judge prompts without their fields."""
    if cfg.stage != "reject":
        return
    for index, mix in enumerate(cfg.reject.mix):
        if mix.path and not Path(mix.path).is_file():
            yield f"reject.mix.{index}.path: {mix.path} is no file (seen from {Path.cwd()})."
    for name, path, wanted in (
        ("judge.prompt_path", cfg.judge.prompt_path, VERDICT_FIELDS),
        ("reject.pairs.prompt_path", cfg.reject.pairs.prompt_path, COMPARISON_FIELDS),
    ):
        if path is None:
            continue
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            yield f"{name}: {path} cannot be read as UTF-8 text ({error}). Give a text file."
            continue
        missing = [f"{{{field}}}" for field in wanted if f"{{{field}}}" not in text]
        if missing:
            yield f"{name}: {path} has no {' and no '.join(missing)}: the judge would not see it. Add it to the text."
    if cfg.asks_judge and cfg.judge.load is not None and not Path(cfg.judge.load).is_dir():
        yield f"judge.load: {cfg.judge.load} is no folder (seen from {Path.cwd()}); a checkpoint is one."


def _right(cfg: RunConfig) -> Iterator[str]:
    """Every prompt needs somebody who says what is right."""
    judged = cfg.judge.prompt_path is not None
    by_rule = any(term.at_least is not None for term in cfg.reward.terms)
    if not by_rule and not (judged and not cfg.judge.sources):
        whom = "prompts of other sources than judge.sources" if judged else "a prompt"
        yield (
            f"reward.terms: none has at_least, so nothing says which responses to {whom} are right. Set it (accuracy: "
            "1), or judge.prompt_path with judge.sources=[]."
        )


def _numbers(cfg: RunConfig) -> Iterator[str]:
    r, f, j, s = cfg.reject, cfg.reject.filters, cfg.judge, cfg.judge.sampling
    for name, value in (
        ("reject.num_prompts", r.num_prompts),
        ("reject.max_per_prompt", r.max_per_prompt),
        ("reject.duplicate_ngram", r.duplicate_ngram),
        ("reject.filters.max_tokens", f.max_tokens),
        ("reject.filters.max_paragraph_characters", f.max_paragraph_characters),
        ("reject.filters.repetition_ngram", f.repetition_ngram),
        ("reject.pairs.per_prompt", r.pairs.per_prompt),
        ("reject.pairs.max_length_ratio", r.pairs.max_length_ratio),
        ("judge.votes", j.votes),
        ("judge.max_prompt_tokens", j.max_prompt_tokens),
        ("judge.sampling.max_new_tokens", s.max_new_tokens),
    ):
        if value is not None and value < 1:
            yield f"{name}={value} has to be at least 1."
    for name, value in (
        ("reject.filters.max_repetition", f.max_repetition),
        ("reject.filters.min_language_consistency", f.min_language_consistency),
        ("reject.duplicate_similarity", r.duplicate_similarity),
        ("judge.min_share", j.min_share),
        ("judge.sampling.top_p", s.top_p),
    ):
        if value is not None and not 0 < value <= 1:
            yield f"{name}={value} has to be above 0 and at most 1."
    for name, value in (
        ("reject.pairs.min_difference", r.pairs.min_difference),
        ("judge.sampling.temperature", s.temperature),
        ("judge.sampling.top_k", s.top_k),
    ):
        if value < 0:
            yield f"{name}={value} has to be at least 0."
    if not 0 <= s.min_p <= 1:
        yield f"judge.sampling.min_p={s.min_p} has to be in [0, 1]; 0 switches it off."


def _selection(cfg: RunConfig) -> Iterator[str]:
    r = cfg.reject
    for index, mix in enumerate(r.mix):
        yield from _mix(f"reject.mix.{index}", mix)
    paths = [mix.path for mix in r.mix]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        yield f"reject.mix names {twice} twice: rows would come twice. Add up their counts."
    if r.prefer != "random" and r.max_per_prompt is None:
        yield (
            f"reject.prefer={r.prefer} says which responses of a prompt are kept, and reject.max_per_prompt=null keeps "
            "them all. Set the latter, or reject.prefer=random."
        )


def _mix(name: str, mix: MixConfig) -> Iterator[str]:
    if not mix.path:
        yield f"{name}.path is empty: name a JSONL file of supervised rows (prompt, response)."
    if (mix.count is None) == (mix.weight is None):
        yield f"{name}: count={mix.count} and weight={mix.weight}; exactly one of them says how many rows are taken."
    if mix.count is not None and mix.count < 1:
        yield f"{name}.count={mix.count} has to be at least 1."
    if mix.weight is not None and mix.weight <= 0:
        yield f"{name}.weight={mix.weight} has to be greater than 0."


def _pairs(cfg: RunConfig) -> Iterator[str]:
    pairs = cfg.reject.pairs
    if pairs.by is not None and cfg.rollout.samples_per_prompt < 2:
        yield (
            f"reject.pairs.by={pairs.by} compares responses to the same prompt, and rollout.samples_per_prompt="
            f"{cfg.rollout.samples_per_prompt}. Set 2 or more, or reject.pairs.by=null."
        )
    if (pairs.by == "judge") != (pairs.prompt_path is not None):
        yield (
            f"reject.pairs.by={pairs.by or 'null'} and reject.pairs.prompt_path={pairs.prompt_path or 'null'}: the "
            "prompt is for by=judge, which needs one. Set both or neither."
        )


def _judge(cfg: RunConfig) -> Iterator[str]:
    j, s = cfg.judge, cfg.judge.sampling
    if not cfg.asks_judge:
        if j.load is not None:
            yield f"judge.load={j.load}, but nobody asks the judge. Set judge.prompt_path, or judge.load=null."
        return
    if j.votes > 1 and s.temperature == 0:
        yield (
            f"judge.votes={j.votes} with judge.sampling.temperature=0 is the same vote {j.votes} times. Set the "
            "temperature above 0, or judge.votes=1."
        )
    if not j.right or not j.wrong or j.right in j.wrong or j.wrong in j.right:
        yield (
            f"judge.right={j.right!r} and judge.wrong={j.wrong!r}: neither may be empty or part of the other, or a "
            "verdict could be read both ways."
        )
    longest, most = j.max_prompt_tokens + s.max_new_tokens, cfg.model.max_position_embeddings
    if longest > most:
        yield (
            f"judge.max_prompt_tokens({j.max_prompt_tokens}) + judge.sampling.max_new_tokens({s.max_new_tokens}) = "
            f"{longest} tokens, but model.max_position_embeddings={most}."
        )
    cache = cfg.rollout.cache_tokens
    if cache is not None and cache < longest:
        yield (
            f"rollout.cache_tokens({cache}) is less than one sequence of the judge, judge.max_prompt_tokens("
            f"{j.max_prompt_tokens}) + judge.sampling.max_new_tokens({s.max_new_tokens}) = {longest}. Raise it."
        )
