"""Reward plug-ins of the tests, well-behaved and not. Imported by reward workers: nothing heavy here."""

from __future__ import annotations

import math
import time


def length(prompts, completions, labels, metadata):
    return [len(text) / 10 for text in completions]


def raises(prompts, completions, labels, metadata):
    raise KeyError("no such label")


def answers_nan(prompts, completions, labels, metadata, only: int = 3):
    """NaN for the sample number ``only`` of the batch, and for each sample asked by itself."""
    return [math.nan if i == only or len(completions) == 1 else 1.0 for i in range(len(completions))]


def answers_too_few(prompts, completions, labels, metadata):
    return [1.0] * (len(completions) - 1)


def hangs(prompts, completions, labels, metadata):
    time.sleep(600)


def dislikes_odd_lengths(prompts, completions, labels, metadata):
    """Raises for some texts only: asked one by one, the others get their number."""
    if any(len(text) % 2 for text in completions):
        raise ValueError("an odd length")
    return [1.0] * len(completions)
