"""Format reward: one block of thinking, then one answer (DeepSeek-R1, arXiv 2501.12948v2, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(
    prompts: Sequence[str], completions: Sequence[str], labels: Sequence[Any], metadata: Sequence[dict[str, Any]]
) -> list[float]:
    """1 for ``<think>...</think><answer>...</answer>`` with nothing but white space around the blocks, else 0.

    Some chat templates end the prompt with ``<think>``; then the completion must not open the tag again.
    """
    return [
        float(is_well_formed("<think>" + completion if prompt.rstrip().endswith("<think>") else completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def is_well_formed(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    before, rest = text.split("<think>")
    # Each partition finds its tag only if it comes after the one before.
    _, closed, rest = rest.partition("</think>")
    between, opened, rest = rest.partition("<answer>")
    _, ended, after = rest.partition("</answer>")
    return bool(closed and opened and ended) and not (before + between + after).strip()
