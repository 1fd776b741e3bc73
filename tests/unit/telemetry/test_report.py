"""The report: self-contained, escaped, made from files alone, whatever state the run is in."""

from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser

import pytest

from r1_megatron.telemetry.report import read_lines, series, write_report
from r1_megatron.telemetry.writers import RunLog


class _Page(HTMLParser):
    """Tags, what they refer to, and all text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    with RunLog(tmp_path, total_steps=3, tensorboard=False, stream=io.StringIO()) as log:
        log.evaluation(0, {"sampled_accuracy": 0.25, "greedy_accuracy": 0.75})
        for step in (1, 2, 3):
            attack = f"</pre><script>alert({step})</script><img src=x onerror=alert(1)> & 两\u2028"
            log.samples(step, [{"prompt": attack, "response": attack, "label": attack, "reward": 0.5,
                                "components": {attack: 1.0}, "finish": "length"}])  # fmt: skip
            log.write(step, {"critic/rewards/mean": step / 4, "actor/grad_norm": math.nan if step == 2 else 1.0})
        log.evaluation(3, {"sampled_accuracy": 0.625, "greedy_accuracy": 0.75})
    (tmp_path / "config.yaml").write_text("stage: grpo\nname: <i>mine</i>\n")
    return tmp_path


def test_page_is_self_contained_and_shows_untrusted_text_as_text(run):
    page = _Page(write_report(run).read_text(encoding="utf-8"))
    assert not page.tags & {"script", "img", "link", "iframe", "i"}
    assert page.references == []
    assert "</pre><script>alert(2)</script><img src=x onerror=alert(1)> & 两\u2028" in page.text
    assert "<i>mine</i>" in page.text
    assert "svg" in page.tags


def test_page_has_the_numbers_of_the_run(run):
    text = _Page(write_report(run).read_text(encoding="utf-8")).text
    assert "0.250 → 0.750" in text  # reward
    assert "0.250 → 0.625" in text  # sampled accuracy
    assert "0.625" in text and "cut at the limit" in text


def test_a_failed_run_says_so(run):
    launch = {"exit_code": 1, "ranks": 2, "seconds": 9.0, "peak_memory_bytes": 10**9, "failure": "rank 1 <died>"}
    (run / "launch.json").write_text(json.dumps(launch))
    assert "The run failed: rank 1 <died>" in _Page(write_report(run).read_text(encoding="utf-8")).text


def test_png(run):
    assert write_report(run, "png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_is_just_writing_its_last_line(run):
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "crit')
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [0, 1, 2, 3, 3]
    write_report(run)


@pytest.mark.parametrize("content, message", [(None, "is not a run folder"), ("", "no step has finished")])
def test_nothing_to_report(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path)


def test_an_evaluation_alone_can_be_reported(tmp_path):
    with RunLog(tmp_path, total_steps=1, tensorboard=False, stream=io.StringIO()) as log:
        log.evaluation(0, {"pass_at_8": 0.5})
    assert "pass at 8" in _Page(write_report(tmp_path).read_text()).text


def test_long_series_keep_their_mean_and_their_gaps():
    rows = [{"step": step, "x": None if 40 <= step < 50 else float(step % 7)} for step in range(1000)]
    steps, values = series(rows, "x", max_points=100)
    assert len(steps) == 100 and steps[0] == 4.5
    assert math.isnan(values[4])
    assert values[0] == pytest.approx(sum(step % 7 for step in range(10)) / 10)
    assert series(rows, "absent") == ([], [])
