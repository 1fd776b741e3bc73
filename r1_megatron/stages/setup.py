"""What every stage starts with: the ranks, the tokenizer, the prompts, the policy with its weights, the log."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from r1_megatron.checkpoint.contents import Contents
from r1_megatron.checkpoint.hugging_face.origin import ORIGIN, build_origin, copy_origin, write_origin
from r1_megatron.checkpoint.random_states import seed_random
from r1_megatron.checkpoint.store import load_checkpoint
from r1_megatron.checkpoint.writer import CheckpointWriter
from r1_megatron.config.schema import RunConfig
from r1_megatron.data.demonstrations import Demonstrations
from r1_megatron.data.loading import ALONE, Rows, Share, counted
from r1_megatron.data.prompts import PromptSet, build_prompts
from r1_megatron.data.rows import Part
from r1_megatron.data.tasks import Task
from r1_megatron.data.templates import chat_template
from r1_megatron.data.tokenizers import Tokenizer, build_tokenizer
from r1_megatron.kernels.ops import library
from r1_megatron.model.build import build_model
from r1_megatron.model.delayed_scaling import scales_are_delayed
from r1_megatron.parallel.groups import ProcessGroups, build_process_groups, destroy_distributed
from r1_megatron.parallel.rank import listen_for_stop
from r1_megatron.parallel.watchdog import watching
from r1_megatron.rewards.base import Grader, build_rewards
from r1_megatron.rollout.engine import Engine, build_engine
from r1_megatron.stages.blocks import blocks_done, num_steps
from r1_megatron.stages.checkpoints import RunCheckpoints
from r1_megatron.stages.judgements import Judged, read_judgements
from r1_megatron.stages.pace import Pace
from r1_megatron.stages.readings import Readings
from r1_megatron.stages.resume import SCALES_BEGIN_ANEW, can_resume, find_start, restore
from r1_megatron.stages.reward_terms import RewardModel, build_reward_models
from r1_megatron.stages.supervised import read_rows, with_steps
from r1_megatron.telemetry.writers import RunLog
from r1_megatron.train.policy import Policy, build_policy
from r1_megatron.train.together import RaisedTogether


@dataclass
class Run:
    """One stage on this rank. ``grader`` is there on one rank per model replica, which grades for the others;
    ``reward_models`` on all, by the number of their term.

    ``rows`` are there in supervised stages, ``judgements`` where a reward model is trained. ``loaded`` describes the
    checkpoint that the weights are from.
    """

    cfg: RunConfig
    groups: ProcessGroups
    tokenizer: Tokenizer
    train_prompts: PromptSet
    held_out: PromptSet
    task: Task | None
    rows: Demonstrations | None
    judgements: Rows[Judged] | None
    policy: Policy
    engine: Engine
    grader: Grader | None
    reward_models: dict[int, RewardModel]
    log: RunLog
    readings: Readings
    checkpoints: RunCheckpoints
    pace: Pace
    loaded: dict[str, Any]


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
    with watching(cfg.output_dir, cfg.hang_after_s, cfg.parallel.timeout_s):
        yield from _open_run(cfg, groups)
    destroy_distributed()


def _open_run(cfg: RunConfig, groups: ProcessGroups) -> Iterator[Run]:
    seed_random(cfg.seed)
    is_writer = dist.get_rank() == 0
    tokenizer = build_tokenizer(cfg.tokenizer, cfg.output_dir, write=is_writer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={cfg.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens. "
            f"Set model.vocab_size={tokenizer.vocab_size} or use the model's own tokenizer."
        )
    # Supervised rows are no prompts, nor are judgements.
    share = data_share(cfg)
    train_prompts, held_out, task = PromptSet(()), PromptSet(()), None
    if cfg.asks_held_out:
        train_prompts, held_out, task = build_prompts(
            cfg.data, tokenizer, cfg.model.vocab_size, train=not cfg.is_supervised, share=share
        )
    rows = read_rows(cfg, tokenizer, share) if cfg.is_supervised else None
    judgements = read_judgements(cfg, tokenizer, share, "data.path") if cfg.stage == "reward_model" else None
    if rows is not None:
        cfg = with_steps(cfg, rows.num_rows)
    if judgements is not None:
        cfg = with_steps(cfg, len(judgements))
    saved = find_start(cfg)
    done, total_steps = 0 if saved is None else saved.step, cfg.train.steps
    if cfg.stage == "reject":
        done = blocks_done(cfg.output_dir)
        total_steps = num_steps(cfg, len(train_prompts))
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(
            RunLog(
                cfg.output_dir,
                total_steps=total_steps,
                is_writer=is_writer,
                world_size=dist.get_world_size(),
                num_samples=cfg.telemetry.num_samples,
                peak_tflops=cfg.profile.peak_tflops,
                tensorboard=cfg.telemetry.tensorboard,
                wandb_project=cfg.telemetry.wandb_project,
                name=cfg.name,
                config=asdict(cfg),
                first_step=done + 1,
                resumed=can_resume(cfg),
                prometheus=_prometheus(cfg),
                stage=cfg.stage,
                disk_wait_s=cfg.resilience.disk_full_wait_s if cfg.resilience.on_disk_full == "wait" else 0.0,
            )
        )
        readings = stack.enter_context(Readings(cfg, groups, log))
        operators = library.load()
        if not operators.loaded:
            log.note(f"the operators run in plain PyTorch, which is slower: {operators.problem}")
        for what, prompts in (("prompts to learn from", train_prompts), ("held-out prompts", held_out)):
            if prompts.left_out:
                log.note(f"{len(prompts)} {what}; left out: {counted(prompts.left_out)}")
        if rows is not None and rows.left_out:
            log.note(f"{rows.num_rows} rows to learn from; left out: {counted(rows.left_out)}")
        if judgements is not None and judgements.left_out:
            log.note(f"data.path: {len(judgements)} rows; left out: {counted(judgements.left_out)}")
        restarts = cfg.resilience.max_reward_restarts
        grades = groups.is_replica_writer and cfg.stage != "reward_model"
        grader = stack.enter_context(build_rewards(cfg.graded_by, restarts)) if grades else None
        source = cfg.checkpoint.load if saved is None else None
        chunks = build_model(cfg, groups, draw_weights=saved is None and not source)
        loaded = {}
        if source:
            contents = Contents(chunks, groups)
            loaded = load_checkpoint(source, contents, cfg.model, verify=cfg.checkpoint.verify, fresh_head=True)
            log.note(f"weights from {source} (stage {loaded.get('stage')}, step {loaded.get('step')})")
        if is_writer and cfg.trains:
            keep_origin(cfg, tokenizer, log)
        policy = build_policy(cfg, groups, chunks)
        if saved is not None:
            problem = restore(cfg, saved, policy)
            log.note(f"going on after step {done} from {saved.path}")
            if problem:
                log.note(problem)
        elif scales_are_delayed(chunks[0].config):
            log.note(SCALES_BEGIN_ANEW)
        engine = build_engine(cfg, policy.chunks, groups, tokenizer)
        writer = CheckpointWriter(background=cfg.checkpoint.async_save)
        checkpoints = RunCheckpoints(cfg, groups, policy, engine, log, writer)
        if saved is not None:
            checkpoints.resume(saved)
        checkpoints.track("spikes", policy.spikes)
        reward_models = build_reward_models(cfg, groups, log)
        try:
            yield Run(
                cfg,
                groups,
                tokenizer,
                train_prompts,
                held_out,
                task,
                rows,
                judgements,
                policy,
                engine,
                grader,
                reward_models,
                log,
                readings,
                checkpoints,
                Pace(cfg, groups, log),
                loaded,
            )
        except RaisedTogether:
            checkpoints.save_at_failure()
            raise
        dist.barrier()


def data_share(cfg: RunConfig) -> Share:
    """What this rank does of the work on streamed files; nothing is shared where every rank holds all rows."""
    if not cfg.data.streaming:
        return ALONE

    def gather(found: Any) -> list[Any]:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, found)
        return parts

    return Share(Part(dist.get_rank(), dist.get_world_size()), gather)


def _prometheus(cfg: RunConfig) -> tuple[str, int] | None:
    port = cfg.telemetry.prometheus_port
    return None if port is None else (cfg.telemetry.prometheus_host, port)
