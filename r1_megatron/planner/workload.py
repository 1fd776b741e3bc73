"""What a step of a run amounts to on one data-parallel rank: sequences, their lengths, packs.

Lengths are not in a configuration. A plan asks for the mean length of a response (``--mean-response``) and otherwise
takes a quarter of the limit; memory is planned for the limit itself, whatever the mean is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from r1_megatron.config.schema import DYNAMIC_TOKENS, RunConfig
from r1_megatron.topology import Topology

# Of the limit; long chains of thought average a half to a quarter of it (arXiv 2603.07685, section 10).
USUAL_SHARE = 4
# Prompts of mathematics and code rarely come near the limit either.
USUAL_PROMPT = 256
# Of a benchmark that does not say: MATH-500's; only the time follows from it.
USUAL_PROBLEMS = 500
# Of a pack, where lengths differ.
FILLED = 0.9


@dataclass(frozen=True)
class Workload:
    """One step.

    Attributes:
        sequences: of the step, all ranks together.
        updates: optimizer steps that learn from them, ``inner_epochs`` included.
        mean_prompt, mean_response: tokens.
        longest: tokens of the longest sequence that is possible.
        pack: tokens of the largest microbatch that is possible.
        microbatches: of one update on one data-parallel rank, with sequences of the mean length.
        annotations: forward passes over every sequence before the first update (old policy, reference).
        replicas: that sample: every context-parallel rank has all weights and takes sequences of its own.
    """

    sequences: int
    updates: int
    mean_prompt: int
    mean_response: int
    longest: int
    pack: int
    microbatches: int
    annotations: int
    replicas: int

    @property
    def mean_length(self) -> int:
        return self.mean_prompt + self.mean_response

    @property
    def per_replica(self) -> int:
        """Sequences of the step that one replica samples."""
        return -(-self.sequences // self.replicas)

    @cached_property
    def mean_square(self) -> float:
        """Of the sequences' lengths: what attention grows with."""
        if not self.mean_prompt:  # supervised rows fill their packs
            return float(self.mean_length**2)
        lengths = [self.mean_prompt + length for length in self.response_lengths]
        return sum(length**2 for length in lengths) / len(lengths)

    @property
    def tokens(self) -> int:
        return self.sequences * self.mean_length

    @cached_property
    def response_lengths(self) -> list[int]:
        """Of one replica's sequences: quantiles of an exponential law with this mean, cut at the limit.

        The longest is the limit where all ranks' sequences together would reach it: ranks that exchange tokens between
        experts wait for the longest of all.
        """
        limit = self.longest - self.mean_prompt
        count, scale = self.per_replica, _scale(self.mean_response, limit)
        lengths = [min(limit, round(-scale * math.log(1 - (i + 0.5) / count))) for i in range(count)]
        lengths[-1] = min(limit, round(scale * math.log(2 * self.sequences)))
        return [max(1, length) for length in lengths]


def workload(cfg: RunConfig, mean_response: int | None = None) -> Workload:
    """Of a step of ``cfg``. ``mean_response``: tokens, at most the limit."""
    p, r = cfg.parallel, cfg.rollout
    dp, vpp = p.data_parallel_size, Topology.from_config(p).vpp
    limit = cfg.longest_sample
    if cfg.is_rl:
        longest, sequences = limit, r.prompts_per_step * r.samples_per_prompt
        updates, used_by = cfg.rl.num_minibatches * cfg.rl.inner_epochs, cfg.rl.num_minibatches
        kl = cfg.rl.kl_coef > 0
        annotations = (updates > 1 or (kl and cfg.rl.kl_in == "reward")) + kl
    elif cfg.stage == "reward_model":
        longest, sequences, updates, used_by = _longest_judged(cfg), cfg.rows_per_step, 1, 1
        annotations = 0
    elif cfg.learns_from_rows:
        # Rows of no stated length are as long as the model allows; a pack of one row is what the budget is usually for.
        longest = (cfg.train.micro_batch_tokens or limit) if cfg.sft.max_tokens is None else cfg.longest_row
        sequences, updates, used_by, annotations = cfg.rows_per_step, 1, 1, 0
    elif cfg.stage == "reject":
        longest, sequences = limit, r.prompts_per_step * r.samples_per_prompt
        updates, used_by, annotations = 0, 1, 0
    else:
        longest, sequences = limit, _sequences_of_an_evaluation(cfg)
        updates, used_by, annotations = 0, 1, 0
    budget = cfg.train.micro_batch_tokens
    together = 2 if cfg.stage == "reward_model" and cfg.reward_model.objective == "pairs" else 1
    pack = max(together * longest, DYNAMIC_TOKENS if budget is None else budget)
    mean_prompt = min(USUAL_PROMPT, cfg.data.max_prompt_tokens)
    mean = max(1, (longest - mean_prompt) // USUAL_SHARE) if mean_response is None else mean_response
    mean = min(mean, max(1, longest - mean_prompt))
    if cfg.learns_from_rows:
        mean_prompt, mean = 0, longest if mean_response is None else mean
    per_update = -(-sequences // (used_by * dp))
    length = mean_prompt + mean
    fitting = pack // (together * length) * together
    packs = per_update / fitting if cfg.learns_from_rows else per_update * length / (FILLED * pack)
    multiple = p.pipeline_model_parallel_size if vpp > 1 else 1
    microbatches = max(1, math.ceil(packs / multiple)) * multiple
    return Workload(
        sequences, updates, mean_prompt, mean, longest, pack, microbatches, annotations, dp * p.context_parallel_size
    )


def _longest_judged(cfg: RunConfig) -> int:
    """Tokens of a reward model's longest sequence. One that is not said is as long as a pack has room for."""
    positions, budget = cfg.model.max_position_embeddings, cfg.train.micro_batch_tokens
    asked = cfg.reward_model.max_tokens
    if asked is None and budget is not None:
        asked = budget // 2 if cfg.reward_model.objective == "pairs" else budget
    return positions if asked is None else max(1, min(asked, positions))


def _sequences_of_an_evaluation(cfg: RunConfig) -> int:
    """Sampled ones of the held-out prompts, or of the benchmarks, as far as these say how many problems they have."""
    e = cfg.evaluate
    if not e.benchmarks:
        return e.num_prompts * e.samples_per_prompt
    return sum((one.num_prompts or USUAL_PROBLEMS) * one.samples_per_prompt for one in e.benchmarks)


def _scale(mean: int, limit: int) -> float:
    """Of the exponential law whose mean is ``mean`` once it is cut at ``limit``: mean = s (1 - exp(-limit / s))."""
    if mean >= 0.95 * limit:
        return 20.0 * limit
    low, high = float(mean), 20.0 * limit
    for _ in range(60):
        middle = (low + high) / 2
        if middle * -math.expm1(-limit / middle) < mean:
            low = middle
        else:
            high = middle
    return high
