"""A run on one page, from the files of its folder alone. ``r1-megatron report RUN_DIR``

The page carries everything in itself (plots as SVG, no script, no network), so it can be mailed and kept.
"""

from __future__ import annotations

import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1_megatron.telemetry.run_folder import CONFIG, ENVIRONMENT, LAUNCH, METRICS, SAMPLES, write_atomic
from r1_megatron.telemetry.writers import duration

MAX_POINTS = 600  # per curve: longer runs are shown as means of equal stretches
MAX_SAMPLES = 12

_PALETTE = ("#2f5d8a", "#c8742b", "#4d8f6b", "#8d5a97", "#b0a04a", "#8a8f98")


@dataclass(frozen=True)
class Panel:
    """One plot: a title and the curves in it as (metric, label). ``log`` for quantities that span decades."""

    title: str
    curves: tuple[tuple[str, str], ...]
    log: bool = False


PANELS = (
    Panel("Reward", (("critic/rewards/mean", "mean"),)),
    Panel("Loss", (("train/loss", "loss"),)),
    Panel("Held-out accuracy", (("eval/sampled_accuracy", "sampled"), ("eval/greedy_accuracy", "greedy"))),
    Panel("Response length, tokens", (("response_length/mean", "mean"), ("response_length/max", "longest"))),
    Panel("Cut at the length limit, share", (("response_length/clip_ratio", ""),)),
    Panel("Entropy, nats per token", (("actor/entropy", ""),)),
    Panel("KL", (("actor/ppo_kl", "to the rollout's policy"), ("actor/kl", "to the reference"))),
    Panel(
        "Rollout against training, |Δ log-probability|",
        (("training/rollout_logprobs_diff_max", "largest"), ("training/rollout_logprobs_diff_mean", "mean")),
        log=True,
    ),
    Panel("Clipped tokens, share", (("actor/pg_clipfrac", ""),)),
    Panel("Gradient norm", (("actor/grad_norm", ""),), log=True),
    Panel("Learning rate", (("actor/lr", ""),)),
    Panel(
        "Seconds per step",
        tuple((f"timing_s/{name}", name) for name in ("rollout", "reward", "annotate", "train", "step")),
    ),
    Panel("Tokens per second", (("perf/throughput", ""),)),
)

Row = dict[str, Any]


def write_report(run_dir: str | Path, kind: Literal["html", "png"] = "html") -> Path:
    """Write ``report.html`` or ``report.png`` into the run folder and return its path.

    Raises:
        ValueError: the folder is not a run's, or no step has been written yet.
    """
    folder = Path(run_dir)
    if not (folder / METRICS).is_file():
        raise ValueError(f"report: {folder} is not a run folder: it has no {METRICS}. Name the output_dir of a run.")
    rows = read_lines(folder / METRICS)
    if not rows:
        raise ValueError(f"report: {folder / METRICS} is empty: no step has finished yet.")
    target = folder / f"report.{kind}"
    if kind == "png":
        write_atomic(target, plot(rows, "png"))
    else:
        write_atomic(target, _page(folder, rows))
    return target


def read_lines(path: Path) -> list[Row]:
    """The objects of a JSON Lines file. A last line without its end (the run is just writing it) is left out."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    # Not splitlines(): rollouts may hold U+2028, which JSON leaves as it is and Python takes for a line's end.
    return [json.loads(line) for line in whole.split("\n") if line.strip()]


def series(rows: Sequence[Row], metric: str, max_points: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Steps and values of one metric. NaN and infinity (``null`` in the file) stay as gaps.

    More than ``max_points`` values are replaced by the means of equal stretches (a stretch with a gap keeps the mean
    of what is there).
    """
    points = [(row["step"], math.nan if row[metric] is None else row[metric]) for row in rows if metric in row]
    stretch = math.ceil(len(points) / max_points) if points else 1
    steps, values = [], []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        finite = [value for _, value in part if not math.isnan(value)]
        steps.append(sum(step for step, _ in part) / len(part))
        values.append(sum(finite) / len(finite) if finite else math.nan)
    return steps, values


