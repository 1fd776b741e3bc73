"""The other side of ``bench_vs_trl.py``, in its own process and, if need be, its own Python environment.

    python tools/trl_side.py generate MODEL WORKLOAD.json PROMPTS.jsonl RESULT.json --new-tokens 256 --repeats 2
    python tools/trl_side.py decode MODEL WORKLOAD.json PROMPTS.jsonl RESULT.json --new-tokens 24 --repeats 2
    python tools/trl_side.py grpo MODEL WORKLOAD.json PROMPTS.jsonl RESULT.json --batch-size 16 --steps 3
    python tools/trl_side.py score MODEL WORKLOAD.json PROMPTS.jsonl RESULT.json --samples SAMPLES.json

``generate`` is Transformers' own, without TRL: all of a step's completions in one batch. ``decode`` is the same, timed
token by token. ``grpo`` is TRL's ``GRPOTrainer``; under ``torch.distributed.run`` it is data-parallel. ``score`` gives
Transformers' log-probabilities of sequences that our side drew.

What DeepSeek-V3's architecture and a CPU ask of TRL: ``use_cpu``, float32 by name (bf16 is TRL's default), no gradient
checkpointing (TRL's default; it costs a second forward), a padding token of its own, and no hub: every file is local.
Sampling is from the full softmax on both sides (Transformers' default cuts to the best 50 tokens). Experts run as
Transformers chooses (``grouped_mm``, by far the fastest of its three here).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import torch

from tools.rl_workload import Workload, read_prompts, reward

WARM_UP_TOKENS = 8


def generate(
    model_folder: str, workload: Workload, prompts: list[str], new_tokens: int, repeats: int
) -> dict[str, Any]:
    """Seconds of calls for a step's completions, and the tokens up to and with each end token."""
    model, tokenizer = _load(model_folder)
    rows = [prompt for prompt in prompts[: workload.num_prompts] for _ in range(workload.samples_per_prompt)]
    inputs = tokenizer(rows, return_tensors="pt", padding=True, padding_side="left")
    options = {"do_sample": True, "top_k": 0, "temperature": 1.0}
    model.generate(**inputs, max_new_tokens=WARM_UP_TOKENS, **options)
    calls = []
    for seed in range(repeats):
        torch.manual_seed(seed)
        began = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=new_tokens, **options)
        seconds = time.perf_counter() - began
        is_end = output[:, inputs["input_ids"].shape[1] :] == tokenizer.eos_token_id
        num_tokens = (is_end.cumsum(1) - is_end.int() == 0).sum()
        calls.append({"seconds": seconds, "tokens": num_tokens.item()})
    return {"calls": calls}


def decode(model_folder: str, workload: Workload, prompts: list[str], new_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds between two tokens of the batch, of all calls; the prompt's forward is before the first of them."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    model, tokenizer = _load(model_folder)
    rows = [prompt for prompt in prompts[: workload.num_prompts] for _ in range(workload.samples_per_prompt)]
    inputs = tokenizer(rows, return_tensors="pt", padding=True, padding_side="left")
    looks: list[float] = []

    class Look(StoppingCriteria):
        """Asked after every token; never stops."""

        def __call__(self, input_ids, scores, **_):
            looks.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    seconds: list[float] = []
    for seed in range(repeats):
        torch.manual_seed(seed)
        looks.clear()
        model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            temperature=1.0,
            stopping_criteria=StoppingCriteriaList([Look()]),
        )
        seconds += [later - earlier for earlier, later in itertools.pairwise(looks)]
    return {"steps": seconds}


def score(model_folder: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and maximum of |difference| from the log-probabilities that came with the samples, over all tokens."""
    model, _ = _load(model_folder)
    differences = []
    with torch.no_grad():
        for sample in samples:
            tokens = torch.tensor(sample["tokens"])
            logprobs = model(input_ids=tokens[None]).logits[0].float().log_softmax(-1)
            drawn = logprobs[:-1].gather(1, tokens[1:, None])[sample["prompt_len"] - 1 :, 0]
            differences.append((drawn - torch.tensor(sample["logprobs"])).abs())
    all_tokens = torch.cat(differences)
    return {"median": all_tokens.median().item(), "max": all_tokens.max().item()}


def grpo(
    model_folder: str, workload: Workload, prompts: list[str], batch_size: int, steps: int, output_dir: str
) -> dict[str, Any]:
    """Seconds of every step: the whole, its generation, and all that is not rollout and reward.

    Args:
        batch_size: completions of a forward and backward of one process.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation, rest = divmod(workload.num_completions, num_processes * batch_size)
    if rest:
        raise SystemExit(f"--batch-size {batch_size} times {num_processes} does not divide {workload.num_completions}")
    recorded: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        """A step lasts from its beginning to its end, optimizer included."""

        def on_step_begin(self, args, state, control, **_):
            recorded.append({"step": time.perf_counter(), "generate": 0.0, "rollout": 0.0})

        def on_step_end(self, args, state, control, **_):
            recorded[-1]["step"] = time.perf_counter() - recorded[-1]["step"]

    class TimedTrainer(GRPOTrainer):
        """Two of TRL's methods, timed: generation, and what prepares a step's samples (which contains it)."""

        def _generate_single_turn(self, *args, **kwargs):
            began = time.perf_counter()
            try:
                return super()._generate_single_turn(*args, **kwargs)
            finally:
                recorded[-1]["generate"] += time.perf_counter() - began

        def _generate_and_score_completions(self, inputs):
            began = time.perf_counter()
            samples = super()._generate_and_score_completions(inputs)
            recorded[-1]["rollout"] += time.perf_counter() - began
            new_tokens, prompt_tokens = samples["completion_mask"].sum(), samples["prompt_mask"].sum()
            totals = self.accelerator.reduce(torch.stack([new_tokens, new_tokens + prompt_tokens]), reduction="sum")
            recorded[-1]["new_tokens"], recorded[-1]["tokens"] = totals.tolist()
            return samples

    model, tokenizer = _load(model_folder)
    config = GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_generations=workload.samples_per_prompt,
        max_completion_length=workload.new_tokens,
        temperature=1.0,
        top_k=0,
        beta=0.0,
        epsilon=0.2,
        loss_type="dapo",  # the mean over all tokens of the step
        scale_rewards="group",
        router_aux_loss_coef=0.0,
        learning_rate=workload.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_steps=steps,
        shuffle_dataset=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    trainer = TimedTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    for figures in recorded:
        figures["train"] = figures["step"] - figures["rollout"]
    return {"steps": recorded, "rewards": rewards}


def _load(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("generate", "decode", "grpo", "score"))
    parser.add_argument("model")
    parser.add_argument("workload", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--samples", type=Path)
    arguments = parser.parse_args()
    workload, prompts = Workload.load(arguments.workload), read_prompts(arguments.prompts)
    if arguments.task == "generate":
        found = generate(arguments.model, workload, prompts, arguments.new_tokens, arguments.repeats)
    elif arguments.task == "decode":
        found = decode(arguments.model, workload, prompts, arguments.new_tokens, arguments.repeats)
    elif arguments.task == "grpo":
        output_dir = f"{arguments.result}.run"
        found = grpo(arguments.model, workload, prompts, arguments.batch_size, arguments.steps, output_dir)
    else:
        found = score(arguments.model, json.loads(arguments.samples.read_text()))
    if os.environ.get("RANK", "0") == "0":
        arguments.result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
