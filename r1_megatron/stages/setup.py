"""What every stage starts with: the ranks, the tokenizer, the prompts, the policy with its weights, the log."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from r1_megatron.checkpoint.store import load_weights, read_description, save_weights
from r1_megatron.config.schema import ModelConfig, RunConfig
from r1_megatron.data.prompts import PromptSet, build_prompts
from r1_megatron.data.tasks import Task
from r1_megatron.data.tokenizers import Tokenizer, build_tokenizer
from r1_megatron.model.build import build_model
from r1_megatron.parallel.groups import ProcessGroups, build_process_groups, destroy_distributed
from r1_megatron.rewards.base import Grader, build_rewards
from r1_megatron.rollout.engine import Engine, build_engine
from r1_megatron.telemetry.run_folder import CHECKPOINTS
from r1_megatron.telemetry.writers import RunLog
from r1_megatron.train.policy import Policy, build_policy

# What decides which weights there are, and their shapes.
_SHAPE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "vocab_size",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "first_k_dense_replace",
    "share_embeddings_and_output_weights",
)


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

    def save_if_due(self, step: int) -> None:
        """A checkpoint every ``checkpoint.interval`` steps, and ``final`` after the last one."""
        if step == self.cfg.train.steps:
            self.save_checkpoint("final", step)
        elif self.cfg.checkpoint.interval and step % self.cfg.checkpoint.interval == 0:
            self.save_checkpoint(f"step_{step:06d}", step)


@contextlib.contextmanager
def open_run(cfg: RunConfig) -> Iterator[Run]:
    """Bring a stage up on this rank and down again, files closed, however it ends."""
    groups = build_process_groups(cfg.parallel, cfg.seed)
    is_writer = dist.get_rank() == 0
    tokenizer = build_tokenizer(cfg.tokenizer, cfg.output_dir, write=is_writer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={cfg.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens. "
            f"Set model.vocab_size={tokenizer.vocab_size} or use the model's own tokenizer."
        )
    train_prompts, held_out, task = build_prompts(cfg.data, tokenizer, cfg.model.vocab_size)
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
        grader = stack.enter_context(build_rewards(cfg.reward)) if groups.is_replica_writer else None
        chunks = build_model(cfg, groups)
        loaded = load_checkpoint(cfg.checkpoint.load, cfg.model, chunks, groups) if cfg.checkpoint.load else {}
        if loaded:
            log.note(f"weights from {cfg.checkpoint.load} (stage {loaded.get('stage')}, step {loaded.get('step')})")
        policy = build_policy(cfg, groups, chunks)
        engine = build_engine(cfg, policy.chunks, groups, tokenizer)
        yield Run(cfg, groups, tokenizer, train_prompts, held_out, task, policy, engine, grader, log, loaded)
        dist.barrier()
    destroy_distributed()


def load_checkpoint(
    folder: str, model: ModelConfig, chunks: Sequence[torch.nn.Module], groups: ProcessGroups
) -> dict[str, Any]:
    """The weights of ``checkpoint.load``, written under any layout; answers the checkpoint's description. Collective.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: another model's (every field that differs is named), or damaged.
    """
    try:
        check_same_model(folder, model, read_description(folder).get("model", {}))
        return load_weights(folder, chunks, groups)
    except CheckpointException as error:  # torch's, on all ranks; it is no Exception and holds one of them per rank
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = f"rank {rank} met {type(cause).__name__}: {cause}"
    except (json.JSONDecodeError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise ValueError(
        f"checkpoint.load: {folder} is damaged or incomplete, it cannot be read ({reason:.500}). "
        "Load an earlier checkpoint, or run the stage that writes it again."
    )


def check_same_model(folder: str, model: ModelConfig, written: dict[str, Any]) -> None:
    """Raises ValueError if the checkpoint's description tells of a model of another shape.

    Without this, a model with fewer layers would be filled from the first ones and never say so.
    """
    ours = asdict(model)
    differing = [
        f"model.{name}={json.dumps(ours[name])}, there {json.dumps(written[name])}"
        for name in _SHAPE
        if name in written and written[name] != ours[name]
    ]
    if differing:
        raise ValueError(
            f"checkpoint.load: {folder} holds another model: {'; '.join(differing)}. "
            "Give both stages the same model section, or load another checkpoint."
        )
