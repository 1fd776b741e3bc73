"""What stages leave behind for others, which field of a configuration takes what, and the references between them.

A reference is the whole value of a field: ``load: ${cold_start.checkpoint}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from r1_megatron.config.schema import RunConfig


@dataclass(frozen=True)
class Artefact:
    """``path`` in the run folder; ``kind``: what may be done with it; ``optional``: some configurations make none."""

    kind: str
    path: str
    optional: bool = False


CHECKPOINT, REWARD_MODEL, ROWS, PAIRS = "a checkpoint", "a reward model", "rows", "preference pairs"
HF_FOLDER, EVALUATION = "a Hugging Face folder", "an evaluation"
_POLICY = {"checkpoint": Artefact(CHECKPOINT, "checkpoints/final")}
# By stage, then by the name that references use.
MAKES: dict[str, dict[str, Artefact]] = {
    "sft": _POLICY,
    "grpo": _POLICY,
    "ppo": _POLICY,
    "reward_model": {"reward_model": Artefact(REWARD_MODEL, "checkpoints/final")},
    "reject": {"data": Artefact(ROWS, "data.jsonl"), "pairs": Artefact(PAIRS, "preferences.jsonl", optional=True)},
    "distill": {**_POLICY, "hf": Artefact(HF_FOLDER, "hf")},
    "evaluate": {"evaluation": Artefact(EVALUATION, "evaluation.json")},
}
# Fields by pattern, with the kinds that they take.
_TAKES = (
    (r"checkpoint\.load|judge\.load", (CHECKPOINT,)),
    (r"critic\.load", (REWARD_MODEL, CHECKPOINT)),
    (r"reward\.terms\.\d+\.options\.\w+", (REWARD_MODEL,)),
    (r"distill\.student|tokenizer\.path", (HF_FOLDER,)),
    (r"reject\.mix\.\d+\.path", (ROWS,)),
)
_DATA = r"data\.(path|sources\.\d+\.path)"
# Of reinforcement and rejection sampling it is prompts with labels, which none of the artefacts are.
_DATA_OF = {"sft": (_DATA, ROWS), "distill": (_DATA, ROWS), "reward_model": (r"data\.(eval_)?path", PAIRS)}

_REFERENCE = re.compile(r"\$\{(\w+)\.(\w+)\}")


@dataclass(frozen=True)
class Reference:
    """``field`` of a configuration wants ``artefact`` of ``node``."""

    field: str
    node: str
    artefact: str

    def __str__(self) -> str:
        return f"${{{self.node}.{self.artefact}}}"


def kinds_taken(stage: str, name: str) -> tuple[str, ...]:
    """The kinds of artefacts that a field takes in a stage; empty: no reference may stand there."""
    for pattern, kinds in _TAKES:
        if re.fullmatch(pattern, name):
            return kinds
    pattern, kind = _DATA_OF.get(stage, ("", ""))
    return (kind,) if pattern and re.fullmatch(pattern, name) else ()


def texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """``(dotted field, text)`` of every text in a configuration, entries of lists by their number."""
    if isinstance(value, str):
        yield name, value
        return
    dotted = f"{name}." if name else ""
    if is_dataclass(value):
        for field in fields(value):
            yield from texts(getattr(value, field.name), dotted + field.name)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from texts(entry, f"{dotted}{key}")
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from texts(entry, f"{dotted}{index}")


def read_reference(name: str, text: str) -> Reference | str | None:
    """The reference that a field's text is; what is wrong with it, in words; ``None``: it is none."""
    match = _REFERENCE.fullmatch(text)
    if match is not None:
        return Reference(name, match[1], match[2])
    if "${" in text:
        return f"{name}={text}: a reference is ${{node.artefact}} and the whole value, nothing before or behind it."
    return None


def with_texts(cfg: RunConfig, change: Callable[[str, str], str]) -> RunConfig:
    """``cfg`` with ``change(field, text)`` in place of every text."""
    return _changed(cfg, "", change)


def _changed(value: Any, name: str, change: Callable[[str, str], str]) -> Any:
    if isinstance(value, str):
        return change(name, value)
    dotted = f"{name}." if name else ""
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _changed(getattr(value, f.name), dotted + f.name, change) for f in fields(value)}
        return replace(value, **parts)
    if isinstance(value, dict):
        return {key: _changed(entry, f"{dotted}{key}", change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_changed(entry, f"{dotted}{index}", change) for index, entry in enumerate(value))
    return value
