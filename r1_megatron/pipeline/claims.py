"""What a pipeline's file says its report should show: ``claims``, each put to the test on the problems of both sides.

::

    claims:
      - say: The cold start is more readable than R1-Zero.
        better: Cold start             # rows of compare
        than: R1-Zero
        figures: [term:format]         # those of an evaluation; default: pass@1
        benchmarks: [bilingual]        # default: all that have them
        otherwise: What may be the reason if it does not hold.

``findings.py`` says what has come out of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_KEYS = ("say", "better", "than", "figures", "benchmarks", "otherwise")


@dataclass(frozen=True)
class Claim:
    """``better`` and ``than`` are rows of ``compare``; empty ``benchmarks``: all that have the figures; ``otherwise``:
    what is said where it does not hold everywhere."""

    say: str
    better: str
    than: str
    figures: tuple[str, ...] = ("pass@1",)
    benchmarks: tuple[str, ...] = ()
    otherwise: str = ""


def read_claims(tree: Any, compared: Sequence[str], problems: list[str]) -> tuple[Claim, ...]:
    """The section as it stands in the YAML; what is wrong with it goes to ``problems``."""
    if tree is None:
        return ()
    if not isinstance(tree, list):
        problems.append(f"claims: expected a list, of {', '.join(_KEYS)} each.")
        return ()
    found = []
    for number, entry in enumerate(tree):
        wrong = list(_wrong(entry, compared))
        problems += [f"claims.{number}{problem}" for problem in wrong]
        if not wrong:
            reason = {"otherwise": entry["otherwise"]} if "otherwise" in entry else {}
            several = {key: tuple(map(str, entry[key])) for key in ("figures", "benchmarks") if entry.get(key)}
            found.append(Claim(entry["say"], entry["better"], entry["than"], **several, **reason))
    return tuple(found)


def _wrong(entry: Any, compared: Sequence[str]) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f": expected {', '.join(_KEYS)}."
        return
    for key in entry:
        if key not in _KEYS:
            yield f".{key}: unknown key. Known: {', '.join(_KEYS)}."
    for key in ("say", "better", "than", *(["otherwise"] if "otherwise" in entry else [])):
        if not isinstance(entry.get(key), str) or not entry[key]:
            yield f".{key}: expected a text."
    for key in ("better", "than"):
        label = entry.get(key)
        if isinstance(label, str) and label and label not in compared:
            near = difflib.get_close_matches(label, compared, n=1)
            meant = f"Did you mean {near[0]}?" if near else f"Rows: {', '.join(compared) or 'none'}."
            yield f".{key}={label}: no row of compare is called so. {meant}"
    if entry.get("than") and entry.get("than") == entry.get("better"):
        yield f".than={entry['than']} is what is claimed to be better. Name another row."
    for key in ("figures", "benchmarks"):
        if not isinstance(entry.get(key, []), list):
            yield f".{key}={entry[key]}: expected a list."
