"""The texts that the coordinator keeps: found by what agents say to hold, within a limit of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.fleet import Fleet, apply
from coordinator.texts import Texts
from tests.coordinator.builders import context, fleet_of, presence, telemetry

REPORT, LOG = context("report"), context("log")


def fleet() -> Fleet:
    return fleet_of(telemetry("pi-1", contexts=[REPORT]), telemetry("pi-2", contexts=[LOG, REPORT]))


def test_a_text_is_found_by_the_context_that_an_agent_says_to_hold_under_its_name() -> None:
    texts = Texts()
    texts.keep("pi-2", "log", "the log")
    assert texts.find(fleet(), LOG.context_id) == "the log"
    assert texts.find(fleet(), REPORT.context_id) is None


def test_a_text_serves_every_agent_that_holds_the_same_context() -> None:
    texts = Texts()
    texts.keep("pi-2", "report", "the report")
    only_pi_1 = apply(fleet(), telemetry("pi-2", sequence=1, contexts=[REPORT]), 1.0)
    assert texts.find(only_pi_1, REPORT.context_id) == "the report"


def test_a_text_whose_agent_holds_it_no_more_is_not_found() -> None:
    texts = Texts()
    texts.keep("pi-1", "report", "the report")
    without = apply(fleet_of(telemetry("pi-1", contexts=[REPORT])), telemetry("pi-1", sequence=1), 1.0)
    assert texts.find(without, REPORT.context_id) is None
    assert texts.find(Fleet(), REPORT.context_id) is None
    assert texts.find(apply(Fleet(), presence("pi-1"), 0.0), REPORT.context_id) is None


def test_a_new_text_of_a_name_replaces_the_old_one() -> None:
    texts = Texts(limit_bytes=10)
    for text in ("12345678", "8765", "éé"):
        texts.keep("pi-1", "report", text)
    assert texts.find(fleet(), REPORT.context_id) == "éé"
    texts.keep("pi-2", "log", "123456")  # 4 bytes and 6: all that the limit allows
    assert texts.find(fleet(), REPORT.context_id) == "éé"


def test_when_the_limit_is_reached_what_was_looked_for_last_stays() -> None:
    texts = Texts(limit_bytes=10)
    texts.keep("pi-1", "report", "1234")
    texts.keep("pi-2", "log", "1234")
    assert texts.find(fleet(), REPORT.context_id) == "1234"
    texts.keep("pi-1", "map", "1234")
    assert texts.find(fleet(), REPORT.context_id) == "1234"
    assert texts.find(fleet(), LOG.context_id) is None


def test_a_text_larger_than_the_limit_is_not_kept_and_drives_out_no_later_one() -> None:
    texts = Texts(limit_bytes=10)
    texts.keep("pi-1", "report", "x" * 11)
    assert texts.find(fleet(), REPORT.context_id) is None
    texts.keep("pi-2", "log", "x" * 10)
    assert texts.find(fleet(), LOG.context_id) == "x" * 10


@given(st.lists(st.tuples(st.sampled_from(["pi-1", "pi-2"]), st.sampled_from(["a", "b"]), st.text(max_size=12))))
def test_what_is_kept_never_exceeds_the_limit_and_the_last_that_fits_is_there(
    given_: list[tuple[str, str, str]],
) -> None:
    texts = Texts(limit_bytes=20)
    for agent, name, text in given_:
        texts.keep(agent, name, text)
        kept = sum(len(each.encode()) for each in texts._texts.values())
        assert kept == texts._bytes <= 20
        assert (agent, name) in texts._texts or len(text.encode()) > 20
