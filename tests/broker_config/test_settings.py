"""Configuration files: what is wrong is said on one line, and the template is the truth."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated

import pytest
from msgspec import Meta, Struct, field

from broker_config.errors import ConfigurationError
from broker_config.settings import BrokerSettings, describe, load_toml


class Link(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the example."""

    rate_bps: Annotated[float, Meta(title="rate of the link", extra={"unit": "bit/s"}, gt=0)] = 1e6
    members: Annotated[tuple[str, ...], Meta(title="who is on it", extra={"unit": "agent ids"})] = ()


class Example(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a configuration may have."""

    broker: Annotated[BrokerSettings, Meta(title="the broker")] = BrokerSettings()
    name: Annotated[str, Meta(title="a name", extra={"unit": ""})] = 'quo"ted \\ Ω \x7f \n line'
    limit: Annotated[int | None, Meta(title="a limit", extra={"unit": "bytes"})] = None
    fast: Annotated[bool, Meta(title="a switch", extra={"unit": ""})] = True
    spare: Annotated[Link | None, Meta(title="a link that may be absent")] = None
    links: Annotated[dict[str, Link], Meta(title="links by name")] = field(
        default_factory=lambda: {"wifi": Link(rate_bps=5e7, members=("a", "b"))}
    )
    more: Annotated[tuple[Link, ...], Meta(title="more links")] = ()


class Required(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One field without a default."""

    agent: Annotated[str, Meta(title="who we are", extra={"unit": ""})]


def _write(directory: Path, text: str) -> Path:
    path = directory / "agent.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_toml(_write(tmp_path, ""), Example) == Example()


@pytest.mark.parametrize(
    ("kind", "whole"), [(Example, Example(spare=Link())), (BrokerSettings, BrokerSettings()), (Link, Link())]
)
def test_the_template_says_nothing_but_what_somebody_takes_the_sign_from(
    kind: type[Struct], whole: Struct, tmp_path: Path
) -> None:
    text = describe(kind)
    assert not [value for value in tomllib.loads(text).values() if value != {}]
    assert load_toml(_write(tmp_path, text), kind) == kind()
    shown = re.sub(r"^#(\[|\w+ = .)", r"\1", text, flags=re.MULTILINE)
    assert shown != text
    assert load_toml(_write(tmp_path, shown), kind) == whole


def test_the_template_gives_the_defaults_with_every_none_filled_in(tmp_path: Path) -> None:
    text = describe(BrokerSettings).replace("#username =", 'username = "ada"')
    assert load_toml(_write(tmp_path, text), BrokerSettings) == BrokerSettings(username="ada")


def test_the_template_says_title_unit_and_default() -> None:
    text = describe(Example)
    assert "# time a message may wait for the broker [s]\n#publish_timeout_s = 8.0" in text
    assert "# a limit [bytes]\n#limit =" in text
    assert "[broker]" in text
    assert "spare" not in tomllib.loads(text)
    assert "#agent =" in describe(Required)


def test_a_field_without_title_or_unit_is_a_mistake_of_ours() -> None:
    class Bare(Struct, forbid_unknown_fields=True):
        port: int = 1

    with pytest.raises(TypeError, match=r"Bare\.port needs"):
        describe(Bare)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[broker]\nhots = "x"', "unknown field broker.hots; did you mean broker.host?"),
        ("[brokr]\nport = 1", "unknown field brokr; did you mean broker?"),
        ("[links.wifi]\nrate_pbs = 1", "unknown field links.wifi.rate_pbs; did you mean links.wifi.rate_bps?"),
        ("[[more]]\n[[more]]\nmenbers = []", "unknown field more[1].menbers; did you mean more[1].members?"),
        ("zzzzzz = 1", "unknown field zzzzzz"),
        ("[broker]\nport = 70000", "broker.port: expected `int` <= 65535"),
        ('[broker]\nport = "1883"', "broker.port: expected `int`, got `str`"),
        ("broker = 3", "broker: expected `object`, got `int`"),
        ("name = \n", "no valid TOML: Invalid value (at line 1"),
    ],
)
def test_a_mistake_names_file_and_field(text: str, says: str, tmp_path: Path) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigurationError) as caught:
        load_toml(path, Example)
    assert str(caught.value).startswith(f"{path}: {says}")
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="missing field agent"):
        load_toml(_write(tmp_path, ""), Required)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"can't read .*absent\.toml: No such file or directory"):
        load_toml(tmp_path / "absent.toml", Example)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        load_toml(path, Example)


def test_the_password_comes_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret\n", encoding="utf-8")
    assert BrokerSettings(password_file=str(tmp_path / "secret")).password() == "s3cret"
    assert BrokerSettings().password() is None
    with pytest.raises(ConfigurationError, match="password_file"):
        BrokerSettings(password_file=str(tmp_path / "absent")).password()
