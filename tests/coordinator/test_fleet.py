from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.messages import LinkQuality, Presence, Telemetry
from coordinator.errors import AgentOffline, AgentUnknown, ContextAmbiguous, ContextNotHeld, RequestImpossible
from coordinator.fleet import (
    DUPLICATE_WINDOW_S,
    Channel,
    Fleet,
    apply,
    expire,
    link_bps,
    link_channels,
    resolve_source,
)
from tests.coordinator.builders import context, fleet_of, instance, presence, telemetry


def after(*events: tuple[float, Presence | Telemetry]) -> Fleet:
    fleet = Fleet()
    for now_s, event in events:
        fleet = apply(fleet, event, now_s)
    return fleet


def test_online_needs_presence_and_telemetry() -> None:
    assert not after((0, presence("pi-1"))).online("pi-1", 0)
    assert not after((0, telemetry("pi-1"))).online("pi-1", 0)
    assert after((0, presence("pi-1")), (0, telemetry("pi-1"))).online("pi-1", 0)
    assert after((0, telemetry("pi-1")), (0, presence("pi-1"))).online("pi-1", 0)
    assert not Fleet().online("pi-1", 0)


def test_an_agent_that_falls_silent_is_offline_after_expiry_whatever_its_presence_says() -> None:
    fleet = fleet_of(telemetry("pi-1"), now_s=100.0)
    assert fleet.online("pi-1", 105.0)
    assert not fleet.online("pi-1", 105.1)
    assert fleet.online("pi-1", 109.0, expiry_s=10.0)


def test_a_will_takes_an_agent_offline_at_once() -> None:
    fleet = apply(fleet_of(telemetry("pi-1")), presence("pi-1", state="offline", model=None), 1.0)
    assert not fleet.online("pi-1", 1.0)


def test_apply_leaves_the_old_fleet_as_it_was() -> None:
    old = fleet_of(telemetry("pi-1"))
    new = apply(old, telemetry("pi-2"), 1.0)
    assert set(old.agents) == {"pi-1"}
    assert set(new.agents) == {"pi-1", "pi-2"}


def test_telemetry_of_an_old_instance_is_ignored_after_a_new_presence() -> None:
    fleet = after((0, presence("pi-1", 1)), (0, telemetry("pi-1", 1, 7)), (1, presence("pi-1", 2)))
    fleet = apply(fleet, telemetry("pi-1", 1, 8, pressure=0.9), 1.0)
    state = fleet.agents["pi-1"]
    assert state.instance == instance(2)
    assert state.telemetry is None
    assert not fleet.online("pi-1", 1.0)


def test_the_will_of_an_old_instance_does_not_take_the_new_one_offline() -> None:
    fleet = after((0, presence("pi-1", 1)), (1, presence("pi-1", 2)), (1, telemetry("pi-1", 2)))
    fleet = apply(fleet, presence("pi-1", 1, "offline"), 1.1)
    assert fleet.online("pi-1", 1.1)


def test_telemetry_overtaken_on_the_way_is_ignored() -> None:
    fleet = fleet_of(telemetry("pi-1", sequence=5, pressure=0.5))
    late = apply(fleet, telemetry("pi-1", sequence=4, pressure=0.1), 1.0).agents["pi-1"].telemetry
    assert late is not None
    assert late.memory.pressure == 0.5


def test_a_restart_is_not_a_duplicate() -> None:
    fleet = after(
        (0, presence("pi-1", 1)),
        (0, telemetry("pi-1", 1, 30)),
        (1, presence("pi-1", 2)),
        (1.01, telemetry("pi-1", 1, 31)),
        (1.02, presence("pi-1", 1, "offline")),
        (1.1, telemetry("pi-1", 2, 0)),
        (2.1, telemetry("pi-1", 2, 1)),
    )
    assert fleet.agents["pi-1"].duplicate is None


def test_a_restart_whose_telemetry_comes_before_its_presence_is_not_a_duplicate() -> None:
    fleet = after(
        (0, presence("pi-1", 1)),
        (0, telemetry("pi-1", 1, 30)),
        (1, telemetry("pi-1", 2, 0)),
        (1.1, presence("pi-1", 2)),
        (2, telemetry("pi-1", 2, 1)),
    )
    assert fleet.agents["pi-1"].duplicate is None
    assert fleet.online("pi-1", 2)


def test_two_instances_whose_presence_alternates_are_a_duplicate_and_both_are_named() -> None:
    fleet = after((0, presence("pi-1", 1)), (1, presence("pi-1", 2)), (2, presence("pi-1", 1)))
    assert fleet.agents["pi-1"].duplicate == (instance(1), instance(2))


def test_two_instances_that_both_go_on_sending_telemetry_are_a_duplicate() -> None:
    fleet = after((0, presence("pi-1", 1)), (0, telemetry("pi-1", 1, 30)), (0.5, presence("pi-1", 2)))
    for second in range(1, 4):
        fleet = apply(fleet, telemetry("pi-1", 1, 30 + second), second)
        fleet = apply(fleet, telemetry("pi-1", 2, second), second + 0.5)
    assert fleet.agents["pi-1"].duplicate == (instance(2), instance(1))


