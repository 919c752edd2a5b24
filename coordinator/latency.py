"""The E2E latency model: one evaluator for every policy (design, "E2E"; methods, section 2).

A link carries a context of n tokens. The receiver prefills the first p of them itself (p = n: the token medium; p = 0:
the cache medium; between them: split); the other n-p travel as cache entries of E elements a token, at a rung of so
many bits an element.

    bits      8·header + 8·p·bytes_per_token_id + (n-p)·E·bits_per_element
    ready     ½·rtt_sender, then, if p < n, the sender's work: prefill of n tokens (nothing if cached) and encoding of
              (n-p)·E elements. A sender with several links works them one after another, in the order of the scenario.
    prefill   of n tokens behind m: prefill_fixed + n / prefill_tps + prefill_s_per_token2 · (n² + 2nm), on either side
    coding    elements / rate of the rung's family of codecs; a cache that is kept coded at the rung itself goes as it
              is, one kept at another coded rung is decoded first
    transfer  bits / rate, and ½·(rtt_sender + rtt_receiver) for payload and acknowledgement. Token ids are at hand from
              the start: in a split, header and ids go first, the cache follows once it is ready.
    receiver  one compute resource, which works one thing after another in order of arrival: prefill of p tokens once
              the ids are there, decoding of (n-p)·E elements once the cache is there, and, when the last part of a
              request is done, that request's question.
    E2E       prefill of the question behind its contexts, ½·rtt_receiver for the first answer token, and what the
              receiver was learned to need beside all this (bus, threads, joining).

The E2E of a round is the largest of its requests. Rates are constant for the whole of a transfer. A link that was not
measured (rate 0) counts as instant and an agent that was not measured as infinitely fast; `Scenario.known` says so.
Not modelled: an agent that is sender and receiver in the same round is counted as two.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from broker_config.messages import CodecSpeed, Rung, Speed, Stages, codec_family

HEADER_BYTES = 600
"""Header, slice digests and trailer of a payload, whatever it carries."""
EXACT_RUNG = "float32"
"""At which a cache is kept that was never coded."""
TIE_FRACTION = 0.10
"""Two E2E this close are one for the planner: it is below the model's own prediction error."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One context on its way to one receiver, as a policy sees it.

    request indexes Scenario.requests. link_bps 0 means not measured; channels are (name, bits per second alone on it),
    one passed twice comes twice. rungs are those the quality floor and the memory of both ends allow, from tightest to
    most faithful; if there are none, note says why, and the link goes as tokens. reference is the ladder's most
    faithful rung, which names the (lossless) token medium in orders and reports. kept: the rung at which the sender
    keeps the cache. receiver_overhead_s comes once per request.
    """

    request: int
    sender: str
    receiver: str
    context: str
    context_id: str
    tokens: int
    elements_per_token: int
    bytes_per_token_id: int
    cached: bool
    reference: Rung
    sender_speed: Speed | None
    receiver_speed: Speed | None
    sender_rtt_s: float = 0.0
    receiver_rtt_s: float = 0.0
    link_bps: float = 0.0
    channels: tuple[tuple[str, float], ...] = ()
    rungs: tuple[Rung, ...] = ()
    sender_pressure: float = 0.0
    receiver_pressure: float = 0.0
    note: str = ""
    kept: str | None = None
    receiver_overhead_s: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether its rate is known."""
        return self.link_bps > 0 and bool(self.channels)

    @property
    def may_cache(self) -> bool:
        """Whether the cache medium is open to it; the token medium always is."""
        return bool(self.rungs) and self.measured and self.known and self.tokens > 0

    @property
    def known(self) -> bool:
        """Whether the prediction rests on measurements only."""
        return self.measured and usable(self.sender_speed) and usable(self.receiver_speed)


