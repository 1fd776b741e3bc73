"""What every stage starts with: the ranks, the tokenizer, the prompts, the policy with its weights, the log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from r1_megatron.checkpoint import retention
from r1_megatron.checkpoint.contents import Contents
from r1_megatron.checkpoint.optimizer_state import optimizer_step
from r1_megatron.checkpoint.origin import ORIGIN, build_origin, copy_origin, write_origin
from r1_megatron.checkpoint.random_states import seed_random
from r1_megatron.checkpoint.store import load_checkpoint
from r1_megatron.checkpoint.writer import CheckpointWriter
from r1_megatron.config.schema import RunConfig
from r1_megatron.data.prompts import PromptSet, build_prompts
from r1_megatron.data.tasks import Task
from r1_megatron.data.templates import chat_template
from r1_megatron.data.tokenizers import Tokenizer, build_tokenizer
from r1_megatron.kernels.ops import library
from r1_megatron.model.build import build_model
from r1_megatron.parallel.groups import ProcessGroups, build_process_groups, destroy_distributed
from r1_megatron.parallel.rank import listen_for_stop, stop_requested
from r1_megatron.rewards.base import Grader, build_rewards
from r1_megatron.rollout.engine import Engine, build_engine
from r1_megatron.rollout.in_flight import InFlight, load_in_flight, save_in_flight
from r1_megatron.stages.resume import can_resume, find_start, restore
from r1_megatron.telemetry.run_folder import CHECKPOINTS
from r1_megatron.telemetry.writers import RunLog
from r1_megatron.train.policy import Policy, build_policy
from r1_megatron.train.step import RaisedTogether
from r1_megatron.types import Prompt


class Resumable(Protocol):
    """Something with a place in the run that a checkpoint keeps: a stream of prompts, for one."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


R = TypeVar("R", bound=Resumable)


@dataclass
class Run:
    """One stage on this rank. ``grader`` is there on one rank per model replica, which grades for the others.

    ``loaded`` describes the checkpoint that the weights are from; ``resumed`` the one that the run goes on from, and
    ``start`` is its folder.
    """

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
    writer: CheckpointWriter
    loaded: dict[str, Any] = field(default_factory=dict)
    resumed: dict[str, Any] = field(default_factory=dict)
    start: Path | None = None
    finished_steps: int = 0
    evaluation: dict[str, float] = field(default_factory=dict)
    _tracked: dict[str, Resumable] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        return Path(self.cfg.output_dir) / CHECKPOINTS

    def track(self, name: str, part: R) -> R:
        """Keep the part's state in every checkpoint from now on, and give it back the one that was kept."""
        if self.resumed:
            part.restore(self.resumed["state"][name])
        self._tracked[name] = part
        return part

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to be done, after those that the checkpoint has."""
        yield from range(self.finished_steps + 1, self.cfg.train.steps + 1)

    def save_checkpoint(
        self, name: str, step: int, resumable: bool = True, in_flight: Sequence[InFlight] | None = None
    ) -> None:
        """Write ``checkpoints/<name>``, or begin to. Collective. ``resumable``: here the run can go on from it.

        ``in_flight``: the sequences of this replica, if the rollout of the step after ``step`` was stopped.
        """
        policy, keeps = self.policy, resumable and self.cfg.checkpoint.save_optimizer
        contents = Contents(
            policy.chunks,
            self.groups,
            policy.optimizer if keeps else None,
            policy.reference if keeps else None,
            random=keeps,
        )
        description: dict[str, Any] = {
            "stage": self.cfg.stage,
            "step": step,
            "policy_version": policy.version,
            "weights": {"dtype": "bfloat16" if self.cfg.train.bf16 else "float32", "fp8": None},
            "evaluation": self.evaluation,
        }
        if keeps:
            assert policy.optimizer is not None and policy.scheduler is not None
            description["optimizer_step"] = optimizer_step(policy.optimizer)
            description["layout"] = asdict(self.cfg.parallel)
            description["state"] = {
                "scheduler_steps": policy.scheduler.num_steps,
                "has_reference": policy.reference is not None,
                "evaluated": bool(self.evaluation),
                "log": self.log.sizes(),
                **{name: part.state() for name, part in self._tracked.items()},
            }
        if in_flight is not None:
            # One entry per stop in this rollout: of two checkpoints of a step the one with more of them is newer.
            description["rollouts_in_flight"] = [*self._earlier_stops(), self._count(in_flight)]

        def write_more(folder: Path) -> None:
            if dist.get_rank() == 0:
                copy_origin(self.cfg.output_dir, folder)
            if in_flight is not None:
                save_in_flight(folder, in_flight, self.groups)

        with policy.gathered():
            state = contents.sharded_state()
            self._announce(self.writer.begin(self.checkpoints / name, state, description, self.cfg.model, write_more))

    def save_if_due(self, step: int, ends: bool) -> None:
        """A checkpoint every ``checkpoint.interval`` steps, ``final`` after the last one, and one before an early end.

        Collective.
        """
        self.finished_steps = step
        self._announce(self.writer.poll())
        interval = self.cfg.checkpoint.interval
        if step == self.cfg.train.steps:
            self.save_checkpoint(retention.FINAL, step)
        elif ends or (interval and step % interval == 0):
            self.save_checkpoint(retention.step_name(step), step)
        if ends or step == self.cfg.train.steps:
            self._announce(self.writer.finish())

    def asked_to_end(self) -> bool:
        """Whether any rank was asked to; they hear of it at different moments. Collective."""
        asked = torch.tensor([int(stop_requested())], device=self.groups.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(asked.item())

    def save_in_rollout(self, rollouts: Sequence[InFlight]) -> None:
        """The checkpoint of a run that ends in the middle of a step's rollout, as it was asked to. Collective."""
        self._announce(self.writer.finish())
        step, cfg = self.finished_steps, self.cfg.checkpoint
        keeps = cfg.rollouts_in_flight == "continue" and cfg.save_optimizer
        name = retention.step_name(step)
        names = [retention.free_name(self.checkpoints, f"{name}_rollout") if keeps else name]
        names.append("" if keeps or not (self.checkpoints / name).exists() else "is there")
        dist.broadcast_object_list(names, src=0)
        if not names[1]:
            self.save_checkpoint(names[0], step, in_flight=rollouts if keeps else None)
            self._announce(self.writer.finish())

    def rollouts_in_flight(self, prompts: Sequence[Prompt], mine: Sequence[Prompt]) -> list[InFlight]:
        """What the run was stopped with in the rollout that now comes first; empty for every later one.

        ``prompts`` are the step's, ``mine`` this replica's of them.
        """
        folder, self.start = self.start, None
        stops = self._earlier_stops()
        if folder is None or not stops or self.cfg.checkpoint.rollouts_in_flight == "restart":
            return []
        self.log.note("the rollout goes on: {begun} of its sequences had begun, {finished} ended".format(**stops[-1]))
        layers = self.engine.moe_layers if self.engine.record_routing else ()
        indices = {prompt.index for prompt in mine}
        return load_in_flight(folder, prompts, indices, vocab_size=self.cfg.model.vocab_size, layers=layers)

    def _earlier_stops(self) -> list[dict[str, int]]:
        return self.resumed.get("rollouts_in_flight", []) if self.resumed.get("step") == self.finished_steps else []

    def _count(self, rollouts: Sequence[InFlight]) -> dict[str, int]:
        """How many sequences of all replicas had begun, and how many of them had ended."""
        num_finished = sum(rollout.finish is not None for rollout in rollouts)
        counts = torch.tensor([len(rollouts), num_finished], device=self.groups.device)
        dist.all_reduce(counts, group=self.groups.dp)
        return dict(zip(("begun", "finished"), counts.tolist()))

    def save_at_failure(self) -> None:
        """What was learned until an error that all ranks raise together. No run goes on from it by itself."""
        self._announce(self.writer.finish())
        if self.policy.version > 0:
            names = [retention.free_name(self.checkpoints, retention.AT_FAILURE)]
            dist.broadcast_object_list(names, src=0)
            self.save_checkpoint(names[0], self.finished_steps, resumable=False)
            self._announce(self.writer.finish())

    def _announce(self, whole: Path | None) -> None:
        """A checkpoint has become whole: say so, and remove those that are not kept."""
        if whole is None:
            return
        self.log.note(f"checkpoint: {whole}")
        if dist.get_rank() == 0:
            retention.apply_retention(self.checkpoints, self.cfg.checkpoint)


