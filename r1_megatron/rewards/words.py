r"""The words of a text by script, without what is no prose: code, formulae, addresses, tags.

A word of a script with spaces is what stands between them. Chinese, Japanese and Thai are written without: there a
character counts as a word. It is nearly always a syllable and mostly a morpheme of its own, while even people often do
not agree on a single segmentation (Sproat et al., arXiv cmp-lg/9405008); a segmenter needs a dictionary besides, and a
policy can lead it astray. All work is linear in the length of the text, whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from r1_megatron.rewards.lexicon import CODE_WORDS

# Letters by script, as character classes. Marks that combine with a letter belong to the word.
MARKS = "\u0300-\u036f"
SCRIPTS = {
    "latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff",
    # With the radicals, strokes and circled ones, and all of planes 2 and 3, which are Chinese, assigned or not.
    "han": "\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u31c0-\u31e3\u3220-\u3247\u3280-\u32b0\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff",
    "kana": "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "hangul": "\u1100-\u11ff\u3131-\u318e\ua960-\ua97c\uac00-\ud7fb",
    "cyrillic": "\u0400-\u052f\u1c80-\u1c88\u2de0-\u2dff\ua640-\ua69f",
    "greek": "\u0370-\u03ff\u1f00-\u1fff",
    "arabic": "\u0610-\u061a\u0620-\u065f\u066e-\u06d3\u06d5-\u06dc\u06ee\u06ef\u06fa-\u06ff\u0750-\u077f\u08a0-\u08ff"
    "\ufb50-\ufdff\ufe70-\ufefc",
    "hebrew": "\u0591-\u05c7\u05d0-\u05f2\ufb1d-\ufb4f",
    "devanagari": "\u0900-\u0963\u0971-\u097f",
    "bengali": "\u0980-\u09e3",
    "tamil": "\u0b80-\u0be5",
    "thai": "\u0e01-\u0e3a\u0e40-\u0e4e",
}
UNSPACED = frozenset({"han", "kana", "thai"})
# Longer words are in no language: their script is "other".
MAX_WORD = 50
CASED = frozenset({"latin", "cyrillic", "greek"})

# A run: words of one script with nothing but spaces, digits and commas between; or the end of a sentence. Letters that
# are signs (µ, ℝ, raised and lowered ones) are in none.
_RUN = re.compile(
    "|".join(
        f"(?P<{script}>[{letters}]+)"
        if script in UNSPACED
        else f"(?P<{script}>[{letters}][{letters}{MARKS}0-9_ ,'’\\-]*)"
        for script, letters in SCRIPTS.items()
    )
    + r"|(?P<other>[^\W\d_\u00b5\u02b0-\u02ff\u2071-\u209c\u2100-\u214f]+)|(?P<end>[!?。！？;；\n]|\.(?=\s|$))"
)
_WORD = {
    script: re.compile(f"[{letters}][{letters}{MARKS}0-9_]*(?:['’\\-][{letters}][{letters}{MARKS}0-9_]*)*")
    for script, letters in SCRIPTS.items()
    if script not in UNSPACED
}

# What shows nothing and only cuts words in two; and letters in fancy dress: full-width, bold, circled, ...
_INVISIBLE = re.compile("[\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")
_FANCY = re.compile(
    "[\uff21-\uff3a\uff41-\uff5a\u249c-\u24e9\U0001d400-\U0001d7ff\U0001f110-\U0001f129\U0001f130-\U0001f149"
    "\U0001f150-\U0001f169\U0001f170-\U0001f189\U0001f1e6-\U0001f1ff]"
)
_A, _SMALL_A = ord("A"), ord("a")

_TAG = re.compile(r"<[/|｜]?([A-Za-z_][A-Za-z0-9_|｜.\-]{0,30})[/|｜]?>")
_BLOCK_TAGS = frozenset({"think", "answer"})
_FENCED = re.compile(r"```(?:[ \t]*[A-Za-z0-9_+#.\-]{1,20}[ \t]*\n)?(.*?)```", re.DOTALL)
_INLINE = re.compile(r"`([^`\n]{1,300})`")
# What stands behind ticks: words in Latin letters, letters of other scripts, and signs that code is full of.
_LATIN_WORD = re.compile(f"[{SCRIPTS['latin']}]{{2,}}")
_LATIN = re.compile("[\x00-\u02ff\u1e00-\u1eff\u2000-\u206f]+")
_CODE_SIGN = re.compile(
    r"[=(){}\[\];<>+*/\\|&^%$#@~_\"]|:[ \t]*$|[A-Za-z]\.[A-Za-z]|--"
    r"|^[ \t]*(?:'|(?:import|from [a-z.]+ import|return|package)\b)"
)
_STRING_BLOCK = re.compile(r'"""|\'\'\'')
# A line of code with so many words for each of its signs is prose; so many words of prose weigh as one line of code.
_MIN_PROSE_WORDS, _WORDS_PER_SIGN, _WORDS_PER_LINE = 4, 3, 10
_ADDRESS = re.compile(
    r"(?:https?://|www\.)[A-Za-z0-9./?#%&=+~:@_\-]{1,2000}"
    r"|(?<![A-Za-z0-9._+\-])[A-Za-z0-9._+\-]{1,64}@[A-Za-z0-9\-]{1,64}(?:\.[A-Za-z0-9\-]{1,64})+"
)
# None of them passes over another's beginning, so that what never ends is not looked at again and again.
_FORMULA = re.compile(
    r"\$\$[^$]{1,4000}\$\$|\$[^$\n]{1,400}\$"
    r"|\\\([^\\]*(?:\\[^()][^\\]*){0,500}\\\)|\\\[[^\\]*(?:\\[^\[\]][^\\]*){0,500}\\\]"
    r"|\\begin\{[a-z]{1,20}\*?\}[^\\]*(?:\\(?!begin\{|end\{)[^\\]*){0,500}\\end\{[a-z]{1,20}\*?\}"
)
_COMMAND = re.compile(r"\\(?:begin|end)\{[a-z]{1,20}\*?\}|\\[A-Za-z]+")
# Three words in a row between dollars are prose, not a formula; so is anything that is not in Latin or Greek letters.
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}[ ,]+[A-Za-z]{2,}[ ,]+[A-Za-z]{2,}|[\u0400-\u1dff\u3040-\ud7ff]")