def plot(rows: Sequence[Row], form: Literal["svg", "png"]) -> bytes:
    """All panels that have data, three in a row, as one picture."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = _shown_names(rows)
    panels = [panel for panel in PANELS if any(metric in names for metric, _ in panel.curves)]
    # A single point is no curve; the tiles and the table show it. (A run of one step keeps its points.)
    panels = [p for p in panels if any(len(series(rows, metric)[0]) > 1 for metric, _ in p.curves)] or panels
    num_columns = min(3, len(panels)) or 1
    num_rows = math.ceil(len(panels) / num_columns) or 1
    style = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8.5,
        "svg.fonttype": "path",
        "axes.edgecolor": "#c9ccd1",
        "axes.labelcolor": "#4a4f57",
        "xtick.color": "#6a7079",
        "ytick.color": "#6a7079",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.0 * num_columns, 2.5 * num_rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for index, axes in enumerate(grid.flat):
            if index < len(panels):
                _draw(axes, panels[index], rows)
            else:
                axes.set_axis_off()
        figure.supxlabel("step", fontsize=8.5, color="#6a7079")
        picture = io.BytesIO()
        figure.savefig(
            picture, format=form, dpi=130, facecolor="white", metadata={"Date": None} if form == "svg" else None
        )
    return picture.getvalue()


def _shown_names(rows: Sequence[Row]) -> set[str]:
    """The metrics of a run. The surrogate loss of a policy gradient says nothing; with a reward it is left out."""
    names = {name for row in rows for name in row}
    return names - {"train/loss"} if "critic/rewards/mean" in names else names


def _draw(axes: Any, panel: Panel, rows: Sequence[Row]) -> None:
    axes.set_title(panel.title, loc="left", fontsize=9.5, color="#22262b", pad=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eceef1", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.margins(x=0.02)
    curves = [(label, *series(rows, metric)) for metric, label in panel.curves]
    curves = [(label, steps, values) for label, steps, values in curves if steps]
    finite = [value for _, _, values in curves for value in values if not math.isnan(value)]
    if finite and panel.log and min(finite) > 0 and max(finite) > 10 * min(finite):
        axes.set_yscale("log")
    elif finite and max(finite) - min(finite) <= 0.02 * max(map(abs, finite)):
        # As good as constant: seen from zero, not through a magnifying glass.
        axes.set_ylim(min(0, 1.25 * min(finite)), max(0, 1.25 * max(finite)) or 1)
    for color, (label, steps, values) in zip(_PALETTE, curves):
        few = len(steps) <= 25
        axes.plot(steps, values, color=color, linewidth=1.5, marker="o" if few else None, markersize=2.6, label=label)
    if len(curves) > 1:
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(curves) > 2 else {"loc": "best"}
        axes.legend(frameon=False, fontsize=7.5, handlelength=1.2, labelcolor="#4a4f57", **beside)
    if all(isinstance(row["step"], int) for row in rows):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


# --------------------------------------------------------------------------------------------------------- the page

_STYLE = """
:root { --ink: #22262b; --soft: #6a7079; --line: #e3e5e9; --paper: #ffffff; --tint: #f6f7f9; --accent: #2f5d8a; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 72rem; color: var(--ink); background: var(--paper);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 2.6rem 0 .8rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); }
.soft { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.6rem 0 0; }
.tile { flex: 1 1 10.5rem; background: var(--tint); border-radius: 6px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .82rem; }
.warning { border-left: 3px solid #c8742b; background: #fdf6ef; padding: .6rem .9rem; margin: 1.2rem 0 0;
           white-space: pre-wrap; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 500; color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
.sample { border: 1px solid var(--line); border-radius: 6px; margin: 0 0 .8rem; overflow: hidden; }
.sample header { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: .45rem .9rem; background: var(--tint);
                 font-size: .85rem; color: var(--soft); }
.sample header b { color: var(--ink); font-weight: 600; }
pre { margin: 0; padding: .7rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere;
      font: 12.5px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre.prompt { color: var(--soft); border-bottom: 1px dashed var(--line); }
details { border: 1px solid var(--line); border-radius: 6px; margin: 0 0 .8rem; }
summary { cursor: pointer; padding: .5rem .9rem; color: var(--accent); }
"""


def _page(folder: Path, rows: Sequence[Row]) -> str:
    config_text = _read_text(folder / CONFIG)
    environment, launched = _read_json(folder / ENVIRONMENT), _read_json(folder / LAUNCH)
    title = _config_value(config_text, "name") or folder.name
    stage = _config_value(config_text, "stage")
    picture = plot(rows, "svg").decode()
    sections = [
        f"<h1>{_text(title)}</h1>",
        f'<div class="soft">{_text(_subtitle(stage, environment, launched))}</div>',
        _warning(launched),
        _tiles(rows, launched),
        "<h2>Curves</h2>" + picture[picture.index("<svg") :],
        _evaluations(rows),
        _samples(read_lines(folder / SAMPLES)),
        _folded("Resolved configuration", config_text, "Configuration and machine"),
        _folded("Machine and versions", json.dumps(environment, indent=2) if environment else ""),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _subtitle(stage: str, environment: Row, launched: Row) -> str:
    parts = [f"stage {stage}" if stage else ""]
    if launched:
        ranks = launched["ranks"]
        parts.append(f"{ranks} rank{'s' if ranks > 1 else ''}")
    if environment:
        gpus = environment.get("gpus") or []
        parts.append(f"{len(gpus)} × {gpus[0]['name']}" if gpus else f"CPU, {environment['cores']} cores")
        parts.append(f"started {environment['started'].replace('T', ' ')}")
    return " · ".join(part for part in parts if part)


def _warning(launched: Row) -> str:
    if launched.get("failure"):
        return f'<div class="warning">{_text("The run failed: " + launched["failure"])}</div>'
    if launched.get("interrupted_by"):
        return f'<div class="warning">The run was ended by {_text(launched["interrupted_by"])}.</div>'
    return ""


def _tiles(rows: Sequence[Row], launched: Row) -> str:
    """The few numbers one looks for first; start and end are means of five steps."""
    steps, names = [row["step"] for row in rows], _shown_names(rows)
    tiles = [("last step", str(max(steps)))]
    for label, metric, form in (
        ("reward", "critic/rewards/mean", "{:.3f}"),
        ("loss", "train/loss", "{:.3f}"),
        ("held-out accuracy, sampled", "eval/sampled_accuracy", "{:.3f}"),
        ("held-out accuracy, greedy", "eval/greedy_accuracy", "{:.3f}"),
        ("response length", "response_length/mean", "{:.1f}"),
        ("entropy, nats", "actor/entropy", "{:.3f}"),
    ):
        values = [row[metric] for row in rows if metric in names and row.get(metric) is not None]
        if len(values) == 1:
            tiles.append((label, form.format(values[0])))
        elif values:
            num = 1 if metric.startswith("eval/") else min(5, len(values) // 2)
            first, last = sum(values[:num]) / num, sum(values[-num:]) / num
            tiles.append((label, f"{form.format(first)} → {form.format(last)}"))
    diffs = [row["training/rollout_logprobs_diff_max"] for row in rows if row.get("training/rollout_logprobs_diff_max")]
    if diffs:
        tiles.append(("largest rollout/training log-prob. difference", f"{max(diffs):.1e}"))
    if launched:
        tiles.append(("time", duration(launched["seconds"])))
        tiles.append(("peak memory, all ranks", f"{launched['peak_memory_bytes'] / 1e9:.2f} GB"))
    cells = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(label)}</span></div>' for label, value in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _evaluations(rows: Sequence[Row]) -> str:
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    if not evaluated:
        return ""
    names = sorted({name for row in evaluated for name in row if name.startswith("eval/")})
    head = "<th>step</th>" + "".join(f"<th>{_text(name[5:].replace('_', ' '))}</th>" for name in names)
    lines = []
    for row in evaluated:
        cells = "".join(f"<td>{_number(row.get(name))}</td>" for name in names)
        lines.append(f"<tr><td>{row['step']}</td>{cells}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<h2>Held-out evaluation</h2><div class="scroll">{table}</div>'


def _samples(samples: Sequence[Row]) -> str:
    if not samples:
        return ""
    if len(samples) > MAX_SAMPLES:  # evenly over the run, first and last included
        samples = [samples[round(i * (len(samples) - 1) / (MAX_SAMPLES - 1))] for i in range(MAX_SAMPLES)]
    return "<h2>Sampled rollouts</h2>" + "".join(_sample(sample) for sample in samples)


def _sample(sample: Row) -> str:
    facts = [
        f"<b>step {_text(sample.get('step', ''))}</b>",
        f"<span>reward <b>{_number(sample.get('reward'))}</b></span>",
    ]
    components = sample.get("components") or {}
    facts += [f"<span>{_text(name)} {_number(value)}</span>" for name, value in components.items()]
    if sample.get("label") is not None:
        facts.append(f"<span>label {_text(sample['label'])}</span>")
    if "response_tokens" in sample:
        facts.append(f"<span>tokens {_text(sample['response_tokens'])}</span>")
    if "finish" in sample:
        facts.append(f"<span>{'cut at the limit' if sample['finish'] == 'length' else 'stopped'}</span>")
    prompt, response = _text(sample.get("prompt", "")), _text(sample.get("response", ""))
    return (
        f'<div class="sample"><header>{"".join(facts)}</header>'
        f'<pre class="prompt">{prompt}</pre><pre>{response}</pre></div>'
    )


def _folded(summary: str, text: str, heading: str = "") -> str:
    if not text:
        return ""
    above = f"<h2>{_text(heading)}</h2>" if heading else ""
    return f"{above}<details><summary>{_text(summary)}</summary><pre>{_text(text)}</pre></details>"


def _text(value: Any) -> str:
    """Anything as HTML text. Rollouts are untrusted: a policy may well write ``<script>``."""
    return html.escape(str(value))


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if not isinstance(value, float):
        return _text(value)
    if value.is_integer() and abs(value) >= 10:
        return f"{value:.0f}"  # a count: the metrics file knows floats only
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def _config_value(config_text: str, key: str) -> str:
    """A top-level scalar of our own resolved configuration."""
    for line in config_text.splitlines():
        if line.startswith(f"{key}:"):
            return line.partition(":")[2].strip().strip("'\"")
    return ""


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _read_json(path: Path) -> Row:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