def keep_origin(cfg: RunConfig, tokenizer: Tokenizer, log: RunLog) -> None:
    """Put into the run folder what every checkpoint takes along for its export to Hugging Face: that of the checkpoint
    the run starts from, or one made for a model that is born here."""
    folder = Path(cfg.output_dir)
    if (folder / ORIGIN).exists():
        return
    if cfg.checkpoint.load and (Path(cfg.checkpoint.load) / ORIGIN).is_dir():
        copy_origin(cfg.checkpoint.load, folder)
        return
    try:
        dtype = "bfloat16" if cfg.train.bf16 else "float32"
        origin = build_origin(cfg.model, tokenizer, dtype, chat_template(cfg.data.template))
    except ValueError as error:
        log.note(f"checkpoints of this model cannot be exported to Hugging Face: {error}")
        return
    write_origin(folder / ORIGIN, origin.files)
    for note in origin.notes:
        log.note(f"{folder / ORIGIN}: {note}")


@contextlib.contextmanager
def open_run(cfg: RunConfig) -> Iterator[Run]:
    """Bring a stage up on this rank and down again, files closed, however it ends.

    An error that all ranks raise together leaves what was learned behind, as checkpoint ``at_failure``.
    """
    listen_for_stop()
    groups = build_process_groups(cfg.parallel, cfg.seed)
    seed_random(cfg.seed)
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
    saved = find_start(cfg)
    done = 0 if saved is None else saved.step
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
                first_step=done + 1,
                resumed=can_resume(cfg),
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
        source = cfg.checkpoint.load if saved is None else None
        chunks = build_model(cfg, groups, draw_weights=saved is None and not source)
        loaded = {}
        if source:
            loaded = load_checkpoint(source, Contents(chunks, groups), cfg.model, verify=cfg.checkpoint.verify)
            log.note(f"weights from {source} (stage {loaded.get('stage')}, step {loaded.get('step')})")
        if is_writer and cfg.stage != "evaluate":
            keep_origin(cfg, tokenizer, log)
        policy = build_policy(cfg, groups, chunks)
        if saved is not None:
            restore(cfg, saved, policy)
            log.note(f"going on after step {done} from {saved.path}")
        engine = build_engine(cfg, policy.chunks, groups, tokenizer)
        writer = CheckpointWriter(background=cfg.checkpoint.async_save)
        run = Run(cfg, groups, tokenizer, train_prompts, held_out, task, policy, engine, grader, log, writer, loaded)
        if saved is not None:
            run.resumed, run.start, run.finished_steps = saved.description, saved.path, done
            run.evaluation = saved.description["evaluation"]
        try:
            yield run
        except RaisedTogether:
            run.save_at_failure()
            raise
        dist.barrier()
    destroy_distributed()
