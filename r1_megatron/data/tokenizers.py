"""Text to token ids and back: sentencepiece models, Hugging Face ``tokenizers`` files, and one built on the spot.

What the other rooms rely on:

* ``encode`` adds nothing (no BOS, no EOS). Prompts get ``bos_id`` in front where the tokenizer wants one, see
  :func:`encode_prompt`; responses end with ``eos_id``, which the sampler draws and the text leaves out.
* ``decode`` hides nothing but control tokens: a reward sees exactly what the policy wrote.
* One character may take several tokens (byte fallback, byte-level BPE). Text that grows token by token, as needed for
  stop strings, comes from :class:`IncrementalDecoder`, never from joining single tokens.

The procedural tasks need no download: :func:`train_tokenizer_bytes` builds a sentencepiece model in memory, the same
bytes on every rank: printable ASCII and tags (104 pieces), and for ``bilingual`` also the words of its stories.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from r1_megatron.config.schema import TokenizerConfig
from r1_megatron.data.tasks import bilingual
from r1_megatron.telemetry.run_folder import write_atomic

TASK_TOKENIZER_KINDS = ("chain_sum", "countdown", "bilingual")
# Tags first, so that a tag is one token and cannot be half written; then the words of the compact template.
TASK_SYMBOLS = ("<think>", "</think>", "<answer>", "</answer>", "User:", "Assistant:", "\n")
TASK_CHARACTERS = "".join(chr(code) for code in range(0x20, 0x7F))
# <unk>, </s>, the symbols, printable ASCII.
TASK_VOCAB_SIZE = 2 + len(TASK_SYMBOLS) + len(TASK_CHARACTERS)


# Some tokenizers call them special.
_REASONING_TAGS = {"<think>", "</think>", "<answer>", "</answer>"}


class Tokenizer(Protocol):
    """What the rest of the package asks of a tokenizer. Ids lie in ``[0, vocab_size)``; there is no padding id."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def bos_id(self) -> int | None:
        """Token that the model expects before the first one, or ``None``."""
        ...

    @property
    def unk_id(self) -> int | None:
        """Token that stands for text the tokenizer cannot write, or ``None`` if it can write all of it."""
        ...

    @property
    def chat_template(self) -> str | None:
        """Jinja source that turns chat messages into text, or ``None``."""
        ...

    @property
    def special_tokens(self) -> dict[str, str]:
        """Named special tokens (``bos_token``, ``eos_token``), as a chat template refers to them."""
        ...

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that stand for control tokens: begin, end, turns of a chat. The tags of reasoning are none."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def token_text(self, token: int) -> str: ...


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a rendered prompt, with the BOS token in front unless the text already begins with it."""
    ids = tokenizer.encode(text)
    if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        return [tokenizer.bos_id, *ids]
    return ids


def encode_as_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids in which spelled control tokens are the text that they look like: whoever writes ``<|im_end|>`` ends
    no turn. Each is encoded in two parts, its first character and the rest; text without any as ``encode`` does. A
    control token that a single character stands for is left out.
    """
    ids = tokenizer.encode(text)
    if not _control_ids(tokenizer, ids):
        return ids
    spelled = "|".join(re.escape(token) for token in sorted(tokenizer.control_tokens, key=len, reverse=True) if token)
    cuts = [match.start() + 1 for match in re.finditer(f"(?=(?:{spelled}))", text)]
    parts = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)])]
    ids = [token for part in parts for token in tokenizer.encode(part)]
    if _control_ids(tokenizer, ids):  # made by a normalizer, of other characters
        ids = [token for letter in text for token in tokenizer.encode(letter)]
    control = _control_ids(tokenizer, ids)
    return [token for token in ids if token not in control]


def _control_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> set[int]:
    return {token for token in set(ids) if _is_control(tokenizer, token)}


@functools.lru_cache(maxsize=1 << 18)
def _is_control(tokenizer: Tokenizer, token: int) -> bool:
    """The unknown token stands for text, whatever is written there."""
    return token != tokenizer.unk_id and tokenizer.token_text(token) in tokenizer.control_tokens


def token_problem(tokens: Sequence[int], tokenizer: Tokenizer, vocab_size: int | None) -> str | None:
    """Why the model cannot read these tokens, or ``None``."""
    if tokenizer.unk_id is not None and tokenizer.unk_id in tokens:
        position = list(tokens).index(tokenizer.unk_id)
        before = tokenizer.decode(tokens[:position])[-20:]
        return f"the tokenizer has no token for the text after {before!r}. Change the text or the tokenizer"
    largest = max(tokens, default=-1)
    if vocab_size is not None and largest >= vocab_size:
        return (
            f"token id {largest}, but model.vocab_size={vocab_size} (the tokenizer has {tokenizer.vocab_size}). "
            f"Set model.vocab_size={tokenizer.vocab_size} or use the model's own tokenizer"
        )
    return None


