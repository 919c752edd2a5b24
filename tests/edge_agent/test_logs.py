"""Logs: a line for people, a JSON object for machines, both to standard error."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest

from edge_agent import logs


@pytest.fixture(autouse=True)
def _root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for handler in handlers:
        root.removeHandler(handler)
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def test_a_machine_reads_one_json_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info")
    logging.getLogger("edge_agent.somewhere").warning("%s is full:\n%d bytes", "Büchse", 7)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    entry = json.loads(err)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry.pop("time"))
    assert entry == {"level": "warning", "where": "edge_agent.somewhere", "message": "Büchse is full:\n7 bytes"}


def test_an_exception_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info")
    try:
        int("fault")
    except ValueError:
        logging.getLogger("x").exception("it failed")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ValueError: invalid literal" in json.loads(err)["exception"]


def test_a_person_reads_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info", plain=True)
    logging.getLogger("x").info("ready")
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    ready\n", capsys.readouterr().err)


def test_less_than_the_level_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("warning")
    logging.getLogger("x").info("chatter")
    assert capsys.readouterr().err == ""


def test_setting_up_twice_does_not_write_twice(capsys: pytest.CaptureFixture[str]) -> None:
    logs.set_up("info")
    logs.set_up("info")
    logging.getLogger("x").info("once")
    assert capsys.readouterr().err.count("\n") == 1
