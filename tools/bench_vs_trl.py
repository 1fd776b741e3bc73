"""r1_megatron against TRL's ``GRPOTrainer`` and Transformers' ``generate``, on this CPU, in the same run.

    python tools/bench_vs_trl.py                                # everything, 9 minutes on 2 cores
    python tools/bench_vs_trl.py --only rollout --rounds 1      # one of: rollout, train, scaling, options
    python tools/bench_vs_trl.py --peer-python /path/to/venv/bin/python    # where TRL is, if not here

Both sides get the same random DeepSeek-V3-style model (the preset ``bench_256``), the same prompts, numbers of samples,
lengths, reward and precision (fp32), and 2 threads in all. In every round each candidate runs once, ours and the peer's
in turn, in processes of its own: a warm-up, which does not count, and two repetitions. The median over all rounds
counts, and each side's best layout.

* rollout: 64 completions. 128 new tokens inside of a GRPO step; 256 by the engine alone against ``generate`` at batch
  64; and completions that end by themselves, by the same law on both sides (mean 50, at most 256 tokens).
* train: whole GRPO steps (rollout, reward, loss, optimizer), ours as ``r1-megatron train`` runs them. Training
  tokens/s are the step's prompt and completion tokens, padding not counted, over all of the step that is not rollout
  and reward. Memory is the largest sum over all processes of their proportional set sizes (Linux's PSS).
* scaling: the same steps of ours on one rank with one thread and on two ranks with one thread each.
* options: the same steps of ours under DP2 with single options the other way than by default.

Before anything is timed, the two sides' log-probabilities of sampled tokens are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import yaml

from tools.measure import cpu_name, mebibytes, table
from tools.memory_watch import MemoryWatch
from tools.rl_model import END_WEIGHT, PRESET, convert, write_model
from tools.rl_workload import Workload, write_prompts

ROOT = Path(__file__).resolve().parent.parent
CORES = 2
PARTS = ("rollout", "train", "scaling", "options")
# Of log-probabilities in fp32: rollout against training, and both sides against each other.
DIFFERENCE_LIMIT = 1e-4
# Of every process: steps or calls of one candidate in one round.
WARM_UP_STEPS, REPEATS = 1, 2
_MEMORY_EVERY_S = 0.2


@dataclass(frozen=True)
class Layout:
    """Ranks of ours and how they share the work; ``threads`` of each."""

    name: str
    parallel: dict[str, int]
    ranks: int = CORES
    threads: int = 1


ONE_RANK = Layout("1 rank, 2 threads", {}, 1, CORES)
ONE_THREAD = Layout("1 rank, 1 thread", {}, 1, 1)
DP2 = Layout("DP2", {"data_parallel_size": 2})
TP2 = Layout("TP2", {"tensor_model_parallel_size": 2})
PP2 = Layout("PP2", {"pipeline_model_parallel_size": 2})
EP2 = Layout("EP2", {"data_parallel_size": 2, "expert_model_parallel_size": 2})
LAYOUTS = {
    "rollout": (ONE_RANK, DP2),
    "train": (ONE_RANK, DP2, EP2, TP2, PP2),
    "scaling": (ONE_THREAD, DP2, EP2, TP2, PP2),
}


# Options of a run that are not its default ones, by section.
OPTIONS = {
    "train.share_prompts: false": {"train": {"share_prompts": False}},
    "rollout.router_replay: false": {"rollout": {"router_replay": False}, "rl": {"probs_diff_limit": None}},
    "train.bf16: true": {"train": {"bf16": True}, "rl": {"probs_diff_limit": None}},
}


@dataclass(frozen=True)
class Trainer:
    """A way to run TRL. ``batch_size``: completions of a forward and backward of one process."""

    name: str
    processes: int
    batch_size: int = 16


TRAINERS = (Trainer("TRL, 2 threads", 1), Trainer("TRL, DDP 2", 2))


@dataclass(frozen=True)
class Goal:
    """A figure of ours beside the peer's. ``ratio`` is in our favour above 1, and has to reach ``goal`` if
    there is one."""

    what: str
    ours: str
    peers: str
    ratio: float
    goal: float | None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio >= self.goal

    def cells(self) -> list[str]:
        goal = "" if self.goal is None else f"{self.goal:.2g}"
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return [self.what, self.ours, self.peers, f"{self.ratio:.2f}", goal, met]


@dataclass
class Bench:
    """Files, processes and figures of one run of the benchmark.

    ``figures[candidate][name]`` has a number per repetition.
    """

    folder: Path
    peer_python: str
    workload: Workload
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Weights for both sides, prompts, and the workload as the peer's process reads it."""
        for name, end_weight in END_WEIGHT.items():
            convert(write_model(self.folder / name, end_weight), self.folder / f"{name}_checkpoint")
        write_prompts(self.folder / "prompts.jsonl", self.workload, WARM_UP_STEPS + REPEATS)
        self.workload.save(self.folder / "workload.json")

    def note(self, candidate: str, **values: float) -> None:
        for name, value in values.items():
            self.figures.setdefault(candidate, {}).setdefault(name, []).append(value)

    def median(self, candidate: str, name: str) -> float:
        return statistics.median(self.figures[candidate][name])

    def best(self, candidates: Sequence[str], name: str) -> str:
        """The candidate with the largest median."""
        return max(candidates, key=lambda candidate: self.median(candidate, name))

    # ---------------------------------------------------------------------------------------------------- our side

    def config(self, layout: Layout, model: str, number: int) -> dict[str, Any]:
        """A run's configuration, as a user would write it."""
        work = self.workload
        return {
            "stage": "grpo",
            "name": "bench_vs_trl",
            "output_dir": str(self.folder / f"run_{number}"),
            "model": {"preset": PRESET, "moe_router_bias_update_rate": 0.0},
            "parallel": {"device": "cpu", **layout.parallel},
            "tokenizer": {"kind": "huggingface", "path": str(self.folder / model)},
            "data": {
                "source": "jsonl",
                "path": str(self.folder / "prompts.jsonl"),
                "template": "none",
                "shuffle": False,
                "max_prompt_tokens": work.max_prompt_tokens,
            },
            "sampling": {},
            "rollout": {
                "prompts_per_step": work.num_prompts,
                "samples_per_prompt": work.samples_per_prompt,
                "max_sequences": work.num_completions,
            },
            "reward": {"terms": [{"function": "tools.rl_workload:reward"}]},
            "rl": {"advantage_normalization": "std", "aggregation": "token_mean", "kl_coef": 0.0},
            "train": {"steps": WARM_UP_STEPS + REPEATS, "lr": work.learning_rate},
            "evaluate": {"num_prompts": 0},
            "checkpoint": {"load": str(self.folder / f"{model}_checkpoint"), "save_optimizer": False},
            "telemetry": {"tensorboard": False, "report": "none", "num_samples": 0},
        }

    def write_config(
        self, layout: Layout, model: str, new_tokens: int, options: dict[str, dict[str, Any]] | None = None
    ) -> Path:
        number = len(list(self.folder.glob("run_*.yaml")))
        config = self.config(layout, model, number)
        config["sampling"]["max_new_tokens"] = new_tokens
        for section, values in (options or {}).items():
            config[section].update(values)
        path = self.folder / f"run_{number}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def our_rollouts(self, layout: Layout, model: str, new_tokens: int, repeats: int) -> dict[str, Any]:
        """``tools/rollout_side.py`` on the layout's ranks."""
        file = self.write_config(layout, model, new_tokens)
        result = file.with_suffix(".json")
        command = [
            sys.executable,
            str(ROOT / "tools" / "rollout_side.py"),
            str(file),
            str(result),
            "--repeats",
            str(repeats),
        ]
        watched(command, environment(layout.threads))
        return json.loads(result.read_text())

    def our_steps(self, layout: Layout, option: str = "") -> None:
        """``r1-megatron train``; the figures of its measured steps."""
        name = option or layout.name
        file = self.write_config(layout, "full", self.workload.new_tokens, OPTIONS.get(option))
        command = [sys.executable, "-m", "r1_megatron.cli", "train", str(file)]
        memory = watched(command, environment(layout.threads))
        metrics = (file.with_suffix("") / "metrics.jsonl").read_text().splitlines()
        for row in map(json.loads, metrics[WARM_UP_STEPS:]):
            train = row["timing_s/step"] - row["timing_s/rollout"] - row["timing_s/reward"]
            self.note(
                name,
                step=row["timing_s/step"],
                rollout=row["rollout/num_tokens"] / row["timing_s/rollout"],
                train=row["perf/total_num_tokens"] / train,
                **{"difference" if option else "replayed": row["training/rollout_logprobs_diff_max"]},
            )
        self.note(name, memory=memory)

    # --------------------------------------------------------------------------------------------------- their side

    def peer(self, task: str, model: str, *options: str, processes: int = 1) -> tuple[dict[str, Any], int]:
        """What ``tools/trl_side.py`` found, and its peak memory."""
        result = self.folder / "peer.json"
        start = [self.peer_python]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        files = [self.folder / model, self.folder / "workload.json", self.folder / "prompts.jsonl", result]
        command = [*start, str(ROOT / "tools" / "trl_side.py"), task, *map(str, files), *options]
        memory = watched(command, environment(CORES // processes))
        return json.loads(result.read_text()), memory

    def peer_steps(self, trainer: Trainer) -> None:
        """TRL's figures of its measured steps."""
        steps = WARM_UP_STEPS + REPEATS
        options = ("--batch-size", str(trainer.batch_size), "--steps", str(steps))
        found, memory = self.peer("grpo", "full", *options, processes=trainer.processes)
        for step in found["steps"][WARM_UP_STEPS:]:
            if step["new_tokens"] != self.workload.num_completions * self.workload.new_tokens:
                sys.exit(f"{trainer.name}: {step['new_tokens']} new tokens: some completion ended early")
            self.note(
                trainer.name,
                step=step["step"],
                rollout=step["new_tokens"] / step["generate"],
                train=step["tokens"] / step["train"],
            )
        self.note(trainer.name, memory=memory)

    # ------------------------------------------------------------------------------------------------------ the parts

    def compare(self) -> None:
        """Ends the program unless Transformers gives sampled tokens the log-probabilities that we do.

        The median counts: where two experts' scores are a tie but for rounding, each side may choose another one, which
        moves a token by up to 1e-3 and those after it by less. Between our own rollout and training router replay
        (`rollout.router_replay`, the default) rules that out; this once the difference without it is measured, too.
        """
        found = self.our_rollouts(ONE_RANK, "full", self.workload.new_tokens, repeats=1)
        samples = self.folder / "samples.json"
        samples.write_text(json.dumps(found["samples"]))
        theirs, _ = self.peer("score", "full", "--samples", str(samples))
        print(f"|ours - Transformers'| log-probability: median {theirs['median']:.1e}, largest {theirs['max']:.1e}")
        if not theirs["median"] <= DIFFERENCE_LIMIT:
            sys.exit(f"error: the two sides are not the same model: {theirs['median']:.1e} > {DIFFERENCE_LIMIT:.0e}")
        self.note("compared", difference=found["difference"], replayed=found["difference_replayed"])

    def rollout_round(self) -> None:
        """The engine alone beside ``generate``: completions of one length, and completions that end by themselves."""
        length = self.workload.long_new_tokens
        for model in END_WEIGHT:
            for layout in LAYOUTS["rollout"]:
                self.note_rollout(layout.name, model, self.our_rollouts(layout, model, length, REPEATS))
            found, _ = self.peer("generate", model, "--new-tokens", str(length), "--repeats", str(REPEATS))
            self.note_rollout("generate", model, found)

    def note_rollout(self, candidate: str, model: str, found: dict[str, Any]) -> None:
        for call in found["calls"]:
            self.note(f"{candidate}, {model}", rollout=call["tokens"] / call["seconds"], tokens=call["tokens"])

    def step_round(self, parts: Sequence[str]) -> None:
        """GRPO steps of every layout that the parts ask for, and of TRL if they are compared."""
        layouts = {layout.name: layout for part in parts if part in ("train", "scaling") for layout in LAYOUTS[part]}
        if "options" in parts:
            layouts |= {DP2.name: DP2}
        for layout in layouts.values():
            self.our_steps(layout)
        for option in OPTIONS if "options" in parts else ():
            self.our_steps(DP2, option)
        for trainer in TRAINERS if "train" in parts else ():
            self.peer_steps(trainer)

    def show_rollout(self) -> list[Goal]:
        """Prints the table of the engine and ``generate``."""
        ours, longest = [layout.name for layout in LAYOUTS["rollout"]], self.workload.long_new_tokens
        rows, goals = [], []
        for model, what, goal in (
            ("full", f"{longest} new tokens", 8.0),
            ("tailed", f"ending by themselves, at most {longest}", None),
        ):
            for name in (*ours, "generate"):
                mean = self.median(f"{name}, {model}", "tokens") / self.workload.num_completions
                rows.append([what, name, f"{mean:.0f}", f"{self.median(f'{name}, {model}', 'rollout'):.0f}"])
            candidates = [f"{name}, {model}" for name in ours]
            goals.append(self.speed_goal(f"rollout against generate, {what}", candidates, f"generate, {model}", goal))
        print(f"\nrollout of {self.workload.num_completions} completions, the engine alone")
        print(table(["completions", "", "mean tokens", "tok/s"], rows))
        return goals

    def speed_goal(self, what: str, ours: Sequence[str], peer: str, goal: float | None, name: str = "rollout") -> Goal:
        """The best of ours by tokens per second beside the peer."""
        best = self.best(ours, name)
        mine, theirs = self.median(best, name), self.median(peer, name)
        layout = best.removesuffix(", full").removesuffix(", tailed")
        return Goal(what, f"{mine:.0f} tok/s ({layout})", f"{theirs:.0f} tok/s", mine / theirs, goal)

    def show_steps(self, names: Sequence[str], title: str) -> None:
        """Prints a line per candidate; gain is over the first one's seconds."""
        rows = []
        for name in names:
            step, memory = self.median(name, "step"), max(self.figures[name]["memory"])
            rollout, train = self.median(name, "rollout"), self.median(name, "train")
            gain = self.median(names[0], "step") / step
            rows.append([name, f"{step:.2f} s", f"{rollout:.0f}", f"{train:.0f}", mebibytes(memory), f"{gain:.2f}"])
        print(f"\n{title}")
        print(table(["", "step", "rollout tok/s", "training tok/s", "memory", "speed"], rows))

    def step_goals(self) -> list[Goal]:
        """Each side's best layout; of memory and whole steps that with the fastest step, and TRL's single process."""
        ours = [layout.name for layout in LAYOUTS["train"]]
        mine = min(ours, key=lambda name: self.median(name, "step"))
        theirs = min((trainer.name for trainer in TRAINERS), key=lambda name: self.median(name, "step"))
        step = self.median(mine, "step"), self.median(theirs, "step")
        memory = max(self.figures[mine]["memory"]), max(self.figures[TRAINERS[0].name]["memory"])
        fastest = {name: self.best([trainer.name for trainer in TRAINERS], name) for name in ("rollout", "train")}
        return [
            self.speed_goal(
                f"rollout in a step, {self.workload.new_tokens} new tokens", ours, fastest["rollout"], 4.0
            ),
            self.speed_goal("training in a step", ours, fastest["train"], 1.2, "train"),
            Goal("whole GRPO step", f"{step[0]:.2f} s ({mine})", f"{step[1]:.2f} s ({theirs})", step[1] / step[0], 2.5),
            Goal(
                "peak memory of all processes", mebibytes(memory[0]), mebibytes(memory[1]), memory[1] / memory[0],
                1 / 1.5,
            ),
        ]  # fmt: skip


def environment(threads: int) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def watched(command: Sequence[str], env: dict[str, str]) -> int:
    """Peak memory of a command, with all below it. Its output is shown if it fails."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        watch = MemoryWatch(process.pid, _MEMORY_EVERY_S)
        watch.start()
        if process.wait() != 0:
            output.seek(0)
            sys.exit(f"{output.read()}\n{' '.join(command)} ended with {process.returncode}")
    return watch.peak


def require_peer(python: str) -> str:
    """The versions of the peer's packages. Ends the program with the remedy where they are not installed."""
    code = "import torch, transformers, trl; print(f'TRL {trl.__version__}, Transformers {transformers.__version__}, "
    code += "torch {torch.__version__}')"
    asked = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        reason = asked.stderr.strip().splitlines()[-1:]
        sys.exit(
            f"--peer-python: {python} cannot import TRL ({' '.join(reason)}). Install it there: pip install "
            "'r1_megatron[bench]', or name the python of an environment that has it (pip install trl)."
        )
    return asked.stdout.strip()


def main() -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has TRL (default: this one)")
    parser.add_argument("--rounds", type=int, default=2, help="each measures everything twice")
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    parts = [arguments.only] if arguments.only else PARTS
    versions = require_peer(arguments.peer_python)
    with tempfile.TemporaryDirectory(prefix="bench_vs_trl_") as folder:
        bench = Bench(Path(folder), arguments.peer_python, Workload())
        bench.prepare()
        print(f"{cpu_name()}, {CORES} threads in all; {versions}; load {os.getloadavg()[0]:.1f}")
        bench.compare()
        for number in range(arguments.rounds):
            print(f"round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            if "rollout" in parts:
                bench.rollout_round()
            bench.step_round(parts)
    goals = report(bench, parts)
    if arguments.json:
        found = {"figures": bench.figures, "goals": [asdict(goal) | {"met": goal.met} for goal in goals]}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def report(bench: Bench, parts: Sequence[str]) -> list[Goal]:
    """Prints the tables and the goals."""
    goals = bench.show_rollout() if "rollout" in parts else []
    if "scaling" in parts:
        bench.show_steps([layout.name for layout in LAYOUTS["scaling"]], "scaling: GRPO steps, ours, 1 thread a rank")
    if "options" in parts:
        bench.show_steps([DP2.name, *OPTIONS], "options: GRPO steps of DP2, by default and otherwise")
    if "train" in parts:
        names = [each.name for each in (*TRAINERS, *LAYOUTS["train"])]
        bench.show_steps(names, f"GRPO steps of {bench.workload.num_completions} completions")
        goals += bench.step_goals()
    if goals:
        print("\neach side's best layout; ratio above 1 is in our favour")
        print(table(["", "ours", "peer's", "ratio", "goal", "met"], [goal.cells() for goal in goals]))
    worst = max(value for each in bench.figures.values() for value in each.get("replayed", []))
    met = "yes" if worst <= DIFFERENCE_LIMIT else "NO"
    print(f"largest |rollout - training| log-probability: {worst:.1e} (limit {DIFFERENCE_LIMIT:.0e}: {met})")
    print(f"once without router replay, where near ties show: {bench.figures['compared']['difference'][0]:.1e}")
    return goals


if __name__ == "__main__":
    sys.exit(main())
