"""The best layouts for a number of GPUs: every combination of sizes that can be, judged by memory and time.

Of those that fit, the Pareto front is shown: no other one is both faster and leaves more memory (by a GiB, so that the
front stays short). Time is that of a step as the configuration has it; memory that of the fullest rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from r1_megatron.config.schema import ModelConfig, RunConfig
from r1_megatron.config.validate import validate_config
from r1_megatron.planner import changes as change
from r1_megatron.planner.changes import Changes
from r1_megatron.planner.hardware import GIB, Hardware
from r1_megatron.planner.plan import Plan, make_plan
from r1_megatron.planner.throughput import plan_time, rollout_seconds
from r1_megatron.planner.workload import workload

# Shares of the rollout cache that are tried, in sequences of full length for each data-parallel rank.
CACHED_SEQUENCES = (64, 32, 16, 8, 4)


@dataclass(frozen=True)
class Found:
    """A layout that fits: what to change for it, and its plan."""

    changes: dict[str, Any]
    plan: Plan

    @property
    def seconds(self) -> float:
        return self.plan.time.total if self.plan.time else 0.0

    @property
    def memory(self) -> int:
        return self.plan.fullest.peak.bytes


@dataclass(frozen=True)
class Search:
    """Attributes:
    front: the fastest first, each leaving more memory than those before it.
    tried, fitting: numbers of configurations.
    why: the choice in words.
    """

    front: tuple[Found, ...]
    tried: int
    fitting: int
    why: tuple[str, ...]


def search(cfg: RunConfig, hardware: Hardware, gpus: int, mean_response: int | None = None) -> Search:
    """The layouts for ``gpus`` GPUs. Batch, lengths and model stay as they are."""
    fastest: list[Found] = []
    open_ones: list[tuple[Found, int, list[Found]]] = []  # with the least memory of the layout, and its other ways
    tried = 0
    for sizes in _layouts(cfg, hardware, gpus):
        ways = list(_options(cfg))
        tried += len(ways)
        frugal = _fitting(cfg, hardware, gpus, sizes | ways[-1], mean_response)
        if frugal is None:
            continue  # what needs least memory needs too much
        rollout = rollout_seconds(frugal.plan.cfg, hardware, workload(frugal.plan.cfg, mean_response))
        cache = {"rollout.cache_tokens": frugal.plan.cfg.rollout.cache_tokens}
        timed = [_timed(cfg, hardware, gpus, sizes | cache | way, mean_response, rollout) for way in ways]
        by_time = sorted((found for found in timed if found is not None), key=lambda found: found.seconds)
        for index, found in enumerate(by_time):
            if (fitting := _with_memory(found, hardware, mean_response)) is not None:
                fastest.append(fitting)
                open_ones.append((fitting, frugal.memory, by_time[index + 1 :]))
                break
    front, found = _front(fastest), list(fastest)
    for best, least, slower in open_ones:
        # No other way of this layout is faster than `best` or takes less than `least`.
        if any(other.seconds <= best.seconds and other.memory <= least for other in front if other is not best):
            continue
        rest = (_with_memory(one, hardware, mean_response) for one in slower)
        found += [one for one in rest if one is not None]
    front = _front(found)
    return Search(front, tried, len(fastest), tuple(_why(cfg, hardware, front, fastest)))


def _timed(
    cfg: RunConfig, hardware: Hardware, gpus: int, changes: Changes, mean_response: int | None, rollout: float
) -> Found | None:
    """A configuration with its times, its memory unknown; ``None``: it contradicts itself."""
    changed = change.apply(cfg, changes)
    if validate_config(changed, gpus, check_files=False):
        return None
    load = workload(changed, mean_response)
    time = plan_time(changed, hardware, load, rollout)
    return Found(change.only_different(cfg, changes), Plan(changed, hardware, gpus, load=load, time=time))


def _with_memory(found: Found, hardware: Hardware, mean_response: int | None) -> Found | None:
    """The same with its memory; ``None``: it does not fit."""
    plan = make_plan(found.plan.cfg, hardware, None, mean_response, with_remedy=False, with_time=False)
    return Found(found.changes, replace(plan, time=found.plan.time)) if plan.fits else None


def first_that_fits(cfg: RunConfig, hardware: Hardware, gpus: int, fixed: bool) -> dict[str, Any] | None:
    """Changes of the layout that fits with the least memory, on these GPUs or the next larger number (unless
    ``fixed``)."""
    for count in (gpus,) if fixed else (gpus, 2 * gpus, 4 * gpus):
        best: Found | None = None
        frugal = list(_options(cfg))[-1]
        for sizes in _layouts(cfg, hardware, count):
            found = _fitting(cfg, hardware, count, sizes | frugal)
            if found is not None and (best is None or found.memory < best.memory):
                best = found
        if best is not None:
            return best.changes
    return None


def _fitting(
    cfg: RunConfig, hardware: Hardware, gpus: int, changes: dict[str, Any], mean_response: int | None = None
) -> Found | None:
    """A configuration that fits, if need be with a smaller cache."""
    changed = change.apply(cfg, changes)
    plan = make_plan(changed, hardware, gpus, mean_response, with_remedy=False, with_time=False)
    if plan.fits:
        return Found(change.only_different(cfg, changes), plan)
    if {kind.partition(":")[0] for kind in plan.kinds} == {"rollout"} and not cfg.learns_from_rows:
        longest = workload(changed).longest
        for sequences in CACHED_SEQUENCES:
            smaller = {**changes, "rollout.cache_tokens": sequences * longest}
            changed = change.apply(cfg, smaller)
            plan = make_plan(changed, hardware, gpus, mean_response, with_remedy=False, with_time=False)
            if plan.fits:
                return Found(change.only_different(cfg, smaller), plan)
    return None


def _layouts(cfg: RunConfig, hardware: Hardware, gpus: int) -> Iterator[dict[str, Any]]:
    """Sizes that divide the model and the job, without those that can only be worse."""
    m = cfg.model
    for tp in _powers(hardware.domain):
        if m.num_attention_heads % tp or m.ffn_hidden_size % tp or (m.is_dense_student and m.query_groups % tp):
            continue
        for pp in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20):
            for cp in _powers(8):
                if gpus % (tp * pp * cp):
                    continue
                stage = gpus // pp
                for ep in _expert_sizes(m, stage):
                    if m.num_moe_layers and ep * pp * hardware.memory_bytes < _expert_bytes(cfg):
                        continue
                    for vpp in (1, 2, 4):
                        if (changes := change.layout(cfg, gpus, tp, pp, ep, cp, vpp)) is not None:
                            yield changes


def _powers(limit: int) -> list[int]:
    return [n for n in (1, 2, 4, 8, 16) if n <= limit]


def _expert_sizes(m: ModelConfig, stage: int) -> list[int]:
    if not m.num_moe_layers:
        return [1]
    return [ep for ep in (1, 2, 4, 8, 16, 32, 64, 128) if m.num_moe_experts % ep == 0 and stage % ep == 0]


def _expert_bytes(cfg: RunConfig) -> int:
    """Weights and gradients of all routed experts."""
    m = cfg.model
    return m.num_moe_layers * m.num_moe_experts * 3 * m.hidden_size * m.moe_ffn_hidden_size * 6


def _options(cfg: RunConfig) -> Iterator[dict[str, Any]]:
    """From the fastest to the one that needs least memory."""
    lend = {"train.offload": True} if cfg.is_rl and cfg.parallel.device != "cpu" else {}
    budget = {} if cfg.learns_from_rows else {"train.micro_batch_tokens": None}
    states = [{}, *change.optimizers(cfg.train)]
    for state in states:
        for again in (change.no_recomputation(), *change.recomputations(cfg)):
            yield {**again, **budget, **lend, **state}


def _front(found: list[Found]) -> tuple[Found, ...]:
    front: list[Found] = []
    for one in sorted(found, key=lambda one: (one.seconds, one.memory)):
        if not front or one.memory < front[-1].memory - GIB:
            front.append(one)
    return tuple(front)


def _why(cfg: RunConfig, hardware: Hardware, front: tuple[Found, ...], fitting: list[Found]) -> Iterator[str]:
    """Why the first of the front is the fastest, beside the fastest of each other kind."""
    if not front:
        yield (
            f"No layout fits: the experts' weights and gradients alone take {_expert_bytes(cfg) / GIB:,.0f} GiB over "
            f"all ranks. Take more GPUs, or larger ones than {hardware.name}."
        )
        return
    best = front[0]
    p, time = best.plan.cfg.parallel, best.plan.time
    assert time is not None and best.plan.load is not None
    yield (
        f"Fastest: {sizes_in_words(best.plan.cfg)}, {best.seconds:,.0f} s a step, "
        f"{best.memory / GIB:.1f} of {hardware.memory_bytes / GIB:.1f} GiB. Of the step {time.rollout:,.0f} s are "
        f"sampling, {time.annotate:,.0f} s old and reference log-probabilities, {time.train:,.0f} s training"
        f"{f', {time.of():,.0f} s other models' if time.others else ''}."
    )
    pairs = (
        ("tensor_model_parallel_size", "TP"),
        ("pipeline_model_parallel_size", "PP"),
        ("expert_model_parallel_size", "EP"),
        ("context_parallel_size", "CP"),
    )
    for name, short in pairs:
        size = getattr(p, name)
        others = [one for one in fitting if getattr(one.plan.cfg.parallel, name) != size]
        if not others:
            yield f"Only {short}{size} fits."
            continue
        rival = min(others, key=lambda one: one.seconds)
        assert rival.plan.time is not None
        yield (
            f"{short}{size} rather than {short}{getattr(rival.plan.cfg.parallel, name)}: "
            f"{rival.seconds - best.seconds:,.0f} s less than the best of those ({sizes_in_words(rival.plan.cfg)}): "
            f"{_difference(best, rival)}."
        )


def _difference(best: Found, rival: Found) -> str:
    """Where the time goes that the rival needs more."""
    one, two = best.plan.time, rival.plan.time
    assert one is not None and two is not None
    parts = {"sampling": two.rollout - one.rollout, "annotating": two.annotate - one.annotate}
    parts["other models"] = two.of() - one.of()
    for name, seconds in two.pass_time.items():
        parts[name] = seconds - one.pass_time.get(name, 0.0)
    largest = sorted(parts.items(), key=lambda part: -abs(part[1]))[:3]
    return (
        ", ".join(f"{name} {seconds:+,.0f} s" for name, seconds in largest if abs(seconds) >= 0.5) or "about the same"
    )


def sizes_in_words(cfg: RunConfig) -> str:
    """``TP4 PP8 VPP2 EP32 DP8, full recomputation, moments in bf16``."""
    p = cfg.parallel
    layout = p.pipeline_model_parallel_layout
    vpp = layout.count("|") + 1 if layout else 0
    sizes = {
        "TP": p.tensor_model_parallel_size,
        "PP": p.pipeline_model_parallel_size,
        "VPP": vpp // p.pipeline_model_parallel_size if vpp else p.virtual_pipeline_model_parallel_size or 1,
        "CP": p.context_parallel_size,
        "EP": p.expert_model_parallel_size,
        "DP": p.data_parallel_size,
    }
    text = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP"))
    train = cfg.train
    if train.recompute_granularity == "full":
        text += ", full recomputation"
    elif train.recompute_modules:
        text += f", recomputing {' '.join(train.recompute_modules)}"
    if train.optimizer_cpu_offload:
        return f"{text}, {train.optimizer_offload_fraction:.0%} of the optimizer on the host"
    return f"{text}, moments in bf16" if "bf16" in (train.exp_avg_dtype, train.exp_avg_sq_dtype) else text
