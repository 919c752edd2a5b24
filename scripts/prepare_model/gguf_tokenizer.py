"""The tokenizer of a GGUF file that llama.cpp calls `llama`: SentencePiece's BPE, as files transformers can load.

transformers 4.57 takes such a file's scores for those of a Unigram model, but they are ranks: the higher the score of
what a pair of pieces joins to, the earlier the pair is joined. Here the pairs are spelled out as merges of a BPE, as
`generate_merges` of transformers does for a SentencePiece file; for Gemma 3 they are those of Google's tokenizer.json.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import tokenizers
from msgspec import Struct
from tokenizers import decoders, models, normalizers, processors

from scripts.prepare_model.errors import ModelRefused

_KIND = "tokenizer.ggml.model"
_SPACE = "▁"  # SentencePiece's spelling of a space
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
# Pieces that the user defined are matched before any other, whatever score the file gives them (-1000 in Gemma's).
_USER_DEFINED_SCORE = 0.0

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


class Vocabulary(Struct, frozen=True, kw_only=True):
    """What the file says of its tokenizer. pieces, scores and types: one of each per id, spaces written ▁."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    bos: str
    eos: str
    unknown: str
    padding: str | None
    adds_bos: bool
    adds_eos: bool
    adds_space_prefix: bool
    chat_template: str | None


def write_tokenizer(gguf: Path, into: Path) -> bool:
    """Write tokenizer.json and tokenizer_config.json of a GGUF file, if its tokenizer is SentencePiece's BPE.

    Returns whether it is; else nothing is written. Raises ModelRefused if the file or its vocabulary is broken.
    """
    metadata = read_metadata(gguf)
    if metadata.get(_KIND) != "llama":
        return False
    vocabulary = _vocabulary(metadata, gguf.name)
    into.mkdir(parents=True, exist_ok=True)
    build(vocabulary).save(str(into / "tokenizer.json"), pretty=False)
    (into / "tokenizer_config.json").write_text(json.dumps(_configuration(vocabulary), indent=2), encoding="utf-8")
    return True


def build(vocabulary: Vocabulary) -> Any:
    """The `tokenizers.Tokenizer` of a vocabulary."""
    ids = {piece: index for index, piece in enumerate(vocabulary.pieces)}
    model = models.BPE(
        vocab=ids, merges=merges(vocabulary), unk_token=vocabulary.unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    decode = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.adds_space_prefix:
        spaces = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decode.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decode)
    tokenizer.post_processor = _post_processor(vocabulary, ids)
    tokenizer.add_tokens(list(_added_tokens(vocabulary)))
    return tokenizer


def merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """All pairs of pieces whose join is a piece, in the order in which they are joined.

    Highest score of the join first, then the longest left part, then the longest right one, then the join's id.
    """
    known = frozenset(vocabulary.pieces)
    found: list[tuple[float, str, int]] = []
    for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True):
        if kind in {_NORMAL, _USER_DEFINED}:
            first = _USER_DEFINED_SCORE if kind == _USER_DEFINED else score
            cuts = (cut for cut in range(1, len(piece)) if piece[:cut] in known and piece[cut:] in known)
            found.extend((first, piece, cut) for cut in cuts)
    found.sort(key=lambda merge: (merge[0], merge[2], len(merge[1])), reverse=True)  # stable: ids stay in order
    return [(piece[:cut], piece[cut:]) for _, piece, cut in found]


def read_metadata(gguf: Path) -> dict[str, Any]:
    """All keys and values that stand before a GGUF file's tensors. Raises ModelRefused.

    gguf.GGUFReader makes a memory map of every string: 20 s for 262,144 tokens, here half a second.
    """
    try:
        with gguf.open("rb") as file:
            magic, version, _, count = _read(file, "4sIQQ")
            if magic != b"GGUF" or version not in _VERSIONS:
                raise ModelRefused(f"{gguf.name} is not a GGUF file of version 2 or 3")
            return dict(_key_and_value(file) for _ in range(count))
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError) as error:
        raise ModelRefused(f"{gguf.name} is damaged: its metadata can't be read ({error})") from None


def _key_and_value(file: BinaryIO) -> tuple[str, Any]:
    return _string(file), _value(file, _read(file, "I")[0])


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _read(file, _SCALARS[kind])[0]
    inner, count = _read(file, "IQ")
    if inner in _SCALARS:
        return _read(file, f"{count}{_SCALARS[inner]}")
    return [_value(file, inner) for _ in range(count)]


def _string(file: BinaryIO) -> str:
    (length,) = _read(file, "Q")
    content: bytes = _read(file, f"{length}s")[0]
    return content.decode("utf-8")


def _read(file: BinaryIO, form: str) -> tuple[Any, ...]:
    form = f"<{form}"
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _vocabulary(metadata: Mapping[str, Any], name: str) -> Vocabulary:
    # What is not said is as llama.cpp has it for this kind of tokenizer.
    try:
        types = tuple(metadata["tokenizer.ggml.token_type"])
        written = metadata["tokenizer.ggml.tokens"]
        scores = tuple(metadata["tokenizer.ggml.scores"])
        if not len(written) == len(types) == len(scores):
            raise ModelRefused(f"{name} has {len(written)} tokens, {len(scores)} scores and {len(types)} types")
        pieces = tuple(map(_piece, written, types))
        if len(set(pieces)) < len(pieces):
            raise ModelRefused(f"{name} writes two tokens alike")
        padding = metadata.get("tokenizer.ggml.padding_token_id")
        return Vocabulary(
            pieces=pieces,
            scores=scores,
            types=types,
            bos=pieces[metadata.get("tokenizer.ggml.bos_token_id", 1)],
            eos=pieces[metadata.get("tokenizer.ggml.eos_token_id", 2)],
            unknown=pieces[metadata.get("tokenizer.ggml.unknown_token_id", 0)],
            padding=None if padding is None else pieces[padding],
            adds_bos=metadata.get("tokenizer.ggml.add_bos_token", True),
            adds_eos=metadata.get("tokenizer.ggml.add_eos_token", False),
            adds_space_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
            chat_template=metadata.get("tokenizer.chat_template"),
        )
    except (KeyError, IndexError) as error:
        raise ModelRefused(f"{name} has no whole tokenizer: {error}") from None


def _piece(written: str, kind: int) -> str:
    # Only pieces that the user defined are written as they look.
    return written.replace(" ", _SPACE) if kind == _USER_DEFINED else written


def _added_tokens(vocabulary: Vocabulary) -> Iterator[Any]:
    for piece, kind in zip(vocabulary.pieces, vocabulary.types, strict=True):
        if kind in {_UNKNOWN, _CONTROL, _USER_DEFINED}:
            yield tokenizers.AddedToken(piece, normalized=False, special=kind != _USER_DEFINED)


def _post_processor(vocabulary: Vocabulary, ids: Mapping[str, int]) -> Any:
    before = [vocabulary.bos] * vocabulary.adds_bos
    after = [vocabulary.eos] * vocabulary.adds_eos
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, ids[token]) for token in (vocabulary.bos, vocabulary.eos)],
    )


def _configuration(vocabulary: Vocabulary) -> dict[str, Any]:
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "unk_token": vocabulary.unknown,
        "pad_token": vocabulary.padding,
        "add_bos_token": vocabulary.adds_bos,
        "add_eos_token": vocabulary.adds_eos,
        "chat_template": vocabulary.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {name: value for name, value in said.items() if value is not None}
