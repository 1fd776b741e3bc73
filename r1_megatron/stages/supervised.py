"""The rows of a supervised stage: what is learned from, in which steps, and what is held out to measure the loss on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from r1_megatron.config.schema import RunConfig, SFTConfig
from r1_megatron.data.conversations import Demonstration
from r1_megatron.data.demonstrations import Demonstrations, build_demonstrations
from r1_megatron.data.loading import Share
from r1_megatron.data.prompts import check_same_order
from r1_megatron.data.tokenizers import Tokenizer
from r1_megatron.types import TrainSample

if TYPE_CHECKING:
    from r1_megatron.stages.setup import Run


def read_rows(cfg: RunConfig, tokenizer: Tokenizer, share: Share) -> Demonstrations:
    """All supervised rows of the run's sources; the same on every rank."""
    return build_demonstrations(
        cfg.data,
        cfg.sft,
        tokenizer,
        cfg.model.vocab_size,
        cfg.longest_row,
        num_held_out=cfg.sft.held_out_rows,
        share=share,
    )


def with_steps(cfg: RunConfig, num_rows: int) -> RunConfig:
    """``cfg`` with the steps that its epochs make of so many rows (or pairs), where it says so.

    Raises:
        ValueError: what the steps have to be more than, or to contain, is not so.
    """
    name, train = cfg.rows_section, cfg.train
    if cfg.epochs is None:
        return cfg
    batch_size = getattr(cfg, name).batch_size
    steps = -(-cfg.epochs * num_rows // batch_size)
    made = f"{name}.epochs({cfg.epochs}) * rows({num_rows}) / {name}.batch_size({batch_size}) makes {steps} steps"
    problems = []
    if train.lr_decay_steps is None and train.lr_warmup_steps >= steps:
        problems.append(f"train.lr_warmup_steps({train.lr_warmup_steps}) has to be less.")
    if outside := [step for step in cfg.profile.steps if step > steps]:
        problems.append(f"profile.steps: {outside} are not among them.")
    if problems:
        raise ValueError(f"{made}. {' '.join(problems)}")
    return replace(cfg, train=replace(train, steps=steps))


def supervised_sample(row: Demonstration, num_tokens: int) -> TrainSample:
    """Every learned token weighs ``1 / num_tokens``, the learned tokens of the whole step on all ranks."""
    tokens = np.asarray(row.tokens, dtype=np.int64)
    mask = np.zeros(len(tokens), dtype=bool)
    for first, end in row.learned:
        mask[first - 1 : end - 1] = True
    return TrainSample(
        tokens=tokens,
        loss_mask=mask,
        advantages=np.zeros(len(tokens), dtype=np.float32),
        weights=mask.astype(np.float32) / np.float32(num_tokens),
    )


def held_out_loss(run: Run) -> dict[str, float]:
    """``loss``: cross entropy of a held-out response token, in nats; nothing without such rows. Collective."""
    if run.rows is None or not run.rows.held_out:
        return {}
    mine = run.rows.held_out[run.groups.replica :: run.groups.topology.num_replicas]
    samples = [supervised_sample(row, 1) for row in mine]
    nll = num_tokens = 0.0
    for sample, logprobs in zip(samples, run.policy.logprobs(samples, temperature=1.0, replay=False)):
        nll -= float(logprobs[sample.loss_mask].sum(dtype=np.float64))
        num_tokens += int(sample.loss_mask.sum())
    sums = torch.tensor([nll, num_tokens], dtype=torch.float64, device=run.groups.device)
    dist.all_reduce(sums, group=run.groups.replicas)
    total, count = sums.tolist()
    return {"loss": total / count}


class DemonstrationStream:
    """Endless rows, in a new order every epoch; the same on every rank."""

    def __init__(self, rows: Demonstrations, cfg: SFTConfig):
        self._rows, self._cfg = rows, cfg
        self._position = 0

    @property
    def epochs(self) -> float:
        """Passes over the rows so far."""
        return self._position / self._rows.num_rows

    def state(self) -> dict[str, Any]:
        """The place in the stream, and which rows it is over."""
        return {"position": self._position, "num_rows": self._rows.num_rows, "order": self._rows.order.kind}

    def restore(self, state: dict[str, Any]) -> None:
        check_same_order(state["num_rows"], state.get("order", ""), self._rows.order, "rows")
        self._position = state["position"]

    def of_step(self, step: int) -> list[Demonstration]:
        """The next ``sft.batch_size`` rows; with ``sft.epochs`` the last step takes what is left."""
        count = self._cfg.batch_size
        if self._cfg.epochs is not None:
            count = min(count, self._cfg.epochs * self._rows.num_rows - (step - 1) * self._cfg.batch_size)
        start, self._position = self._position, self._position + count
        return [self._rows.at(place) for place in range(start, start + count)]
