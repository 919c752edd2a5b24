"""Hypothesis strategies out of the message types themselves: a new field or type is covered when it is declared."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect as kinds

from broker_config.topics import TOPICS, Topic

MAX_ITEMS = 3
MAX_TEXT = 40


def messages(topic: Topic[Any]) -> st.SearchStrategy[Any]:
    """Any message that may be published on a topic."""
    return st.one_of([_of(each) for each in message_types(topic)])


def message_types(topic: Topic[Any]) -> list[kinds.StructType]:
    """The struct types of a topic."""
    kind = kinds.type_info(topic.message)
    each = kind.types if isinstance(kind, kinds.UnionType) else (kind,)
    return [struct for struct in each if isinstance(struct, kinds.StructType)]


def any_topic_and_message() -> st.SearchStrategy[tuple[Topic[Any], Any]]:
    """A topic and a message of it."""
    return st.sampled_from(TOPICS).flatmap(lambda topic: st.tuples(st.just(topic), messages(topic)))


def _of(kind: kinds.Type) -> st.SearchStrategy[Any]:  # noqa: PLR0911  (one per kind)
    match kind:
        case kinds.Metadata():
            return _of(kind.type)
        case kinds.StructType():
            fields = {field.name: _of(field.type) for field in kind.fields}
            return st.fixed_dictionaries(fields).map(
                lambda values: msgspec.convert(values, kind.cls, from_attributes=True)
            )
        case kinds.UnionType():
            return st.one_of([_of(member) for member in kind.types])
        case kinds.StrType():
            return _text(kind)
        case kinds.BytesType():
            return st.binary(max_size=MAX_TEXT)
        case kinds.IntType():
            return st.integers(min_value=kind.ge, max_value=kind.le)
        case kinds.FloatType():
            low, high = (kind.ge if kind.ge is not None else kind.gt), kind.le
            return st.floats(min_value=low, max_value=high, exclude_min=kind.ge is None and kind.gt is not None)
        case kinds.VarTupleType():
            return st.lists(_of(kind.item_type), min_size=kind.min_length or 0, max_size=MAX_ITEMS).map(tuple)
        case kinds.LiteralType():
            return st.sampled_from(kind.values)
        case kinds.BoolType():
            return st.booleans()
        case kinds.NoneType():
            return st.none()
    raise NotImplementedError(f"no strategy for {kind}")


def _text(kind: kinds.StrType) -> st.SearchStrategy[str]:
    longest = min(kind.max_length or MAX_TEXT, MAX_TEXT)
    if kind.pattern is not None:
        return st.from_regex(kind.pattern).filter(lambda text: len(text) <= longest)
    return st.text(min_size=kind.min_length or 0, max_size=longest)
