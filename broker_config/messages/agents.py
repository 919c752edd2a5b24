"""What an agent tells of itself: presence (retained, with a will) and telemetry (every second)."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal

from msgspec import Meta, Struct

from broker_config.messages.base import (
    PROTOCOL_VERSION,
    AgentId,
    BitsPerSecond,
    Bytes,
    Count,
    Digest,
    Fraction,
    Id,
    Message,
    Name,
    Nats,
    PerSecond,
    Reason,
    RungName,
    Seconds,
    Tokens,
)

CodecFamily = Annotated[str, Meta(pattern=r"^[a-z]{1,16}\Z", title="family of codecs")]
SecondsPerToken2 = Annotated[float, Meta(ge=0, le=1e3, title="seconds per token squared")]

_FAMILIES = {"qkvcomm": "mix", "klmix": "mix"}


@lru_cache(maxsize=1_024)
def codec_family(rung: str) -> CodecFamily:
    """What rungs that take like time to code have in common: float, fp, q, mix or klt, by the letters of the name."""
    letters = rung[: next((at for at, letter in enumerate(rung) if not letter.isalpha()), len(rung))][:16].lower()
    return _FAMILIES.get(letters, letters)


class Rung(Struct, frozen=True, kw_only=True):
    """One step of a model's ladder, measured when the bundle was made.

    bits_per_element counts every header and scale byte; kl is the mean KL divergence in nats along the uncompressed
    answer; agreement is the share of answer positions with the same argmax. transformed: receivers need the sender's
    transform to decode it.
    """

    name: RungName
    bits_per_element: Annotated[float, Meta(gt=0, le=64)]
    kl: Nats
    agreement: Fraction
    transformed: bool = False


class ModelInfo(Struct, frozen=True, kw_only=True):
    """The model an agent runs. Equal fingerprints exchange caches; equal tokenizers exchange token ids.

    transform: the id of the one by which it codes caches. baselines: rungs that are used only if they are named.
    """

    name: Annotated[str, Meta(max_length=128)]
    fingerprint: Digest
    tokenizer: Digest
    prefix: Digest
    weight_precision: Annotated[str, Meta(max_length=16)]
    elements_per_token: Annotated[int, Meta(ge=1, le=2**24)]
    bytes_per_token_id: Annotated[int, Meta(ge=1, le=4)]
    window_tokens: Tokens
    transform: Digest | None = None
    ladder: Annotated[tuple[Rung, ...], Meta(min_length=1, max_length=64)]
    baselines: Annotated[tuple[Rung, ...], Meta(max_length=64)] = ()


class Presence(Message, frozen=True, kw_only=True, tag="presence"):
    """Retained: online with what the agent runs, or offline (said by itself, or by its will).

    protocol: the newest version that it understands.
    """

    agent: AgentId
    instance: Id
    state: Literal["online", "offline"]
    model: ModelInfo | None = None
    software: Annotated[str, Meta(max_length=32)] = ""
    protocol: Annotated[int, Meta(ge=1, le=2**16)] = PROTOCOL_VERSION


class Memory(Struct, frozen=True, kw_only=True):
    """Memory of a device. pressure is the largest of the three terms that design names."""

    pressure: Fraction
    cache_bytes: Bytes
    cache_budget_bytes: Bytes
    available_bytes: Bytes
    total_bytes: Bytes
    resident_bytes: Bytes
    stalled_share: Fraction | None = None


Strain = Literal["undervoltage", "frequency-capped", "throttled", "soft-temperature-limit", "over-current"]
"""What holds a board back, in the words of its firmware."""


class Health(Struct, frozen=True, kw_only=True):
    """How a device bears its work. now: what holds it back; earlier: what did since its start, but not now.

    temperature_c: of the hottest sensor, in °C.
    """

    temperature_c: Annotated[float, Meta(ge=-100, le=200)] | None = None
    now: Annotated[tuple[Strain, ...], Meta(max_length=8)] = ()
    earlier: Annotated[tuple[Strain, ...], Meta(max_length=8)] = ()


class LinkQuality(Struct, frozen=True, kw_only=True):
    """An agent's access link to the broker, as measured by itself. None: not measured yet."""

    round_trip_s: Seconds | None = None
    uplink_bps: BitsPerSecond | None = None
    downlink_bps: BitsPerSecond | None = None
    signal_dbm: Annotated[float, Meta(ge=-200, le=50)] | None = None


class CodecSpeed(Struct, frozen=True, kw_only=True):
    """How fast an agent codes cache elements at the rungs of one family."""

    codec: CodecFamily
    encode_elements_per_s: PerSecond
    decode_elements_per_s: PerSecond


class Speed(Struct, frozen=True, kw_only=True):
    """What an agent has learned of its own speed.

    A prefill of n tokens behind m takes prefill_fixed_s + n / prefill_tps + prefill_s_per_token2 · (n² + 2·n·m); the
    prompt's prefix, which always stands in front, is not counted in m. codecs: what is known of families of rungs;
    encode_elements_per_s and decode_elements_per_s hold for all others.
    """

    prefill_fixed_s: Seconds
    prefill_tps: PerSecond
    prefill_s_per_token2: SecondsPerToken2 = 0.0
    decode_tps: PerSecond
    encode_elements_per_s: PerSecond
    decode_elements_per_s: PerSecond
    codecs: Annotated[tuple[CodecSpeed, ...], Meta(max_length=16)] = ()


class ContextInfo(Struct, frozen=True, kw_only=True):
    """A context an agent holds: always its text, and, while cached, its KV cache.

    rung: at which the cache is kept, in memory (cache_bytes of it) or on disk. ready: rungs, of the ladder and beside
    it, that it can be sent at as it is; None: all.
    """

    context_id: Digest
    name: Name
    tokens: Tokens
    cached: bool
    cache_bytes: Bytes
    rung: RungName | None = None
    ready: Annotated[tuple[RungName, ...], Meta(max_length=128)] | None = None


class SendProgress(Struct, frozen=True, kw_only=True):
    """A transfer that an agent is sending. moved_bytes of its payload were acknowledged by the receiver.

    goodput_bps: how fast it moves, if nothing but the network (and its pace) held it back just now; None: not known.
    """

    transfer: Id
    moved_bytes: Bytes
    goodput_bps: BitsPerSecond | None = None


class Telemetry(Message, frozen=True, kw_only=True, tag="telemetry"):
    """Every second, retained, so that a coordinator that starts late knows the fleet at once."""

    agent: AgentId
    instance: Id
    sequence: Count
    uptime_s: Seconds
    memory: Memory
    link: LinkQuality
    speed: Speed | None
    contexts: Annotated[tuple[ContextInfo, ...], Meta(max_length=4_096)] = ()
    sending: Annotated[tuple[SendProgress, ...], Meta(max_length=64)] = ()
    queued: Count = 0
    note: Reason = ""
    health: Health | None = None