class Run(NamedTuple):
    """Neighbouring words of one script; of an unspaced one ``words`` is a string, as its characters are the words.

    ``before`` and ``after`` are the characters around it, blanks passed over.
    """

    script: str
    words: Sequence[str]
    before: str
    after: str


class Prose(NamedTuple):
    """A text without what is no prose, and whether numbers or formulae were among what was left out."""

    text: str
    has_mathematics: bool


def prose_of(text: str) -> Prose:
    """The text as it reads, in plain letters, with code, formulae, addresses and tags left out.

    Ticks alone make no code. Behind them stay: what is in another script than Latin, and lines of words without signs
    of code. Words of short spans and names of tags stay as identifiers, with an underscore behind (``is_code``).
    """
    text = _INVISIBLE.sub("", text)
    if _FANCY.search(text):
        text = _FANCY.sub(lambda match: _plain_letter(match[0]), text)
    if "<" in text:
        text = _TAG.sub(lambda tag: "\n" if tag[1] in _BLOCK_TAGS else _identifiers(tag[1]), text)
    if "`" in text:
        text = _FENCED.sub(lambda block: f"\n{_prose_of_block(block[1])}\n", text)
        text = _INLINE.sub(lambda span: _prose_of_span(span[1]), text)
    text = _ADDRESS.sub(" ", text)
    has_mathematics = re.search(r"\d", text) is not None
    if "$" in text or "\\" in text:
        formulae = [match.span() for match in _FORMULA.finditer(text) if not _PROSE.search(match[0])]
        has_mathematics = has_mathematics or bool(formulae)
        begins, ends = [0, *(end for _, end in formulae)], [*(begin for begin, _ in formulae), len(text)]
        text = _COMMAND.sub(" ", " ".join(text[begin:end] for begin, end in zip(begins, ends)))
    return Prose(text, has_mathematics)


