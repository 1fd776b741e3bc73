"""What has come out of a pipeline's claims.

A claim holds where the paired difference lies above zero with its whole interval, and fails where it lies below;
anything else is left open. What both sides have cost stands beside it: model FLOPs of the node whose checkpoint was
evaluated, of training and sampling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1_megatron.evaluation.compare import compare, signed
from r1_megatron.evaluation.results import read_evaluation
from r1_megatron.pipeline.claims import Claim
from r1_megatron.pipeline.figures import read_figures
from r1_megatron.pipeline.state import NodeState, PipelineState, artefact_paths

# Of a claim without findings.
NOTHING = "nothing to compare: not evaluated yet, or no benchmark has the figures"


@dataclass(frozen=True)
class Finding:
    """Of one figure on one benchmark. ``values``: what the claim is compared with, and what it is about; ``flops``
    of both, 0 where unknown; ``difference``: value, low, high; ``notes``: what else differs between them."""

    claim: Claim
    benchmark: str
    figure: str
    num_problems: int
    values: tuple[float, float]
    difference: Mapping[str, float]
    flops: tuple[float, float]
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        if self.difference["low"] > 0:
            return "holds"
        return "fails" if self.difference["high"] < 0 else "open"

    def __str__(self) -> str:
        than, better = self.values
        of = f"{self.benchmark} {self.figure} {100 * better:.1f}% against {100 * than:.1f}%"
        return f"{of}, {signed(self.difference)} over {self.num_problems} problems: {self.verdict}"


def evaluations_of(state: PipelineState) -> dict[str, dict[str, Any]]:
    """The evaluations that there are, by row of `compare`."""
    by_node = {each.node.name: each for each in state.nodes}
    found = {}
    for label, reference in state.pipeline.compare.items():
        path = artefact_paths(by_node[reference.node]).get(reference.artefact)
        if path is not None:
            with contextlib.suppress(ValueError):  # not made yet
                found[label] = read_evaluation(path)
    return found


def findings(state: PipelineState, evaluations: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """What has come out of the claims whose evaluations are there (``evaluations``, by row of `compare`)."""
    found = []
    for claim in state.pipeline.claims:
        if claim.better not in evaluations or claim.than not in evaluations:
            continue
        try:
            rows = compare([evaluations[claim.than], evaluations[claim.better]], [claim.than, claim.better])
        except ValueError:  # no benchmark in common
            continue
        flops = (_flops(state, claim.than), _flops(state, claim.better))
        found += [
            Finding(
                claim, row["benchmark"], row["figure"], row["num_problems"],
                (row["base"]["value"], row["other"]["value"]), row["difference"], flops, tuple(row["notes"]),
            )
            for row in rows
            if row["figure"] in claim.figures and (not claim.benchmarks or row["benchmark"] in claim.benchmarks)
        ]  # fmt: skip
    return found


def claims_text(state: PipelineState, found: Sequence[Finding]) -> list[str]:
    """Lines, claim by claim; none where nothing is claimed."""
    lines: list[str] = []
    for claim in state.pipeline.claims:
        mine = [finding for finding in found if finding.claim is claim]
        lines += ["", f"  {claim.say}{_cost(mine[0]) if mine else ''}"]
        lines += [f"      {finding}" for finding in mine] or [f"      {NOTHING}"]
        lines += [f"      {note}" for note in remarks(claim, mine)]
    return lines


def remarks(claim: Claim, found: Sequence[Finding]) -> list[str]:
    """What belongs beside a claim's findings: the reason where it does not hold everywhere, and what else than the
    checkpoint differs between the two evaluations."""
    said = [claim.otherwise] if claim.otherwise and any(finding.verdict != "holds" for finding in found) else []
    differing = dict.fromkeys(note for finding in found for note in finding.notes)
    return said + ([f"The evaluations also differ in: {'; '.join(differing)}."] if differing else [])


def _cost(finding: Finding) -> str:
    """The compute of both sides, where both are known."""
    than, better = finding.flops
    return f" ({better / 1e12:.3g} against {than / 1e12:.3g} TFLOP)" if than and better else ""


def _flops(state: PipelineState, label: str) -> float:
    """Model FLOPs of the node that made the checkpoint that a row of ``compare`` is about."""
    by_name = {each.node.name: each for each in state.nodes}
    evaluation = by_name.get(state.pipeline.compare[label].node)
    if evaluation is None:
        return 0.0
    loads = [one.node for one in evaluation.node.references if one.field == "checkpoint.load"]
    made_by: NodeState | None = by_name.get(loads[0]) if loads else None
    if made_by is None or made_by.folder is None:
        return 0.0
    return read_figures(made_by.folder, made_by.node.stage).flops
