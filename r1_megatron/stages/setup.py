"""What every stage starts with: the ranks, the tokenizer, the prompts, the policy with its weights, the log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from r1_megatron.checkpoint.store import load_checkpoint, save_weights
from r1_megatron.config.schema import RunConfig
from r1_megatron.data.prompts import PromptSet, build_prompts
from r1_megatron.data.tasks import Task
from r1_megatron.data.tokenizers import Tokenizer, build_tokenizer
from r1_megatron.kernels.ops import library
from r1_megatron.model.build import build_model
from r1_megatron.parallel.groups import ProcessGroups, build_process_groups, destroy_distributed
from r1_megatron.parallel.rank import listen_for_stop, stop_requested
from r1_megatron.rewards.base import Grader, build_rewards
from r1_megatron.rollout.engine import Engine, build_engine
from r1_megatron.telemetry.run_folder import CHECKPOINTS
from r1_megatron.telemetry.writers import RunLog
from r1_megatron.train.policy import Policy, build_policy
from r1_megatron.train.step import RaisedTogether


@dataclass
class Run:
    """One stage on this rank. ``grader`` is there on one rank per model replica, which grades for the others."""

    cfg: RunConfig
    groups: ProcessGroups
    tokenizer: Tokenizer
    train_prompts: PromptSet
    held_out: PromptSet
    task: Task | None
    policy: Policy
    engine: Engine
    grader: Grader | None
    log: RunLog
    loaded: dict[str, Any] = field(default_factory=dict)
    finished_steps: int = 0

    def save_checkpoint(self, name: str, step: int) -> None:
        """Write ``checkpoints/<name>`` in the run folder. Collective."""
        description = {
            "stage": self.cfg.stage,
            "step": step,
            "policy_version": self.policy.version,
            "model": asdict(self.cfg.model),
        }
        folder = Path(self.cfg.output_dir) / CHECKPOINTS / name
        with self.policy.gathered():
            save_weights(folder, self.policy.chunks, self.groups, description)
        self.log.note(f"checkpoint: {folder}")

    def save_if_due(self, step: int) -> bool:
        """A checkpoint every ``checkpoint.interval`` steps, ``final`` after the last one, and one before an early end.

        Answers whether the run ends here because it was asked to (Ctrl-C, a time limit). Collective.
        """
        self.finished_steps = step
        asked = torch.tensor([int(stop_requested())], device=self.groups.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        interval = self.cfg.checkpoint.interval
        if step == self.cfg.train.steps:
            self.save_checkpoint("final", step)
        elif asked.item() or (interval and step % interval == 0):
            self.save_checkpoint(f"step_{step:06d}", step)
        return bool(asked.item())


@contextlib.contextmanager
def open_run(cfg: RunConfig) -> Iterator[Run]:
    """Bring a stage up on this rank and down again, files closed, however it ends.

    An error that all ranks raise together leaves what was learned behind, as checkpoint ``at_failure``.
    """
    listen_for_stop()
    groups = build_process_groups(cfg.parallel, cfg.seed)
    is_writer = dist.get_rank() == 0
    tokenizer = build_tokenizer(cfg.tokenizer, cfg.output_dir, write=is_writer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={cfg.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens. "
            f"Set model.vocab_size={tokenizer.vocab_size} or use the model's own tokenizer."
        )
    # Supervised rows are no prompts: the stage reads data.path itself.
    wants_prompts = cfg.stage != "sft" or cfg.data.source != "jsonl"
    train_prompts, held_out, task = build_prompts(cfg.data, tokenizer, cfg.model.vocab_size, train=wants_prompts)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(
            RunLog(
                cfg.output_dir,
                total_steps=cfg.train.steps,
                is_writer=is_writer,
                world_size=dist.get_world_size(),
                num_samples=cfg.telemetry.num_samples,
                tensorboard=cfg.telemetry.tensorboard,
                wandb_project=cfg.telemetry.wandb_project,
                name=cfg.name,
                config=asdict(cfg),
            )
        )
        operators = library.load()
        if not operators.loaded:
            log.note(f"the operators run in plain PyTorch, which is slower: {operators.problem}")
        for name, prompts in (("data.path", train_prompts), ("data.eval_path", held_out)):
            if prompts.num_too_long or prompts.num_duplicates:
                log.note(
                    f"{name}: {len(prompts)} prompts; left out: {prompts.num_too_long} too long, "
                    f"{prompts.num_duplicates} duplicates"
                )
        grader = stack.enter_context(build_rewards(cfg.reward)) if groups.is_replica_writer else None
        chunks = build_model(cfg, groups, draw_weights=not cfg.checkpoint.load)
        loaded = load_checkpoint(cfg.checkpoint.load, cfg.model, chunks, groups) if cfg.checkpoint.load else {}
        if loaded:
            log.note(f"weights from {cfg.checkpoint.load} (stage {loaded.get('stage')}, step {loaded.get('step')})")
        policy = build_policy(cfg, groups, chunks)
        engine = build_engine(cfg, policy.chunks, groups, tokenizer)
        run = Run(cfg, groups, tokenizer, train_prompts, held_out, task, policy, engine, grader, log, loaded)
        try:
            yield run
        except RaisedTogether:
            if policy.version > 0:
                run.save_checkpoint("at_failure", run.finished_steps)
            raise
        dist.barrier()
    destroy_distributed()
