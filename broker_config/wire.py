"""Messages to bytes and back: MessagePack on the wire, validated types in the program.

Bytes from the bus are a stranger's until `unpack` has returned. They are bounded before they are parsed, and whatever
is wrong with them ends in one error, MessageRejected, on one line.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack
import msgspec

from broker_config.errors import MessageRejected
from broker_config.messages import PROTOCOL_VERSION, Message
from broker_config.topics import Topic

M = TypeVar("M")

_LONGEST_REASON = 240


def pack(message: Message) -> bytes:
    """The bytes of a message: one MessagePack map, its type in the field `type`, binary fields unencoded."""
    packed: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)), use_bin_type=True)
    return packed


def unpack(topic: Topic[M], payload: bytes | bytearray | memoryview) -> M:
    """The message that arrived on a topic.

    payload is not looked at if it is longer than topic.max_bytes. Raises MessageRejected, which names the topic's
    pattern and the field, for anything that is not a valid message of the topic's type in a version known here.
    """
    if len(payload) > topic.max_bytes:
        raise MessageRejected(topic.pattern, f"{len(payload)} bytes, {topic.max_bytes} are allowed")
    content = _parse(topic, payload)
    _check_version(topic, content)
    try:
        message: M = msgspec.convert(content, topic.message, strict=True, builtin_types=(bytes,))
    except (msgspec.ValidationError, RecursionError) as error:
        raise MessageRejected(topic.pattern, _one_line(error)) from None
    return message


def _parse(topic: Topic[Any], payload: bytes | bytearray | memoryview) -> object:
    """Objects out of MessagePack; every length limit follows from topic.max_bytes. Raises MessageRejected."""
    limit = topic.max_bytes
    try:
        content: object = msgpack.unpackb(
            payload,
            raw=False,
            strict_map_key=True,
            max_str_len=limit,
            max_bin_len=limit,
            max_array_len=limit,
            max_map_len=limit // 2,
            max_ext_len=0,
        )
    # msgpack documents that unpackb may raise several kinds; all say the same here: these bytes are no message.
    except (ValueError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise MessageRejected(topic.pattern, f"no valid MessagePack: {_one_line(error)}") from None
    return content


def _check_version(topic: Topic[Any], content: object) -> None:
    """A newer sender is told apart from a broken one. Raises MessageRejected that names both versions."""
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > PROTOCOL_VERSION:
        raise MessageRejected(
            topic.pattern, f"protocol version {version}, this program speaks {PROTOCOL_VERSION}: update it"
        )


def _one_line(error: Exception) -> str:
    """What the libraries say, without line breaks, cut short, and with the field where people look for it."""
    text = " ".join(str(error).split()) or type(error).__name__
    what, separator, where = text.rpartition(" - at `$")
    if separator:
        text = f"field {where.rstrip('`').lstrip('.') or '(whole message)'}: {what}"
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 1] + "…"
