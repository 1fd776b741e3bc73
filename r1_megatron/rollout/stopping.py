"""Stop strings: a sample ends with the token that completes one of them."""

from __future__ import annotations

from collections.abc import Sequence

from r1_megatron.data.tokenizers import IncrementalDecoder, Tokenizer


class StopStrings:
    """Watches the text of the sequences in flight. A string may begin in one token and end in a later one."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._overlap = max(map(len, self._stop), default=1) - 1
        self._decoders: dict[int, IncrementalDecoder] = {}
        self._tails: dict[int, str] = {}

    def completes(self, request: int, token: int) -> bool:
        """Whether this token of the request's response completes a stop string."""
        if not 0 <= token < self._tokenizer.vocab_size:
            return False  # a column of the model that the tokenizer has no text for
        decoder = self._decoders.get(request)
        if decoder is None:
            decoder = self._decoders[request] = IncrementalDecoder(self._tokenizer)
        text = self._tails.get(request, "") + decoder.push(token)
        self._tails[request] = text[-self._overlap :] if self._overlap else ""
        return any(stop in text for stop in self._stop)

    def forget(self, request: int) -> None:
        """The request ended."""
        self._decoders.pop(request, None)
        self._tails.pop(request, None)
