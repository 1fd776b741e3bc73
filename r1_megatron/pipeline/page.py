"""``report.html`` of a pipeline: its nodes, and the evaluations that the file wants compared, on the same problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r1_megatron import __version__
from r1_megatron.evaluation.compare import compare, signed, verdict
from r1_megatron.evaluation.results import INTERVALS
from r1_megatron.pipeline.figures import read_figures
from r1_megatron.pipeline.findings import NOTHING, Finding, evaluations_of, findings, remarks
from r1_megatron.pipeline.read import Pipeline
from r1_megatron.pipeline.state import PipelineState, read_state
from r1_megatron.pipeline.store import seconds_of
from r1_megatron.telemetry import report as run_report
from r1_megatron.telemetry.report.text import text
from r1_megatron.telemetry.run_folder import write_atomic
from r1_megatron.telemetry.writers import duration

_STYLE = Path(run_report.__file__).with_name("page.css")


def write_page(pipeline: Pipeline) -> Path:
    """Write it anew; answers its path."""
    target = pipeline.output_dir / "report.html"
    write_atomic(target, page(read_state(pipeline)))
    return target


def page(state: PipelineState) -> str:
    """The whole page as text; it loads nothing and runs nothing."""
    name, done = text(state.pipeline.name), sum(each.state == "done" for each in state.nodes)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="r1_megatron {__version__}">
<title>{name}</title>
<style>{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<header class="top"><h1>{name}</h1><p class="soft">{done} of {len(state.nodes)} nodes are done</p></header>
<main>
{_compared(state)}{_nodes(state)}</main>
</body>
</html>
"""


def _compared(state: PipelineState) -> str:
    evaluations = evaluations_of(state)
    return _claims(state, findings(state, evaluations)) + _comparison(state, evaluations)


def _claims(state: PipelineState, found: Sequence[Finding]) -> str:
    """Claim by claim what has come out."""
    if not state.pipeline.claims:
        return ""
    said = "Each is tested on the problems of both models, in pairs: it holds, or fails, where the whole interval of "
    said += "the difference lies on one side of zero."
    parts = [f'<p class="soft">{text(said)}</p>']
    for claim in state.pipeline.claims:
        mine = [one for one in found if one.claim is claim]
        heads = ("", "", claim.than, claim.better, "difference", "")
        table = _table(heads, [_finding(one) for one in mine]) if mine else f"<p>{NOTHING.capitalize()}.</p>"
        notes = remarks(claim, mine)
        notes += [_cost(mine[0])] if mine and all(mine[0].flops) else []
        parts += [f"<h3>{text(claim.say)}</h3>{table}", *(f'<p class="soft">{text(note)}</p>' for note in notes)]
    return f"<section><h2>Claims</h2>{''.join(parts)}</section>\n"


def _finding(one: Finding) -> list[str]:
    values = [f"{100 * value:.1f}" for value in one.values]
    return [one.benchmark, one.figure, *values, signed(one.difference), one.verdict]


def _cost(one: Finding) -> str:
    than, better = (f"{flops / 1e12:.3g}" for flops in one.flops)
    labels = f"{one.claim.better} took {better} TFLOP of training and sampling, {one.claim.than} {than}"
    return f"{labels}; what they started and learned from is not in it."


def _comparison(state: PipelineState, evaluations: Mapping[str, dict[str, Any]]) -> str:
    """Per benchmark the figures of all evaluations, and how the others differ from the first one, in pairs."""
    entries: dict[str, dict[str, Mapping[str, Any]]] = {}
    for label, evaluation in evaluations.items():
        for entry in evaluation["benchmarks"]:
            entries.setdefault(entry["name"], {})[label] = entry
    differences = _differences(state, evaluations)
    parts = []
    for benchmark, rows in entries.items():
        figures = list(dict.fromkeys(name for entry in rows.values() for name in entry["figures"]))
        body = [
            [
                label,
                entry["num_problems"],
                *(_percent(entry["figures"].get(name)) for name in figures),
                f"{entry['mean_tokens']:,.1f}",
            ]
            for label, entry in rows.items()
        ]
        missing = [label for label in state.pipeline.compare if label not in rows]
        note = f'<p class="soft">Not evaluated yet: {text(", ".join(missing))}.</p>' if missing else ""
        table = _table(["", "problems", *figures, "tokens"], body)
        parts.append(f"<h3>{text(benchmark)}</h3>{table}{note}{differences.get(benchmark, '')}")
    if not parts:
        return ""
    return f'<section><h2>Compared</h2><p class="soft">Per cent. {text(INTERVALS)}</p>{"".join(parts)}</section>\n'


def _differences(state: PipelineState, evaluations: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """By benchmark: how much better or worse the others are than the first evaluation, over the problems of both."""
    base, *others = [*state.pipeline.compare] or [""]
    others = [label for label in others if label in evaluations]
    if base not in evaluations or not others:
        return {}
    try:
        rows = compare([evaluations[label] for label in (base, *others)], [base, *others])
    except ValueError:  # no benchmark in common
        return {}
    tables = {}
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        mine = [row for row in rows if row["benchmark"] == benchmark]
        figures = list(dict.fromkeys(row["figure"] for row in mine))
        cells = {(row["name"], row["figure"]): row["difference"] for row in mine}
        body = [
            [label, *(_difference(cells.get((label, figure))) for figure in figures)]
            for label in dict.fromkeys(row["name"] for row in mine)
        ]
        notes = sorted({f"{row['name']} also differs in: {'; '.join(row['notes'])}." for row in mine if row["notes"]})
        said = "".join(f'<p class="soft">{text(note)}</p>' for note in notes)
        tables[benchmark] = _table([f"against {base}", *figures], body) + said
    return tables


def _difference(difference: Mapping[str, float] | None) -> str:
    """Marked where the interval tells the two apart."""
    if difference is None:
        return "–"
    return signed(difference) + (f" {verdict(difference)}" if verdict(difference) in ("better", "worse") else "")


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Plain text in its cells; the first of each row is its head."""
    top = "".join(f"<th>{text(head)}</th>" for head in heads)
    body = "".join(
        f"<tr><th>{text(first)}</th>{''.join(f'<td>{text(str(cell))}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"


def _percent(figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "–"
    return f"{100 * figure['value']:.1f} [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"


def _nodes(state: PipelineState) -> str:
    rows = []
    for each in state.nodes:
        found = None if each.folder is None else read_figures(each.folder, each.node.stage)
        seconds = 0.0 if each.folder is None else seconds_of(each.folder)
        name = text(each.node.name)
        if each.folder is not None and (each.folder / "report.html").is_file():
            name = f'<a href="{text(each.folder.relative_to(state.pipeline.output_dir))}/report.html">{name}</a>'
        cells = (
            name,
            text(each.node.stage),
            text(each.state),
            "" if found is None or found.steps is None else str(found.steps),
            duration(seconds) if seconds else "",
            f"{found.flops / 1e12:.3g}" if found and found.flops else "",
            text(", ".join(each.node.needs)),
            text(found.brief() if found else each.said),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = "".join(
        f"<th>{head}</th>" for head in ("node", "stage", "state", "steps", "time", "TFLOP", "needs", "figures")
    )
    return f"<section><h2>Nodes</h2><table><tr>{heads}</tr>{''.join(rows)}</table></section>\n"
