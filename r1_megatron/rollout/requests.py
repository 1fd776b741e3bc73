"""What a call of ``Engine.generate`` asks for, checked and put in order. Pure: nothing has run when this refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from r1_megatron.config.schema import SamplingConfig
from r1_megatron.rollout.in_flight import InFlight
from r1_megatron.rollout.race import Race
from r1_megatron.rollout.sampler import check_sampling, request_key
from r1_megatron.rollout.scheduler import SAMPLES_PER_PROMPT_LIMIT, Request
from r1_megatron.types import Prompt

_SHOWN_PROBLEMS = 8


@dataclass(frozen=True)
class Call:
    """The arguments of ``Engine.generate``, on one rank.

    ``routing_shape``: global numbers of the layers whose experts are recorded, and experts per token; ``None``: none.
    """

    prompts: Sequence[Prompt]
    samples_per_prompt: int
    sampling: SamplingConfig
    seed: int
    policy_version: int = 0
    in_flight: Sequence[InFlight] = ()
    routing_shape: tuple[Sequence[int], int] | None = None
    race: Race | None = None


def make_requests(call: Call) -> list[Request]:
    """One request per sample, samples of a prompt together; those that ``in_flight`` says are finished left out."""
    resumed = {rollout.request: rollout for rollout in call.in_flight}
    requests = []
    for number, prompt in enumerate(call.prompts):
        tokens = np.asarray(prompt.tokens, dtype=np.int64)
        for sample in range(call.samples_per_prompt):
            name = prompt.index * SAMPLES_PER_PROMPT_LIMIT + sample
            drawn = {}
            if (rollout := resumed.get(name)) is not None:
                if rollout.finish is not None:
                    continue
                drawn = {"response": rollout.tokens[rollout.prompt_len :], "logprobs": rollout.logprobs}
            key = request_key(call.seed, name)
            requests.append(Request(name, key, number, tokens, call.sampling.max_new_tokens, **drawn))
    return requests


def check_call(call: Call, *, vocab_size: int, max_len: int) -> None:
    """Raise ``ValueError`` naming what cannot be sampled or resumed.

    Args:
        vocab_size: real vocabulary.
        max_len: longest sequence, in tokens.
    """
    sampling = call.sampling
    check_sampling(sampling)
    if not 1 <= call.samples_per_prompt <= SAMPLES_PER_PROMPT_LIMIT:
        raise ValueError(f"samples_per_prompt={call.samples_per_prompt} must be in [1, {SAMPLES_PER_PROMPT_LIMIT}].")
    outside = [token for token in sampling.stop_token_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"sampling.stop_token_ids: {outside} are outside the vocabulary [0, {vocab_size}).")
    seen: set[int] = set()
    problems = []
    for prompt in call.prompts:
        length = len(prompt.tokens)
        wrong = [token for token in prompt.tokens if not 0 <= token < vocab_size]
        if wrong:
            problems.append(f"prompt {prompt.index}: token ids {wrong[:5]} are outside [0, {vocab_size})")
        if length == 0:
            problems.append(f"prompt {prompt.index} is empty")
        if length + sampling.max_new_tokens > max_len:
            problems.append(
                f"prompt {prompt.index}: {length} tokens + sampling.max_new_tokens({sampling.max_new_tokens}) = "
                f"{length + sampling.max_new_tokens}, but a sequence may have {max_len} tokens "
                "(data.max_prompt_tokens + sampling.max_new_tokens of the run)"
            )
        if prompt.index in seen or not 0 <= prompt.index < 1 << 43:
            problems.append(f"prompt {prompt.index}: the index must be in [0, 2**43) and stand once in a call")
        seen.add(prompt.index)
    _refuse("cannot generate", problems)
    _check_in_flight(call, vocab_size)


def _check_in_flight(call: Call, vocab_size: int) -> None:
    """Each sequence must be the beginning of a sample that the call asks for."""
    by_index = {prompt.index: prompt for prompt in call.prompts}
    seen: set[int] = set()
    problems = []
    for rollout in call.in_flight:
        prompt = by_index.get(rollout.prompt_index)
        if prompt is None or rollout.request % SAMPLES_PER_PROMPT_LIMIT >= call.samples_per_prompt:
            sample = rollout.request % SAMPLES_PER_PROMPT_LIMIT
            problems.append(
                f"request {rollout.request} (prompt {rollout.prompt_index}, sample {sample}) is none of the "
                f"{call.samples_per_prompt} samples of prompts {sorted(by_index)[:5]}"
            )
            continue
        if rollout.request in seen:
            problems.append(f"request {rollout.request} is given twice")
        seen.add(rollout.request)
        said = [*_conflicts(rollout, prompt, call), *_faults(rollout, vocab_size, call.routing_shape)]
        problems += [f"request {rollout.request} {problem}" for problem in said]
    _refuse("cannot resume the rollouts in flight", problems)


def _conflicts(rollout: InFlight, prompt: Prompt, call: Call) -> Iterator[str]:
    if tuple(rollout.tokens[: rollout.prompt_len].tolist()) != prompt.tokens:
        yield f"begins with other tokens than prompt {prompt.index}"
    if rollout.key != request_key(call.seed, rollout.request):
        yield f"was drawn with another seed than {call.seed}"
    drawn_by = rollout.versions
    if (drawn_by[rollout.num_carried :] != call.policy_version).any() or (drawn_by > call.policy_version).any():
        yield f"was drawn by version {drawn_by.max()} of the policy, this is version {call.policy_version}"
    if rollout.num_carried and call.race is None:
        yield f"has {rollout.num_carried} tokens of earlier steps (rollout.over_sampling_prompts is 0)"
    limit = call.sampling.max_new_tokens
    if rollout.num_response > limit - (rollout.finish is None):
        state = "on its way" if rollout.finish is None else "finished"
        yield f"is {state} with {rollout.num_response} tokens, sampling.max_new_tokens={limit}"


def _faults(rollout: InFlight, vocab_size: int, routing_shape: tuple[Sequence[int], int] | None) -> Iterator[str]:
    outside = rollout.tokens[(rollout.tokens < 0) | (rollout.tokens >= vocab_size)]
    if len(outside):
        yield f"has tokens {outside[:5].tolist()}, outside [0, {vocab_size})"
    if not 1 <= rollout.num_response == len(rollout.logprobs):
        yield f"has {rollout.num_response} drawn tokens and {len(rollout.logprobs)} log-probabilities"
    if routing_shape is None:
        return
    layers, topk = routing_shape
    recorded = {layer: experts.shape for layer, experts in (rollout.routed_experts or {}).items()}
    missing = [layer for layer in layers if recorded.get(layer) != (len(rollout.tokens) - 1, topk)]
    if missing:
        yield (
            f"has no experts [{len(rollout.tokens) - 1}, {topk}] of layers {missing[:5]} (rollout.router_replay needs "
            f"them; recorded: {dict(list(recorded.items())[:5])})"
        )


def _refuse(what: str, problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        told = "; ".join(problems[:_SHOWN_PROBLEMS])
        raise ValueError(f"{what}: {told}" + (f"; and {more} more" if more > 0 else ""))
