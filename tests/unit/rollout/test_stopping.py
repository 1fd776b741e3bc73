"""Stop strings are found across token boundaries, by request."""

from __future__ import annotations

from r1_megatron.config.schema import TokenizerConfig
from r1_megatron.data.tokenizers import build_tokenizer
from r1_megatron.rollout.stopping import StopStrings

TOKENIZER = build_tokenizer(TokenizerConfig(kind="chain_sum"))


def first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Characters are tokens here: how many until a stop string is complete."""
    watch = StopStrings(TOKENIZER, stop)
    for number, token in enumerate(TOKENIZER.encode(text)):
        if watch.completes(1, token):
            return number + 1
    return None


def test_found_at_the_completing_token() -> None:
    assert first_stop("1+2=3;", ("=3",)) == 5
    assert first_stop("aaab", ("aab",)) == 4
    assert first_stop("abc", ("x", "c")) == 3
    assert first_stop("abc" * 30 + "!", ("c!",)) == 91
    assert first_stop("abc", ("d", "abcd")) is None


def test_requests_do_not_mix() -> None:
    watch = StopStrings(TOKENIZER, ("ab",))
    a, b = TOKENIZER.encode("ab")
    assert not watch.completes(1, a)
    assert not watch.completes(2, b)
    assert watch.completes(1, b)
    watch.forget(1)
    assert not watch.completes(1, b)


def test_ids_without_text_are_passed_over() -> None:
    watch = StopStrings(TOKENIZER, ("ab",))
    a, b = TOKENIZER.encode("ab")
    assert [watch.completes(1, token) for token in (a, TOKENIZER.vocab_size + 5, b)] == [False, False, True]
