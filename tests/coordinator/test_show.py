"""What a person reads of rounds and fleets."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from rich.console import Console

from broker_config import topics
from broker_config.messages import Ended, LinkReport, PredictionError, Presence, RoundReport, Stages, Telemetry
from coordinator.fleet import Fleet, apply
from coordinator.show import error_lines, fleet_table, medium, outcome_lines, plan_lines, rate, seconds, size, stages
from tests.broker_config.strategies import messages
from tests.coordinator.builders import MODEL, context, digest, fleet_of, instance, presence, telemetry

LINK = LinkReport(
    sender="pi-1",
    context="report",
    context_id=digest(1),
    tokens=400,
    own_tokens=0,
    medium="cache",
    rung="int8",
    link_bps=2.4e7,
    share_bps=1.2e7,
    sender_pressure=0.31,
    receiver_pressure=0.72,
    planned_bytes=4_900_000,
    fp16_bytes=9_216_000,
    text_bytes=800,
    predicted=Stages(encode_s=0.08, transfer_s=1.5, decode_s=0.04),
)
REPORT = RoundReport(
    request=instance(1),
    question="Which valve?",
    receiver="jetson-1",
    policy="jmsra",
    state="planned",
    links=(LINK,),
    predicted_e2e_s=2.0,
    predicted_question_s=0.25,
)
MEASURED = msgspec.structs.replace(
    LINK,
    measured=Stages(encode_s=0.1, transfer_s=1.75, decode_s=0.05),
    payload_bytes=4_800_000,
    wire_bytes=4_900_500,
)
ANSWERED = msgspec.structs.replace(
    REPORT,
    state="answered",
    links=(MEASURED,),
    e2e_s=2.25,
    total_s=3.5,
    question_s=0.3,
    answer="north",
    deadline_s=3.0,
)


def rendered(fleet: Fleet) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(fleet_table(fleet))
    return out.getvalue()


def test_a_plan_says_for_each_link_what_goes_how_and_under_which_circumstances() -> None:
    assert list(plan_lines(REPORT)) == [
        "pi-1:report → jetson-1: cache int8; link 24.0 Mbit/s, share 12.0 Mbit/s, memory pressure 0.31 → 0.72"
    ]


def test_a_note_and_a_rate_that_is_not_known_are_said() -> None:
    link = msgspec.structs.replace(LINK, medium="tokens", link_bps=0.0, share_bps=0.0, note="link not measured yet")
    (line,) = plan_lines(msgspec.structs.replace(REPORT, links=(link,)))
    assert line == (
        "pi-1:report → jetson-1: tokens; link unknown rate, share unknown rate, memory pressure 0.31 → 0.72 "
        "(link not measured yet)"
    )


def test_an_outcome_says_bytes_beside_fp16_and_text_and_predicted_beside_measured() -> None:
    assert list(outcome_lines(ANSWERED)) == [
        (
            "pi-1:report: 4.9 MB on the wire (fp16 cache 9.2 MB, text 800 B); predicted/measured encode 0.08/0.10 s, "
            "transfer 1.50/1.75 s, decode 0.04/0.05 s"
        ),
        "question 0.25/0.30 s; E2E 2.00/2.25 s (-11%), whole answer 3.50 s; deadline 3 s kept",
    ]


def test_prediction_errors_are_a_line_for_each_policy() -> None:
    errors = [
        PredictionError(policy="jmsra", rounds=12, median_error=0.113, median_bias=-0.042),
        PredictionError(policy="kv", rounds=1, median_error=0.2, median_bias=0.2),
    ]
    assert list(error_lines(errors)) == [
        "jmsra: E2E predicted within 11% (median of the last 12 rounds, predicted less measured -4%)",
        "kv: E2E predicted within 20% (median of the last 1 round, predicted less measured +20%)",
    ]


def test_a_missed_deadline_and_a_fallback_cannot_be_overlooked() -> None:
    link = msgspec.structs.replace(MEASURED, wire_bytes=None, fallback="coordinator", note="sender expired: no ack")
    report = msgspec.structs.replace(ANSWERED, links=(link,), deadline_s=1.0)
    first, last = outcome_lines(report)
    assert "4.8 MB on the wire" in first
    assert first.endswith("; FALLBACK to text from coordinator; sender expired: no ack")
    assert last.endswith("; deadline 1 s MISSED")


def test_it_is_said_how_often_shares_were_revised() -> None:
    for revisions, said in ((0, "kept"), (1, "; shares revised once"), (2, "; shares revised 2 times")):
        *_, last = outcome_lines(msgspec.structs.replace(ANSWERED, revisions=revisions))
        assert last.endswith(said)


def test_a_split_that_has_moved_says_from_where_to_where() -> None:
    moved = msgspec.structs.replace(MEASURED, medium="split", own_tokens=100, computed_tokens=164)
    first, _ = outcome_lines(msgspec.structs.replace(ANSWERED, links=(moved,)))
    assert first.endswith("; computed by the receiver 100/164 tokens")
    kept = msgspec.structs.replace(moved, computed_tokens=100)
    first, _ = outcome_lines(msgspec.structs.replace(ANSWERED, links=(kept,)))
    assert "computed by" not in first


def test_a_rest_that_was_computed_from_the_ids_is_named_as_that() -> None:
    link = msgspec.structs.replace(MEASURED, fallback="ids", note="receiver expired: not complete within 4 s")
    first, _ = outcome_lines(msgspec.structs.replace(ANSWERED, links=(link,)))
    assert first.endswith("; FALLBACK to its token ids; receiver expired: not complete within 4 s")


def test_what_was_not_measured_is_a_dash() -> None:
    first, last = outcome_lines(REPORT)
    assert "0 B on the wire" in first
    assert "encode 0.08 s, transfer 1.50 s, decode 0.04 s" in first
    assert last == "question 0.25/–; E2E 2.00/–, whole answer –"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (4_900_000, "4.9 MB"), (2.5e9, "2.5 GB"), (7e13, "70000.0 GB")],
)
def test_sizes_have_decimal_units(count: float, text: str) -> None:
    assert size(count) == text


def test_rates_seconds_media_and_stages_read_as_they_should() -> None:
    assert (rate(12_345_678), rate(0)) == ("12.3 Mbit/s", "unknown rate")
    assert (seconds(1.234), seconds(None)) == ("1.23 s", "–")
    assert medium(msgspec.structs.replace(LINK, medium="split", own_tokens=100)) == "100 tokens + cache int8"
    assert stages(Stages(), None) == "nothing to do"
    assert stages(Stages(), Stages(decode_s=0.2)) == "decode 0.00/0.20 s"


def test_the_fleet_table_shows_every_agent_with_what_it_holds() -> None:
    fleet = fleet_of(
        telemetry("pi-1", contexts=[context("report", 400), context("map", 12, cached=False)], pressure=0.44),
        telemetry("bare", speed=None),
        telemetry("full", contexts=[context("log", 300, rung="int6"), context("plan", 9, rung="int4", cache_bytes=0)]),
    )
    fleet = apply(fleet, presence("gone", 1, "offline"), 0.0)
    text = rendered(fleet)
    for shown in (
        *("pi-1", "online", "SmolLM2-135M-Instruct int8", "0.44", "20.0 Mbit/s / 30.0 Mbit/s", "20 ms"),
        *(
            "150 / 12 tokens/s",
            "report (400 tokens, cache lossless)",
            "map (12 tokens, text)",
            "gone",
            "offline",
            "none",
        ),
        *("log (300 tokens, cache int6)", "plan (9 tokens, cache int4, on disk)"),
    ):
        assert shown in text


def test_two_agents_with_one_id_are_shown_as_such() -> None:
    noted = msgspec.structs.replace(telemetry("pi-1"), note="another agent with id pi-1 is running")
    assert "two agents share this id!" in rendered(fleet_of(noted))


def test_names_that_look_like_markup_are_shown_as_they_are() -> None:
    odd = msgspec.structs.replace(MODEL, name="model[/red] [bold]x", weight_precision="[int8]")
    assert "model[/red] [bold]x [int8]" in rendered(fleet_of(telemetry("pi-1"), models={"pi-1": odd}))
    gone = apply(Fleet(), presence("pi-2", 1, "offline", odd), 0.0)
    assert "model[/red] [bold]x" in rendered(gone)


ENDS = messages(topics.EVENTS).filter(lambda event: isinstance(event, Ended))
QUIET = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)


@QUIET
@example(Ended(report=ANSWERED))
@given(ENDS)
def test_every_valid_report_can_be_shown_on_one_line_for_each_link_and_one_more(end: Any) -> None:
    plan, outcome = list(plan_lines(end.report)), list(outcome_lines(end.report))
    assert len(plan) == len(end.report.links)
    assert len(outcome) == len(end.report.links) + 1
    out = Console(file=io.StringIO(), width=200)
    for line in (*plan, *outcome):
        out.print(line, style="dim", markup=False)


@QUIET
@given(messages(topics.PRESENCE), messages(topics.TELEMETRY))
def test_every_agent_that_presents_itself_can_be_shown(said: Presence, reported: Telemetry) -> None:
    reported = msgspec.structs.replace(reported, agent=said.agent, instance=said.instance)
    fleet = apply(Fleet(), said, 0.0)
    rendered(fleet)
    assert said.agent[:8] in rendered(apply(fleet, reported, 0.0))
