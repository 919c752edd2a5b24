"""The topic tree."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.topics import BULK, TOPICS, Topic

LEVELS = st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True)


def _shape(topic: Topic[Any]) -> str:
    return re.sub(r"{\w+}", "{}", topic.pattern)


def test_every_topic_is_declared_once() -> None:
    assert len({_shape(topic) for topic in TOPICS}) == len(TOPICS)


def test_bulk_is_never_retained() -> None:
    assert not any(topic.retain for topic in TOPICS if topic.connection == "bulk")


@given(st.sampled_from(TOPICS), st.data())
def test_parse_is_the_inverse_of_at(topic: Topic[Any], data: st.DataObject) -> None:
    parameters = {name: data.draw(LEVELS) for name in topic.names}
    address = topic.at(**parameters)
    assert topic.parse(address) == parameters
    assert topic.filter(**parameters) == address


@given(st.sampled_from(list(combinations(TOPICS, 2))), st.data())
def test_no_address_belongs_to_two_topics(pair: tuple[Topic[Any], Topic[Any]], data: st.DataObject) -> None:
    one, other = pair
    assert other.parse(one.at(**{name: data.draw(LEVELS) for name in one.names})) is None


@pytest.mark.parametrize("level", ["", "a/b", "+", "#", "a+", "a\0"])
def test_a_parameter_is_one_level(level: str) -> None:
    with pytest.raises(ValueError, match="one topic level"):
        BULK.at(site="home", receiver=level, sender="pi-1")
    with pytest.raises(ValueError, match="one topic level"):
        BULK.filter(receiver=level)


def test_a_misspelt_parameter_does_not_become_a_wildcard() -> None:
    with pytest.raises(KeyError, match="reciever"):
        BULK.filter(reciever="pi-1")


def test_parameters_left_out_match_any_level() -> None:
    assert BULK.filter(site="home", receiver="pi-2") == "kvbus/home/bulk/pi-2/+"
