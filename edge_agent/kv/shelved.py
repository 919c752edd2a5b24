"""A cache at rest: the slices of the payload that would carry it, coded at a rung."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from edge_agent.errors import PayloadRejected, RecipeInvalid
from edge_agent.kv import coded
from edge_agent.kv.cache import Cache, concatenate
from edge_agent.kv.header import PLACE_BYTES, Header
from edge_agent.kv.payload import decode_slice, in_order, pieces, slice_bodies, slice_place
from edge_agent.kv.reader import BodyReader, Expectation
from edge_agent.kv.recipe import Recipe, recipe
from edge_agent.kv.transform import Transform


@dataclass(frozen=True, eq=False)
class Shelved:
    """header: of a payload with the whole context, no token of which the receiver prefills. bodies: of its slices, by
    their places.
    """

    header: Header
    bodies: tuple[bytes, ...]

    @property
    def rung(self) -> str:
        return self.header.rung

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.bodies))


def shelve(header: Header, cache: Cache, transform: Transform | None) -> Shelved:
    """A cache, coded as the header says. Raises like payload.slice_bodies."""
    return Shelved(header, tuple(slice_bodies(header, cache, transform)))


def taken_down(shelved: Shelved, transform: Transform | None) -> Cache:
    """The cache that was put on the shelf, as its rung has left it."""
    header = shelved.header
    positions = header.positions()
    return concatenate([decode_slice(header, positions, body, transform) for body in shelved.bodies])


def nests(held: Recipe, wanted: Recipe) -> bool:
    """Whether a rung follows from another by shifting alone."""
    return (
        held.level is not None
        and wanted.level is not None
        and (held.eviction, wanted.eviction) == (None, None)
        and wanted.level >= held.level
        and (wanted.level - held.level) % 2 == 0
    )


def tightened(shelved: Shelved, wanted: Recipe, transform: Transform) -> Shelved:
    """The same at a coarser rung that nests in its own, slice by slice, without going back to floats.

    Raises RecipeInvalid for any other rung.
    """
    header = msgspec.structs.replace(shelved.header, rung=wanted.name, level=wanted.level)
    return Shelved(header, tuple(bodies_for(header, shelved, transform)))


def bodies_for(header: Header, shelved: Shelved, transform: Transform, *, last_first: bool = False) -> Iterator[bytes]:
    """The bodies of a payload with this header, out of a shelved cache in whose rung the header's nests.

    At most two of the shelf's slices are unpacked at a time. Raises RecipeInvalid for a rung that does not nest.
    """
    held, level = shelved.header, header.level
    if held.level is None or level is None or not nests(recipe(held.rung), recipe(header.rung)):
        raise RecipeInvalid(f"{header.rung} does not follow from {held.rung}")
    starts, unpacked = held.slice_starts(), dict[int, coded.Symbols]()
    for start, entries in in_order(header, last_first=last_first):
        first = header.own_tokens + start
        parts = []
        for number, (at, count) in enumerate(starts):
            if at + count <= first or at >= first + entries:
                unpacked.pop(number, None)
                continue
            if number not in unpacked:
                symbols = _unpacked(transform, held, shelved.bodies[number], count)
                unpacked[number] = coded.tightened(transform, symbols, held.level, level)
            parts.append((unpacked[number], max(0, first - at), min(count, first + entries - at)))
        yield slice_place(start, entries) + coded.pack(transform, level, coded.joined(parts))


def refinement(fine: Shelved, coarse: Recipe, transform: Transform) -> Iterator[bytes]:
    """A payload, piece by piece, of what a holder of the same cache at a coarser rung lacks.

    Raises RecipeInvalid for a rung that does not nest in the cache's, or is it.
    """
    level = fine.header.level
    if level is None or coarse.level is None or not nests(recipe(fine.rung), coarse) or coarse.level == level:
        raise RecipeInvalid(f"{fine.rung} does not refine {coarse.name}")
    header = msgspec.structs.replace(fine.header, refines=coarse.level)
    return pieces(header, _refinements(fine, level, coarse.level, transform))


def refined(coarse: Shelved, data: bytes, expectation: Expectation) -> Shelved:
    """The finer cache, of the one that is held and what `refinement` made. Raises PayloadRejected."""
    held, transform = coarse.header, expectation.transform
    header, bodies = _whole(data, expectation, refines=held.level)
    alike = msgspec.structs.replace(header, rung=held.rung, level=held.level, refines=None, facts=held.facts)
    if alike != held or transform is None or header.level is None or held.level is None:
        raise PayloadRejected("refines", "another cache than the one that is held")
    whole = []
    for (start, count), body, more in zip(header.slice_starts(), coarse.bodies, bodies, strict=True):
        symbols = _unpacked(transform, held, body, count)
        finer = coded.refined(transform, symbols, held.level, memoryview(more)[PLACE_BYTES:], header.level)
        whole.append(slice_place(start, count) + coded.pack(transform, header.level, finer))
    return Shelved(msgspec.structs.replace(header, refines=None), tuple(whole))


def as_payload(shelved: Shelved) -> bytes:
    """All of it, with digests."""
    return b"".join(pieces(shelved.header, shelved.bodies))


def from_payload(data: bytes, expectation: Expectation) -> Shelved:
    """What as_payload made. Raises PayloadRejected for damaged bytes, another model's, or a part of a context."""
    return Shelved(*_whole(data, expectation))


def _whole(data: bytes, expectation: Expectation, *, refines: int | None = None) -> tuple[Header, tuple[bytes, ...]]:
    """Header and bodies of a payload with a whole context."""
    reader = BodyReader(expectation, refines=refines)
    reader.feed(data)
    header = reader.header
    if header is None or not reader.complete:
        raise PayloadRejected("trailer", "missing")
    if header.own_tokens or not header.entries:
        raise PayloadRejected("own_tokens", "it is no whole cache")
    return header, reader.bodies


def _refinements(fine: Shelved, level: int, coarse_level: int, transform: Transform) -> Iterator[bytes]:
    for (start, count), body in zip(fine.header.slice_starts(), fine.bodies, strict=True):
        symbols = _unpacked(transform, fine.header, body, count)
        yield slice_place(start, count) + coded.pack_refinement(transform, symbols, level, coarse_level)


def _unpacked(transform: Transform, header: Header, body: bytes, entries: int) -> coded.Symbols:
    """A body's symbols."""
    wanted = dict.fromkeys(header.shape.sent_layers, entries)
    return coded.unpack(transform, header.level or 0, memoryview(body)[PLACE_BYTES:], wanted)
