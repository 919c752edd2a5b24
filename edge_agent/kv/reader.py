"""Reading a payload while it arrives: every field checked before anything is allocated for it, nothing unpickled."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import struct
from dataclasses import dataclass

import msgpack
import msgspec

from edge_agent.errors import PayloadRejected, WrongModel
from edge_agent.kv.cache import Cache, Int32, concatenate
from edge_agent.kv.header import (
    DIGEST_BYTES,
    FINAL_DIGEST_BYTES,
    FORMAT_VERSION,
    MAGIC,
    MAX_HEADER_BYTES,
    PLACE_BYTES,
    SLICE_MARK,
    TRAILER_MARK,
    Header,
    Shape,
)
from edge_agent.kv.payload import decode_slice
from edge_agent.kv.transform import Transform

VOCABULARY_LIMIT = 2**24


@dataclass(frozen=True)
class Expectation:
    """What a receiver can use. limit_bytes bounds the decoded size; vocabulary bounds token ids; transform is that of
    its bundle, if it has one.
    """

    fingerprint: str
    tokenizer: str
    prefix: str
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    window_tokens: int
    limit_bytes: int
    transform: Transform | None = None


class PayloadReader:
    """Feed it bytes as they come; `header` is set once it is there, `slices` fills, `complete` ends it.

    slices: by their first entry, in whatever order they come; who uses them at once takes them out with `take`.
    passed: slices that end at or below this entry are of no use any more: they are checked, but not decoded.
    Raises PayloadRejected (WrongModel for another model's payload) at the first byte range that can't be used.
    """

    _refines: int | None = None

    def __init__(self, expectation: Expectation) -> None:
        self._expectation = expectation
        self._buffer = bytearray()
        self._digest = hashlib.blake2b(digest_size=FINAL_DIGEST_BYTES)
        self.header: Header | None = None
        self._positions: dict[int, Int32] = {}
        self._seen: set[int] = set()
        self.slices: dict[int, Cache] = {}
        self.passed = 0
        self.complete = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises PayloadRejected."""
        if data and self.complete:
            raise PayloadRejected("trailer", f"{len(data)} bytes follow it")
        self._buffer += data
        while not self.complete and self._step():
            pass
        if self.complete and self._buffer:
            raise PayloadRejected("trailer", f"{len(self._buffer)} bytes follow it")

    def finish(self) -> Cache | None:
        """The whole cache that was sent (None if only token ids were). Raises PayloadRejected if cut short."""
        if not self.complete:
            what = "header" if self.header is None else "trailer"
            raise PayloadRejected(what, f"missing: the payload ends early, {len(self._buffer)} bytes into it")
        return concatenate([self.slices[start] for start in sorted(self.slices)]) if self.slices else None

    def take(self) -> list[tuple[int, Cache]]:
        """The slices that have come since: (first entry, cache). They are not kept here any more."""
        taken = sorted(self.slices.items())
        for start, _ in taken:
            del self.slices[start]
        return taken

    def _step(self) -> bool:
        """Take one record off the buffer, if it is there whole."""
        if self.header is None:
            return self._read_header()
        mark = bytes(self._buffer[:1])
        if mark == SLICE_MARK:
            return self._read_slice(self.header)
        if mark == TRAILER_MARK:
            return self._read_trailer(self.header)
        if mark:
            raise PayloadRejected("record", f"unknown mark {mark!r}")
        return False

    def _read_header(self) -> bool:
        if not MAGIC.startswith(bytes(self._buffer[: len(MAGIC)])):
            raise PayloadRejected("magic", "these bytes are not a kvbus payload")
        if len(self._buffer) < len(MAGIC) + 4:
            return False
        (length,) = struct.unpack_from("<I", self._buffer, len(MAGIC))
        if length > MAX_HEADER_BYTES:
            raise PayloadRejected("header", f"{length} bytes, above the limit of {MAX_HEADER_BYTES}")
        record = self._take(len(MAGIC) + 4, length)
        if record is None:
            return False
        header = self._check(_parse_header(record))
        self._positions = header.positions()
        self.header = header
        return True

    def _read_slice(self, header: Header) -> bool:
        if len(self._buffer) < 5 + PLACE_BYTES:
            return False
        (length,) = struct.unpack_from("<I", self._buffer, 1)
        start, entries = struct.unpack_from("<II", self._buffer, 5)
        self._check_place(header, start, entries)
        exact, most = header.body_bytes(entries), header.body_limit_bytes(entries)
        if length < PLACE_BYTES or length > most or exact not in {None, length}:
            needs = f"needs {exact}" if exact is not None else f"needs at most {most}"
            raise PayloadRejected("slice", f"{length} bytes where its shape {needs}")
        body = self._take(5, length)
        if body is None:
            return False
        self._seen.add(start)
        self._keep(header, start, body)
        return True

    def _check_place(self, header: Header, start: int, entries: int) -> None:
        if not entries or header.slice_entries(start) != entries:
            raise PayloadRejected("slice", f"{entries} entries from {start} on, which is not where one may stand")
        if start in self._seen:
            raise PayloadRejected("slice", f"the one from entry {start} on comes twice")

    def _keep(self, header: Header, start: int, body: bytes) -> None:
        if start + header.slice_entries(start) > self.passed:
            self.slices[start] = decode_slice(header, self._positions, body, self._expectation.transform)

    def _read_trailer(self, header: Header) -> bool:
        size = 5 + FINAL_DIGEST_BYTES
        if len(self._buffer) < size:
            return False
        (slices,) = struct.unpack_from("<I", self._buffer, 1)
        if slices != len(self._seen) or slices != len(header.slice_starts()):
            raise PayloadRejected("trailer", f"{slices} slices announced, {len(self._seen)} came")
        self._digest.update(self._buffer[:5])
        if not hmac.compare_digest(self._digest.digest(), bytes(self._buffer[5:size])):
            raise PayloadRejected("trailer", "its digest does not match what came")
        del self._buffer[:size]
        self.complete = True
        return True

    def _take(self, head: int, length: int) -> bytes | None:
        """A record's content, once it is there whole with its digest, taken off the buffer and checked."""
        size = head + length + DIGEST_BYTES
        if len(self._buffer) < size:
            return None
        content = bytes(self._buffer[head : head + length])
        if hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest() != bytes(self._buffer[head + length : size]):
            raise PayloadRejected("digest", "a record is corrupt")
        self._digest.update(self._buffer[:size])
        del self._buffer[:size]
        return content

    def _check(self, header: Header) -> Header:
        expected = self._expectation
        if header.fingerprint != expected.fingerprint and header.own_tokens < header.tokens:
            raise WrongModel(header.fingerprint, expected.fingerprint)
        for field in ("tokenizer", "prefix"):
            if getattr(header, field) != getattr(expected, field):
                raise PayloadRejected(field, f"{getattr(header, field)}, this agent has {getattr(expected, field)}")
        shape, ours = header.shape, (expected.layers, expected.kv_heads, expected.head_dim)
        if (shape.layers, shape.kv_heads, shape.head_dim) != ours:
            raise PayloadRejected("shape", f"{(shape.layers, shape.kv_heads, shape.head_dim)}, this model has {ours}")
        known = expected.transform.id if expected.transform is not None else None
        if header.transform not in {None, known}:
            raise PayloadRejected("transform", f"{header.transform} is not known here (known: {known})")
        if header.refines != self._refines:
            raise PayloadRejected("refines", f"level {header.refines}; held here is {self._refines}")
        if header.tokens > expected.window_tokens:
            raise PayloadRejected("tokens", f"{header.tokens}, above the window of {expected.window_tokens}")
        if header.decoded_bytes() > expected.limit_bytes:
            raise PayloadRejected("size", f"{header.decoded_bytes()} bytes decoded, limit {expected.limit_bytes}")
        if any(token >= expected.vocabulary for token in header.ids()):
            raise PayloadRejected("token_ids", f"an id is outside the vocabulary of {expected.vocabulary}")
        return header


class BodyReader(PayloadReader):
    """Keeps the bodies of slices as they are, checked by their digests alone.

    refines: the level of a cache that is held and is to be refined; without, only what stands by itself is taken.
    """

    def __init__(self, expectation: Expectation, *, refines: int | None = None) -> None:
        super().__init__(expectation)
        self._refines = refines
        self._bodies: dict[int, bytes] = {}

    @property
    def bodies(self) -> tuple[bytes, ...]:
        """By their places, whatever the order in which they came."""
        return tuple(self._bodies[start] for start in sorted(self._bodies))

    def _keep(self, header: Header, start: int, body: bytes) -> None:  # noqa: ARG002
        self._bodies[start] = body


def decode(data: bytes, expectation: Expectation) -> tuple[Header, Cache | None]:
    """A whole payload at once. Raises PayloadRejected."""
    reader = PayloadReader(expectation)
    reader.feed(data)
    cache = reader.finish()
    if reader.header is None:  # finish() has refused that
        raise PayloadRejected("header", "missing")
    return reader.header, cache


def _parse_header(packed: bytes) -> Header:
    try:
        raw = msgpack.unpackb(packed, raw=False, strict_map_key=True)  # its limits default to the buffer's length
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise PayloadRejected("format_version", f"{version} is not known here (known: {FORMAT_VERSION})")
        header = msgspec.convert(raw, type=Header)
    except (ValueError, msgpack.UnpackException) as error:  # msgspec's and msgpack's errors are ValueErrors
        raise PayloadRejected("header", str(error)) from None
    _check_codec(header)
    _check_layers(header.shape)
    if not all(fact.content.isprintable() for fact in header.facts):
        raise PayloadRejected("facts", "hold a line break or a control character")
    if header.id_bytes not in (1, 2, 4) or len(header.token_ids) != header.tokens * header.id_bytes:
        reason = f"{len(header.token_ids)} bytes are not {header.tokens} ids of {header.id_bytes} bytes"
        raise PayloadRejected("token_ids", reason)
    if header.own_tokens > header.tokens:
        raise PayloadRejected("own_tokens", f"{header.own_tokens} of a context of {header.tokens} tokens")
    if header.kept is not None and (header.entries > header.tokens - header.own_tokens or not header.shape.sent_layers):
        raise PayloadRejected("kept", f"{header.entries} entries of {header.tokens - header.own_tokens}")
    return header


def _check_codec(header: Header) -> None:
    expected = len(header.shape.sent_layers) if header.codec == "affine" else 0
    if len(header.widths) != expected:
        raise PayloadRejected("widths", f"{len(header.widths)} where codec {header.codec} has {expected}")
    if {header.transform is not None, header.level is not None} != {header.codec == "klt"}:
        raise PayloadRejected("transform", f"{header.transform} at level {header.level} with codec {header.codec}")
    if header.refines is not None and (
        header.level is None or header.refines <= header.level or (header.refines - header.level) % 2
    ):
        raise PayloadRejected("refines", f"level {header.refines} by level {header.level}")


def _check_layers(shape: Shape) -> None:
    sent = shape.sent_layers
    if any(b <= a for a, b in itertools.pairwise(sent)) or any(not 0 <= i < shape.layers for i in sent):
        raise PayloadRejected("sent_layers", f"{sent} are not rising layers of {shape.layers}")
