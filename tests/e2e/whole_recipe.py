"""``make test-pipeline``: every node of `examples/r1_tiny_pipeline.yaml` in a few steps, killed in one of every stage.

Not one of `make test`'s, for it takes six minutes. Nothing is learned at these sizes. What is shown is that each stage
gets what it needs from the others and goes on from wherever it was killed, and that Transformers loads the students.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/r1_tiny_pipeline.yaml"
# One node of every stage, and what is there in its folder when it is at work.
KILLED = {
    "base": "metrics.jsonl",
    "zero": "metrics.jsonl",
    "cold_data": "blocks/inputs.json",
    "helpful": "metrics.jsonl",
    "qwen": "metrics.jsonl",
    "evaluate_base": "completions",
}
STEPS = {
    "base": 80,
    "zero": 3,
    "zero_language": 2,
    "rl_1": 2,
    "rl_2": 4,
    "qwen_base": 40,
    "qwen_rl": 2,
    "llama_base": 40,
}
# Everything that ends is right, so that hardly trained models leave something to learn from; the shorter the better.
ANYTHING = "[{function: format, at_least: 0}, {function: token_count, options: {schedule: [[1, 10]], tolerance: 54}}]"
BENCHMARK = "{format: held_out, name: bilingual, sources: [bilingual], num_prompts: 6, samples_per_prompt: 2}"


def overrides() -> list[str]:
    found = [f"{node}.train.steps={steps}" for node, steps in STEPS.items()]
    found += [f"{node}.checkpoint.interval=1" for node in ("zero", "rl_1", "rl_2", "helpful")]
    found += [f"{node}.rollout.prompts_per_step=4" for node in ("zero", "zero_language", "rl_1", "rl_2", "qwen_rl")]
    for node in ("cold_data", "rejected", "general", "general_held_out"):
        found += [
            f"{node}.reward.terms={ANYTHING}",
            f"{node}.reject.num_prompts=24",
            f"{node}.rollout.prompts_per_step=8",
        ]
        found += [f"{node}.reject.filters={{format: none}}"]
    found += [f"{node}.reject.pairs.min_difference=0.01" for node in ("general", "general_held_out")]
    found += [
        "cold_start.sft.epochs=1",
        "sft_2.sft.epochs=1",
        "qwen.sft.epochs=2",
        "llama.sft.epochs=1",
        "base.checkpoint.interval=20",
    ]
    found += ["helpful.reward_model.batch_size=4", "rl_2.reward.terms.4.last_steps=3"]
    models = (
        "base",
        "zero",
        "zero_language",
        "cold_start",
        "rl_1",
        "sft_2",
        "rl_2",
        "qwen_base",
        "qwen",
        "qwen_rl",
        "llama",
    )
    return found + [f"evaluate_{model}.evaluate.benchmarks=[{BENCHMARK}]" for model in models]


def command(verb: str, folder: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "r1_megatron.cli",
        "pipeline",
        verb,
        str(EXAMPLE),
        f"output_dir={folder}",
        *overrides(),
    ]


def kill_in(node: str, folder: Path, sign: str) -> str:
    """Run until the node is at work, then kill the driver and everything below it. Answers what was said."""
    log = folder.parent / f"{node}.txt"
    with log.open("w") as out:
        driver = subprocess.Popen(command("run", folder), stdout=out, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not (folder / node / sign).exists():
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)
    family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    driver.wait()
    return log.read_text()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's folder when all is done, after six kills."""
    folder = tmp_path_factory.mktemp("recipe") / "runs"
    for node, sign in KILLED.items():
        said = kill_in(node, folder, sign)
        assert f"{node}: node" in said and f"{node}: done" not in said
    done = subprocess.run(command("run", folder), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all 28 nodes are done" in done.stdout and "A distilled student is more often right" in done.stdout
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_there_once(recipe: Path) -> None:
    for node, steps in STEPS.items():
        done = [row["step"] for row in rows_of(recipe / node) if "train/updates" in row]
        assert done == list(range(1, steps + 1)), node


def test_each_stage_has_got_what_others_made(recipe: Path) -> None:
    manifest = json.loads((recipe / "rejected/manifest.json").read_text())
    assert manifest["counts"]["all"]["kept"] > 0
    judged = [name for row in rows_of(recipe / "rl_2") for name in row if name.startswith("reward/reward_model")]
    assert judged, "translations, by the reward model"
    told = subprocess.run(
        [*command("status", recipe), "--provenance", "llama"], capture_output=True, text=True, check=True
    )
    for node in ("rejected", "rl_1", "cold_start", "cold_data", "zero", "base", "general"):
        assert f"of {node}" in told.stdout, told.stdout


def test_status_and_report(recipe: Path) -> None:
    told = subprocess.run([*command("status", recipe), "--json"], capture_output=True, text=True, check=True)
    state = json.loads(told.stdout)
    assert {node["state"] for node in state["nodes"]} == {"done"} and len(state["nodes"]) == 28
    assert {finding["verdict"] for finding in state["findings"]} <= {"holds", "fails", "open"} and state["findings"]
    page = (recipe / "report.html").read_text()
    for label in ("Base", "R1-Zero", "R1", "Qwen2 distilled", "Llama distilled"):
        assert f"<tr><th>{label}</th>" in page


@pytest.mark.parametrize("student", ["qwen", "llama"])
def test_a_student_is_a_model_of_transformers(recipe: Path, student: str) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(recipe / student / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(recipe / student / "hf")
    assert type(model).__name__.lower().startswith(student)
    asked = "User: 小明有5个苹果。又买了3个。还剩几个苹果？ Assistant:"
    prompt = tokenizer(asked, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(written[0]).startswith(asked) and written.shape[1] > prompt["input_ids"].shape[1]
