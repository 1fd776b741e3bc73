"""How long the other models of a step take: the critic that learns with the policy, the reward models that grade.

The critic says once what every token is worth, all sequences of the step in one forward pass, and then makes as many
updates as the policy does (`stages/ppo.py`). A reward term with a model is one forward pass over the sequences that
are graded (`stages/reward_terms.py`): all of them, as a configuration does not say how many prompts are of a source,
and whole ones, whatever part the term sees. What lies on the host (``train.offload``) comes to the GPU and, where it
learns, goes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from r1_megatron.config.schema import RewardTermConfig, RunConfig
from r1_megatron.config.value_models import beside, critic_config, model_of_term, reward_model_terms
from r1_megatron.planner.hardware import GIB, Hardware
from r1_megatron.planner.parameters import rank_parameters
from r1_megatron.planner.passes import Passes, num_minibatches
from r1_megatron.planner.precision import precision
from r1_megatron.planner.workload import Workload

# Formats of benchmarks that are graded by the run's reward terms.
GRADED_BY_TERMS = ("held_out", "prompts")


@dataclass(frozen=True)
class OtherTime:
    """Seconds with their reason. ``kind``: ``reward_model`` (while rewards are given), ``values`` (while sequences are
    annotated), ``critic`` (while it learns) or ``lending`` (between host and GPU)."""

    kind: str
    name: str
    seconds: float
    how: str


def other_times(cfg: RunConfig, hardware: Hardware, load: Workload) -> Iterator[OtherTime]:
    """Of a step in which every reward term counts."""
    if cfg.stage == "ppo":
        yield from _critic(cfg, hardware, load)
    if _grades(cfg):
        for number in reward_model_terms(cfg):
            yield _reward_model(cfg, number, hardware, load)


def _grades(cfg: RunConfig) -> bool:
    """Whether the reward terms grade what a step samples. Held-out prompts beside training are not of a step."""
    benchmarks = cfg.evaluate.benchmarks if cfg.stage == "evaluate" else ()
    return not cfg.learns_from_rows and (not benchmarks or any(one.format in GRADED_BY_TERMS for one in benchmarks))


def _critic(cfg: RunConfig, hardware: Hardware, load: Workload) -> Iterator[OtherTime]:
    passes = Passes.of(critic_config(cfg), hardware, load)
    slowest, pp = passes.slowest, passes.links.topology.pp
    yield OtherTime("values", "the critic's values", passes.asking(), _asked(passes))
    after, _ = passes.after(slowest.held)
    packs = f"{load.microbatches} packs" + (f" * (1 + {passes.waits:.2f} of waiting)" if pp > 1 else "")
    once = f"{packs} * {slowest.seconds:.3g} s forward and backward + {after:.2g} s behind them"
    how = f"{load.updates} updates * ({once})"
    yield OtherTime("critic", "training of the critic", passes.training(), how)
    if cfg.train.offload:
        of = precision(cfg)
        lent = max(
            held.total * of.activation
            + held.optimizer_shard(cfg.train.use_distributed_optimizer) * (1 - of.offloaded) * of.optimizer
            for held in rank_parameters(passes.cfg.model, passes.cfg.parallel)
        )
        how = f"2 ways * {lent / GIB:.1f} GiB of weights and optimizer / {_bandwidth(hardware)}"
        yield OtherTime("lending", "the critic to the host and back", 2 * lent / hardware.host_bandwidth, how)


def _reward_model(cfg: RunConfig, number: int, hardware: Hardware, load: Workload) -> OtherTime:
    term, model = cfg.graded_by.terms[number], model_of_term(cfg, number)
    name = f"reward.terms.{number}"
    if model is None:
        how = f"unknown: {term.options['checkpoint']} is not here; options.preset would say which model it is"
        return OtherTime("reward_model", name, 0.0, how)
    own = beside(cfg, model)
    longest = min(term.options.get("max_tokens") or model.max_position_embeddings, model.max_position_embeddings)
    # The model is asked for the whole step at once, whatever the policy's minibatches are.
    of_all = replace(load, microbatches=load.microbatches * num_minibatches(cfg), updates=0)
    passes = Passes.of(own, hardware, _cut(of_all, longest))
    seconds, how = passes.asking(), _asked(passes)
    if cfg.train.offload:
        weights = max(held.total for held in rank_parameters(own.model, own.parallel)) * precision(own).activation
        seconds += weights / hardware.host_bandwidth
        how += f" + {weights / GIB:.1f} GiB of weights from the host / {_bandwidth(hardware)}"
    return OtherTime("reward_model", name, seconds, how + _when(term))


def _cut(load: Workload, longest: int) -> Workload:
    """Sequences that are longer lose their beginning."""
    if load.longest <= longest:
        return load
    prompt = min(load.mean_prompt, longest // 2)
    return replace(load, longest=longest, mean_prompt=prompt, mean_response=min(load.mean_response, longest - prompt))


def _asked(passes: Passes) -> str:
    topology, seconds = passes.links.topology, passes.slowest.forward_seconds
    packs = f"{passes.num_packs} packs of the step"
    if topology.pp > 1:
        packs = f"({packs} + {topology.pp - 1} to fill the pipeline)"
    return f"{packs} * {seconds:.3g} s forward on the slowest stage"


def _when(term: RewardTermConfig) -> str:
    said = [f"from step {term.from_step} on"] if term.from_step > 1 else []
    said += [f"up to step {term.until_step}"] if term.until_step is not None else []
    said += [f"as if all prompts were of {', '.join(term.sources)}"] if term.sources else []
    return "; " + ", ".join(said) if said else ""


def _bandwidth(hardware: Hardware) -> str:
    return f"{hardware.host_bandwidth / 1e9:.0f} GB/s"