def test_the_same_retained_telemetry_again_is_no_sign_of_a_second_instance() -> None:
    fleet = after((0, presence("pi-1", 2)), (0, telemetry("pi-1", 2)))
    for second in range(5):
        fleet = apply(fleet, telemetry("pi-1", 1, 30), second)
        fleet = apply(fleet, telemetry("pi-1", 2, second), second)
    assert fleet.agents["pi-1"].duplicate is None


def test_the_duplicate_mark_goes_once_one_of_them_is_silent() -> None:
    fleet = after((0, presence("pi-1", 1)), (1, presence("pi-1", 2)), (2, presence("pi-1", 1)))
    later_s = 2 + DUPLICATE_WINDOW_S
    fleet = apply(fleet, telemetry("pi-1", 1, 9), later_s)
    assert fleet.agents["pi-1"].duplicate is None
    assert expire(fleet, later_s + 1).agents["pi-1"].duplicate is None


def test_expire_forgets_agents_that_were_silent_for_long() -> None:
    fleet = apply(fleet_of(telemetry("pi-1"), now_s=0), telemetry("pi-2"), 90.0)
    assert set(expire(fleet, 100.0, forget_s=50.0).agents) == {"pi-2"}


def test_a_source_is_an_agent_with_one_context_or_an_agent_and_a_context() -> None:
    fleet = fleet_of(
        telemetry("pi-1", contexts=[context("report")]), telemetry("pi-2", contexts=[context("a"), context("b")])
    )
    assert resolve_source(fleet, "pi-1", 0) == ("pi-1", context("report"))
    assert resolve_source(fleet, "pi-1:report", 0) == ("pi-1", context("report"))
    assert resolve_source(fleet, "pi-2:b", 0) == ("pi-2", context("b"))


@pytest.mark.parametrize(
    ("source", "now_s", "error"),
    [
        ("pi-9", 0.0, AgentUnknown),
        ("pi-1", 60.0, AgentOffline),
        ("pi-1:absent", 0.0, ContextNotHeld),
        ("pi-3", 0.0, ContextNotHeld),
        ("pi-2", 0.0, ContextAmbiguous),
        ("pi-1:", 0.0, RequestImpossible),
        ("", 0.0, RequestImpossible),
    ],
)
def test_a_source_that_means_nothing_is_refused_by_kind(source: str, now_s: float, error: type[Exception]) -> None:
    fleet = fleet_of(
        telemetry("pi-1", contexts=[context("report")]),
        telemetry("pi-2", contexts=[context("a"), context("b")]),
        telemetry("pi-3"),
    )
    with pytest.raises(error):
        resolve_source(fleet, source, now_s)


def test_a_link_is_as_fast_as_its_slower_end_and_unknown_if_either_end_is() -> None:
    fleet = fleet_of(
        telemetry("up", link=LinkQuality(uplink_bps=1e6, downlink_bps=9e6)),
        telemetry("down", link=LinkQuality(uplink_bps=9e6, downlink_bps=5e6)),
        telemetry("dark", link=LinkQuality()),
        telemetry("dead", link=LinkQuality(uplink_bps=0.0, downlink_bps=0.0)),
    )
    assert link_bps(fleet, "up", "down") == 1e6
    assert link_bps(fleet, "down", "down") == 5e6
    for pair in (("dark", "down"), ("up", "dark"), ("up", "dead"), ("up", "nobody")):
        assert link_bps(fleet, *pair) is None
        assert link_channels(fleet, *pair, channels=()) == ()


def test_an_agent_in_no_group_has_channels_of_its_own_and_a_shared_cell_is_passed_twice() -> None:
    link = LinkQuality(uplink_bps=1e6, downlink_bps=2e6)
    fleet = fleet_of(*(telemetry(agent, link=link) for agent in ("a", "b", "c")))
    cell = Channel("cell", ("a", "b"))
    assert link_channels(fleet, "a", "c", []) == (("a/up", 1e6), ("c/down", 2e6))
    assert link_channels(fleet, "a", "c", [cell]) == (("cell", 1e6), ("c/down", 2e6))
    assert link_channels(fleet, "a", "b", [cell]) == (("cell", 1e6), ("cell", 2e6))
    assert link_channels(fleet, "a", "c", [Channel("site", ("a",)), cell])[:2] == (("cell", 1e6), ("site", 1e6))


def test_a_channel_name_that_could_be_an_access_link_is_refused() -> None:
    with pytest.raises(ValueError, match="slash"):
        Channel("pi-1/up", ("pi-1",))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.booleans(), st.floats(0, 3)), max_size=30))
def test_any_sequence_of_events_leaves_telemetry_and_presence_of_one_instance(
    events: list[tuple[str, int, bool, float]],
) -> None:
    fleet, now_s = Fleet(), 0.0
    for sequence, (agent, number, is_presence, wait_s) in enumerate(events):
        now_s += wait_s
        event = presence(agent, number) if is_presence else telemetry(agent, number, sequence)
        fleet = expire(apply(fleet, event, now_s), now_s)
        state = fleet.agents[agent]
        assert {part.instance for part in (state.presence, state.telemetry) if part} == {state.instance}
        assert state.last_seen_s <= now_s
        if state.duplicate:
            assert state.duplicate[0] == state.instance != state.duplicate[1]
