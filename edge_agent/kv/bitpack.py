"""Bit packing: codes of 1-8 bits, most significant bit first, without gaps (methods.md 1.4).

Two 4-bit codes fill a byte, four 6-bit codes three bytes; eight codes of b bits always fill b bytes, which is what the
vectorised form uses.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_agent.errors import RecipeInvalid

UInt8 = npt.NDArray[np.uint8]

CODES_PER_GROUP = 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits occupy (the last byte filled with zeros)."""
    return (count * check_bits(bits) + 7) // 8


def check_bits(bits: int) -> int:
    """bits itself if 1-8, else RecipeInvalid."""
    if not 1 <= bits <= 8:
        raise RecipeInvalid(f"{bits} bits: a width must be 1 to 8")
    return bits


def pack(codes: UInt8, bits: int) -> bytes:
    """Pack codes (uint8, any shape, read in C order, each < 2**bits) into bytes.

    Raises RecipeInvalid for bits outside 1-8, ValueError for a code that does not fit.
    """
    flat = np.ascontiguousarray(codes, dtype=np.uint8).reshape(-1)
    if flat.size and int(flat.max()) >> check_bits(bits):
        raise ValueError(f"code {int(flat.max())} does not fit {bits} bits")
    if bits == CODES_PER_GROUP:
        return flat.tobytes()
    size = packed_bytes(flat.size, bits)
    groups = -(-flat.size // CODES_PER_GROUP)
    padded = np.zeros((groups, CODES_PER_GROUP), dtype=np.uint8)
    padded.reshape(-1)[: flat.size] = flat
    word = np.zeros(groups, dtype=np.uint64)
    for column in range(CODES_PER_GROUP):
        word <<= np.uint64(bits)
        word |= padded[:, column]
    big_endian = word.astype(">u8").view(np.uint8).reshape(groups, 8)
    return big_endian[:, 8 - bits :].tobytes()[:size]


def unpack(data: bytes | memoryview, bits: int, count: int) -> UInt8:
    """The `count` codes that `pack` put into data, uint8 (count,).

    Raises RecipeInvalid for bits outside 1-8, ValueError if data has another size than those codes need.
    """
    if len(data) != packed_bytes(count, bits):
        raise ValueError(f"{len(data)} bytes can't hold exactly {count} codes of {bits} bits")
    if bits == CODES_PER_GROUP:
        return np.frombuffer(data, dtype=np.uint8).copy()
    groups = -(-count // CODES_PER_GROUP)
    padded = np.zeros(groups * bits, dtype=np.uint8)
    padded[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    big_endian = np.zeros((groups, 8), dtype=np.uint8)
    big_endian[:, 8 - bits :] = padded.reshape(groups, bits)
    word = big_endian.view(">u8").reshape(groups).astype(np.uint64)
    codes = np.empty((groups, CODES_PER_GROUP), dtype=np.uint8)
    mask = np.uint64((1 << bits) - 1)
    for column in range(CODES_PER_GROUP):
        codes[:, column] = (word >> np.uint64(bits * (CODES_PER_GROUP - 1 - column))) & mask
    return codes.reshape(-1)[:count]
