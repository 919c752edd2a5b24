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
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from broker_config.messages.base import Digest, RungName, Tokens
from edge_agent.errors import CacheInvalid, PayloadRejected, RecipeInvalid
from edge_agent.facts.fact import MAX_FACTS, Fact
from edge_agent.kv import coded
from edge_agent.kv.bitpack import pack, packed_bytes, unpack
from edge_agent.kv.cache import Cache, Float32, Int32, Layer
from edge_agent.kv.entropy import most_bytes
from edge_agent.kv.quantize import Quantized, dequantize, quantize
from edge_agent.kv.recipe import Codec
from edge_agent.kv.transform import LEVELS, Transform

MAGIC = b"KVB1"
FORMAT_VERSION = 5
SLICE_MARK, TRAILER_MARK = b"S", b"T"
DIGEST_BYTES, FINAL_DIGEST_BYTES = 16, 32
MAX_HEADER_BYTES = 1 << 20
PLACE_BYTES = 8

LARGEST_FP16 = float(np.finfo(np.float16).max)


class Shape(Struct, frozen=True, kw_only=True):
    """Of the cache that the slices carry. sent_layers: the layers that have entries, rising."""

    layers: Annotated[int, Meta(ge=1, le=512)]
    kv_heads: Annotated[int, Meta(ge=1, le=4_096)]
    head_dim: Annotated[int, Meta(ge=1, le=4_096)]
    sent_layers: Annotated[tuple[int, ...], Meta(max_length=512)]


class Kept(Struct, frozen=True, kw_only=True):
    """Which entries of a cache were kept. entries: of each sent layer and head; by_head: heads kept different ones.

    mask: a bit for each token that the receiver does not prefill itself, set where its entry is there; for each sent
    layer, and each head if by_head; packed, then deflated.
    """

    entries: Annotated[int, Meta(ge=1, le=65_536)]
    by_head: bool
    mask: Annotated[bytes, Meta(max_length=MAX_HEADER_BYTES)]