class SentencePieceTokenizer:
    """A sentencepiece model, from a ``.model`` file or from its bytes.

    Raises:
        ValueError: the file is missing or not a sentencepiece model, or it has no such stop token.
    """

    chat_template: str | None = None

    def __init__(self, model: str | Path | bytes, eos_token: str | None = None):
        import sentencepiece

        if isinstance(model, bytes):
            name, data = "<memory>", model
        else:
            name, data = str(model), _read_file(Path(model))
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(data)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"tokenizer.path: {name} is not a sentencepiece model ({len(data)} bytes). "
                "For a tokenizer.json set tokenizer.kind=huggingface."
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id = _id_or_none(self._processor.bos_id())
        # With byte fallback every text can be written.
        has_bytes = any(self._processor.is_byte(i) for i in range(self.vocab_size))
        self.unk_id = None if has_bytes else _id_or_none(self._processor.unk_id())
        self.eos_id = self._find_eos(name, eos_token)
        self.special_tokens = {"eos_token": self._processor.id_to_piece(self.eos_id)}
        if self.bos_id is not None:
            self.special_tokens["bos_token"] = self._processor.id_to_piece(self.bos_id)
        self.control_tokens = tuple(self.special_tokens.values())

    def _find_eos(self, name: str, eos_token: str | None) -> int:
        eos = self._processor.eos_id() if eos_token is None else self._processor.piece_to_id(eos_token)
        if eos_token is not None and self._processor.id_to_piece(eos) != eos_token:
            raise ValueError(f"tokenizer.eos_token: {name} has no piece {eos_token!r}. Leave it out or name a piece.")
        if eos < 0:
            raise ValueError(f"tokenizer.eos_token: {name} has no end-of-sentence piece. Name the one that ends text.")
        return eos

    @property
    def model(self) -> bytes:
        """The sentencepiece model, as its file holds it."""
        return self._processor.serialized_model_proto()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(_checked_text(text))

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode(_checked_ids(ids, self.vocab_size))

    def piece(self, token: int) -> str:
        """The name of a token in the model: of a control token, which has no text, for one."""
        return self._processor.id_to_piece(token)

    def token_text(self, token: int) -> str:
        """Text of one token as it stands inside a sentence: the leading space of a word is kept."""
        _checked_ids([token], self.vocab_size)
        if self._processor.is_byte(token) or self._processor.is_control(token):
            return self._processor.decode([token])
        return self._processor.id_to_piece(token).replace("\u2581", " ")


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` with, beside it, ``tokenizer_config.json`` (special tokens, chat template). No network.

    Args:
        path: the folder or the ``tokenizer.json`` itself.
        eos_token: stop token; ``None``: the one of ``tokenizer_config.json``.

    Raises:
        ValueError: a file is missing or malformed, or there is no such stop token.
    """

    def __init__(self, path: str | Path, eos_token: str | None = None):
        import tokenizers

        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        self.folder = file.parent
        data = _read_file(file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as error:  # The library raises bare Exception for malformed files.
            raise ValueError(
                f"tokenizer.path: {file} is not a Hugging Face tokenizer.json ({error}). "
                "For a sentencepiece .model file set tokenizer.kind=sentencepiece."
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = _read_json_object(file.with_name("tokenizer_config.json"))
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.special_tokens = {
            key: text
            for key in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (text := _special_text(self._config.get(key))) is not None
        }
        self.eos_id = self._find_eos(file, eos_token)
        self.bos_id = self._find_bos()
        # Byte-level and byte-fallback models write every text; the others have an unknown token.
        model = json.loads(data).get("model", {})
        unknown = model.get("unk_token")
        self.unk_id = self._tokenizer.token_to_id(unknown) if unknown and not model.get("byte_fallback") else None
        self.chat_template = self._find_chat_template(file)
        added = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special} | set(self.special_tokens.values())
        self.control_tokens = tuple(sorted(special - _REASONING_TAGS))

    def _find_eos(self, file: Path, eos_token: str | None) -> int:
        name = eos_token or self.special_tokens.get("eos_token")
        if name is None:
            raise ValueError(
                f"tokenizer.eos_token: {file.with_name('tokenizer_config.json')} names no eos_token. "
                "Set tokenizer.eos_token to the token that ends a response."
            )
        eos = self._tokenizer.token_to_id(name)
        if eos is None:
            raise ValueError(f"tokenizer.eos_token: {file} has no token {name!r}. Name one of its tokens.")
        self.special_tokens["eos_token"] = name
        return eos

    def _find_bos(self) -> int | None:
        """BOS only where the tokenizer itself would add it: by its post-processor or by ``add_bos_token``."""
        name = self.special_tokens.get("bos_token")
        bos = self._tokenizer.token_to_id(name) if name else None
        added = self._tokenizer.encode("", add_special_tokens=True).ids
        if bos is not None and (self._config.get("add_bos_token") or added[:1] == [bos]):
            return bos
        return None

    def _find_chat_template(self, file: Path) -> str | None:
        separate = file.with_name("chat_template.jinja")
        if separate.is_file():
            return separate.read_text(encoding="utf-8")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # Several named templates.
            template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
        return template

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(_checked_text(text), add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(_checked_ids(ids, self.vocab_size), skip_special_tokens=False)

    def token_text(self, token: int) -> str:
        return self.decode([token])


class IncrementalDecoder:
    """Text of a growing token sequence, character by character, never a broken one.

    ``push`` returns the text that one more token settled. An incomplete UTF-8 character shows as one to three
    replacement characters at the end of the decoded text, so up to three of them are held back until the next token
    tells; ``flush`` gives them up. What all calls returned together is ``decode(all tokens)``. Only a window of recent
    tokens is decoded again, so the work per token does not grow with the length.

    Example:
        >>> decoder = IncrementalDecoder(tokenizer)
        >>> text = ""
        >>> for token in tokens:
        ...     text += decoder.push(token)
        ...     if text.endswith(stop):
        ...         break
    """

    WINDOW = 16

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_given = 0  # Characters of the window's text that were returned already.

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        num_settled = max(_num_settled(text), self._num_given)
        fresh = text[self._num_given : num_settled]
        self._num_given = num_settled
        if len(self._window) >= 2 * self.WINDOW:
            # Half of the window stays as context: tokenizers treat the very first token differently.
            self._window = self._window[-self.WINDOW :]
            self._num_given = _num_settled(self._tokenizer.decode(self._window))
        return fresh

    def flush(self) -> str:
        """The characters still held back; the decoder starts anew."""
        text = self._tokenizer.decode(self._window)[self._num_given :]
        self._window, self._num_given = [], 0
        return text


def _num_settled(text: str) -> int:
    """Number of characters that no later token can change: all but up to three replacement characters at the end."""
    return len(text) - min(len(text) - len(text.rstrip("\ufffd")), 3)


@functools.lru_cache(maxsize=2)
def _train_task_model(symbols: tuple[str, ...], characters: str) -> bytes:
    import sentencepiece

    # Character i occurs n - i times: the order of the ids is the one given, whatever the trainer does with ties.
    num = len(characters)
    sentences = ("".join(characters[: num - k]) for k in range(num))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="char",
        vocab_size=2 + len(symbols) + num,  # <unk> and </s>
        character_coverage=1.0,
        user_defined_symbols=[symbol.replace(" ", "\u2581") for symbol in symbols],
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def train_tokenizer_bytes(kind: str) -> bytes:
    """The sentencepiece model of a procedural task: one piece per printable ASCII character and per tag (``chain_sum``
    and ``countdown`` share this one of ``TASK_VOCAB_SIZE`` pieces); for ``bilingual`` also one per word and per Chinese
    character of the task, behind them.

    A pure function of ``kind``: every rank calls it and holds the same model, without a file between them.
    """
    if kind not in TASK_TOKENIZER_KINDS:
        raise ValueError(f"tokenizer.kind: {kind!r} builds no tokenizer; those that do are {TASK_TOKENIZER_KINDS}.")
    words, characters = bilingual.vocabulary() if kind == "bilingual" else ([], [])
    return _train_task_model((*TASK_SYMBOLS, *words), TASK_CHARACTERS + "".join(characters))


def build_tokenizer(cfg: TokenizerConfig, run_dir: str | Path | None = None, write: bool = False) -> Tokenizer:
    """The tokenizer of a run.

    Args:
        cfg: the ``tokenizer`` section.
        run_dir: the run folder, needed only with ``write``.
        write: put a task's own model into the run folder as ``tokenizer.model`` (one rank does that), so that the
            checkpoint can be used without this package.
    """
    if cfg.kind in TASK_TOKENIZER_KINDS:
        data = train_tokenizer_bytes(cfg.kind)
        if write:
            assert run_dir is not None
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            write_atomic(Path(run_dir) / "tokenizer.model", data)
        return SentencePieceTokenizer(data, cfg.eos_token)
    if cfg.path is None:
        raise ValueError(f"tokenizer.path: kind={cfg.kind} needs a path. Set tokenizer.path to the file or folder.")
    if cfg.kind == "sentencepiece":
        return SentencePieceTokenizer(cfg.path, cfg.eos_token)
    return HuggingFaceTokenizer(cfg.path, cfg.eos_token)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer.path: cannot read {path} ({error.strerror}). Give an existing file.") from error


def _read_json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tokenizer.path: {path} is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"tokenizer.path: {path} holds a {type(value).__name__}, expected an object.")
    return value


def _special_text(value: Any) -> str | None:
    """A special token is stored as text or as ``{"content": text, ...}``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _checked_text(text: str) -> str:
    """JSON can hold half of a surrogate pair, and the tokenizers' own errors for it help nobody."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds half of a surrogate pair at character {error.start}, which no encoding can write"
        ) from None
    return text


def _checked_ids(ids: Iterable[int], vocab_size: int) -> Sequence[int]:
    ids = [int(i) for i in ids]
    for position, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"token id {token} at position {position} is outside the tokenizer's vocabulary [0, {vocab_size}). "
                "The model's vocab_size is larger than the tokenizer's, or the ids come from another tokenizer."
            )
    return ids
