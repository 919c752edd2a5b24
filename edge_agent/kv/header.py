"""The header of a payload: what its slices carry, and of which context."""

from __future__ import annotations

import zlib
from typing import Annotated

import msgpack
import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from broker_config.messages.base import Digest, RungName, Tokens
from edge_agent.errors import PayloadRejected
from edge_agent.facts.fact import MAX_FACTS, Fact
from edge_agent.kv.bitpack import packed_bytes
from edge_agent.kv.cache import Cache, Int32
from edge_agent.kv.entropy import most_bytes
from edge_agent.kv.recipe import Codec
from edge_agent.kv.transform import LEVELS

MAGIC = b"KVB1"
FORMAT_VERSION = 5
SLICE_MARK, TRAILER_MARK = b"S", b"T"
DIGEST_BYTES, FINAL_DIGEST_BYTES = 16, 32
MAX_HEADER_BYTES = 1 << 20
PLACE_BYTES = 8


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
        total = len(MAGIC) + 4 + len(packed_header(self)) + DIGEST_BYTES + 5 + FINAL_DIGEST_BYTES
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


def packed_header(header: Header) -> bytes:
    """As it stands in a payload."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(header, builtin_types=(bytes,)), use_bin_type=True)
    return packed


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
