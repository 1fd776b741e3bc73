"""PPO (arXiv 1707.06347) with a critic and GAE: the baseline that GRPO's authors compare it with.

    r1-megatron train examples/chain_sum_ppo.yaml

The loop is GRPO's, and so are sampling, grading, log-probabilities and the policy's loss. What differs is who says how
good a token was: not the other answers to the prompt but a critic, a value model of its own on the same ranks
(`model/value_head.py`), which learns from the same minibatches with an optimizer of its own. With ``rl.kl_in: reward``
each token pays for its divergence from the reference policy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from r1_megatron.checkpoint.contents import Contents
from r1_megatron.checkpoint.store import load_checkpoint, read_description
from r1_megatron.config.schema import RunConfig
from r1_megatron.config.value_models import critic_config
from r1_megatron.data.prompts import PromptStream
from r1_megatron.model.build import build_model
from r1_megatron.rl.credit import response_divergence, whiten_samples
from r1_megatron.rl.gae import credited, token_rewards
from r1_megatron.rollout.in_flight import RolloutStopped
from r1_megatron.stages.carry import Carry
from r1_megatron.stages.evaluate import end_step, evaluate, evaluate_at_start
from r1_megatron.stages.grpo import (
    advantage_moments,
    annotate,
    assign,
    check_rollout_match,
    has_several_updates,
    refresh_reference,
    sample_step,
)
from r1_megatron.stages.roll_backs import rolls_back
from r1_megatron.stages.setup import Run, open_run
from r1_megatron.stages.step_profile import profiled_steps
from r1_megatron.stages.step_report import Minibatch, StepReport
from r1_megatron.train.objectives import PolicyObjective
from r1_megatron.train.policy import Policy, build_policy
from r1_megatron.train.step import train_step
from r1_megatron.train.value_objectives import CriticObjective
from r1_megatron.types import StepResult

CRITIC = "critic"  # in checkpoints


def run(cfg: RunConfig) -> None:
    """Sample, grade, ask the critic, learn. Each line enters one room."""
    with open_run(cfg) as run:
        critic = open_critic(run)
        prompts = run.checkpoints.track("prompts", PromptStream(run.train_prompts, cfg.data.seed, cfg.data.shuffle))
        carry = run.checkpoints.track_carry(Carry(cfg.rollout, run.groups.topology.num_replicas))
        objective = PolicyObjective(cfg.rl, cfg.sampling.temperature)
        evaluation = functools.partial(evaluate_while_it_rests, critic)
        if not run.checkpoints.resumed:
            refresh_reference(run, step=0)
        evaluate_at_start(run, evaluation)
        for step in profiled_steps(run):
            report = StepReport(run)
            before = prompts.state()
            try:
                with critic.resting():
                    graded = sample_step(run, step, prompts, carry, report)
            except RolloutStopped as stopped:
                prompts.restore(before)
                run.checkpoints.save_in_rollout(stopped.rollouts)
                break
            with run.log.clock("annotate"):
                minibatches = annotate(run, assign(run, step, graded, report))
                minibatches, told = ask_critic(run, critic, minibatches, report)
            with run.log.clock("train"):
                results, critic_results = learn(run, critic, step, minibatches, objective)
            if rolls_back(run, step, results + critic_results):
                continue
            graded.append(report.replaced)  # sampled, graded and shown all the same
            metrics = report.metrics(graded, minibatches, results) | carry.metrics | run.pace.metrics(step)
            metrics |= told | critic_metrics(run, critic_results)
            run.log.samples(step, report.sample_rows(graded))
            metrics |= run.readings.of_step(step)
            run.log.write(step, metrics)
            check_rollout_match(run, step, metrics)
            refresh_reference(run, step)
            if end_step(run, step, evaluation):
                break


def open_critic(run: Run) -> Policy:
    """The critic: from the run's checkpoint, from ``critic.load``, or from what the policy starts from. Collective."""
    cfg = critic_config(run.cfg)
    resumed, source = bool(run.checkpoints.resumed), cfg.checkpoint.load
    chunks = build_model(cfg, run.groups, draw_weights=not resumed and source is None)
    if source is not None and not resumed:
        field = "critic.load" if run.cfg.critic.load else "checkpoint.load"
        prefix = f"{CRITIC}." if CRITIC in read_description(source, field) else ""
        contents = Contents(chunks, run.groups, prefix=prefix)
        load_checkpoint(source, contents, cfg.model, field=field, verify=cfg.checkpoint.verify, fresh_head=True)
        run.log.note(f"the critic's weights from {source}")
    critic = run.checkpoints.track_model(CRITIC, build_policy(cfg, run.groups, chunks))
    run.checkpoints.track("critic_spikes", critic.spikes)
    return critic


