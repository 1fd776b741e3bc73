"""The page of a pipeline: the evaluations that the file wants compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from r1_megatron.evaluation.compare import compare, signed
from r1_megatron.evaluation.regrade import regrade
from r1_megatron.evaluation.results import read_evaluation
from r1_megatron.pipeline import page
from r1_megatron.pipeline.claims import read_claims
from r1_megatron.pipeline.findings import claims_text, evaluations_of, findings
from r1_megatron.pipeline.read import read_pipeline
from r1_megatron.pipeline.state import read_state
from tests.unit.evaluation.test_results import ANSWERS, made_up

NODES = "".join(
    f"  {name}: {{config: {{stage: evaluate, checkpoint: {{load: base}}, seed: {seed}}}}}\n"
    for seed, name in enumerate(("early", "late", "never"), 1)
)


def test_evaluations_are_compared_in_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    made_up(tmp_path / "one", "one")
    made_up(tmp_path / "other", "other", answers=(*ANSWERS[:1], (["1", "1", "1", "1"], "1"), *ANSWERS[2:]))
    for name in ("one", "other"):
        regrade(tmp_path / name)
    compared = "compare: {Early: '${early.evaluation}', Late: '${late.evaluation}', Never: '${never.evaluation}'}\n"
    (tmp_path / "p.yaml").write_text(f"name: p\noutput_dir: runs/p\nnodes:\n{NODES}{compared}")
    pipeline, problems = read_pipeline(tmp_path / "p.yaml")
    assert problems == []
    state = read_state(pipeline)
    for each, made in zip(state.nodes, ("one", "other")):  # nobody has made the third
        assert each.folder is not None
        shutil.copytree(tmp_path / made, each.folder)
    said = page.page(state)
    rows = compare([read_evaluation(tmp_path / name) for name in ("one", "other")], ["Early", "Late"])
    expected = {row["figure"]: signed(row["difference"]) for row in rows}
    assert set(expected) == {"pass@1", "pass@2", "cons@3", "cons@4", "greedy"}
    assert "<th>against Early</th>" in said and "<tr><th>Late</th>" in said
    assert all(difference in said for difference in expected.values())
    assert expected["pass@1"].startswith("+12.5 ["), "one problem of four, from two right samples of four to four"
    assert "Not evaluated yet: Never." in said


CLAIMS = """
claims:
  - {say: Late is better than early., better: Late, than: Early}
  - {say: And the other way round., better: Early, than: Late, figures: [pass@1, greedy], otherwise: Late!}
  - {say: Never is best., better: Never, than: Late}
"""


def test_claims_are_put_to_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    made_up(tmp_path / "one", "one", answers=[(["99"] * 4, "99")] * 40)  # problem i asks for i
    right = [([f"{i}"] * 3 + ["99"], f"{i}") if i < 30 else (["99"] * 4, "99") for i in range(40)]
    made_up(tmp_path / "other", "other", answers=right)
    for name in ("one", "other"):
        regrade(tmp_path / name)
    compared = "compare: {Early: '${early.evaluation}', Late: '${late.evaluation}', Never: '${never.evaluation}'}\n"
    (tmp_path / "p.yaml").write_text(f"name: p\noutput_dir: runs/p\nnodes:\n{NODES}{compared}{CLAIMS}")
    pipeline, problems = read_pipeline(tmp_path / "p.yaml")
    assert problems == []
    state = read_state(pipeline)
    for each, made in zip(state.nodes, ("one", "other")):
        assert each.folder is not None
        shutil.copytree(tmp_path / made, each.folder)
    found = findings(state, evaluations_of(state))
    assert [(one.claim.better, one.figure, one.verdict) for one in found] == [
        ("Late", "pass@1", "holds"), ("Early", "pass@1", "fails"), ("Early", "greedy", "fails"),
    ]  # fmt: skip
    assert found[0].values == (0.0, 0.5625) and found[0].num_problems == 40  # 30 of 40 problems, 3 of 4 samples
    said = "\n".join(claims_text(state, found))
    assert "Late is better than early.\n      sums pass@1 56.2% against 0.0%, +56.2 [+" in said
    assert said.count("Late!") == 1 and page.page(state).count("Late!") == 1
    assert said.endswith("Never is best.\n      nothing to compare: not evaluated yet, or no benchmark has the figures")
    html = page.page(state)
    assert "<td>holds</td>" in html and "<td>fails</td>" in html and "Nothing to compare: not evaluated yet" in html


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ("oops", "claims: expected a list, of say, better, than, figures, benchmarks, otherwise each."),
        ("[oops]", "claims.0: expected say, better, than"),
        (
            "[{say: x, better: Late, than: Earlie}]",
            "claims.0.than=Earlie: no row of compare is called so. Did you mean",
        ),
        ("[{say: x, better: Late, than: Late}]", "claims.0.than=Late is what is claimed to be better. Name another"),
        ("[{say: x, better: Late}]", "claims.0.than: expected a text."),
        ("[{say: x, better: Late, than: Early, figure: greedy}]", "claims.0.figure: unknown key. Known: say"),
        ("[{say: x, better: Late, than: Early, figures: greedy}]", "claims.0.figures=greedy: expected a list."),
    ],
)
def test_wrong_claims_are_named(claims: str, said: str) -> None:
    problems: list[str] = []
    assert read_claims(yaml.safe_load(claims), ["Early", "Late"], problems) == ()
    assert any(problem.startswith(said) for problem in problems), problems
