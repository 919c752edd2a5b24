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
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from broker_config.messages import Stages
from coordinator.latency import Decision, Prediction, Scenario
from coordinator.numbers import Floats
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

    @cached_property
    def bit_s(self) -> Floats:
        """Seconds a bit, (K,), at the first rates."""
        rates = self.rates[:, 0]
        return np.divide(1.0, rates, out=np.zeros_like(rates), where=rates > 0)


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
    ladders = table.ladders_of([(decision.rung,) if decision.rung else () for decision in decisions])
    bits, encode_s, decode_s = ladders.coded(np.zeros(table.count, dtype=np.intp))
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
    carries, first_bits = sent > 0, first * course.token_bits
    text_s = _through(course, table.order_s, table.head_bits)
    ids_s = np.maximum(text_s, table.order_s + table.text_token_s * course.own)
    sending_s = np.maximum(begin_s, text_s)
    all_s = _through(course, sending_s, sent * course.token_bits)
    last_s = _through(course, made_s, first_bits)
    arrive_s = np.where(carries, np.maximum(all_s, last_s), ids_s) + table.back_s
    first_s = np.where(carries, _through(course, sending_s, first_bits) + table.back_s, arrive_s)
    prefill_s, decode_s = table.prefill_s(course.own), course.decode_s * sent
    at_once = np.where(carries, first / np.maximum(sent, 1.0), 1.0)
    works = _Works(
        first_s=np.array([np.minimum(first_s, arrive_s), text_s + table.back_s]),
        last_s=np.array([arrive_s, ids_s + table.back_s]),
        work_s=np.array([decode_s, prefill_s]),
        at_once=np.array([at_once, table.text_at_once(course.own)]),
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
        return np.asarray(start_s + bits * course.bit_s)
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
    """Work of links at their receivers, (2, K) decoding and prefill.

    at_once of it comes at the last moment, the rest evenly since the first.
    """

    first_s: Floats
    last_s: Floats
    work_s: Floats
    at_once: Floats


def _requests(table: Table, works: _Works) -> Floats:
    """E2E of each request: when its receiver has worked all that goes before it, and its question."""
    spread = works.last_s - works.first_s
    flows = spread > 0
    slope = np.divide(works.work_s * (1 - works.at_once), spread, out=np.zeros_like(spread), where=flows)
    jump = np.where(flows, works.work_s * works.at_once, works.work_s)
    moment = _by_member(table, works.last_s, works.first_s)
    constant = _by_member(table, jump + slope * works.last_s, -slope * works.first_s)
    slopes = _by_member(table, slope, -slope)
    moments = table.moments
    order = moments.order(-moment)
    moment = moment[order]
    ends_s = moment + moments.running(constant[order]) - moments.running(slopes[order]) * moment
    found = table.questions_s + table.last_s
    found[table.asked] += np.maximum.reduceat(ends_s, moments.starts)
    return found


def _by_member(table: Table, last: Floats, first: Floats) -> Floats:
    """What holds from the last moments of both works on, and from the first, for each member, (4 M,)."""
    return np.concatenate([last, first])[:, table.member_link].ravel()