@dataclass(frozen=True, kw_only=True)
class RequestTerms:
    """What a policy needs to know of a request."""

    request: str
    receiver: str
    question_tokens: int
    deadline_s: float | None = None
    quality_floor: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """All that a policy may look at. airtime_free is what transfers in flight leave of a channel (1 if not named)."""

    requests: tuple[RequestTerms, ...]
    links: tuple[Link, ...]
    airtime_free: Mapping[str, float] = field(default_factory=dict)
    header_bytes: int = HEADER_BYTES
    tie_fraction: float = TIE_FRACTION

    @property
    def known(self) -> bool:
        """Whether everything that the prediction rests on was measured."""
        return all(link.known for link in self.links)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What is decided of one link. rung may be None when no cache travels; rate_bps 0 is unpaced (not measured)."""

    own_tokens: int
    rung: Rung | None
    rate_bps: float


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Per link: stages, when its last bit is at the receiver, when it is worked. Per request: question and E2E seconds.

    The stages of a link add up to done_s where it waits for nobody. e2e_s is that of the round.
    """

    stages: tuple[Stages, ...]
    arrive_s: tuple[float, ...]
    done_s: tuple[float, ...]
    question_s: tuple[float, ...]
    request_e2e_s: tuple[float, ...]
    e2e_s: float


class _Job(NamedTuple):
    arrive_s: float
    link: int
    cache: bool
    work_s: float


def usable(speed: Speed | None) -> bool:
    """Whether a speed was measured in all that the model divides by."""
    return speed is not None and min(speed.prefill_tps, speed.encode_elements_per_s, speed.decode_elements_per_s) > 0


def prefill_s(speed: Speed | None, tokens: int, behind: int = 0) -> float:
    """Seconds to prefill so many tokens behind so many; 0 for none, or for an agent that was not measured."""
    if speed is None or tokens <= 0 or speed.prefill_tps <= 0:
        return 0.0
    attended = tokens * (tokens + 2.0 * behind)
    return speed.prefill_fixed_s + tokens / speed.prefill_tps + speed.prefill_s_per_token2 * attended


def encode_s(speed: Speed | None, elements: int, rung_name: str | None = None, kept: str | None = None) -> float:
    """Seconds to encode so many cache elements at a rung, out of what is kept at another; 0 where not measured.

    Nothing, if that is the same coded one; floats are packed in any case.
    """
    kept = None if kept == EXACT_RUNG else kept
    if speed is None or (kept is not None and kept == rung_name):
        return 0.0
    codec = _codec(speed, rung_name)
    rate = codec.encode_elements_per_s if codec else speed.encode_elements_per_s
    again_s = decode_s(speed, elements, kept) if kept is not None else 0.0
    return (elements / rate if rate > 0 else 0.0) + again_s


def decode_s(speed: Speed | None, elements: int, rung_name: str | None = None) -> float:
    """Seconds to decode so many cache elements of a rung; 0 where not measured."""
    if speed is None:
        return 0.0
    codec = _codec(speed, rung_name)
    rate = codec.decode_elements_per_s if codec else speed.decode_elements_per_s
    return elements / rate if rate > 0 else 0.0


def _codec(speed: Speed, rung_name: str | None) -> CodecSpeed | None:
    """What was measured of a rung's family."""
    family = codec_family(rung_name) if rung_name else None
    return next(
        (
            codec
            for codec in speed.codecs
            if codec.codec == family and min(codec.encode_elements_per_s, codec.decode_elements_per_s) > 0
        ),
        None,
    )


def ids_bits(link: Link, own_tokens: int, header_bytes: int) -> float:
    """Bits of the header and of the ids of the tokens that the receiver computes itself."""
    return 8.0 * (header_bytes + own_tokens * link.bytes_per_token_id)


def cache_bits(link: Link, own_tokens: int, rung: Rung | None) -> float:
    """Bits of the cache entries of the other tokens. Raises ValueError if there are some and no rung to carry them."""
    elements = (link.tokens - own_tokens) * link.elements_per_token
    if elements and rung is None:
        raise ValueError(f"{link.sender}:{link.context} needs a rung for {link.tokens - own_tokens} tokens of cache")
    return elements * rung.bits_per_element if rung else 0.0


def payload_bytes(link: Link, own_tokens: int, rung: Rung | None, header_bytes: int = HEADER_BYTES) -> int:
    """What the model expects a payload to measure."""
    return math.ceil((ids_bits(link, own_tokens, header_bytes) + cache_bits(link, own_tokens, rung)) / 8)