def sentences(prose: str) -> Iterator[list[Run]]:
    """The runs of each sentence that has any."""
    sentence: list[Run] = []
    for match in _RUN.finditer(prose):
        script, run = match.lastgroup, match[0]
        assert script is not None
        if script == "end":
            if sentence:
                yield sentence
            sentence = []
            continue
        words = _WORD[script].findall(run) if script in _WORD else run if script in UNSPACED else [run]
        if len(run) > MAX_WORD and script not in UNSPACED:
            sentence += [Run("other", [word], "", "") for word in words if len(word) > MAX_WORD]
            words = [word for word in words if len(word) <= MAX_WORD]
        begin, end = match.span()
        before = prose[begin - 2 : begin].rstrip()[-1:] if begin > 1 else prose[:begin]
        sentence.append(Run(script, words, before, prose[end : end + 1]))
    if sentence:
        yield sentence


def is_code(word: str) -> bool:
    """Whether `prose_of` found the word in a span of code or in a tag."""
    return word.endswith("_")


def _identifiers(code: str) -> str:
    """The first words of a piece of code, marked as such, and what it has in other scripts."""
    words = [word + "_" for word in _LATIN_WORD.findall(code)[:_MIN_PROSE_WORDS]]
    return f" {' '.join(words)} {_LATIN.sub(' ', code)} "


def _weight(line: str) -> tuple[int, int]:
    """Words of a line that no programming language is made of, and signs of code."""
    words = sum(word not in CODE_WORDS for word in _LATIN_WORD.findall(line))
    return words, sum(1 for _ in _CODE_SIGN.finditer(line))


def _prose_of_span(code: str) -> str:
    words, signs = _weight(code)
    is_prose = words >= _MIN_PROSE_WORDS and words > _WORDS_PER_SIGN * signs
    return f" {code} " if is_prose else _identifiers(code)


def _prose_of_block(block: str) -> str:
    """The lines of a fenced block that are prose. Comments are, if the block is more comment than code."""
    plain: list[str] = []
    comments: list[str] = []
    others: list[str] = []
    num_comments = num_code = 0
    together: list[str] = []  # neighbouring lines without a sign: prose may have a few words on each
    num_words = 0
    in_string = False
    for line in [*block.split("\n"), ";"]:
        words, signs = _weight(line)
        was_in_string = in_string
        in_string ^= len(_STRING_BLOCK.findall(line)) % 2 == 1
        if not signs and not was_in_string:
            together.append(line)
            num_words += words
            continue
        if num_words >= _MIN_PROSE_WORDS:
            plain += together
        else:
            others += together
            num_code += sum(_LATIN_WORD.search(each) is not None for each in together)
        together, num_words = [], 0
        if words >= _MIN_PROSE_WORDS and words > _WORDS_PER_SIGN * signs:
            comments.append(line)
            num_comments += -(-words // _WORDS_PER_LINE)
        else:
            others.append(line)
            num_code += any(letter.isalpha() for letter in line)
    if num_comments > num_code:
        plain += comments
    else:
        others += comments
    return "\n".join([*plain, *(_LATIN.sub(" ", line) for line in others)])


def _plain_letter(letter: str) -> str:
    """The ASCII letter behind a full-width, circled or mathematical one; digits and Greek of the latter: a space."""
    code = ord(letter)
    if code >= 0x1F110:
        return chr(_A + ((code - 0x1F1E6) if code >= 0x1F1E6 else (code - 0x1F110) % 32))
    if code >= 0x1D400:
        place = (code - 0x1D400) % 52
        return " " if code >= 0x1D6A4 else chr((_A if place < 26 else _SMALL_A - 26) + place)
    if code >= 0xFF41:
        return chr(code - 0xFF41 + _SMALL_A)
    if code >= 0xFF21:
        return chr(code - 0xFF21 + _A)
    if code < 0x24B6:
        return chr(code - 0x249C + _SMALL_A)
    return chr(code - 0x24B6 + _A) if code < 0x24D0 else chr(code - 0x24D0 + _SMALL_A)
