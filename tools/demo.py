"""The demo: a small DeepSeek-V3-style model learns chain sums by R1-Zero, on 2 ranks of this machine's CPU.

    make demo

1. A light supervised base on noisy traces, split over 2 pipeline stages.
2. GRPO with rule rewards from that checkpoint, now over 2 expert-parallel ranks: it is resharded on the way.
3. The result as a Hugging Face folder, loaded with `AutoModelForCausalLM` and asked one held-out problem.

Prints what the held-out problems say before and after, and where to look. Interrupted, it goes on when started again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/demo", type=Path, help="folder for the two runs")
    runs = parser.parse_args().runs
    base, zero = runs / "base", runs / "zero"
    started = time.monotonic()
    train("chain_sum_base.yaml", base)
    train("chain_sum_zero_ep2.yaml", zero, f"checkpoint.load={base}/checkpoints/final")
    exported = runs / "zero_hf"
    if not exported.exists():
        run("convert", "to-hf", str(zero / "checkpoints" / "final"), str(exported), "--verify", "--quiet")
    ask(exported, zero)
    return summarise(base, zero, time.monotonic() - started)


def train(example: str, folder: Path, *overrides: str) -> None:
    run("train", str(ROOT / "examples" / example), f"output_dir={folder}", "parallel.device=cpu", *overrides)


def run(*arguments: str) -> None:
    code = subprocess.run([sys.executable, "-m", "r1_megatron.cli", *arguments], env=os.environ).returncode
    if code:
        sys.exit(code)


def ask(exported: Path, zero: Path) -> None:
    """One held-out problem for the exported model, by nothing but Transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from r1_megatron.config.load import load_config
    from r1_megatron.data.tasks import build_task

    logging.disable_progress_bar()
    data = load_config(zero / "config.yaml").data
    task = build_task(data.source, data.task_options, data.num_train, data.num_eval, data.seed)
    problem = task.eval[0]
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported)
    chat = [{"role": "user", "content": task.prompt_text(problem)}]
    asked = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
    answered = model.generate(**asked, max_new_tokens=48, do_sample=False)
    print(f"""
exported for Transformers: {exported}
  AutoModelForCausalLM, greedy, a held-out problem (the answer is {task.label(problem)}):
  {tokenizer.decode(answered[0])}""")


def summarise(base: Path, zero: Path, seconds: float) -> int:
    """Prints the table; exit code 1 if the policy did not learn what it always has."""
    rows = [json.loads(line) for line in (zero / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval/sampled_accuracy" in row]
    steps = [row for row in rows if "critic/rewards/mean" in row]
    before, after = evaluations[0], evaluations[-1]
    peak = max(json.loads((run / "launch.json").read_text())["peak_memory_bytes"] for run in (base, zero))
    difference = max(row["training/rollout_probs_diff_max"] for row in steps)
    print(f"""
held-out accuracy          sampled   greedy
  base (noisy traces)      {before["eval/sampled_accuracy"]:7.3f}  {before["eval/greedy_accuracy"]:7.3f}
  after {len(steps):3d} GRPO steps     {after["eval/sampled_accuracy"]:7.3f}  {after["eval/greedy_accuracy"]:7.3f}

largest difference between rollout and training probability of a sampled token: {difference:.1e}
peak memory of all ranks together: {peak / 1e9:.2f} GB; {seconds / 60:.1f} minutes in all
curves, samples, configuration: {zero / "report.html"}""")
    expected = {
        "sampled accuracy of the base <= 0.35": before["eval/sampled_accuracy"] <= 0.35,
        "sampled accuracy afterwards >= 0.85": after["eval/sampled_accuracy"] >= 0.85,
        "greedy accuracy not more than 0.03 below the base's": after["eval/greedy_accuracy"]
        >= before["eval/greedy_accuracy"] - 0.03,
        "peak memory <= 4 GB": peak <= 4e9,
    }
    missed = [name for name, holds in expected.items() if not holds]
    for name in missed:
        print(f"error: expected {name}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