def question_s(scenario: Scenario, request: int) -> float:
    """Seconds the receiver prefills the question of a request, behind its contexts."""
    links = [link for link in scenario.links if link.request == request]
    behind = sum(link.tokens for link in links)
    return prefill_s(links[0].receiver_speed if links else None, scenario.requests[request].question_tokens, behind)


def evaluate(scenario: Scenario, decisions: Sequence[Decision]) -> Prediction:
    """The seconds of every stage, link and request under these decisions, one per link of the scenario."""
    jobs: dict[str, list[_Job]] = defaultdict(list)
    sender_free_s: dict[str, float] = {}
    stages: list[Stages] = []
    arrive_s: list[float] = []
    for index, (link, decision) in enumerate(zip(scenario.links, decisions, strict=True)):
        own, cached_tokens = decision.own_tokens, link.tokens - decision.own_tokens
        text_ready_s = link.sender_rtt_s / 2
        back_s = (link.sender_rtt_s + link.receiver_rtt_s) / 2
        first_s = _seconds(ids_bits(link, own, scenario.header_bytes), decision.rate_bps)
        rest_s = _seconds(cache_bits(link, own, decision.rung), decision.rate_bps)
        elements, rung_name = cached_tokens * link.elements_per_token, decision.rung.name if decision.rung else None
        stage = Stages(
            sender_prefill_s=prefill_s(link.sender_speed, link.tokens) if cached_tokens and not link.cached else 0.0,
            encode_s=encode_s(link.sender_speed, elements, rung_name, link.kept if link.cached else None),
            transfer_s=text_ready_s + first_s + rest_s + back_s,
            decode_s=decode_s(link.receiver_speed, elements, rung_name),
            receiver_prefill_s=prefill_s(link.receiver_speed, own),
        )
        arrival_s = text_ready_s + first_s + back_s
        if own:
            jobs[link.receiver].append(_Job(arrival_s, index, False, stage.receiver_prefill_s))
        if cached_tokens:
            ready_s = sender_free_s.get(link.sender, text_ready_s) + stage.sender_prefill_s + stage.encode_s
            sender_free_s[link.sender] = ready_s
            begin_s = max(ready_s, text_ready_s + first_s) if own else ready_s + first_s
            arrival_s = begin_s + rest_s + back_s
        if cached_tokens or not own:
            jobs[link.receiver].append(_Job(arrival_s, index, True, stage.decode_s))
        stages.append(stage)
        arrive_s.append(arrival_s)
    return _work(scenario, jobs, stages, arrive_s)


def _seconds(bits: float, rate_bps: float) -> float:
    return bits / rate_bps if rate_bps > 0 else 0.0


def _work(
    scenario: Scenario, jobs: Mapping[str, list[_Job]], stages: list[Stages], arrive_s: list[float]
) -> Prediction:
    """Every receiver works its jobs in order of arrival, and each question right after the last part of its request."""
    done_s = [0.0] * len(scenario.links)
    questions_s = [question_s(scenario, request) for request in range(len(scenario.requests))]
    e2e_s = [0.0] * len(scenario.requests)
    for of_receiver in jobs.values():
        left: dict[int, int] = defaultdict(int)
        for job in of_receiver:
            left[scenario.links[job.link].request] += 1
        free_s = 0.0
        for job in sorted(of_receiver):
            link = scenario.links[job.link]
            free_s = done_s[job.link] = max(free_s, job.arrive_s) + job.work_s
            left[link.request] -= 1
            if not left[link.request]:
                free_s += questions_s[link.request]
                e2e_s[link.request] = free_s + link.receiver_rtt_s / 2 + link.receiver_overhead_s
    return Prediction(
        stages=tuple(stages),
        arrive_s=tuple(arrive_s),
        done_s=tuple(done_s),
        question_s=tuple(questions_s),
        request_e2e_s=tuple(e2e_s),
        e2e_s=max(e2e_s, default=0.0),
    )
