"""A plan and a search as text for people and as plain data for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from r1_megatron.planner.changes import in_words
from r1_megatron.planner.hardware import GB, GIB
from r1_megatron.planner.memory import RankMemory
from r1_megatron.planner.plan import HOST_SHARE, Plan
from r1_megatron.planner.search import Search, sizes_in_words

# Columns of the table of memory, in this order.
_KINDS = (
    "weights", "gradients", "optimizer", "reference", "critic", "reward_model", "activations", "cache", "workspace",
    "fixed",
)  # fmt: skip


def show_plan(plan: Plan) -> str:
    """The verdict first, then memory, traffic and time."""
    name = f"{plan.cfg.name}: {sizes_in_words(plan.cfg)} on {plan.gpus:,} {plan.hardware.name}"
    blocks = [[name]]
    if plan.fits:
        rank = plan.fullest
        blocks[0].append(
            f"  fits: {rank.peak.bytes / GIB:.1f} of {plan.hardware.memory_bytes / GIB:.1f} GiB on the fullest rank "
            f"(pp rank {rank.pp}, {rank.peak.name}), {_host(plan)}"
        )
    else:
        blocks[0].append(f"  refused: {len(plan.problems)} problem{'s' if len(plan.problems) > 1 else ''}")
        blocks[0] += [f"  - {text}" for text in plan.problems]
        blocks[0].append(f"  {_remedy(plan)}")
    if plan.memory:
        blocks += [_memory_table(plan, phase.name) for phase in plan.memory[0].phases]
        blocks.append(_details(plan))
    if plan.time is not None:
        blocks += [_traffic(plan), _seconds(plan)]
    return "\n\n".join("\n".join(block) for block in blocks)


def show_search(found: Search, hardware_name: str, gpus: int) -> str:
    """The front as a table, the choice in words, and what to write behind the command for the first of it."""
    lines = [
        f"{found.tried:,} configurations for {gpus:,} {hardware_name}, {found.fitting:,} layouts fit; those that no "
        f"other one beats in both time and memory:"
    ]
    if not found.front:
        return "\n".join(found.why)
    rows = [("step", "memory", "tokens/s/GPU", "layout")]
    for one in found.front:
        assert one.plan.time is not None
        rows.append(
            (
                f"{one.seconds:,.0f} s",
                f"{one.memory / GIB:.1f} GiB",
                f"{one.plan.time.tokens_per_gpu:,.0f}",
                sizes_in_words(one.plan.cfg),
            )
        )
    lines += _table(rows, left=(3,))
    lines += ["", *found.why, "", f"The first of them: {in_words(found.front[0].changes) or 'the file as it is'}"]
    return "\n".join(lines)


# Seconds of other models by kind, as parts of a step: in front of the log-probabilities, and behind them.
_BEFORE = {"reward models": ("reward_model",)}
_BESIDE = {"the critic's values": ("values",), "training of the critic": ("critic", "lending")}

# ---------------------------------------------------------------------------------------------------------------------


def _remedy(plan: Plan) -> str:
    if plan.remedy:
        return f"With this it fits: {in_words(plan.remedy)}"
    if plan.kinds == {"layout"}:
        return "No single change ends all of that: set what the sentences say."
    return "No change was found with which it fits: take more or larger GPUs (--gpus, --gpu), or see --search."


def _host(plan: Plan) -> str:
    if plan.hardware.is_cpu:
        return "of this machine"
    return (
        f"{plan.node_bytes / GIB:,.0f} of {plan.hardware.host_bytes * HOST_SHARE / GIB:,.0f} GiB of main memory on the "
        f"fullest node"
    )


def _memory_table(plan: Plan, phase_name: str) -> list[str]:
    """One row for every run of pipeline ranks that need the same."""
    rows: list[tuple[str, ...]] = []
    kinds = [k for k in _KINDS if any(_phase(rank, phase_name).of(k) for rank in plan.memory)]
    previous: tuple[str, ...] | None = None
    first = 0
    for rank in plan.memory:
        phase = _phase(rank, phase_name)
        cells = (*(f"{phase.of(kind) / GIB:.1f}" for kind in kinds), f"{phase.bytes / GIB:.1f}")
        if cells == previous:
            rows[-1] = (f"{first}-{rank.pp}", *cells)
        else:
            first = rank.pp
            rows.append((str(rank.pp), *cells))
        previous = cells
    return [f"memory in {phase_name}, GiB of a rank", *_table([("pp rank", *kinds, "in all"), *rows])]


def _phase(rank: RankMemory, name: str):
    return next(phase for phase in rank.phases if phase.name == name)


def _details(plan: Plan) -> list[str]:
    """How the fullest rank's memory comes about."""
    rank = plan.fullest
    rows: dict[tuple[str, str], tuple[str, ...]] = {}
    for item in (item for phase in rank.phases for item in phase.items if item.bytes):
        rows[item.name, item.how] = (item.name, f"{item.bytes / GIB:.2f}", item.how)
    for item in (item for item in rank.host if item.bytes):
        rows["host", item.name] = (f"main memory: {item.name}", f"{item.bytes / GIB:.2f}", item.how)
    return [f"how it comes about on pp rank {rank.pp}", *_table(list(rows.values()), left=(0, 2))]


