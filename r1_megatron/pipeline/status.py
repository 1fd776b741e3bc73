"""``r1-megatron pipeline status``: each node with its state, inputs, outputs and figures; and where these are from.

base        sft       done          500 steps   3m20s   loss 0.312, held-out accuracy 0.262
                      in  data.seed=1
                      out checkpoint runs/r1/artefacts/base-3f9a0c21b7de4415/checkpoints/final (sha256 9c2e41d0)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from r1_megatron.pipeline.figures import read_figures
from r1_megatron.pipeline.findings import claims_text, evaluations_of, findings
from r1_megatron.pipeline.state import NodeState, PipelineState
from r1_megatron.pipeline.store import Provenance, code_now, seconds_of
from r1_megatron.telemetry.writers import duration


def status_text(state: PipelineState) -> str:
    """The whole pipeline."""
    done = sum(each.state == "done" for each in state.nodes)
    lines = [f"{state.pipeline.name}: {done} of {len(state.nodes)} nodes are done, in {state.pipeline.output_dir}"]
    widths = [max(len(cells[i]) for cells in map(_cells, state.nodes)) for i in range(4)]
    now = code_now()
    for each in state.nodes:
        *cells, said = _cells(each)
        lines += ["", "  " + "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + f"  {said}".rstrip()]
        lines += [f"      {line}" for line in _details(each, now)]
    lines += claims_text(state, findings(state, evaluations_of(state)))
    return "\n".join(lines)


def _cells(each: NodeState) -> tuple[str, str, str, str, str]:
    if each.folder is None:
        return each.node.name, each.node.stage, each.state, "", each.said
    found = read_figures(each.folder, each.node.stage)
    steps = "" if found.steps is None else f"{found.steps} steps"
    seconds = seconds_of(each.folder)
    compute = f"{found.flops / 1e12:.3g} TFLOP" if found.flops else ""
    size = ", ".join(part for part in (steps, duration(seconds) if seconds else "", compute) if part)
    said = "; ".join(part for part in (each.said, found.brief()) if part)
    return each.node.name, each.node.stage, each.state, size, said


def _details(each: NodeState, code: str) -> Iterator[str]:
    if each.job is None:
        for reference in each.node.references:
            yield f"in   {reference.field} = {reference}"
        return
    by_field = {reference.field: reference for reference in each.node.references}
    for taken in each.job.inputs:
        of = f"{by_field[taken.field]} = " if taken.field in by_field else ""
        yield f"in   {taken.field} = {of}{taken.path} ({taken.sha256[:8]})"
    if each.provenance is None:
        return
    for name, output in each.provenance["outputs"].items():
        yield f"out  {name} = {output['path']} ({output['sha256'][:8]})"
    if each.folder is not None:
        for benchmark, figures in read_figures(each.folder, each.node.stage).by_benchmark().items():
            yield f"     {benchmark}: {figures}"
    if (made := code_of(each.provenance)) != code:
        yield f"made by other code: {made}; now {code}"


def code_of(told: Provenance) -> str:
    return f"{told['code']['version']} {told['code']['commit'] or ''}".strip()


def chain_text(state: PipelineState, name: str) -> str:
    """Where the artefacts of a node are from, down to files and seeds.

    Raises:
        ValueError: there is no such node, or it is not done.
    """
    made = state.made
    if name not in state.pipeline.nodes:
        raise ValueError(f"--provenance {name}: there is no such node. Nodes: {', '.join(state.pipeline.nodes)}.")
    if name not in made:
        raise ValueError(f"--provenance {name}: the node is not done, so there is nothing yet to tell the origin of.")
    return "\n".join(_chain(made[name], made, "", set()))


def _chain(told: Provenance, made: dict[str, Provenance], indent: str, seen: set[str]) -> Iterator[str]:
    outputs = ", ".join(f"{name} {output['sha256'][:16]}" for name, output in told["outputs"].items())
    seeds = ", ".join(f"{field}={seed}" for field, seed in told["seeds"].items())
    yield f"{indent}{told['node']}: {outputs}"
    yield f"{indent}  made by stage {told['stage']}, {told['done']}, r1_megatron {code_of(told)}, {seeds}"
    yield f"{indent}  configuration {told['configuration']['path']} (sha256 {told['configuration']['sha256'][:16]})"
    for taken in told["inputs"]:
        if "node" not in taken:
            yield f"{indent}  {taken['field']}: {taken['path']} (sha256 {taken['sha256'][:16]})"
            continue
        again = taken["node"] in seen
        yield f"{indent}  {taken['field']}: of {taken['node']}" + (", see above" if again else ":")
        if not again:
            seen.add(taken["node"])
            yield from _chain(made[taken["node"]], made, indent + "    ", seen)


def as_dict(state: PipelineState) -> dict[str, Any]:
    """For programs: ``pipeline status --json``."""
    return {
        "name": state.pipeline.name,
        "output_dir": str(state.pipeline.output_dir),
        "nodes": [
            {
                "name": each.node.name,
                "stage": each.node.stage,
                "state": each.state,
                "said": each.said,
                "folder": None if each.folder is None else str(each.folder),
                "seconds": None if each.folder is None else seconds_of(each.folder),
                "figures": []
                if each.folder is None
                else [vars(figure) for figure in read_figures(each.folder, each.node.stage).figures],
                "provenance": each.provenance,
            }
            for each in state.nodes
        ],
        "findings": [asdict(one) | {"verdict": one.verdict} for one in findings(state, evaluations_of(state))],
    }
