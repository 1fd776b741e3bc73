"""What becomes of the requests of one call: rollouts that ended and, if the call is stopped, all that is in flight."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import numpy as np

from r1_megatron.data.tokenizers import Tokenizer
from r1_megatron.rollout.in_flight import InFlight
from r1_megatron.rollout.requests import Call
from r1_megatron.rollout.sampler import request_key
from r1_megatron.rollout.scheduler import SAMPLES_PER_PROMPT_LIMIT, Finished, Live
from r1_megatron.rollout.stopping import StopStrings
from r1_megatron.types import FinishReason, Rollout

# The experts of a sequence's first tokens: (its pages, number of tokens) -> [tokens, layers, topk], or None.
Routing = Callable[[np.ndarray, int], "np.ndarray | None"]


class Answers:
    """Collects the rollouts of one call.

    Args:
        call: its finished sequences in flight are answers already, the others wait in the queue.
        stop_tokens: ids that end a sequence and are left out of its text.
    """

    def __init__(self, call: Call, tokenizer: Tokenizer, stop_tokens: Collection[int]):
        self._call, self._tokenizer, self._stop_tokens = call, tokenizer, stop_tokens
        self._stop_strings = StopStrings(tokenizer, call.sampling.stop) if call.sampling.stop else None
        self._numbers = {prompt.index: number for number, prompt in enumerate(call.prompts)}
        self._rollouts: list[list[Rollout | None]] = [[None] * call.samples_per_prompt for _ in call.prompts]
        # By request, unfinished ones as an earlier call or their giving up left them.
        self._begun: dict[int, InFlight] = {}
        for begun in call.in_flight:
            if begun.finish is not None:
                experts = self._recorded(begun)
                self._add(begun.request, begun.tokens, begun.prompt_len, begun.logprobs, experts, begun.finish)
                continue
            self._begun[begun.request] = begun
            for token in begun.tokens[begun.prompt_len :].tolist():
                self.completes_stop_string(begun.request, token)

    @property
    def rollouts(self) -> list[list[Rollout]]:
        """By prompt and sample; every request has ended."""
        rollouts = [[rollout for rollout in group if rollout is not None] for group in self._rollouts]
        assert all(len(group) == self._call.samples_per_prompt for group in rollouts)
        return rollouts

    def completes_stop_string(self, request: int, token: int) -> bool:
        """Whether the request's next token completes one of ``sampling.stop``."""
        return self._stop_strings is not None and self._stop_strings.completes(request, token)

    def finish(self, end: Finished, routing: Routing) -> None:
        """A sequence ended; its pages are still as they were."""
        request, tokens, logprobs, _ = end.sequence
        finish: FinishReason = "stop" if end.stopped else "length"
        self._add(request.request, tokens, len(request.prompt), logprobs, self._experts(end.sequence, routing), finish)
        if self._stop_strings is not None:
            self._stop_strings.forget(request.request)

    def give_up(self, sequence: Live, routing: Routing) -> None:
        """A sequence is put back into the queue; its pages are still as they were.

        It will be fed again, but its experts are those that its tokens met when they were drawn.
        """
        self._begun[sequence.request.request] = self._on_its_way(sequence, routing)

    def in_flight(self, live: Iterable[Live], routing: Routing) -> list[InFlight]:
        """All sequences that have begun, in this call or in an earlier one, in the order of their request.

        ``live``: those whose tokens but the last one are in the cache. Others that have begun wait to be fed again.
        """
        begun = dict(self._begun)
        for sequence in live:
            begun[sequence.request.request] = self._on_its_way(sequence, routing)
        for r in (r for group in self._rollouts for r in group if r is not None):
            begun[r.request] = self._as_in_flight(
                r.request, r.tokens, r.prompt_len, r.logprobs, r.routed_experts, r.finish
            )
        return [begun[request] for request in sorted(begun)]

    def _add(
        self,
        request: int,
        tokens: np.ndarray,
        prompt_len: int,
        logprobs: np.ndarray,
        experts: np.ndarray | None,
        finish: FinishReason,
    ) -> None:
        index, sample = divmod(request, SAMPLES_PER_PROMPT_LIMIT)
        self._rollouts[self._numbers[index]][sample] = Rollout(
            request=request,
            tokens=tokens,
            prompt_len=prompt_len,
            logprobs=logprobs,
            routed_experts=experts,
            finish=finish,
            policy_version=self._call.policy_version,
            text=self._text(tokens[prompt_len:].tolist()),
        )

    def _as_in_flight(
        self,
        request: int,
        tokens: np.ndarray,
        prompt_len: int,
        logprobs: np.ndarray,
        experts: np.ndarray | None,
        finish: FinishReason | None,
    ) -> InFlight:
        by_layer = None
        if experts is not None and self._call.routing_shape is not None:
            by_layer = {layer: experts[:, column] for column, layer in enumerate(self._call.routing_shape[0])}
        key = request_key(self._call.seed, request)
        return InFlight(request, key, tokens, prompt_len, logprobs, finish, self._call.policy_version, by_layer)

    def _on_its_way(self, sequence: Live, routing: Routing) -> InFlight:
        request, tokens, logprobs, _ = sequence
        experts = self._experts(sequence, routing)
        return self._as_in_flight(request.request, tokens, len(request.prompt), logprobs, experts, None)

    def _experts(self, sequence: Live, routing: Routing) -> np.ndarray | None:
        """Those of a sequence's fed tokens; of one fed again what it met when they were drawn, not when fed again."""
        experts = routing(sequence.pages, len(sequence.tokens) - 1)
        if experts is not None and (begun := self._begun.get(sequence.request.request)) is not None:
            experts[: len(begun.tokens) - 1] = self._recorded(begun)
        return experts

    def _recorded(self, begun: InFlight) -> np.ndarray | None:
        """``[num_tokens - 1, layers, topk]`` as they were recorded before."""
        if self._call.routing_shape is None:
            return None
        layers, topk = self._call.routing_shape
        if not layers:  # a pipeline stage without mixture-of-experts layers
            return np.zeros((len(begun.tokens) - 1, 0, topk), dtype=np.uint8)
        assert begun.routed_experts is not None
        return np.stack([begun.routed_experts[layer] for layer in layers], axis=1)

    def _text(self, response: list[int]) -> str:
        if response and response[-1] in self._stop_tokens:
            response = response[:-1]
        # The model's vocabulary may be larger than the tokenizer's (DeepSeek-V3: 129280 against 128815).
        known = self._tokenizer.vocab_size
        return self._tokenizer.decode([token for token in response if token < known])
