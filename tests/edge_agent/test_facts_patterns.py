"""Patterns find what they are for, nothing that only looks like it, and in linear time."""

from __future__ import annotations

import time

import pytest

from edge_agent.facts.measures import measures
from edge_agent.facts.names import names
from edge_agent.facts.patterns import technical

LONG = 200_000


def _contents(text: str, kind: str, detail: str | None = None) -> set[str]:
    found = technical(text) + measures(text)
    return {fact.content for fact in found if fact.type == kind and detail in {None, fact.detail}}


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Call GET /v1/users/{id} first.", "GET /v1/users/{id}"),
        ("Metrics are at /metrics, see there.", "/metrics"),
        ("POST /api/v2/items?limit=10.", "POST /api/v2/items?limit=10"),
        ("It is (/files/report.json) that one asks.", "/files/report.json"),
        ("Ask https://example.org/a?b=1, then wait.", "https://example.org/a?b=1"),
        ("DELETE https://example.org/a.", "DELETE https://example.org/a"),
        ("Publish to mqtt://broker.local:1883.", "mqtt://broker.local:1883"),
        ("/users/:id/posts lists them", "/users/:id/posts"),
    ],
)
def test_endpoints_are_found(text: str, content: str) -> None:
    assert content in _contents(text, "endpoint")


@pytest.mark.parametrize(
    "text", ["black and/or white", "90 km/h", "a / b", "<b>bold</b>", "1/2", "./local", "://", "//"]
)
def test_a_slash_alone_makes_no_endpoint(text: str) -> None:
    assert not _contents(text, "endpoint")


def test_a_method_is_a_fact_of_its_own_only_away_from_an_endpoint() -> None:
    assert _contents("Use PATCH for that, or an HTTP PUT.", "http_method") == {"PATCH", "PUT"}
    assert not _contents("GET /users and POST https://a.org/x", "http_method")


@pytest.mark.parametrize("text", ["get the post", "THE MAN PUT THE BOOK AWAY", "POSTAL", "to GET THERE", "HEAD-ON"])
def test_words_that_look_like_methods_are_none(text: str) -> None:
    assert not _contents(text, "http_method")


@pytest.mark.parametrize(
    "content",
    [
        "100 requests per minute",
        "60 req/s",
        "5 calls/hour",
        "1,000 messages a day",
        "10 requests every 5 seconds",
        "20 API calls per second",
        "10k requests / day",
    ],
)
def test_rate_limits_are_found(content: str) -> None:
    assert content in _contents(f"The limit is {content}, no more.", "rate_limit")


@pytest.mark.parametrize("text", ["100 requests", "100 km per hour", "many requests per minute", "5 callers/hour"])
def test_other_rates_are_not_rate_limits(text: str) -> None:
    assert not _contents(text, "rate_limit")


@pytest.mark.parametrize(
    "content",
    [
        "v2.1.3",
        "v2",
        "version 3.0",
        "Version 2",
        "firmware 1.4",
        "v1.0-rc1",
        "2.1.3",
        "release 4.2",
        "version 2.0.1-beta",
    ],
)
def test_versions_are_found(content: str) -> None:
    assert content in _contents(f"It runs {content} since May.", "version")


@pytest.mark.parametrize(
    "text", ["12.03.1931", "192.168.0.1", "version of", "release 5 men", "rv2", "3.14", "1.2.3.4.5"]
)
def test_other_numbers_are_not_versions(text: str) -> None:
    assert not _contents(text, "version")


@pytest.mark.parametrize(
    "content",
    [
        "214 metres",
        "3.3 V",
        "12 kg",
        "45 %",
        "45%",
        "5 MB/s",
        "$3.5 million",
        "-12 °C",
        "€40",
        "38,000 euros",
        "14 megawatt hours",
        "805.99 km2",
        "212 litres per second",
        "80 percent",
        "10-20 kg",
        "750 cubic metres",
        "twelve years",
        "forty-six years",
        "500 ms",
        "2.4 GHz",
        "1.5 kW/h",
        "180 solar panels",
        "25 bodies",
        "1,500 people",
        "four electric pumps",
        "7.2 million inhabitants",
    ],
)
def test_quantities_are_found(content: str) -> None:
    assert content in _contents(f"There it was {content}, they said.", "quantity")


