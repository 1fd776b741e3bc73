"""A sentencepiece model as a ``tokenizer.json`` that answers the same ids and the same text.

sentencepiece works on the whole text: it normalises it (a compiled character map, spaces at the ends and in a row),
puts one space in front, writes spaces as U+2581, and cuts out user-defined symbols before anything else. The Hugging
Face library works on pieces of text, so every step here is one that does not care where pieces begin: normalisation is
global, nothing is split at spaces, and user-defined symbols are isolated by a pattern of the pre-tokenizer (as "added
tokens" they would cut the text before it is normalised).

Control tokens, bytes and the unknown token are in the vocabulary, but no text may become one of them: texts that spell
one, such as ``</s>``, are cut behind their first character.

Source: sentencepiece's ``normalizer.cc``, ``unigram_model.cc``, ``bpe_model.cc`` and ``sentencepiece_processor.cc``.
"""

from __future__ import annotations

import re
from typing import Any

SPACE = "\u2581"
# Unicode's last private plane: characters that no text holds.
_PRIVATE = 0x100000
_ALL = 1 << 30


class UnsupportedSentencePiece(ValueError):
    """A feature that has no counterpart in the Hugging Face library."""


def convert(model: bytes, prepend_bos: bool) -> Any:
    """The ``tokenizers.Tokenizer`` of a serialised sentencepiece model.

    Args:
        model: the file's bytes.
        prepend_bos: put the BOS token in front where special tokens are asked for (Transformers' default).

    Raises:
        UnsupportedSentencePiece: word models, whitespace as a suffix or unescaped, unused pieces.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, processors

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(model)
    _check(proto)
    tokenizer: Any = Tokenizer(_model(proto))
    tokenizer.normalizer = _normalizer(proto)
    tokenizer.pre_tokenizer = _pre_tokenizer(proto, model)
    tokenizer.decoder = _decoder(proto)
    control = [piece for piece in proto.pieces if piece.type == piece.CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True) for piece in control])
    if prepend_bos:
        bos = proto.trainer_spec.bos_piece
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, proto.trainer_spec.bos_id)]
        )
    return tokenizer


def _check(proto: Any) -> None:
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    refused = {
        "a word model": spec.model_type == spec.WORD,
        "whitespace as a suffix": spec.treat_whitespace_as_suffix,
        "spaces that are not escaped": not rules.escape_whitespaces,
        "unused pieces": any(piece.type == piece.UNUSED for piece in proto.pieces),
    }
    found = [what for what, there in refused.items() if there]
    if found:
        raise UnsupportedSentencePiece(f"a tokenizer.json cannot express {' and '.join(found)}")


def _model(proto: Any) -> Any:
    from tokenizers import models

    spec, pieces = proto.trainer_spec, proto.pieces
    if spec.model_type == spec.UNIGRAM:
        # A score of 0 is more than any sum of log-probabilities: an isolated symbol is always the whole symbol.
        scores = [(piece.piece, 0.0 if piece.type == piece.USER_DEFINED else piece.score) for piece in pieces]
        return models.Unigram(scores, unk_id=spec.unk_id, byte_fallback=spec.byte_fallback)
    return models.BPE(
        vocab={piece.piece: index for index, piece in enumerate(pieces)},
        merges=_merges(proto) if spec.model_type == spec.BPE else [],
        unk_token=pieces[spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        # An isolated symbol is the whole symbol.
        ignore_merges=any(piece.type == piece.USER_DEFINED for piece in pieces),
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """sentencepiece merges any two neighbours that form a piece, the piece of the best score first."""
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL}
    merges = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                merges.append((-proto.pieces[index].score, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(merges)]


def _normalizer(proto: Any) -> Any:
    """The whole text's normalisation; symbols go through it behind private characters, as nothing may change them."""
    from tokenizers import Regex, normalizers

    rules, steps = proto.normalizer_spec, []
    if rules.precompiled_charsmap:
        charsmap = normalizers.Precompiled(rules.precompiled_charsmap)
        if charsmap.normalize_str("\r") == " ":
            # The Hugging Face library looks at "\r\n" as one character and finds the map of its beginning.
            steps.append(normalizers.Replace("\r", " "))
        steps.append(charsmap)
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))

    plain = normalizers.Sequence(steps)
    prefix = plain.normalize_str("xx").removesuffix("xx")
    changed = [symbol for symbol in _symbols(proto) if plain.normalize_str(f"x{symbol}x") != f"{prefix}x{symbol}x"]
    hidden = {symbol: chr(_PRIVATE + index) for index, symbol in enumerate(changed)}
    hide = [normalizers.Replace(symbol, private) for symbol, private in hidden.items()]
    show = [normalizers.Replace(private, symbol) for symbol, private in hidden.items()]
    return normalizers.Sequence([*hide, *steps, *show])


def _symbols(proto: Any) -> list[str]:
    """User-defined symbols, longest first, as they are looked for; normalised text has no spaces, so some never are."""
    symbols = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    return sorted((symbol for symbol in symbols if " " not in symbol), key=len, reverse=True)


def _pre_tokenizer(proto: Any, model: bytes) -> Any:
    """User-defined symbols stand alone; a text that spells a reserved piece is cut where sentencepiece cuts it."""
    from tokenizers import Regex, pre_tokenizers

    symbols = "|".join(re.escape(symbol) for symbol in _symbols(proto))
    steps = [pre_tokenizers.Split(Regex(symbols), "isolated")] if symbols else []
    reserved = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN, piece.BYTE)]
    # BPE finds one only where it is all there is (`ignore_merges`).
    begin, end = ("", "") if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM else (r"\A", r"\z")
    cuts = "|".join(
        f"{begin}{re.escape(text[:cut])}(?={re.escape(text[cut:])}{end})"
        for text, cut in _first_cuts(reserved, model).items()
    )
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.Split(Regex(cuts), "merged_with_previous")])


def _first_cuts(texts: list[str], model: bytes) -> dict[str, int]:
    """How much of each text sentencepiece takes first, in characters; texts of one character cannot be cut."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    cuts = {}
    for text in texts:
        pieces = [piece.removeprefix(SPACE) for piece in processor.encode(text, out_type=str)]
        first = next((piece for piece in pieces if piece), "")
        if len(text) > 1:
            cuts[text] = len(first) if text != first and text.startswith(first) else 1
    return cuts


def _decoder(proto: Any) -> Any:
    from tokenizers import decoders

    spec, rules = proto.trainer_spec, proto.normalizer_spec
    unknown = chr(_PRIVATE)  # its text begins with a space that is not the dummy prefix
    steps = [decoders.Replace(proto.pieces[spec.unk_id].piece, unknown), decoders.Replace(SPACE, " ")]
    if spec.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", _ALL if rules.remove_extra_whitespaces else 1, 0))
    return decoders.Sequence([*steps, decoders.Replace(unknown, spec.unk_surface)])
