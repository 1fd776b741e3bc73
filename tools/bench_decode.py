"""How the time of a decode step grows with the context, 64 sequences at once, on this CPU.

    python tools/bench_decode.py                                 # the preset tiny: 1 rank (1 and 2 threads), DP2
    python tools/bench_decode.py --preset bench_256 --contexts 128 1024
    python tools/bench_decode.py --samples 8                     # 8 prompts, as a step of GRPO has them
    python tools/bench_decode.py --peer-python /path/to/venv/bin/python    # and Transformers' generate

Ours is the engine of a run (``decode_side.py``). By default every sequence has a prompt of its own, so that no two
share a page of the cache; the samples of one prompt do. Transformers gets the same weights and prompts of the same
length, and its tokens are timed one by one. What counts is the median.

``floor`` is what the step would take if nothing but attention over the cache grew, and that ran as fast as this
machine's ``torch.mm`` of 1024 x 1024 float32 matrices: the step at the first context and the multiplications that come
to it, ``2 H (2 R + P)`` operations a layer, sequence and position (H heads, R latent, P rotary numbers). Softmax and
the way to memory come on top.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import yaml

from r1_megatron.config.presets import PRESETS
from r1_megatron.config.schema import ModelConfig
from tools.bench_vs_trl import DP2, ONE_RANK, ONE_THREAD, Layout, environment, watched
from tools.decode_side import prompt_length
from tools.measure import cpu_name, table
from tools.rl_model import END_WEIGHT, convert, write_model
from tools.rl_workload import Workload, write_prompts

ROOT = Path(__file__).resolve().parent.parent
BATCH = 64
LAYOUTS = (ONE_THREAD, ONE_RANK, DP2)
# Of a step, from the first of these contexts to the last.
GROWTH_GOAL, GOAL_CONTEXTS = 0.15, (128, 1024)
# New tokens of each of Transformers' calls.
_PEER_TOKENS = 24
PEER = "Transformers' generate"


@dataclass(frozen=True)
class Decode:
    """One model's files and what is measured of it."""

    folder: Path
    model: ModelConfig
    preset: str
    contexts: list[int]
    segments: int
    repeats: int
    samples: int = 1

    def prepare(self) -> None:
        """Weights whose completions do not end, for both sides."""
        source = write_model(self.folder / "model", END_WEIGHT["full"], model=self.model)
        convert(source, self.folder / "checkpoint")
        write_prompts(self.folder / "one.jsonl", Workload(1, 1, 1, 1), 1, self.model.vocab_size)

    def ours(self, layout: Layout) -> tuple[list[float], list[float]]:
        """Seconds of a step at each context, and the least that arithmetic allows of each."""
        longest = max(self.contexts)
        number = len(list(self.folder.glob("run_*.yaml")))
        config = {
            "stage": "grpo",
            "name": "bench_decode",
            "output_dir": str(self.folder / f"run_{number}"),
            "model": {"preset": self.preset},
            "parallel": {"device": "cpu", **layout.parallel},
            "tokenizer": {"kind": "huggingface", "path": str(self.folder / "model")},
            "data": {
                "source": "jsonl",
                "path": str(self.folder / "one.jsonl"),
                "template": "none",
                "max_prompt_tokens": longest,
            },
            "sampling": {"max_new_tokens": longest},
            "rollout": {
                "prompts_per_step": BATCH // self.samples,
                "samples_per_prompt": 2,  # the command line says how many
                "max_prefill_tokens": BATCH * longest,
            },
            "reward": {"terms": [{"function": "tools.rl_workload:reward"}]},
            "evaluate": {"num_prompts": 0},
            "checkpoint": {"load": str(self.folder / "checkpoint"), "save_optimizer": False},
            "telemetry": {"tensorboard": False, "report": "none", "num_samples": 0},
        }
        file = self.folder / f"run_{number}.yaml"
        file.write_text(yaml.safe_dump(config))
        result = file.with_suffix(".json")
        options = {
            "--contexts": self.contexts,
            "--samples": [self.samples],
            "--segments": [self.segments],
            "--repeats": [self.repeats],
        }
        words = [str(word) for option, values in options.items() for word in (option, *values)]
        side = str(ROOT / "tools" / "decode_side.py")
        watched([sys.executable, side, str(file), str(result), *words], environment(layout.threads))
        found = json.loads(result.read_text())
        seconds = [statistics.median(found["steps"][str(context)]) for context in self.contexts]
        # The rate was measured on all ranks at once, each with its own threads.
        rate = found["peak_tflops"] * 1e12 * layout.ranks
        floors = [seconds[0] + self.operations(context - self.contexts[0]) / rate for context in self.contexts]
        return seconds, floors

    def operations(self, positions: int) -> float:
        """Of all layers' attention over so many more cached positions of every sequence."""
        model = self.model
        per_position = 2 * model.num_attention_heads * (2 * model.kv_lora_rank + model.qk_pos_emb_head_dim)
        return BATCH * model.num_layers * per_position * positions

    def peer(self, python: str) -> list[float]:
        """Transformers' seconds of a step at each context."""
        return [self.peer_step(python, context - _PEER_TOKENS // 2) for context in self.contexts]

    def peer_step(self, python: str, prompt_len: int) -> float:
        workload = Workload(BATCH // self.samples, self.samples, prompt_len, prompt_len)
        files = [self.folder / name for name in ("workload.json", "prompts.jsonl", "peer.json")]
        workload.save(files[0])
        write_prompts(files[1], workload, 1, self.model.vocab_size)
        command = [python, str(ROOT / "tools" / "trl_side.py"), "decode", str(self.folder / "model"), *map(str, files)]
        options = ["--new-tokens", str(_PEER_TOKENS), "--repeats", str(self.repeats)]
        watched([*command, *options], environment(ONE_RANK.threads))
        return statistics.median(json.loads(files[2].read_text())["steps"])


def main() -> int:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("tiny", "bench_256"), default="tiny")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 512, 1024], help="tokens")
    parser.add_argument("--samples", type=int, default=1, help="of each prompt; a divisor of 32")
    parser.add_argument("--segments", type=int, default=4, help="of 16 steps, in each call")
    parser.add_argument("--repeats", type=int, default=3, help="calls at each context")
    parser.add_argument("--peer-python", help="a Python that has Transformers, to measure it as well")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    contexts = sorted(set(arguments.contexts))
    if len(contexts) < 2 or prompt_length(contexts[0], arguments.segments) < 1:
        least = -prompt_length(0, arguments.segments) + 1
        parser.error(f"--contexts {contexts}: two at least, of {least} tokens or more with --segments")
    if BATCH // DP2.ranks % arguments.samples:
        parser.error(f"--samples {arguments.samples} does not divide the {BATCH // DP2.ranks} sequences of a rank")
    model = ModelConfig(**PRESETS[arguments.preset])
    with tempfile.TemporaryDirectory(prefix="bench_decode_") as folder:
        bench = Decode(
            Path(folder), model, arguments.preset, contexts, arguments.segments, arguments.repeats, arguments.samples
        )
        bench.prepare()
        what = f"{arguments.preset}, {BATCH} sequences of {BATCH // arguments.samples} prompts"
        print(f"{cpu_name()}; {what}; load {os.getloadavg()[0]:.1f}")
        figures, rows = {}, []
        judged = (contexts[0], contexts[-1]) == GOAL_CONTEXTS
        for layout in LAYOUTS:
            seconds, floors = bench.ours(layout)
            figures[layout.name] = seconds
            rows.append(cells(layout.name, seconds, floors[-1], judged))
        if arguments.peer_python:
            figures[PEER] = bench.peer(arguments.peer_python)
            rows.append(cells(PEER, figures[PEER], None, judged))
        headings = ["ms a step at a context of", *map(str, contexts), "growth", "floor", "goal", "met"]
        print(table(headings, rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"contexts": contexts, "seconds": figures}, indent=2) + "\n")
    return 0


def cells(name: str, seconds: list[float], floor: float | None, judged: bool) -> list[str]:
    """One line of the table; of the goal's contexts if ``judged``."""
    growth = seconds[-1] / seconds[0] - 1
    shown = [name, *(f"{1e3 * second:.2f}" for second in seconds), f"{growth:+.0%}"]
    if floor is None:
        return [*shown, "", "", ""]
    goal = [f"< {GROWTH_GOAL:.0%}", "yes" if growth < GROWTH_GOAL else "NO"] if judged else ["", ""]
    return [*shown, f"{floor / seconds[0] - 1:+.0%}", *goal]


if __name__ == "__main__":
    sys.exit(main())
