"""Language consistency: the share of a text's words that are in the language of the question.

DeepSeek-R1 adds it to the other rewards, over the words of the chain of thought (arXiv 2501.12948v2, equation 7;
``on: reasoning``), because a policy that is rewarded for right answers alone mixes languages. It costs some accuracy
(Supplementary B.6).

What counts as a word, and what is left out, says `words.py`. The script decides where it can: Chinese characters are no
English. Where several languages share one (Latin, Cyrillic, Arabic, Devanagari), a sentence of four words or more is
put to a language detector, py3langid: a naive Bayes model of 4.6 MB that comes with its package, 60 microseconds a
sentence, the same answer every time.

Not counted against a text, beside code, formulae, numbers and addresses: names, abbreviations, units, variables,
identifiers and names of functions in another script than the text's; but no more of them than it has words of its own,
so that nothing hides behind capital letters, digits or underscores. Single signs in a formula are free.

    {function: language_consistency, on: reasoning}
    {function: language_consistency, on: reasoning, options: {language: zh}}
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from r1_megatron.rewards.lexicon import COMMON_ENGLISH, PLAIN_ENGLISH, SIGNS
from r1_megatron.rewards.words import CASED, UNSPACED, Run, is_code, prose_of, sentences

# Languages by ISO 639-1 that share a script, which the detector tells apart; and all, with the scripts they are in.
_SHARED = {
    "latin": "en fr de es it pt nl sv da no fi pl cs ro hu tr vi id",
    "cyrillic": "ru uk bg sr",
    "arabic": "ar fa ur",
    "devanagari": "hi mr ne",
}
LANGUAGES: dict[str, tuple[str, ...]] = {
    "zh": ("han",),
    "ja": ("han", "kana"),
    "ko": ("hangul",),
    "el": ("greek",),
    "he": ("hebrew",),
    "bn": ("bengali",),
    "ta": ("tamil",),
    "th": ("thai",),
} | {language: (script,) for script, languages in _SHARED.items() for language in languages.split()}
_NAMES = {
    "chinese": "zh", "english": "en", "japanese": "ja", "korean": "ko", "french": "fr", "german": "de", "spanish": "es",
    "italian": "it", "portuguese": "pt", "russian": "ru", "arabic": "ar", "hindi": "hi", "中文": "zh", "英文": "en",
}  # fmt: skip

# Longer texts are worth nothing: no response is.
MAX_LENGTH = 1_000_000
# The detector: from how many words on it is asked, in pieces of how many characters it reads a sentence, how sure it
# has to be that a piece is foreign, and how many pieces of a text it reads. Of a longer text that is one of each of so
# many equal parts, for its whole part. Which one says a hash of the text, so that no place is safe.
MIN_WORDS, MAX_CHARACTERS, SURE, MAX_ASKED = 4, 300, 0.9, 256
# Signs in a row that are still a formula, where one of these stands beside them.
_MAX_SIGNS_IN_A_ROW, _OPERATORS = 3, frozenset("0123456789+-*/=<>^()[]{}|%!·×÷±≤≥≠≈∈→⇒−√∑∏∫")
# Foreign words that a sentence of another script may hold and still be prose with names in it.
_MOST_SMALL_WORDS = 2
# Chinese characters in brackets or quotes behind a name in another script: the name's own spelling.
_MAX_GLOSS = 4
_OPENING, _CLOSING = "(（「『《“\"'‘", ")）」』》”\"'’"
# Where the user's turn begins and ends in a chat or in a template for plain text.
_TURN_BEGINS = re.compile(
    r"<[|｜][Uu]ser[|｜]>|<\|im_start\|>user\b|<\|start_header_id\|>user<\|end_header_id\|>|\[INST\]|\bUser:"
)
_ANSWER_BEGINS = re.compile(r"<[|｜][Aa]ssistant[|｜]>|<\|im_end\|>|<\|eot_id\|>|\[/INST\]|\bAssistant:")


class WordCount(NamedTuple):
    """Words of a text: in the language, in another one, and names and signs that are in neither."""

    target: int
    foreign: int
    excused: int

    @property
    def share(self) -> float | None:
        """The part that is in the language; ``None``: there is not a word in any."""
        words = self.target + self.foreign
        return self.target / words if words else None


def language_consistency(
    prompts: Sequence[str],
    completions: Sequence[str],
    labels: Sequence[Any],
    metadata: Sequence[dict[str, Any]],
    language: str | None = None,
    wordless: float = 1.0,
) -> list[float]:
    """The share of words in the language of the question: ``metadata["language"]``, else ``language``, else detected.

    ``wordless`` is what formulae and numbers without a word are worth; a text without these either, and one that is
    all code, is worth 0.

    Raises:
        ValueError: a language is unknown, or a prompt has no words to tell it from (an error of the data).
    """
    given = None if language is None else known_language(language, "options.language")
    if not isinstance(wordless, (int, float)) or not 0 <= wordless <= 1:
        raise ValueError(f"options.wordless={wordless!r} has to be between 0 and 1")
    return [
        _grade(completion, _target(prompt, data, given), float(wordless))
        for prompt, completion, data in zip(prompts, completions, metadata, strict=True)
    ]


def known_language(name: Any, where: str) -> str:
    """A language by its ISO 639-1 code, with or without a region, or by its English name."""
    text = name.strip().lower() if isinstance(name, str) else ""
    code = _NAMES.get(text, re.split("[-_]", text)[0])
    if code not in LANGUAGES:
        raise ValueError(f"{where}={name!r} is no known language: {', '.join(LANGUAGES)}")
    return code


def detect_language(text: str) -> str | None:
    """The language of a question; ``None`` where it has no words. Of a chat it is the last turn of the user."""
    turn = _ANSWER_BEGINS.split(_TURN_BEGINS.split(text[-MAX_LENGTH:])[-1])[0]
    scripts: Counter[str] = Counter()
    found: dict[str, list[Run]] = {}
    for run in (run for sentence in sentences(prose_of(turn).text) for run in sentence):
        scripts[run.script] += sum(_is_word(word) for word in run.words)
        found.setdefault(run.script, []).append(run)
    known = {script: count for script, count in scripts.items() if count and script != "other"}
    if not known:
        return None
    script = max(known, key=lambda script: (known[script], script))
    if script in ("han", "kana"):
        return "ja" if 10 * known.get("kana", 0) >= known.get("han", 0) else "zh"
    if script not in _SHARED:
        return next(language for language, written in LANGUAGES.items() if written == (script,))
    words = [word for run in found[script] for word in run.words]
    if script == "latin" and _is_plain_english(words):
        return "en"
    language, sure = _ask(script, words)
    return language if sure >= 0.5 and len(words) >= MIN_WORDS else _SHARED[script].split()[0]


def count_words(prose: str, language: str) -> WordCount:
    """The words of a text (`words.prose_of`) by whether they are in a language."""
    return _count(list(sentences(prose)), LANGUAGES[language], language)


def mixing(text: str) -> float | None:
    """The share of words that are not in the script most words are in; ``None`` without words. No detector is asked."""
    if len(text) > MAX_LENGTH:
        return None
    parts = list(sentences(prose_of(text).text))
    scripts: Counter[str] = Counter()
    for run in (run for sentence in parts for run in sentence):
        scripts[run.script] += len(_spoken(run))
    if not any(scripts.values()):
        return None
    most = max(scripts, key=lambda script: (scripts[script], script))
    is_japanese = most in ("han", "kana") and 10 * scripts["kana"] >= scripts["han"]
    share = _count(parts, LANGUAGES["ja"] if is_japanese else (most,), None).share
    return None if share is None else 1.0 - share


def _grade(completion: str, language: str, wordless: float) -> float:
    if len(completion) > MAX_LENGTH:
        return 0.0
    prose = prose_of(completion)
    share = count_words(prose.text, language).share
    if share is not None:
        return share
    return wordless if prose.has_mathematics else 0.0


def _target(prompt: str, metadata: dict[str, Any], given: str | None) -> str:
    if metadata.get("language") is not None:
        return known_language(metadata["language"], "metadata.language")
    language = given or _detected(prompt)
    if language is None:
        raise ValueError(
            "the prompt has no words to tell its language from: say it in the row's metadata (language: en), or for "
            "all rows in the term's options.language"
        )
    return language


def _count(parts: Sequence[list[Run]], scripts: tuple[str, ...], language: str | None) -> WordCount:
    target = foreign = excused = 0
    to_ask: list[Sequence[str]] = []
    for sentence in parts:
        own = [_spoken(run) for run in sentence if run.script in scripts]
        num_own = sum(map(len, own))
        for run in sentence:
            if run.script not in scripts:
                free, names = _excused(run)
                foreign += len(run.words) - free - names
                excused += names
        if language == "zh" and any(run.script == "kana" for run in sentence):
            foreign += num_own  # Japanese: its characters are of it
        elif language == "ja" and num_own > 8 and not any(run.script == "kana" for run in sentence):
            foreign += num_own  # nine characters without a kana are Chinese
        elif language is not None and num_own >= MIN_WORDS and scripts[0] in _SHARED:
            to_ask += _pieces([word for words in own for word in words])
        else:
            target += num_own
    for part in _parts(to_ask):
        assert language is not None
        num_words = sum(map(len, part.pieces))
        is_own = _is_in(language, scripts[0], part.pieces[part.heard])
        target += num_words if is_own else 0
        foreign += 0 if is_own else num_words
    too_many = max(0, excused - target)
    return WordCount(target, foreign + too_many, excused - too_many)


class _Part(NamedTuple):
    """Pieces of a text that go with one of them."""

    pieces: Sequence[Sequence[str]]
    heard: int


def _spoken(run: Run) -> Sequence[str]:
    """Its words without those of code."""
    return run.words if run.script in UNSPACED else [word for word in run.words if not is_code(word)]


def _pieces(words: Sequence[str]) -> list[Sequence[str]]:
    """A sentence in pieces of `MAX_CHARACTERS` at most, the last of which has `MIN_WORDS` words or more."""
    begins, length = [0], 0
    for place, word in enumerate(words):
        length += len(word) + 1
        if length > MAX_CHARACTERS + 1:
            begins.append(place)
            length = len(word) + 1
    if len(begins) > 1 and len(words) - begins[-1] < MIN_WORDS:
        begins.pop()
    return [words[begin:end] for begin, end in zip(begins, [*begins[1:], len(words)])]


def _parts(pieces: Sequence[Sequence[str]]) -> list[_Part]:
    """At most `MAX_ASKED` equal parts of a text; which piece of each is heard depends on all of its words."""
    if len(pieces) <= MAX_ASKED:
        return [_Part([piece], 0) for piece in pieces]
    text = "\n".join(" ".join(piece) for piece in pieces).encode("utf-8", "replace")
    draw = random.Random(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big"))
    bounds = [place * len(pieces) // MAX_ASKED for place in range(MAX_ASKED + 1)]
    return [_Part(pieces[begin:end], draw.randrange(end - begin)) for begin, end in itertools.pairwise(bounds)]


def _excused(run: Run) -> tuple[int, int]:
    """Of a run in another script: its units and the variables and functions of formulae; and its names and the other
    signs, of which no more are excused than the text has words."""
    if run.script == "other":
        return 0, 0
    if run.script not in CASED:
        is_gloss = run.before in _OPENING and run.after in _CLOSING and run.before and run.after
        return 0, len(run.words) if is_gloss and run.script in UNSPACED and len(run.words) <= _MAX_GLOSS else 0
    rest = [word for word in run.words if _is_word(word)]
    signs = [word for word in run.words if not _is_word(word)]
    free = 0
    if len(run.words) <= _MAX_SIGNS_IN_A_ROW and (run.before in _OPERATORS or run.after in _OPERATORS):
        free = sum(sum(letter.isalpha() for letter in word) <= 2 or word.lower() in SIGNS for word in signs)
    if rest and rest[0] is run.words[0] and run.before.isdigit() and _is_unit(rest[0]):
        rest = rest[1:]
        free += 1
    names, follows = 0, False
    for word in rest:  # "However" is no name, "Times" behind "New York" is part of one
        follows = word[0].isupper() and (follows or word.lower() not in COMMON_ENGLISH)
        names += follows
    num_signs = len(run.words) - len(rest) - free
    return free, num_signs + (names if len(rest) - names <= _MOST_SMALL_WORDS else 0)


def _is_word(word: str) -> bool:
    """No variable (one letter, or with a digit or an underscore in it), no function and no unit."""
    if (len(word) == 1 and word.isascii()) or (len(word) <= 2 and "\u0370" <= word[0] <= "\u03ff"):
        return False
    return not ("_" in word or any(letter.isdigit() for letter in word) or word.lower() in SIGNS)


def _is_unit(word: str) -> bool:
    """Behind a number."""
    return len(word) <= 3 and word.lower() not in COMMON_ENGLISH


def _is_in(language: str, script: str, words: Sequence[str]) -> bool:
    """Whether a sentence may be in a language of its script: it is, unless the detector is sure of another one."""
    if language == "en" and _is_plain_english(words):
        return True
    detected, sure = _ask(script, words)
    return detected == language or sure < SURE


def _is_plain_english(words: Sequence[str]) -> bool:
    return 4 * sum(word.lower() in PLAIN_ENGLISH for word in words) >= len(words)


def _ask(script: str, words: Sequence[str]) -> tuple[str, float]:
    return _detector(script)(" ".join(words)[:MAX_CHARACTERS])


@functools.lru_cache(maxsize=4096)
def _detected(prompt: str) -> str | None:
    """A prompt's samples come one after the other."""
    return detect_language(prompt)


@functools.cache
def _detector(script: str) -> Callable[[str], tuple[str, float]]:
    """Text to its likeliest language among those of a script, and how likely that is."""
    identifier = copy.copy(_model())
    identifier.set_languages(_SHARED[script].split())
    return identifier.classify


@functools.cache
def _model() -> Any:
    # Not before it is needed: unpacking the model takes a second and 120 MB.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
