"""What a rank measures about the algorithms: a step of each, from rewards to the gradients of the model's parameters.

The completions, and the weights of the current, the old and the reference policy, are the references' ``papers``. The
stage's own functions make samples of them: penalty, selection, advantages, annotation, KL in the reward, whitening.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from r1_megatron.config.algorithms import ALGORITHMS
from r1_megatron.config.schema import RLConfig
from r1_megatron.rl.select import apply_overlong_penalty
from r1_megatron.stages import grpo
from r1_megatron.stages.step_report import StepReport
from r1_megatron.train.objectives import PolicyObjective
from tests.distributed.ppo_checks import graded_groups
from tests.distributed.train_bench import Answer, Bench, gradients_of
from tests.paper_oracle import L_MAX
from tests.tiny import TINY


def papers(bench: Bench) -> Answer:
    """Annotated by the policy that sampled, learned from by one that has moved since: the second of two updates."""
    expected = bench.references["papers"]
    cfg = bench.config(TINY)
    cfg = replace(cfg, sampling=replace(cfg.sampling, temperature=expected["temperature"], max_new_tokens=L_MAX))
    policy = bench.policy(cfg, "papers_reference")
    policy.refresh_reference()
    bench.load(policy, "papers_old")
    groups, steps = graded_groups(expected["batch"], bench.groups), {}
    for name, fields in ALGORITHMS.items():
        rl = RLConfig(inner_epochs=2, **fields)
        run: Any = SimpleNamespace(cfg=replace(cfg, rl=rl), groups=bench.groups, policy=policy)
        report = StepReport(run)
        graded = apply_overlong_penalty(groups, rl, max_new_tokens=L_MAX)
        minibatches = grpo.annotate(run, grpo.assign(run, 1, [graded], report))
        (minibatch,) = grpo.finish_credit(run, minibatches, report)
        steps[name] = minibatch.samples, PolicyObjective(rl, cfg.sampling.temperature)
    bench.load(policy, "tiny")
    return {
        name: gradients_of(policy, samples, expected["answers"][name], objective)
        for name, (samples, objective) in steps.items()
    }


CHECKS = (papers,)
