"""Packing is exact, dense, and in the order that the paper gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import RecipeInvalid
from edge_agent.kv.bitpack import pack, packed_bytes, unpack


@st.composite
def codes(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    bits = draw(st.integers(1, 8))
    values = draw(st.lists(st.integers(0, 2**bits - 1), max_size=200))
    return np.array(values, dtype=np.uint8), bits


@given(codes())
def test_what_is_packed_comes_back(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    data = pack(values, bits)
    assert len(data) == packed_bytes(len(values), bits) == -(-len(values) * bits // 8)
    assert np.array_equal(unpack(data, bits, len(values)), values)


@given(codes())
def test_packing_is_the_plain_string_of_bits(case: tuple[np.ndarray, int]) -> None:
    values, bits = case
    string = "".join(f"{value:0{bits}b}" for value in values)
    string += "0" * (-len(string) % 8)
    assert pack(values, bits) == bytes(int(string[i : i + 8], 2) for i in range(0, len(string), 8))


def test_two_4_bit_codes_fill_a_byte_and_four_6_bit_codes_three() -> None:
    assert pack(np.array([0xA, 0x5], dtype=np.uint8), 4) == b"\xa5"
    assert pack(np.array([0b111111, 0, 0b111111, 0], dtype=np.uint8), 6) == b"\xfc\x0f\xc0"


@pytest.mark.parametrize("bits", [-1, 0, 9, 16])
def test_bits_outside_1_to_8_are_refused_by_name(bits: int) -> None:
    with pytest.raises(RecipeInvalid, match=f"{bits} bits"):
        pack(np.zeros(4, dtype=np.uint8), bits)
    with pytest.raises(RecipeInvalid, match=f"{bits} bits"):
        unpack(b"\0", bits, 1)


def test_a_code_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="code 16 does not fit 4 bits"):
        pack(np.array([3, 16], dtype=np.uint8), 4)


@given(st.integers(1, 8), st.integers(0, 40), st.binary(max_size=40))
def test_data_of_another_size_is_refused(bits: int, count: int, data: bytes) -> None:
    if len(data) != packed_bytes(count, bits):
        with pytest.raises(ValueError, match="can't hold exactly"):
            unpack(data, bits, count)
