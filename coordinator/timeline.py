"""What becomes of decisions: the one evaluator of every policy, over all links at once (see `coordinator.latency`).

Of each link's cache, slices of c tokens go through sender, link and receiver one behind the other, so that stages
overlap but for a slice (without slices c is all that is sent, and nothing overlaps):

    begin   the sender has made the first slice; header and ids have gone before it
    arrive  the later of: all bits are through from `begin` on; the last slice is made and through

A receiver is one server that never rests while there is work. It ends at the largest, over all moments t, of t + the
work that comes at t or later. Work is prefill, which comes with the ids, and decoding, which comes evenly between a
link's first slice and its last; so the largest is found at one of these moments. Of several requests at one receiver
those with the earlier deadline go first, and the questions of those before count in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from broker_config.messages import Stages
from coordinator.ladders import Ladders
from coordinator.latency import Decision, Prediction, Scenario
from coordinator.numbers import Floats, Ints
from coordinator.table import Table


@dataclass(frozen=True)
class Course:
    """What is decided, as columns (K,). own: tokens the receiver prefills; token_bits: of an entry at the link's rung.

    encode_s, decode_s: seconds a token; rates: (K, S) bits per second from steps_s (S,) on, 0: instant.
    """

    own: Floats
    token_bits: Floats
    encode_s: Floats
    decode_s: Floats
    rates: Floats
    steps_s: Floats = field(default_factory=lambda: np.zeros(1))


@dataclass(frozen=True)
class Timeline:
    """Seconds from acceptance on, by link (K,), and by request."""

    sender_prefill_s: Floats
    encode_s: Floats
    transfer_s: Floats
    decode_s: Floats
    receiver_prefill_s: Floats
    arrive_s: Floats
    request_e2e_s: Floats

    @property
    def e2e_s(self) -> float:
        """Of the round."""
        return float(self.request_e2e_s.max(initial=0.0))


def evaluate(scenario: Scenario, decisions: Sequence[Decision]) -> Prediction:
    """The seconds of every stage, link and request under these decisions, one per link of the scenario.

    Raises ValueError if entries are to travel and no rung is named to carry them.
    """
    for link, decision in zip(scenario.links, decisions, strict=True):
        if decision.own_tokens < link.tokens and decision.rung is None:
            left = link.tokens - decision.own_tokens
            raise ValueError(f"{link.sender}:{link.context} needs a rung for {left} tokens of cache")
    table = Table(scenario)
    return predicted(table, timeline(table, course_of(table, decisions)))


def course_of(table: Table, decisions: Sequence[Decision]) -> Course:
    """Decisions as columns."""
    pairs = list(zip(table.scenario.links, decisions, strict=True))
    alone = [replace(link, rungs=(decision.rung,) if decision.rung else ()) for link, decision in pairs]
    bits, encode_s, decode_s = Ladders(alone).coded(np.zeros(table.count, dtype=np.intp))
    steps = sorted({0.0, *(at for decision in decisions for at, _ in decision.later)})
    rates = np.array([_rates(decision, steps) for decision in decisions]).reshape(table.count, len(steps))
    return Course(
        own=np.array([float(decision.own_tokens) for decision in decisions]),
        token_bits=bits,
        encode_s=encode_s,
        decode_s=decode_s,
        rates=rates,
        steps_s=np.array(steps),
    )


def _rates(decision: Decision, steps: Sequence[float]) -> list[float]:
    found, rate, later = [], decision.rate_bps, dict(decision.later)
    for at in steps:
        rate = later.get(at, rate)
        found.append(rate)
    return found


def timeline(table: Table, course: Course) -> Timeline:
    """The course of a round."""
    sent, first, produce_s, encode_s, begin_s, made_s = table.making(course.own, course.encode_s)
    carries = sent > 0
    text_s = _through(course, table.order_s, table.head_bits)
    ids_s = np.maximum(text_s, table.order_s + table.text_token_s * course.own)
    sending_s = np.maximum(begin_s, text_s)
    all_s = _through(course, sending_s, sent * course.token_bits)
    last_s = _through(course, made_s, first * course.token_bits)
    arrive_s = np.where(carries, np.maximum(all_s, last_s), ids_s) + table.back_s
    first_s = np.where(carries, _through(course, sending_s, first * course.token_bits) + table.back_s, arrive_s)
    prefill_s, decode_s = table.prefill_s(course.own), course.decode_s * sent
    at_once = np.where(carries, first / np.maximum(sent, 1.0), 1.0)
    works = (
        _Works(np.minimum(first_s, arrive_s), arrive_s, decode_s, at_once),
        _Works(text_s + table.back_s, ids_s + table.back_s, prefill_s, table.text_at_once(course.own)),
    )
    return Timeline(
        sender_prefill_s=produce_s,
        encode_s=encode_s,
        transfer_s=np.maximum(arrive_s - np.where(carries, begin_s - table.order_s, 0.0), 0.0),
        decode_s=decode_s,
        receiver_prefill_s=prefill_s,
        arrive_s=arrive_s,
        request_e2e_s=_requests(table, works),
    )


def predicted(table: Table, found: Timeline) -> Prediction:
    """A timeline as a value."""
    columns = (found.sender_prefill_s, found.encode_s, found.transfer_s, found.decode_s, found.receiver_prefill_s)
    return Prediction(
        stages=tuple(
            Stages(sender_prefill_s=made, encode_s=encoded, transfer_s=sent, decode_s=decoded, receiver_prefill_s=read)
            for made, encoded, sent, decoded, read in zip(*(each.tolist() for each in columns), strict=True)
        ),
        arrive_s=tuple(found.arrive_s.tolist()),
        question_s=tuple(table.question_s.tolist()),
        request_e2e_s=tuple(found.request_e2e_s.tolist()),
        e2e_s=found.e2e_s,
    )


def _through(course: Course, start_s: Floats, bits: Floats) -> Floats:
    """When so many bits are through from a start on, at the rates of each link; a rate of 0 takes no time."""
    rates, steps_s = course.rates, course.steps_s
    if len(steps_s) == 1:
        return start_s + np.divide(bits, rates[:, 0], out=np.zeros_like(bits), where=rates[:, 0] > 0)
    at_s, left = start_s.copy(), bits.copy()
    for step, ends_s in enumerate([*steps_s[1:], np.inf]):
        rate = rates[:, step]
        room = np.maximum(ends_s - at_s, 0.0)
        takes_s = np.divide(left, rate, out=np.zeros_like(left), where=rate > 0)
        runs_s = np.minimum(takes_s, room)
        left = np.maximum(left - runs_s * rate, 0.0) * (takes_s > room)
        at_s = at_s + runs_s
    return at_s


@dataclass(frozen=True)
class _Works:
    """Work of links at their receivers: at_once of it comes at the last moment, the rest evenly since the first."""

    first_s: Floats
    last_s: Floats
    work_s: Floats
    at_once: Floats


def _requests(table: Table, works: tuple[_Works, ...]) -> Floats:
    """E2E of each request: when its receiver has worked all that goes before it, and its question."""
    member = table.member_link
    first_s, last_s, work_s, at_once = (
        np.concatenate([getattr(each, name)[member] for each in works])
        for name in ("first_s", "last_s", "work_s", "at_once")
    )
    request = np.concatenate([table.member_request] * len(works))
    spread = last_s - first_s
    flows = spread > 0
    slope = np.divide(work_s * (1 - at_once), spread, out=np.zeros_like(work_s), where=flows)
    jump = np.where(flows, work_s * at_once, work_s)
    moment = np.concatenate([last_s, first_s])
    owner = np.concatenate([request, request])
    constant = np.concatenate([jump + slope * last_s, -slope * first_s])
    slopes = np.concatenate([slope, -slope])
    order = np.lexsort((-moment, owner))
    moment, owner = moment[order], owner[order]
    constant, slopes = _running(constant[order], owner), _running(slopes[order], owner)
    ends_s = moment + constant - slopes * moment
    found = np.zeros(len(table.question_s))
    np.maximum.at(found, owner, ends_s)
    return found + table.questions_s + table.last_s


def _running(values: Floats, owner: Ints) -> Floats:
    """Running sums that begin anew with each owner."""
    upto = np.cumsum(values)
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    base = np.repeat(upto[starts] - values[starts], np.diff(np.append(starts, len(owner))))
    return np.asarray(upto - base)
