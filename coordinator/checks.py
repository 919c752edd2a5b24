"""What a person asks for, checked before it travels: on the other side, what is no valid message is dropped unread."""

from __future__ import annotations

import re

import msgspec

from broker_config.messages import Message
from broker_config.messages.base import AgentId
from coordinator.errors import RequestImpossible

_EMPTY = {
    "question": "the question is empty; ask something",
    "text": "the text is empty; there is nothing to hold",
    "sources": "it names no source; name at least one agent that holds a context",
}
_AGENT = "an agent's id is made of small letters, digits, '-' and '_', 32 at most"
_WRITTEN = {
    "receiver": _AGENT,
    "agent": _AGENT,
    "sources": "a source is written pi-1, or pi-1:report for one context of it",
    "policy": "a policy's name is made of small letters, digits, '-' and '_'",
    "rung": "a rung's name is made of small letters, digits, '.', '-' and '_', 32 at most",
    "name": "a context's name is made of letters, digits, '.', '-' and '_', 64 at most",
}


def check(message: Message) -> None:
    """Raises RequestImpossible if the other side would not take this for a valid message; its line says why."""
    try:
        msgspec.convert(msgspec.to_builtins(message), type(message), strict=True)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        field, _, index = where.rstrip("`]").partition("[")
        value = getattr(message, field, None)
        value = value[int(index)] if index and isinstance(value, tuple) else value
        if field in _EMPTY and not index and not value:
            raise RequestImpossible(_EMPTY[field]) from None
        if field in _WRITTEN and "regex" in what:
            raise RequestImpossible(f"{_WRITTEN[field]}, not {_shown(value)}") from None
        raise RequestImpossible(f"{field}: {what[:1].lower()}{what[1:]}, not {_shown(value)}") from None


def check_agent(agent: str) -> None:
    """Raises RequestImpossible if this can't be an agent's id."""
    try:
        msgspec.convert(agent, AgentId)
    except msgspec.ValidationError:
        raise RequestImpossible(f"{_AGENT}, not {_shown(agent)}") from None


def _shown(value: object) -> str:
    """A value for a line that a person reads."""
    text = str(value)
    if isinstance(value, tuple) or len(text) > 60:
        return f"{len(value) if isinstance(value, tuple) else len(text)}"
    return re.sub(r"\s", " ", text) or "nothing"