class Header(Struct, frozen=True, kw_only=True):
    """The payload's header. tokens, token_ids are of the whole context, id_bytes for each id; no slice covers the first
    own_tokens. A slice's first entry is counted from there.

    widths: with codec "affine", the bits of each sent layer; else empty. transform, level: with codec "klt" alone, its
    id and how coarsely its components are quantized. refines: the coarser level of the very cache that the receiver
    must hold already, to be brought to this one. kept: which entries are there, if not all. facts: what the sender
    says of the context beside its cache, for the receiver to put before the question.
    """

    format_version: Annotated[int, Meta(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
    fingerprint: Digest
    tokenizer: Digest
    weight_precision: str
    context_id: Digest
    prefix: Digest
    shape: Shape
    codec: Codec
    widths: Annotated[tuple[Annotated[int, Meta(ge=1, le=8)], ...], Meta(max_length=512)] = ()
    rung: RungName
    transform: Digest | None = None
    level: Annotated[int, Meta(ge=0, lt=LEVELS)] | None = None
    refines: Annotated[int, Meta(ge=0, lt=LEVELS)] | None = None
    slice_tokens: Annotated[int, Meta(ge=1, le=65_536)]
    tokens: Tokens
    id_bytes: Annotated[int, Meta(ge=1, le=4)]
    token_ids: Annotated[bytes, Meta(max_length=MAX_HEADER_BYTES)]
    own_tokens: Tokens = 0
    kept: Kept | None = None
    facts: Annotated[tuple[Fact, ...], Meta(max_length=MAX_FACTS)] = ()

    def ids(self) -> list[int]:
        """The token ids, unpacked."""
        return [int(token) for token in np.frombuffer(self.token_ids, dtype=f"<u{self.id_bytes}")]

    @property
    def entries(self) -> int:
        """Entries of each sent layer that the slices carry."""
        return self.tokens - self.own_tokens if self.kept is None else self.kept.entries

    def slice_entries(self, start: int) -> int:
        """How many entries the slice that begins with this one has; 0 if none begins there."""
        if start % self.slice_tokens or not 0 <= start < self.entries:
            return 0
        return min(self.slice_tokens, self.entries - start)

    def slice_starts(self) -> list[tuple[int, int]]:
        """(first entry, entries) of every slice, rising."""
        return [(start, self.slice_entries(start)) for start in range(0, self.entries, self.slice_tokens)]

    def positions(self) -> dict[int, Int32]:
        """Of each sent layer the positions of its entries, int32 (entries,), or (kv_heads, entries) if heads differ.

        Raises PayloadRejected if the header's own account of them does not add up.
        """
        layers, span = self.shape.sent_layers, self.tokens - self.own_tokens
        if self.kept is None:
            return dict.fromkeys(layers, np.arange(self.own_tokens, self.tokens, dtype=np.int32))
        heads = self.shape.kv_heads if self.kept.by_head else 1
        bits = _unmasked(self.kept.mask, len(layers) * heads * span).reshape(-1, span)
        if np.any(np.count_nonzero(bits, axis=1) != self.kept.entries):
            raise PayloadRejected("kept", f"not {self.kept.entries} entries of every layer")
        at = (np.nonzero(bits)[1] + self.own_tokens).astype(np.int32).reshape(len(layers), heads, -1)
        return {layer: rows if self.kept.by_head else rows[0] for layer, rows in zip(layers, at, strict=True)}

    def body_bytes(self, entries: int) -> int | None:
        """Size of the body of a slice of so many entries; None if that depends on what is in it."""
        of_a_layer = 2 * self.shape.kv_heads * self.shape.head_dim * entries
        sent = len(self.shape.sent_layers)
        if self.codec == "klt":
            return None
        if self.codec == "affine":
            codes = sum(packed_bytes(len(places) * of_a_layer, bits) for bits, places in self.places_by_width())
            return 8 + 16 * sent + codes
        return 8 + sent * of_a_layer * (4 if self.codec == "float32" else 2)

    def body_limit_bytes(self, entries: int) -> int:
        """What the body of such a slice never exceeds."""
        exact = self.body_bytes(entries)
        if exact is not None:
            return exact
        return 8 + most_bytes(2 * len(self.shape.sent_layers) * self.shape.kv_heads * self.shape.head_dim * entries)

    def places_by_width(self) -> list[tuple[int, list[int]]]:
        """(bits, places in sent_layers of the layers that have so many), bits rising."""
        return [(bits, [at for at, own in enumerate(self.widths) if own == bits]) for bits in sorted(set(self.widths))]

    def decoded_bytes(self) -> int:
        """Memory that the decoded slices will occupy as float32."""
        return 2 * len(self.shape.sent_layers) * self.shape.kv_heads * self.shape.head_dim * 4 * self.entries

    def payload_bytes(self) -> int | None:
        """Exact size of the whole payload, if it is known before a slice is coded."""
        total = len(MAGIC) + 4 + len(_pack_header(self)) + DIGEST_BYTES + 5 + FINAL_DIGEST_BYTES
        for _, entries in self.slice_starts():
            body = self.body_bytes(entries)
            if body is None:
                return None
            total += 5 + body + DIGEST_BYTES
        return total


def pack_ids(ids: list[int], id_bytes: int) -> bytes:
    """Token ids as little-endian integers of id_bytes (1, 2 or 4) bytes each."""
    return np.asarray(ids, dtype=f"<u{id_bytes}").tobytes()


def kept_of(cache: Cache, *, own_tokens: int, tokens: int, layers: tuple[int, ...]) -> Kept:
    """What a header says of a cache of which entries were evicted: as many in each of these layers and each head."""
    by_head = any(cache.layers[layer].positions.ndim > 1 for layer in layers)
    rows = [row for layer in layers for row in np.atleast_2d(cache.layers[layer].positions)]
    bits = np.zeros((len(rows), tokens - own_tokens), dtype=np.uint8)
    for row, positions in zip(bits, rows, strict=True):
        row[positions - own_tokens] = 1
    mask = zlib.compress(np.packbits(bits).tobytes(), 9)
    return Kept(entries=cache.layers[layers[0]].entries, by_head=by_head, mask=mask)


class PayloadWriter:
    """A payload piece by piece, for who has its slices one after the other."""

    def __init__(self, header: Header) -> None:
        packed = _pack_header(header)
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


def _unmasked(mask: bytes, bits: int) -> npt.NDArray[np.uint8]:
    """So many bits, one in each uint8. Raises PayloadRejected if these bytes hold others."""
    size = (bits + 7) // 8
    inflate = zlib.decompressobj()
    try:
        packed = inflate.decompress(mask, size + 1)
    except zlib.error as error:
        raise PayloadRejected("kept", str(error)) from None
    if len(packed) != size or not inflate.eof or inflate.unused_data:
        raise PayloadRejected("kept", f"is not the mask of {bits} entries")
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=bits)


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


def _pack_header(header: Header) -> bytes:
    packed: bytes = msgpack.packb(msgspec.to_builtins(header, builtin_types=(bytes,)), use_bin_type=True)
    return packed


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