def _traffic(plan: Plan) -> list[str]:
    assert plan.time is not None
    rows = [("an update sends, GB of a rank", "NVLink", "network")]
    for name, traffic in plan.time.traffic.by_kind.items():
        if traffic.nvlink or traffic.network:
            rows.append((name, f"{traffic.nvlink / GB:,.1f}", f"{traffic.network / GB:,.1f}"))
    return _table(rows, left=(0,)) if len(rows) > 1 else ["nothing is sent between ranks"]


def _seconds(plan: Plan) -> list[str]:
    time, load = plan.time, plan.load
    assert time is not None and load is not None
    step = f"a step: {time.total:,.1f} s"
    if not plan.cfg.learns_from_rows:
        rest = time.total - time.rollout - time.annotate - time.train - time.of()
        parts = [
            ("sampling", time.rollout),
            *((name, time.of(*kinds)) for name, kinds in _BEFORE.items() if time.of(*kinds)),
            ("old and reference log-probabilities", time.annotate),
            *((name, time.of(*kinds)) for name, kinds in _BESIDE.items() if time.of(*kinds)),
            ("training", time.train),
            ("the rest", rest),
        ]
        step += " = " + " + ".join(f"{name} {seconds:,.0f}" for name, seconds in parts)
    lines = [step, *(f"  {other.name}, {other.seconds:,.1f} s: {other.how}" for other in time.others)]
    inside = ", ".join(f"{name} {seconds:,.1f}" for name, seconds in time.pass_time.items() if seconds >= 0.05)
    if load.updates:
        lines += [
            f"  training, s: {inside}",
            f"  {load.updates} updates of {load.microbatches} microbatches; the pipeline waits {time.bubble:.0%} of "
            "the time it works",
            f"  {time.training_tokens_per_gpu:,.0f} tokens/s/GPU and {time.training_tflops:,.0f} TFLOP/s/GPU in "
            f"training, {time.tokens_per_gpu:,.1f} tokens/s/GPU over the whole step",
        ]
    if plan.cfg.stage == "reward_model":
        pairs = ", two to a pair" if plan.cfg.reward_model.objective == "pairs" else ""
        lines.append(
            f"  taken for granted: {load.sequences:,} sequences{pairs}, of {load.mean_length:,} tokens in the mean "
            f"(--mean-response), {load.longest:,} at most; nothing is sampled"
        )
    if not plan.cfg.learns_from_rows:
        lines.append(
            f"  taken for granted: prompts of {load.mean_prompt:,} and responses of {load.mean_response:,} tokens in "
            f"the mean (--mean-response), {load.longest:,} at most"
        )
    return lines


def _table(rows: Sequence[tuple[str, ...]], left: tuple[int, ...] = ()) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: tuple[str, ...]) -> str:
        cells = (cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        return "  " + "  ".join(cells).rstrip()

    return [line(row) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Plain data.


def plan_data(plan: Plan) -> dict[str, Any]:
    """What ``--json`` prints. Bytes, seconds, parameters."""
    data: dict[str, Any] = {
        "name": plan.cfg.name,
        "fits": plan.fits,
        "gpu": plan.hardware.name,
        "gpus": plan.gpus,
        "problems": list(plan.problems),
        "remedy": dict(plan.remedy) if plan.remedy else None,
        "memory_bytes": plan.hardware.memory_bytes,
        "ranks": [_rank_data(rank) for rank in plan.memory],
        "node_bytes": plan.node_bytes,
    }
    if plan.time is not None:
        time = plan.time
        data["seconds"] = {
            "step": time.total,
            "rollout": time.rollout,
            "annotate": time.annotate,
            "train": time.train,
            "train_parts": time.pass_time,
            "other_models": [asdict(other) for other in time.others],
        }
        data["tokens_per_second_per_gpu"] = time.tokens_per_gpu
        data["training_tokens_per_second_per_gpu"] = time.training_tokens_per_gpu
        data["training_tflops_per_gpu"] = time.training_tflops
        data["bubble"] = time.bubble
        data["update_bytes"] = {
            name: {"nvlink": traffic.nvlink, "network": traffic.network}
            for name, traffic in time.traffic.by_kind.items()
        }
    return data


def search_data(found: Search) -> dict[str, Any]:
    return {
        "tried": found.tried,
        "fitting": found.fitting,
        "why": list(found.why),
        "front": [{"changes": one.changes, **plan_data(one.plan)} for one in found.front],
    }


def _rank_data(rank: RankMemory) -> dict[str, Any]:
    return {
        "pp": rank.pp,
        "parameters": dict(rank.parameters.parts),
        "phases": {phase.name: {i.name: i.bytes for i in phase.items} for phase in rank.phases},
        "peak_bytes": rank.peak.bytes,
        "host": {item.name: item.bytes for item in rank.host},
    }
