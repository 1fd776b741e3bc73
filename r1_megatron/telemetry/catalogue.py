"""Every metric's name, unit and meaning: the table behind ``docs/metrics.md`` and Prometheus' help texts.

    python -m r1_megatron.telemetry.catalogue > docs/metrics.md

Where other trainers' dashboards have a name, it is theirs. ``<word>`` in a name stands for any text without a slash,
``{a,b}`` for either. Tests compare the table with the page, and with what runs write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product


@dataclass(frozen=True)
class Documented:
    """One line of the table."""

    names: str
    unit: str
    meaning: str

    @property
    def expanded(self) -> list[str]:
        """The names with every ``{a,b}`` written out.

        Example:
            >>> Documented("critic/{score,rewards}/mean", "", "").expanded
            ['critic/score/mean', 'critic/rewards/mean']
        """
        parts = re.split(r"\{([^}]*)\}", self.names)
        choices = [part.split(",") if place % 2 else [part] for place, part in enumerate(parts)]
        return ["".join(chosen) for chosen in product(*choices)]

    def fits(self, name: str) -> bool:
        """Whether this line is about the metric ``name``."""
        return any(re.fullmatch(_as_regex(pattern), name) for pattern in self.expanded)


@dataclass(frozen=True)
class Chapter:
    title: str
    text: str
    lines: tuple[Documented, ...]


def _lines(*rows: tuple[str, str, str]) -> tuple[Documented, ...]:
    return tuple(Documented(*row) for row in rows)


CHAPTERS = (
    Chapter(
        "Rewards and advantages",
        "Over all rollouts of a step, on all ranks.",
        _lines(
            ("critic/score/{mean,max,min}", "reward", "reward of a rollout before the penalty for overlong ones"),
            ("critic/rewards/{mean,max,min}", "reward", "reward that the advantages are computed from, without the "
             "divergence that `rl.kl_in: reward` takes off it"),
            ("critic/advantages/{mean,std}", "", "advantage, over the response tokens that are learned from"),
            ("reward/<term>/mean", "reward", "one reward term before its weight, over the rollouts it counts for"),
            ("reward/ungraded", "rollouts", "completions that no term counts for at this step: reward 0 for nothing"),
            ("source/<source>/rewards/mean", "reward", "mean reward of one source that a term names (`/` as `_`)"),
            ("source/<source>/response_length/mean", "tokens", "tokens of its responses"),
            ("reward/failed", "rollouts", "completions that a reward function failed on and that count zero"),
            ("rl/dropped_groups", "groups", "groups that were left out because their rewards are all equal"),
            ("rl/resamples", "", "times that a step sampled other prompts in their place (`zero_variance_groups`)"),
        ),
    ),
    Chapter(
        "Policy",
        "Means over the tokens of an update that carry loss, and over the updates of a step.",
        _lines(
            ("actor/entropy", "nats", "entropy of the policy where a response token was drawn"),
            ("actor/kl", "nats", "divergence from the reference policy (`rl.kl_estimator`; k3 with `kl_in: reward`)"),
            ("actor/reward_kl_penalty/mean", "nats", "the same as `kl_in: reward` takes it off, before its weight"),
            ("actor/ppo_kl", "nats", "divergence of the policy from the one before the step's first update"),
            ("actor/ratio", "", "probability of a token under the policy over that under the old one"),
            ("actor/pg_clipfrac", "share", "tokens (with ratios of sequences: of those) whose ratio was clipped"),
            ("actor/pg_clipfrac_dual", "share", "tokens whose loss was capped by `rl.clip_ratio_dual`"),
            ("actor/tis_weight", "", "truncated importance weight of training over rollout (`rl.tis_cap`)"),
            ("actor/grad_norm", "", "L2 norm of the gradient before clipping; NaN where an update was skipped"),
            ("actor/lr", "", "learning rate of the step's updates"),
            ("train/loss", "", "loss that was minimised, mean over the step's updates"),
            ("sft/loss", "nats", "cross entropy of a response token"),
            ("sft/mtp_loss", "nats", "the same of the multi-token-prediction layers, their mean (DeepSeek-V3, eq. 24)"),
            ("sft/epoch", "", "passes over the rows"),
            ("train/num_tokens", "tokens", "tokens that carry loss, all ranks together"),
            ("num_tokens", "tokens", "the same as the loss saw them, mean over the updates"),
            ("train/updates", "", "optimizer steps made"),
            ("train/skipped_updates", "", "optimizer steps passed over for NaN or Inf (`train.on_nonfinite`)"),
        ),
    ),
    Chapter(
        "Critic",
        "Stage ppo. Means over the tokens that carry loss; losses and gradients also over the updates of a step.",
        _lines(
            ("critic/{values,returns}/mean", "reward", "the critic's word before the step; what it learns"),
            ("critic/vf_explained_var", "share", "of the returns' variance, what the critic's values explain of it"),
            ("critic/vf_loss", "", "half the squared error of a value, the larger of clipped and not"),
            ("critic/vf_clipfrac", "share", "tokens whose clipped error is the larger one (`critic.value_clip`)"),
            ("critic/{grad_norm,lr}", "", "of the critic's updates, as the policy's under actor/"),
            ("critic/{updates,skipped_updates}", "", "its optimizer steps made; passed over for NaN or Inf"),
        ),
    ),
    Chapter(
        "Reward model",
        "Stage reward_model. Means over the pairs, or rows, of a step.",
        _lines(
            ("reward_model/loss", "nats", "Bradley-Terry loss of a pair, or binary cross entropy of a row"),
            ("reward_model/accuracy", "share", "pairs whose better answer scores higher; rows on the right side of 0"),
            ("reward_model/margin", "", "what the better answer of a pair scores above the other"),
            ("reward_model/score", "", "mean score"),
            ("reward_model/epoch", "", "passes over the rows"),
        ),
    ),
    Chapter(
        "Rollout against training",
        "The same tokens, under the weights that drew them, computed by the rollout and by the training forward: what "
        "differs is rounding, routing, or a fault. Tokens of earlier versions of the policy are not counted.",
        _lines(
            ("training/rollout_probs_diff_{mean,max}", "", "absolute difference of a token's probability"),
            ("training/rollout_logprobs_diff_{mean,max}", "nats", "absolute difference of its log-probability"),
        ),
    ),
    Chapter(
        "Responses",
        "Tokens as the tokenizer counts them.",
        _lines(
            ("response_length/{mean,max,min}", "tokens", "tokens of a response"),
            ("response_length/clip_ratio", "share", "responses cut at the limit, `sampling.max_new_tokens`"),
            ("rollout/max_new_tokens", "tokens", "that limit, with `sampling.length_switches`"),
            ("prompt_length/{mean,max}", "tokens", "tokens of a prompt"),
        ),
    ),
    Chapter(
        "Thinking",
        "Of up to 64 responses of every replica. Phrases are counted by their form, in English and Chinese "
        "(`telemetry/aha.py`): a response that says it checks need not do it.",
        _lines(
            ("aha/reevaluation_share", "share", "responses that think again: wait, let me check, 等等, 让我检查, ..."),
            ("aha/verification_share", "share", "responses that say they check: verify, plug back in, 验算, 代回, ..."),
            ("aha/{reevaluations,verifications}", "phrases", "such phrases in a response, in the mean"),
            ("aha/reflective_words", "words", "wait, mistake, however, but, retry, error, verify, wrong, evaluate, "
             "check (Nature s41586-025-09422-z, Extended Data Fig. 1) and their Chinese ones, in a response"),
            ("aha/waits", "words", "of these, wait and 等等"),
            ("aha/language_mixing", "share", "words that are not in the script of most words; names, code and formulae "
             "not counted"),
            ("aha/mixed_share", "share", "responses with more than 5 % of such words"),
        ),
    ),
    Chapter(
        "Rollout engine",
        "Counts are sums over the replicas, everything else is the largest replica's, if not said otherwise.",
        _lines(
            ("rollout/num_tokens", "tokens", "tokens drawn"),
            ("rollout/num_tokens_fed", "tokens", "prompt tokens fed, those of shared prompts once"),
            ("rollout/num_forwards", "", "forwards"),
            ("rollout/num_forwards_played", "", "of them, forwards played as CUDA graphs"),
            ("rollout/tokens_per_s", "tokens/s", "tokens drawn per second, all replicas together"),
            ("rollout/batch_mean", "sequences", "sequences in a decode step, in the mean"),
            ("rollout/preemptions", "sequences", "sequences that gave up their place in the cache, to go on later"),
            ("rollout/cache_bytes", "bytes", "size of the key-value cache of a rank"),
            ("rollout/cache_pages_peak", "pages", "pages of the cache in use at once"),
            ("rollout/<activity>_s", "s", "time in one activity of the engine: planning, waiting, forward, sampling"),
            ("rollout/{num_drafts,num_draws}", "", "tokens that were drafted; draws, each of one token or more"),
            ("rollout/draft_acceptance", "share", "drafts that were right, over all replicas"),
            ("rollout/tokens_per_draw", "tokens", "tokens of a sequence's draw, 1 without drafts"),
            ("rollout/finish_length", "tokens", "over-sampling: this step's tokens in the longest sample learned from"),
            ("rollout/{carried,cancelled,expired}_groups", "groups", "over-sampling: groups that go on in the next "
             "step; that are thrown away; of these, those that have gone on for too long"),
            ("rollout/cancelled_num_tokens", "tokens", "tokens thrown away, all those of expired groups included"),
            ("rollout/stale_tokens_fraction", "share", "response tokens that an earlier version of the policy drew"),
            ("rollout/staleness_max", "versions", "how many versions ago the oldest token was drawn"),
        ),
    ),
    Chapter(
        "Time and speed",
        "Model FLOPs are those of the sequences, without recomputation and padding.",
        _lines(
            ("timing_s/step", "s", "the step from its first phase to its last, evaluation and checkpoint not counted"),
            ("timing_s/<phase>", "s", "one phase: rollout, reward, annotate, train; data and train of fine-tuning"),
            ("perf/total_num_tokens", "tokens", "prompt and response tokens of the step, all ranks together"),
            ("perf/throughput", "tokens/s", "those tokens over the whole step"),
            ("perf/tokens_per_second_per_gpu", "tokens/s", "the same per rank"),
            ("perf/rollout_flops", "FLOP", "model FLOPs of the step's samples, a prompt counted once for its group"),
            ("perf/train_tokens", "tokens", "tokens of forward and backward passes, all ranks together"),
            ("perf/shared_tokens", "tokens", "of those, prompts that another sample's pass has computed (no FLOPs)"),
            ("perf/train_flops", "FLOP", "model FLOPs of forward and backward passes, all ranks together"),
            ("perf/train_throughput", "tokens/s", "trained tokens over `timing_s/train`"),
            ("perf/train_tflops_per_gpu", "TFLOP/s", "model FLOPs over `timing_s/train`, per rank"),
            ("perf/mfu", "share", "the same as a share of `profile.peak_tflops`"),
        ),
    ),
    Chapter(
        "Memory",
        "1 GB is 1e9 bytes.",
        _lines(
            ("perf/max_memory_allocated_gb", "GB", "peak of torch's allocations on the fullest GPU so far"),
            ("perf/cpu_memory_used_gb", "GB", "peak resident set of the first rank's process so far"),
        ),
    ),
    Chapter(
        "GPUs",
        "What NVML says of every rank's GPU, read each `telemetry.sample_interval_s` and where a step begins and ends. "
        "`mean`, `max` and `min` are over the readings of a step and over all ranks; `ranks.jsonl` has a number per "
        "rank. What a device does not report is left out; on the CPU all of it.",
        _lines(
            ("gpu/power_watts/{mean,max}", "W", "power drawn by the board"),
            ("gpu/energy_joules", "J", "energy of the step, all GPUs: the device's counter, else power x time"),
            ("gpu/joules_per_token", "J/token", "that energy over `perf/total_num_tokens`"),
            ("gpu/temperature_celsius/{mean,max}", "°C", "temperature of the chip"),
            ("gpu/memory_temperature_celsius/{mean,max}", "°C", "temperature of its memory"),
            ("gpu/memory_used_gb/{mean,max}", "GB", "device memory in use, by all processes"),
            ("gpu/utilization/{mean,min}", "share", "time in which any kernel ran, however small"),
            ("gpu/sm_clock_mhz/{mean,min}", "MHz", "clock of the streaming multiprocessors"),
            ("gpu/throttled/{mean,max}", "share", "readings with a slowdown for heat, power brake or hardware"),
            ("gpu/power_capped/{mean,max}", "share", "readings at the power limit: usual under load"),
            ("gpu/nvlink_{tx,rx}_gb_per_s/{mean,max}", "GB/s", "payload sent and received over all NVLinks of a GPU"),
            ("gpu/pcie_{tx,rx}_gb_per_s/{mean,max}", "GB/s", "bytes sent and received over PCIe by a GPU"),
            ("gpu/throttle_reasons", "bits", "in `ranks.jsonl` only: every reason NVML gave in the step"),
        ),
    ),
    Chapter(
        "Processes",
        "Of every rank's own process, its children not counted.",
        _lines(
            ("host/rss_gb/{mean,max}", "GB", "resident set"),
            ("host/cpu_cores/{mean,max}", "cores", "processor time per second: 1 is one core fully busy"),
        ),
    ),
    Chapter(
        "Rejection sampling",
        "Shares over all replicas of a block (stage `reject`); what becomes of the responses in the end stands in "
        "`manifest.json`.",
        _lines(
            ("reject/right", "share", "responses that are right by rule, of those that a rule decides"),
            ("reject/fit", "share", "responses that pass all filters of `reject.filters`, right or not"),
            ("reject/judged_right", "share", "votes of the judge that call a response right"),
            ("reject/no_verdict", "share", "votes of the judge without a verdict"),
        ),
    ),
    Chapter(
        "Held-out prompts",
        "At the start, every `evaluate.interval` steps, and at the end. Stage `evaluate` writes them once, for every "
        "benchmark that it asks; intervals and breakdowns are in its `evaluation.json`.",
        _lines(
            ("eval/num_prompts", "prompts", "held-out prompts"),
            ("eval/{sampled,greedy}_accuracy", "share", "completions that are right"),
            ("eval/{sampled,greedy}_reward", "reward", "mean reward"),
            ("eval/{sampled,greedy}_stopped", "share", "completions that ended by themselves"),
            ("eval/{sampled,greedy}_length", "tokens", "mean length of a response"),
            ("eval/{sampled,greedy}_{reevaluation_share,verification_share,language_mixing}", "share",
             "what `aha/*` says of training's responses"),
            ("eval/loss", "nats", "held-out rows: cross entropy of a response token; of a reward model, its loss"),
            ("eval/<benchmark>/{pass,cons}@<k>", "share", "of a benchmark: any of k samples, or their majority"),
            ("eval/<benchmark>/greedy", "share", "problems whose greedy completion is right"),
            ("eval/<benchmark>/term:<term>", "share", "mean of a term of the reward that is a share, as `format` is"),
            ("eval/<benchmark>/mean_tokens", "tokens", "mean length of a sample"),
            ("eval/<benchmark>/stopped", "share", "samples that ended by themselves"),
            ("eval/num_rows", "", "held-out pairs or rows of a reward model"),
            ("eval/{accuracy,score,margin}", "", "of a reward model on them, as under reward_model/"),
            ("eval/calibration_error", "share", "how far its probabilities are from what came true, in ten bins"),
            ("eval/<name>", "", "any other result"),
        ),
    ),
    Chapter(
        "Faults",
        "What a run does about them is in [faults.md](faults.md), and each of them in `failures.jsonl`.",
        _lines(
            ("resilience/slowest_rank", "", "rank that worked longest by its peers; absent where no rank has one"),
            ("resilience/straggler_ratio", "", "its work time, waiting not counted, by the median of its peers'"),
            ("resilience/roll_backs", "", "how often the run has gone back to a checkpoint; absent before"),
        ),
    ),
    Chapter(
        "For Prometheus only",
        "",
        _lines(
            ("train/step", "", "the newest step"),
            ("train/total_steps", "", "steps of the whole run (`train.steps`)"),
            ("train/step_timestamp_seconds", "s", "when that step was written, Unix time: an alarm for runs that hang"),
        ),
    ),
)  # fmt: skip


@lru_cache(maxsize=4096)
def describe(name: str) -> Documented | None:
    """The line about a metric, a literal name before a pattern; ``None`` if there is none."""
    lines = [line for chapter in CHAPTERS for line in chapter.lines if line.fits(name)]
    return min(lines, key=lambda line: line.names.count("<"), default=None)


def undocumented(names: Iterable[str]) -> list[str]:
    """Those of the names that no line is about (``step``, ``time`` and ``nonfinite`` of a row are not metrics)."""
    return sorted(name for name in set(names) - {"step", "time", "nonfinite"} if describe(name) is None)


def page() -> str:
    """``docs/metrics.md``."""
    parts = [
        "# Metrics\n",
        "What `metrics.jsonl`, TensorBoard, wandb, the report and Prometheus show, one value per step. NaN and "
        'infinity are `null` in `metrics.jsonl`, and its `"nonfinite"` says which. Prometheus has every name with '
        "`r1_megatron_` in front and `_` for `/`: `r1_megatron_critic_score_mean`; per rank "
        "`r1_megatron_rank_gpu_power_watts` and so on, as in `ranks.jsonl`.\n",
        "This page is made by `python -m r1_megatron.telemetry.catalogue`.\n",
    ]
    for chapter in CHAPTERS:
        parts.append(f"## {chapter.title}\n")
        parts += [f"{chapter.text}\n"] if chapter.text else []
        rows = [f"| `{line.names}` | {line.unit} | {line.meaning} |" for line in chapter.lines]
        parts.append("\n".join(["| Name | Unit | Meaning |", "| --- | --- | --- |", *rows]) + "\n")
    return "\n".join([*parts, *_USE])


_USE = (
    """## Prometheus

`telemetry.prometheus_port=9400` serves the newest values at `http://127.0.0.1:9400/metrics` on the host of the first
rank; with `telemetry.prometheus_host=0.0.0.0` other hosts reach them, without a password. The first rank's host changes
with every job: let Prometheus look it up in a file that the job writes.

```yaml
scrape_configs:
  - job_name: r1_megatron
    scrape_interval: 30s
    file_sd_configs: [{files: [/shared/prometheus/r1_megatron_*.json]}]
```

Alarms to begin with:

| Alarm | Expression |
| --- | --- |
| no step for half an hour | `time() - r1_megatron_train_step_timestamp_seconds > 1800` |
| rollout and training part | `r1_megatron_training_rollout_logprobs_diff_mean > 0.05` |
| a GPU slowed down for heat | `r1_megatron_rank_gpu_throttled > 0.1` |
| updates are skipped | `r1_megatron_train_skipped_updates > 0` |
""",
)


def _as_regex(pattern: str) -> str:
    return "".join("[^/]+" if part.startswith("<") else re.escape(part) for part in re.split(r"(<[^>]*>)", pattern))


if __name__ == "__main__":
    print(page(), end="")