def evaluate_while_it_rests(
    critic: Policy, run: Run, step: int, stop: Callable[[], bool] | None = None
) -> dict[str, float]:
    with critic.resting():
        return evaluate(run, step, stop)


def ask_critic(
    run: Run, critic: Policy, minibatches: Sequence[Minibatch], report: StepReport
) -> tuple[list[Minibatch], dict[str, float]]:
    """Advantages, values and returns of every token, and what is to be said of them. Collective.

    Advantages are whitened over all tokens that the step learns from, on all ranks, so they are the same under every
    layout.
    """
    ppo, rl = run.cfg.ppo, run.cfg.rl
    values = iter(critic.values([sample for minibatch in minibatches for sample in minibatch.samples]))
    finished = []
    for minibatch in minibatches:
        rewards = [reward for group in minibatch.groups for reward in group.rewards]
        samples = []
        for sample, reward in zip(minibatch.samples, rewards, strict=True):
            costs = np.zeros(len(sample.tokens) - sample.prompt_len)
            if rl.kl_coef and rl.kl_in == "reward":
                report.divergences.append(response_divergence(sample, rl))
                costs = rl.kl_coef * report.divergences[-1]
                if not has_several_updates(rl):  # the forward pass of the one update is the old policy
                    sample = replace(sample, old_logprobs=None)
            given = token_rewards(reward, costs)
            samples.append(credited(sample, given, next(values), ppo.gamma, ppo.gae_lambda))
        finished.append(replace(minibatch, samples=samples))
    told = value_metrics(run, finished)
    if ppo.whiten_advantages:
        mean, std = advantage_moments(run, finished)
        finished = [replace(part, samples=whiten_samples(part.samples, mean, std, rl)) for part in finished]
    return finished, told


def learn(
    run: Run, critic: Policy, step: int, minibatches: Sequence[Minibatch], objective: PolicyObjective
) -> tuple[list[StepResult], list[StepResult]]:
    """One optimizer step of the critic, and one of the policy, per minibatch and inner epoch; in the first
    ``critic.warmup_steps`` steps the critic's alone."""
    results, critic_results = [], []
    critic_objective = CriticObjective(run.cfg.critic.value_clip)
    for _ in range(run.cfg.rl.inner_epochs):
        for minibatch in minibatches:
            if minibatch.num_tokens == 0:
                continue
            for model, aim, made in ((critic, critic_objective, critic_results), (run.policy, objective, results)):
                if model is critic or step > run.cfg.critic.warmup_steps:
                    batch = model.pack(minibatch.samples, minibatch.num_tokens)
                    made.append(train_step(model, batch, aim, minibatch.num_sequences, step))
    return results, critic_results


def value_metrics(run: Run, minibatches: Sequence[Minibatch]) -> dict[str, float]:
    """Means of values and returns over the tokens that are learned from, and how much of the returns' variance the
    critic explains. Collective."""
    sums = np.zeros(5)
    for sample in (sample for minibatch in minibatches for sample in minibatch.samples):
        assert sample.values is not None and sample.returns is not None
        values, returns = (array[sample.loss_mask].astype(np.float64) for array in (sample.values, sample.returns))
        missed = returns - values
        sums += [len(values), values.sum(), returns.sum(), (returns**2).sum(), (missed**2).sum()]
    total = torch.from_numpy(sums).to(run.groups.device)
    dist.all_reduce(total, group=run.groups.replicas)
    count, of_values, of_returns, squares, missed = total.tolist()
    count = max(count, 1.0)
    mean, mean_missed = of_returns / count, (of_returns - of_values) / count
    variance, left = squares / count - mean**2, missed / count - mean_missed**2
    metrics = {"critic/values/mean": of_values / count, "critic/returns/mean": mean}
    return metrics | ({"critic/vf_explained_var": 1.0 - left / variance} if variance > 1e-12 else {})


def critic_metrics(run: Run, results: Sequence[StepResult]) -> dict[str, float]:
    """Means over the critic's updates; shows what was passed over."""
    for problem in (result.problem for result in results if result.problem):
        run.log.note(f"update of the critic skipped: {problem}")
    made = [result.metrics for result in results if result.updated]
    names = {"critic/vf_loss", "critic/vf_clipfrac", "actor/lr", "actor/grad_norm"} if made else ()
    means = {name: sum(metrics[name] for metrics in made) / len(made) for name in sorted(names)}
    means = {name.replace("actor/", "critic/"): value for name, value in means.items()}
    return means | {"critic/updates": float(len(made)), "critic/skipped_updates": float(len(results) - len(made))}
