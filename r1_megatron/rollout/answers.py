"""What becomes of the requests of one call: rollouts that ended and, if the call is stopped, all that is in flight.

Where groups race (`race.py`), also how far each of them is and, at the end, what the losers have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import numpy as np

from r1_megatron.data.tokenizers import Tokenizer
from r1_megatron.rollout.in_flight import InFlight, token_versions
from r1_megatron.rollout.requests import Call
from r1_megatron.rollout.sampler import request_key
from r1_megatron.rollout.scheduler import SAMPLES_PER_PROMPT_LIMIT, Finished, Live, Request
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
        # By prompt number: samples that have not ended, and the most tokens that one which has ended drew in this step.
        self._num_open = [call.samples_per_prompt for _ in call.prompts]
        self._lengths = [-1 for _ in call.prompts]
        self._carried = {begun.request: begun for begun in call.in_flight if begun.num_carried}
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
        """By prompt and sample; every request has ended, but for the losers of a race, whose groups are empty."""
        rollouts = [[rollout for rollout in group if rollout is not None] for group in self._rollouts]
        if self._call.race is not None:
            winners = set(self._call.race.winners)
            rollouts = [group if p.index in winners else [] for p, group in zip(self._call.prompts, rollouts)]
        assert all(len(group) in (0, self._call.samples_per_prompt) for group in rollouts)
        return rollouts

    def done(self) -> list[int]:
        """What this rank reports to the others that race (`Race.report`); nothing where nobody does."""
        if self._call.race is None:
            return []
        done = zip(self._call.prompts, self._lengths, self._num_open)
        return self._call.race.report({prompt.index: length for prompt, length, is_open in done if not is_open})

    def most_tokens(self) -> Callable[[Request], int]:
        """What a request may draw at most, as far as the race is decided."""
        race = self._call.race
        assert race is not None
        under_way = [-1 for _ in self._call.prompts]
        for begun in self._begun.values():
            number = self._numbers[begun.prompt_index]
            under_way[number] = max(under_way[number], begun.num_drawn)

        def most(request: Request) -> int:
            number = request.prompt_number
            index = self._call.prompts[number].index
            drawn = {"ended": self._lengths[number], "under_way": under_way[number]}
            return self._num_carried(request.request) + race.most_tokens(index, **drawn)

        return most

    def losers(self) -> tuple[list[InFlight], int]:
        """When the race is over, what goes on in the next step, and how many tokens of this step are thrown away."""
        race = self._call.race
        assert race is not None
        winners, finish = set(race.winners), race.finish
        begun = [one for one in self.in_flight((), lambda pages, n: None) if one.prompt_index not in winners]
        if not race.keeps_rest:
            return [], sum(one.num_drawn for one in begun)
        # Where nothing of this step is kept, its experts are not either.
        kept = [one.cut(finish) if finish else self._carried.get(one.request) for one in begun]
        left_over = sum(max(one.num_drawn - finish, 0) for one in begun)
        return [one.carried() for one in kept if one is not None], left_over

    def completes_stop_string(self, request: int, token: int) -> bool:
        """Whether the request's next token completes one of ``sampling.stop``."""
        return self._stop_strings is not None and self._stop_strings.completes(request, token)

    def finish(self, end: Finished, routing: Routing) -> None:
        """A sequence ended; its pages are still as they were."""
        request, tokens, logprobs, _ = end.sequence
        finish: FinishReason = "stop" if end.stopped else "length"
        if not end.stopped and len(logprobs) < self._call.sampling.max_new_tokens:
            self.give_up(end.sequence, routing)  # a loser of the race: this far in this step, and no further
        else:
            experts = self._experts(end.sequence, routing)
            self._add(request.request, tokens, len(request.prompt), logprobs, experts, finish)
        if self._stop_strings is not None:
            self._stop_strings.forget(request.request)

    def give_up(self, sequence: Live, routing: Routing) -> None:
        """A sequence is put back into the queue, or waits for the next step; its pages are still as they were.

        It will be fed again, but in this step its experts are those that its tokens met when they were drawn.
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
        number = self._numbers[index]
        self._num_open[number] -= 1
        self._lengths[number] = max(self._lengths[number], len(logprobs) - self._num_carried(request))
        versions = None
        if self._call.race is not None and self._call.race.keeps_rest:
            versions = token_versions(self._carried_versions(request), len(logprobs), self._call.policy_version)
        self._rollouts[number][sample] = Rollout(
            request=request,
            tokens=tokens,
            prompt_len=prompt_len,
            logprobs=logprobs,
            routed_experts=experts,
            finish=finish,
            policy_version=self._call.policy_version,
            text=self._text(tokens[prompt_len:].tolist()),
            versions=versions,
        )

    def _carried_versions(self, request: int) -> np.ndarray:
        """Of the tokens that earlier steps have drawn."""
        carried = self._carried.get(request)
        return np.zeros(0, dtype=np.int32) if carried is None else carried.carried_versions

    def _num_carried(self, request: int) -> int:
        return len(self._carried_versions(request))

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
        key, version = request_key(self._call.seed, request), self._call.policy_version
        carried = self._carried_versions(request)
        return InFlight(request, key, tokens, prompt_len, logprobs, finish, version, by_layer, carried)

    def _on_its_way(self, sequence: Live, routing: Routing) -> InFlight:
        request, tokens, logprobs, _ = sequence
        experts = self._experts(sequence, routing)
        return self._as_in_flight(request.request, tokens, len(request.prompt), logprobs, experts, None)

    def _experts(self, sequence: Live, routing: Routing) -> np.ndarray | None:
        """Those of a sequence's fed tokens; of one fed again what it met when they were drawn, not when fed again.

        But one that an earlier step has drawn meets its experts anew: its next tokens look back on what these have made
        of it, and training has to see the same.
        """
        experts = routing(sequence.pages, len(sequence.tokens) - 1)
        begun = self._begun.get(sequence.request.request)
        if experts is not None and begun is not None and begun.num_drawn:
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