@pytest.mark.parametrize(
    "text",
    [
        "pump 3 stopped",
        "in 1931 it was",
        "chapter 7",
        "one of them",
        "AX-4410 man",
        "the 1970s",
        "1 was",
        "3 of the",
        "x12 kgx",
    ],
)
def test_numbers_that_measure_nothing_are_no_quantities(text: str) -> None:
    assert not _contents(text, "quantity")


@pytest.mark.parametrize(
    "content",
    [
        "1931-03-12",
        "2024-05-01T14:30:00Z",
        "12 March 1931",
        "12th of March, 1931",
        "March 12, 1931",
        "October 1973",
        "4 March",
        "March 4",
        "12/03/1931",
        "12.03.1931",
        "1931",
        "1914–1918",
        "14:30",
        "08:02:15",
        "2 pm",
        "10:15 a.m.",
        "1970s",
        "19th century",
        "fifth century BC",
        "500 BC",
        "Tuesday morning",
    ],
)
def test_dates_are_found(content: str) -> None:
    assert content.rstrip(".") in {found.rstrip(".") for found in _contents(f"It was {content} when it began", "date")}


@pytest.mark.parametrize(
    "text",
    ["25:99", "1:2", "$1931", "1931.5", "AB-1931-X", "31:12 x", "March on", "may 4 men", "12345", "1931 %", "3000"],
)
def test_other_numbers_are_no_dates(text: str) -> None:
    assert not _contents(text, "date")


@pytest.mark.parametrize(
    "content",
    [
        "AX-4410",
        "E3",
        "N86",
        "RFC 2616",
        "ISO 8601",
        "CVE-2021-44228",
        "123e4567-e89b-12d3-a456-426614174000",
        "d41d8cd98f00b204e9800998ecf8427e",
        "snake_case_name",
        "ERR_TIMEOUT",
        "max_tokens",
        "getUserName()",
        "--dry-run",
        "ada@example.org",
        "192.168.0.1:1883",
        "10.0.0.0/8",
        "00:1A:2B:3C:4D:5E",
        "settings.toml",
        "0x1F",
    ],
)
def test_identifiers_are_found(content: str) -> None:
    assert content in _contents(f"We saw {content}, twice.", "identifier")


@pytest.mark.parametrize(
    "text",
    [
        "well-known",
        "NATO",
        "3D 4K",
        "120 kWh",
        "the 19th",
        "999.1.1.1",
        "e.g. this",
        "a@b",
        "1970",
        "mother-in-law",
        "12345",
        "_",
        "O'Neill",
    ],
)
def test_plain_words_and_numbers_are_no_identifiers(text: str) -> None:
    assert not _contents(text, "identifier")


def test_names_are_runs_of_capitals_and_not_the_words_that_open_a_sentence() -> None:
    text = (
        "The pump was seen by Maria Lindqvist. Pumps stop. However, Dr. J. R. R. Tolkien met her in St. Louis, "
        'at the Bank of the West. "Nothing," she said. Later Belmont grew; Belmont is old.'
    )
    assert [fact.content for fact in names(text)] == [
        "Maria Lindqvist",
        "Dr. J. R. R. Tolkien",
        "St. Louis",
        "Bank of the West",
        "Belmont",
        "Belmont",
    ]


RUNS = [
    *"aA1_-/.' (°",
    *("a/", "/a", "/a.", "{a}", "http://", "GET ", "GET /", "a@", "a.", "a_", "aA", "--a", "0x1", "v1.", "a'"),
    *("1,", "1.", "1 ", "1-", "1:1", "A1", "A-", "A ", "A. ", "A of ", "two ", "two-", "1 aaa ", "1931-"),
    *("March ", "1 March ", "1 requests ", "1 million ", "one million "),
]


def _seconds(text: str) -> float:
    began = time.process_time()
    technical(text)
    measures(text)
    names(text)
    return time.process_time() - began


@pytest.mark.parametrize("piece", RUNS)
def test_a_run_of_anything_is_read_in_time(piece: str) -> None:
    assert _seconds((piece * 10_000)[:10_000]) < 5


@pytest.mark.parametrize("piece", ["a@", "1 aaa ", "{a}", "1,", "A-1/"])
def test_reading_200_000_characters_takes_seconds_not_minutes(piece: str) -> None:
    assert _seconds((piece * LONG)[:LONG]) < 60
