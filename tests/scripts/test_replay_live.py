"""Live replays: real processes with the tiny model on links that follow a trace, beside their twins in virtual time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from edge_agent.model.manifest import read_manifest
from edge_agent.model.text import Text
from scripts.replay.errors import SettingInvalid
from scripts.replay.findings import agreement
from scripts.replay.live import Broker, LiveTerms, check_live, live, measured, text_of
from scripts.replay.policies import policy_named
from scripts.replay.setting import AgentTerms, MemoryTerms, Place, RequestTerms, Setting
from scripts.replay.virtual.run import Terms, run
from tests.scripts.replays import steps


def site(folder: Path, **changes: object) -> Place:
    """Two agents for a quarter of a minute."""
    setting = Setting(
        agents=tuple(AgentTerms(name=name, contexts=(60, 120)) for name in ("a", "b")),
        requests=RequestTerms(count=4, first_s=4.0, sources=(1,)),
        duration_s=14.0,
    )
    return Place(msgspec.structs.replace(setting, **changes), folder, "small")


@pytest.mark.integration
@pytest.mark.parametrize("broker", [Broker.EMBEDDED, pytest.param(Broker.MOSQUITTO, marks=pytest.mark.slow)])
async def test_a_live_replay_and_its_twin(tiny_bundle: Path, tmp_path: Path, broker: Broker) -> None:
    trace = steps(8.0, 4.0, 6.0, rtt_s=0.02)
    where = site(tmp_path)
    terms = LiveTerms(
        place=where, traces=[("steps", trace)], policies=("kv",), bundle=tiny_bundle, folder=tmp_path, broker=broker
    )
    said: list[str] = []
    (played,) = [each async for each in live(terms, said.append)]
    result = played.result
    assert [question.state for question in result.questions] == ["answered"] * 4
    assert {link.medium for question in result.questions for link in question.links} == {"cache"}
    assert said[-1] == "steps, kv: 4 questions in 14 s"
    assert {agent.agent for agent in result.agents} == {"a", "b"}
    told = result.agents[0]
    assert set(told.link_mbps) <= {8.0, 4.0, 6.0}
    assert all(0 <= at_s < 60 for at_s in told.time_s)
    twin = measured(where, played.recording, tiny_bundle)
    speeds = [agent.speed for agent in twin.setting.agents]
    assert all(speed is not None for speed in speeds)
    again = Terms(place=twin, policy=policy_named("kv"), trace=trace, trace_name="steps")
    virtual = await asyncio.to_thread(run, again)
    one, _ = agreement([result, virtual])
    assert one.questions == 4
    assert one.virtual_s > 0


def test_texts_have_as_many_tokens_as_they_should(tiny_bundle: Path) -> None:
    text = Text(tiny_bundle, read_manifest(tiny_bundle))
    for tokens in (40, 60, 121, 400):
        assert len(text.context_ids(text_of(tokens, "a", text))) == tokens
    assert text_of(60, "a", text) != text_of(60, "b", text)
    with pytest.raises(SettingInvalid, match="no text of 1 tokens"):
        text_of(1, "a", text)


@pytest.mark.bundle
def test_texts_of_the_real_model_too(bundle: Path) -> None:
    text = Text(bundle, read_manifest(bundle))
    for tokens in (100, 250, 1_200):
        assert len(text.context_ids(text_of(tokens, "agent-1", text))) == tokens


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"copies": 2}, "copies must be 1"),
        ({"agents": (AgentTerms(name="a", memory=MemoryTerms(trace="ramp")),)}, "a memory trace needs virtual time"),
        ({"agents": (AgentTerms(name="a", cached=False),)}, "agents read their contexts before"),
    ],
)
def test_what_can_only_be_virtual_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    trace = steps(1.0)
    terms = LiveTerms(
        place=site(tmp_path, **changes), traces=[("x", trace)], policies=("kv",), bundle=tmp_path, folder=tmp_path
    )
    with pytest.raises(SettingInvalid, match=said):
        check_live(terms)


def test_live_policies_and_links_must_be_there(tmp_path: Path) -> None:
    terms = LiveTerms(place=site(tmp_path), traces=[("", None)], policies=("kv",), bundle=tmp_path, folder=tmp_path)
    with pytest.raises(SettingInvalid, match="neither trace nor mbps"):
        check_live(terms)
    with pytest.raises(SettingInvalid, match="live, policies are the coordinator's"):
        check_live(LiveTerms(place=site(tmp_path), traces=[], policies=("a:b",), bundle=tmp_path, folder=tmp_path))
