"""Runs of small integers come back exactly, take little more than their entropy, and bad bytes are refused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import PayloadRejected
from edge_agent.kv.entropy import ALPHABETS, LARGEST, Alphabet, alphabet, compress, decompress, most_bytes

letters = st.sampled_from([each for _, each in ALPHABETS])
numbers = st.one_of(st.integers(-4, 4), st.integers(-300, 300), st.integers(-LARGEST + 1, LARGEST - 1))


def run_of(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@given(st.lists(st.tuples(st.lists(numbers, max_size=40), letters), max_size=6))
def test_runs_come_back_exactly(runs: list[tuple[list[int], Alphabet]]) -> None:
    given_runs = [(run_of(values), each) for values, each in runs]
    data = compress(given_runs)
    assert len(data) <= most_bytes(sum(len(values) for values, _ in runs))
    back = decompress(data, [(len(values), each) for values, each in given_runs])
    assert all(np.array_equal(one, other) for (one, _), other in zip(given_runs, back, strict=True))
    assert all(each.dtype == np.int32 for each in back)


@pytest.mark.parametrize("most", [1, 3, 7])
def test_a_closed_alphabet_holds_its_edges_at_no_cost(most: int) -> None:
    values = np.random.default_rng(most).integers(-most, most + 1, 4_000).astype(np.int32)
    closed = Alphabet(most, int(np.log(256) / np.log(2 * most + 1)), closed=True)
    data = compress([(values, closed)])
    assert np.array_equal(decompress(data, [(len(values), closed)])[0], values)
    assert 8 * len(data) < 1.05 * len(values) * np.log2(2 * most + 1) + 1_200


@pytest.mark.parametrize(("deviation", "over"), [(0.4, 1.2), (0.6, 1.1), (1.0, 1.05), (3.0, 1.02), (20.0, 1.02)])
def test_laplacian_numbers_take_little_more_than_their_entropy(deviation: float, over: float) -> None:
    drawn = np.random.default_rng(1).laplace(scale=deviation / 2**0.5, size=200_000)
    values = np.trunc(drawn + np.copysign(0.25, drawn)).astype(np.int32)
    counts = np.unique(values, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / len(values))).sum()
    assert 8 * len(compress([(values, alphabet(deviation))])) < over * entropy + 1_000


@given(st.binary(max_size=60), st.lists(st.tuples(st.integers(0, 50), letters), max_size=3))
def test_any_bytes_are_numbers_or_refused(data: bytes, runs: list[tuple[int, Alphabet]]) -> None:
    try:
        back = decompress(data, runs)
    except PayloadRejected:
        return
    assert [len(each) for each in back] == [count for count, _ in runs]


@given(st.data(), st.lists(numbers, min_size=1, max_size=60), letters)
def test_a_changed_or_missing_byte_is_numbers_or_refused(
    data: st.DataObject, values: list[int], each: Alphabet
) -> None:
    coded = bytearray(compress([(run_of(values), each)]))
    coded[data.draw(st.integers(0, len(coded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(coded)))
    for changed in (bytes(coded), bytes(coded[:cut])):
        try:
            back = decompress(changed, [(len(values), each)])[0]
        except PayloadRejected:
            continue
        assert len(back) == len(values)
        assert np.abs(back.astype(np.int64)).max() < LARGEST + 128


def deflated(*pieces: bytes) -> bytes:
    coder = zlib.compressobj(6, zlib.DEFLATED, -15)
    return b"".join(coder.compress(piece) for piece in pieces) + coder.flush()


def test_what_was_not_announced_is_refused() -> None:
    three = Alphabet(1, 5)
    with pytest.raises(PayloadRejected, match="holds more than its numbers"):
        decompress(deflated(bytes([121, 121])), [(5, three)])
    with pytest.raises(PayloadRejected, match="holds more than its numbers"):
        decompress(deflated(bytes([121])) + b"x", [(5, three)])
    with pytest.raises(PayloadRejected, match="end early"):
        decompress(deflated(bytes([121])), [(10, three)])
    with pytest.raises(PayloadRejected, match="outside its alphabet"):
        decompress(deflated(bytes([243])), [(5, three)])
    with pytest.raises(PayloadRejected, match="inflated"):
        decompress(b"\xff\xff\xff", [(5, three)])
    with pytest.raises(PayloadRejected, match="no component has"):
        decompress(deflated(bytes([242]), bytes([255] * 5), b"\xff\xff\xff\xff" * 5), [(5, three)])


def test_a_bomb_stays_packed() -> None:
    bomb = deflated(bytes(50_000_000))
    assert len(bomb) < 60_000
    with pytest.raises(PayloadRejected, match="holds more than its numbers"):
        decompress(bomb, [(10, Alphabet(127, 1))])
