"""The payload: a context on the wire, as header, slices and trailer.

    magic "KVB1" | u32 length, header (MessagePack) | 16-byte digest
    then per slice:  "S" | u32 length, body | 16-byte digest
    then once:       "T" | u32 number of slices | 32-byte digest of everything before

All integers are little-endian; digests are BLAKE2b. So a payload can be sent while it is still being made, and used
while it arrives. The header carries all token ids of the context, a few bytes each, so that whoever has it can compute
whatever does not come. The first own_tokens of them no slice covers; slices carry the entries of the others, or, where
the header says so, of those of them that were kept: as many of every sent layer and head. Slices lie on a grid of
slice_tokens and stand in any order, each once; the trailer's digest is over them as they stand. A payload without
slices is the token medium.

A slice's body: u32 first entry, u32 entries, then by codec
    float32, fp16   keys then values of every sent layer, (kv_heads, entries, head_dim) each
    affine          float32 (sent layers, 2, 2): minimum and maximum of keys, of values; then the codes, bit-packed: of
                    the layers of each width together, widths rising, layers rising, keys then values of each
    klt             the symbols of the transform that the header names, at its level (see kv.coded); or, where it
                    refines a coarser level, what a holder of the cache at that one lacks of them
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from edge_agent.errors import CacheInvalid, PayloadRejected, RecipeInvalid
from edge_agent.kv import coded
from edge_agent.kv.bitpack import pack, packed_bytes, unpack
from edge_agent.kv.cache import Cache, Float32, Int32, Layer
from edge_agent.kv.header import (
    DIGEST_BYTES,
    FINAL_DIGEST_BYTES,
    MAGIC,
    PLACE_BYTES,
    SLICE_MARK,
    TRAILER_MARK,
    Header,
    packed_header,
)
from edge_agent.kv.quantize import Quantized, dequantize, quantize
from edge_agent.kv.transform import Transform

LARGEST_FP16 = float(np.finfo(np.float16).max)


class PayloadWriter:
    """A payload piece by piece, for who has its slices one after the other."""

    def __init__(self, header: Header) -> None:
        packed = packed_header(header)
        self.first = MAGIC + struct.pack("<I", len(packed)) + packed + _digest(packed)
        self._digest = hashlib.blake2b(self.first, digest_size=FINAL_DIGEST_BYTES)
        self._slices = 0

    def slice(self, body: bytes) -> bytes:
        """The piece of the next slice."""
        piece = SLICE_MARK + struct.pack("<I", len(body)) + body + _digest(body)
        self._digest.update(piece)
        self._slices += 1
        return piece

    def trailer(self) -> bytes:
        """The last piece."""
        closing = TRAILER_MARK + struct.pack("<I", self._slices)
        self._digest.update(closing)
        return closing + self._digest.digest()


def encode(
    header: Header, cache: Cache | None, transform: Transform | None = None, *, last_first: bool = False
) -> Iterator[bytes]:
    """The payload of a cache piece by piece. Raises like slice_bodies."""
    return pieces(header, slice_bodies(header, cache, transform, last_first=last_first))


def pieces(header: Header, bodies: Iterable[bytes]) -> Iterator[bytes]:
    """A payload piece by piece: header, each slice as soon as its body is there, trailer."""
    writer = PayloadWriter(header)
    yield writer.first
    for body in bodies:
        yield writer.slice(body)
    yield writer.trailer()


def slice_bodies(
    header: Header, cache: Cache | None, transform: Transform | None = None, *, last_first: bool = False
) -> Iterator[bytes]:
    """The body of each slice, as soon as it is coded; last_first: from the last down to the first.

    cache must have the entries that the header announces in every sent layer, those of own tokens aside (None when
    there is nothing to send); transform is the one that the header names, if it does.
    Raises RecipeInvalid without that, CacheInvalid for a cache that doesn't cover them, or that holds a NaN, an
    infinity, or what fp16 can't hold.
    """
    sent = _announced(header, cache)
    for start, entries in in_order(header, last_first=last_first):
        yield slice_body(header, start, sent.part(start, start + entries), transform)


def in_order(header: Header, *, last_first: bool) -> list[tuple[int, int]]:
    """(first entry, entries) of every slice, rising or falling."""
    starts = header.slice_starts()
    return starts[::-1] if last_first else starts


def slice_body(header: Header, start: int, part: Cache, transform: Transform | None = None) -> bytes:
    """The body of the slice that begins with this entry; part: its entries. Raises like slice_bodies."""
    return slice_place(start, header.slice_entries(start)) + _encode_slice(header, part, transform)


def slice_place(start: int, entries: int) -> bytes:
    """What a body begins with."""
    return struct.pack("<II", start, entries)


def slice_entries(body: bytes) -> int:
    """How many entries a body is of."""
    entries: int = struct.unpack_from("<II", body)[1]
    return entries


def decode_slice(
    header: Header, positions: Mapping[int, Int32], body: bytes | memoryview, transform: Transform | None = None
) -> Cache:
    """One slice's body as a cache, in which layers that were not sent are empty. positions, transform: the header's.

    Raises PayloadRejected if a field is out of range or a size does not add up.
    """
    start, entries = struct.unpack_from("<II", body)
    data = memoryview(body)[PLACE_BYTES:]
    shape = header.shape
    dims = (shape.kv_heads, entries, shape.head_dim)
    here = {layer: at[..., start : start + entries] for layer, at in positions.items()}
    if header.codec == "klt":
        transform, level = _transform(header, transform)
        symbols = coded.unpack(transform, level, data, dict.fromkeys(shape.sent_layers, entries))
        return coded.cache_of(transform, level, symbols, kv_heads=shape.kv_heads, positions=here)
    tensors = _decode_affine(header, data, dims) if header.codec == "affine" else _decode_float(header, data, dims)
    nothing = np.zeros((shape.kv_heads, 0, shape.head_dim), dtype=np.float32)
    layers = [Layer(nothing, nothing, np.zeros(0, dtype=np.int32))] * shape.layers
    for place, index in enumerate(shape.sent_layers):
        layers[index] = Layer(tensors[2 * place], tensors[2 * place + 1], here[index])
    return Cache(tuple(layers))


def _announced(header: Header, cache: Cache | None) -> Cache:
    """The entries that the slices carry."""
    if not header.entries:
        return Cache(())
    if cache is None:
        raise CacheInvalid("the header announces slices, but no cache is given")
    sent = cache.between(header.own_tokens, header.tokens) if header.kept is None else cache
    for index, positions in header.positions().items():
        layer = sent.layers[index]
        if not np.array_equal(layer.positions, positions):
            raise CacheInvalid(f"layer {index} has not the {header.entries} entries to be sent")
    return sent


def _encode_slice(header: Header, part: Cache, transform: Transform | None) -> bytes:
    tensors = [
        array for index in header.shape.sent_layers for array in (part.layers[index].keys, part.layers[index].values)
    ]
    if header.codec == "klt":
        transform, level = _transform(header, transform)
        symbols = coded.symbols_of(transform, level, part, header.shape.sent_layers)
        return coded.pack(transform, level, symbols)
    if header.codec == "affine":
        quantized = [quantize(tensor, header.widths[place // 2]) for place, tensor in enumerate(tensors)]
        pieces = [np.array([(q.minimum, q.maximum) for q in quantized], dtype="<f4").tobytes()]
        for bits, places in header.places_by_width():
            codes = [quantized[2 * place + kind].codes.reshape(-1) for place in places for kind in (0, 1)]
            pieces.append(pack(np.concatenate(codes), bits))
        return b"".join(pieces)
    if not all(np.isfinite(tensor).all() for tensor in tensors):
        raise CacheInvalid("a cache to be sent holds a NaN or an infinity")
    if header.codec == "fp16":
        if any(float(np.abs(tensor).max(initial=0.0)) > LARGEST_FP16 for tensor in tensors):
            raise CacheInvalid("a cache to be sent holds a value that fp16 can't; use float32 or fewer bits")
        return b"".join(tensor.astype("<f2").tobytes() for tensor in tensors)
    return b"".join(tensor.astype("<f4", copy=False).tobytes() for tensor in tensors)


def _transform(header: Header, given: Transform | None) -> tuple[Transform, int]:
    if given is None or header.level is None or given.id != header.transform:
        raise RecipeInvalid(f"rung {header.rung} needs the transform {header.transform} of the model's bundle")
    return given, header.level


def _decode_float(header: Header, data: memoryview, dims: tuple[int, int, int]) -> list[Float32]:
    dtype = "<f4" if header.codec == "float32" else "<f2"
    flat = np.frombuffer(data, dtype=dtype).astype(np.float32)
    if not np.isfinite(flat).all():
        raise PayloadRejected("slice", "holds a NaN or an infinity")
    return list(flat.reshape(2 * len(header.shape.sent_layers), *dims))


def _decode_affine(header: Header, data: memoryview, dims: tuple[int, int, int]) -> list[Float32]:
    count = 2 * len(header.shape.sent_layers)
    ranges = np.frombuffer(data[: 8 * count], dtype="<f4").reshape(count, 2)
    if not np.isfinite(ranges).all() or np.any(ranges[:, 0] > ranges[:, 1]):
        raise PayloadRejected("slice", "holds a range that is not one")
    tensors: dict[int, Float32] = {}
    of_a_layer, at = 2 * dims[0] * dims[1] * dims[2], 8 * count
    for bits, places in header.places_by_width():
        size = packed_bytes(len(places) * of_a_layer, bits)
        codes = unpack(data[at : at + size], bits, len(places) * of_a_layer).reshape(len(places), 2, *dims)
        at += size
        for place, pair in zip(places, codes, strict=True):
            for kind in (0, 1):
                low, high = (float(bound) for bound in ranges[2 * place + kind])
                tensors[2 * place + kind] = dequantize(Quantized(pair[kind], bits, low, high))
    return [tensors[index] for index in range(count)]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
