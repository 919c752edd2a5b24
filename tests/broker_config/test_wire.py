"""Messages survive the wire, and nothing that arrives on it does harm."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker_config.errors import MessageRejected
from broker_config.messages import PROTOCOL_VERSION, Ack, Chunk, Message, Probe
from broker_config.topics import ACKS, BULK, PROBES, TELEMETRY, TOPICS, Topic
from broker_config.wire import pack, unpack
from tests.broker_config.strategies import any_topic_and_message, message_types

FORGIVING = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TRANSFER = "0123456789abcdef"


@given(any_topic_and_message())
@FORGIVING
def test_every_message_of_every_topic_survives_the_wire(topic_and_message: tuple[Topic[Any], Any]) -> None:
    topic, message = topic_and_message
    assert unpack(topic, pack(message)) == message


def _all_messages(kind: type[Message]) -> set[type[Message]]:
    return {kind, *(deeper for each in kind.__subclasses__() for deeper in _all_messages(each))}


def test_every_message_type_is_on_a_topic() -> None:
    on_topics = {struct.cls for topic in TOPICS for struct in message_types(topic)}
    assert on_topics == _all_messages(Message) - {Message}


def _assert_valid_or_rejected(topic: Topic[Any], payload: bytes) -> None:
    line = ""
    try:
        assert isinstance(unpack(topic, payload), Message)
    except MessageRejected as rejected:
        line = str(rejected)
    assert not line or (topic.pattern in line and "\n" not in line)


@given(st.sampled_from(TOPICS), st.binary(max_size=400))
@FORGIVING
def test_random_bytes_are_rejected_or_valid_but_never_crash(topic: Topic[Any], payload: bytes) -> None:
    _assert_valid_or_rejected(topic, payload)


@given(any_topic_and_message(), st.data())
@FORGIVING
def test_flipped_bits_are_rejected_or_valid_but_never_crash(
    topic_and_message: tuple[Topic[Any], Any], data: st.DataObject
) -> None:
    topic, message = topic_and_message
    payload = bytearray(pack(message))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    _assert_valid_or_rejected(topic, bytes(payload))


@given(any_topic_and_message(), st.data())
@FORGIVING
def test_a_message_cut_short_is_rejected(topic_and_message: tuple[Topic[Any], Any], data: st.DataObject) -> None:
    topic, message = topic_and_message
    payload = pack(message)
    with pytest.raises(MessageRejected):
        unpack(topic, payload[: data.draw(st.integers(0, len(payload) - 1))])


def _chunk(**changes: Any) -> bytes:
    content = {"type": "chunk", "version": 1, "transfer": TRANSFER, "index": 0, "crc32": 0, "data": b""} | changes
    packed: bytes = msgpack.packb(content)
    return packed


@pytest.mark.parametrize(
    ("payload", "says"),
    [
        (_chunk(index=-1), "field index"),
        (_chunk(index="0"), "field index: Expected `int`, got `str`"),
        (_chunk(data="AAAA"), "field data: Expected `bytes`, got `str`"),
        (_chunk(transfer="0123456789abcdef\n"), "field transfer"),
        (_chunk(transfer="../../etc/passwd"), "field transfer"),
        (_chunk(data=b"x" * 262_145), "field data"),
        (_chunk(type="order"), "field type"),
        (_chunk(version=PROTOCOL_VERSION + 1), f"protocol version {PROTOCOL_VERSION + 1}"),
        (_chunk(version=True), "field version"),
        (msgpack.packb({"type": "chunk"}), "transfer"),
        (msgpack.packb([1, 2]), "Expected `object`, got `array`"),
        (msgpack.packb({1: 2}), "no valid MessagePack"),
        (b"\x91" * 2_000, "no valid MessagePack"),
        (b"\xdd\xff\xff\xff\xff", "no valid MessagePack"),
        (b"", "no valid MessagePack"),
        (b"\xc7\x10\x01" + b"x" * 16, "no valid MessagePack"),
        (b"\x80\x04\x95.", "no valid MessagePack"),
    ],
)
def test_what_is_wrong_is_said_on_one_line(payload: bytes, says: str) -> None:
    with pytest.raises(MessageRejected) as caught:
        unpack(BULK, payload)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_payload_above_the_limit_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(msgpack, "unpackb", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(MessageRejected, match=f"{BULK.max_bytes + 1} bytes, {BULK.max_bytes} are allowed"):
        unpack(BULK, b"x" * (BULK.max_bytes + 1))


def test_unknown_later_fields_are_ignored() -> None:
    assert unpack(ACKS, msgpack.packb(msgspec.to_builtins(_ack()) | {"colour": "red"})) == _ack()


def test_a_not_a_number_is_rejected() -> None:
    nan = msgpack.packb({"type": "telemetry", "uptime_s": float("nan")})
    with pytest.raises(MessageRejected):
        unpack(TELEMETRY, nan)


def test_the_largest_chunk_and_probe_fit_their_topics() -> None:
    full = bytes(262_144)
    chunk = Chunk(transfer=TRANSFER, index=2**24, crc32=2**32 - 1, data=full, last=True)
    assert unpack(BULK, pack(chunk)) == chunk
    assert unpack(PROBES, pack(Probe(sequence=2**40, padding=full))).padding == full


def _ack() -> Ack:
    return Ack(transfer=TRANSFER, receiver="pi-2", next_index=3, missing=(4, 5))
