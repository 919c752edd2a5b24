"""The live picture of the fleet as a value: `apply(fleet, event, now_s)` gives the next one.

Nothing here reads a clock or the bus. `now_s` is the coordinator's own monotonic time; an agent's times are never
compared with it (design, "Contracts": nothing compares two hosts' clocks). An agent is online when its presence says
so, its telemetry is here, and it was heard less than `expiry_s` ago.

Which of two instances of one id is believed: the last whose presence said "online". What the other still sends (late
telemetry, its will) changes nothing; but if it goes on sending, two agents run under one id, and `duplicate` names
both instances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from broker_config.messages import ContextInfo, ModelInfo, Presence, Telemetry
from coordinator.errors import AgentOffline, AgentUnknown, ContextAmbiguous, ContextNotHeld, RequestImpossible

LEAST_BPS = 1e3
"""At less, a cache would take longer than messages can tell of (1e9 s)."""
EXPIRY_S = 5.0
"""Telemetry comes every second; four may be lost."""
DUPLICATE_WINDOW_S = 10.0
"""Both instances must have been heard within it: a restart leaves at most one late message of the old one."""
SIGNS_OF_LIFE = 2
FORGET_S = 3_600.0


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another instance heard under an agent's id. succeeded: the current instance took over from it."""

    instance: str
    heard_s: float
    sequence: int
    signs: int = 0
    succeeded: bool = False


@dataclass(frozen=True, kw_only=True)
class AgentState:
    """What is known of one agent: the last presence and telemetry of its current instance."""

    instance: str
    last_seen_s: float
    presence: Presence | None = None
    telemetry: Telemetry | None = None
    rival: Rival | None = None
    duplicate: tuple[str, str] | None = None

    @property
    def model(self) -> ModelInfo | None:
        """The model it said it runs."""
        return self.presence.model if self.presence else None


@dataclass(frozen=True)
class Fleet:
    """All agents heard of, by id."""

    agents: Mapping[str, AgentState] = field(default_factory=lambda: MappingProxyType({}))

    def online(self, agent: str, now_s: float, expiry_s: float = EXPIRY_S) -> bool:
        """Whether the agent can be given orders now."""
        state = self.agents.get(agent)
        return (
            state is not None
            and state.presence is not None
            and state.presence.state == "online"
            and state.telemetry is not None
            and now_s - state.last_seen_s <= expiry_s
        )

    def require_online(self, agent: str, now_s: float, expiry_s: float = EXPIRY_S) -> AgentState:
        """Its state. Raises AgentUnknown or AgentOffline."""
        state = self.agents.get(agent)
        if state is None:
            raise AgentUnknown(agent, self.agents)
        if not self.online(agent, now_s, expiry_s):
            raise AgentOffline(agent, None if state.telemetry is None else now_s - state.last_seen_s)
        return state


@dataclass(frozen=True)
class Channel:
    """A named group of agents whose access links share capacity, such as one Wi-Fi cell. Comes from configuration.

    An agent in no group has its uplink and its downlink each as a channel of its own (named `pi-1/up`, `pi-1/down`).
    """

    name: str
    members: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"channel name {self.name!r} must not be empty or hold a slash")


def apply(fleet: Fleet, event: Presence | Telemetry, now_s: float) -> Fleet:
    """The fleet after this event, heard at now_s."""
    state = fleet.agents.get(event.agent)
    changed = _on_presence(state, event, now_s) if isinstance(event, Presence) else _on_telemetry(state, event, now_s)
    agents = dict(fleet.agents) if not isinstance(fleet.agents, MappingProxyType) else fleet.agents.copy()
    agents[event.agent] = _mark_duplicate(changed, now_s)
    return Fleet(MappingProxyType(agents))


def expire(fleet: Fleet, now_s: float, forget_s: float = FORGET_S) -> Fleet:
    """Clears what has gone stale: the duplicate mark of a rival that fell silent, agents unheard for forget_s."""
    agents = {
        agent: _mark_duplicate(state, now_s)
        for agent, state in fleet.agents.items()
        if now_s - state.last_seen_s <= forget_s
    }
    return Fleet(MappingProxyType(agents))


def _on_presence(state: AgentState | None, event: Presence, now_s: float) -> AgentState:
    if state is None:
        return AgentState(instance=event.instance, last_seen_s=now_s, presence=event)
    if event.instance == state.instance:
        return replace(state, presence=event, last_seen_s=now_s if event.state == "online" else state.last_seen_s)
    if event.state == "offline" and state.presence is not None:
        return state  # the will or the farewell of an instance that another one has followed
    rival = state.rival
    returns = rival is not None and rival.succeeded and rival.instance == event.instance
    return AgentState(
        instance=event.instance,
        last_seen_s=now_s,
        presence=event,
        rival=Rival(
            instance=state.instance,
            heard_s=state.last_seen_s,
            sequence=state.telemetry.sequence if state.telemetry else -1,
            signs=SIGNS_OF_LIFE if returns and _living(state) else 0,
            succeeded=True,
        ),
    )


def _living(state: AgentState) -> bool:
    return state.presence is not None and state.presence.state == "online"


def _on_telemetry(state: AgentState | None, event: Telemetry, now_s: float) -> AgentState:
    if state is None or (state.presence is None and event.instance != state.instance):
        return AgentState(instance=event.instance, last_seen_s=now_s, telemetry=event)
    if event.instance == state.instance:
        if state.telemetry and event.sequence < state.telemetry.sequence:
            return state  # overtaken on the way (QoS 0)
        return replace(state, telemetry=event, last_seen_s=now_s)
    rival = state.rival
    if rival is None or rival.instance != event.instance:
        rival = Rival(instance=event.instance, heard_s=now_s, sequence=event.sequence, signs=1)
    elif event.sequence > rival.sequence:
        signs = 1 if now_s - rival.heard_s > DUPLICATE_WINDOW_S else rival.signs + 1
        rival = replace(rival, heard_s=now_s, sequence=event.sequence, signs=signs)
    return replace(state, rival=rival)


def _mark_duplicate(state: AgentState, now_s: float) -> AgentState:
    rival = state.rival
    both_live = (
        rival is not None
        and rival.signs >= SIGNS_OF_LIFE
        and max(now_s - rival.heard_s, now_s - state.last_seen_s) <= DUPLICATE_WINDOW_S
    )
    duplicate = (state.instance, rival.instance) if rival and both_live else None
    return state if duplicate == state.duplicate else replace(state, duplicate=duplicate)


def resolve_source(fleet: Fleet, source: str, now_s: float, expiry_s: float = EXPIRY_S) -> tuple[str, ContextInfo]:
    """The agent and the context that `pi-1` (if it holds one only) or `pi-1:report` means.

    Raises AgentUnknown, AgentOffline, ContextNotHeld, ContextAmbiguous, or RequestImpossible for an empty name.
    """
    agent, colon, name = source.partition(":")
    if not agent or (colon and not name):
        raise RequestImpossible(f"{source!r} names no source; write an agent, or agent and context as pi-1:report")
    telemetry = fleet.require_online(agent, now_s, expiry_s).telemetry
    contexts = {context.name: context for context in (telemetry.contexts if telemetry else ())}
    if name:
        if name not in contexts:
            raise ContextNotHeld(agent, name, contexts)
        return agent, contexts[name]
    if not contexts:
        raise ContextNotHeld(agent, None, ())
    if len(contexts) > 1:
        raise ContextAmbiguous(agent, contexts)
    return agent, next(iter(contexts.values()))


def uplink_bps(fleet: Fleet, agent: str) -> float | None:
    """The measured rate from the agent to the broker, or None. One below LEAST_BPS is no measurement to plan with."""
    telemetry = fleet.agents[agent].telemetry if agent in fleet.agents else None
    return _to_plan_with(telemetry.link.uplink_bps) if telemetry else None


def downlink_bps(fleet: Fleet, agent: str) -> float | None:
    """The measured rate from the broker to the agent, or None."""
    telemetry = fleet.agents[agent].telemetry if agent in fleet.agents else None
    return _to_plan_with(telemetry.link.downlink_bps) if telemetry else None


def _to_plan_with(bps: float | None) -> float | None:
    return None if bps is None or bps < LEAST_BPS else bps


def link_bps(fleet: Fleet, sender: str, receiver: str) -> float | None:
    """The rate of a link: the least of the sender's uplink and the receiver's downlink. None if either is unknown."""
    up, down = uplink_bps(fleet, sender), downlink_bps(fleet, receiver)
    return None if up is None or down is None else min(up, down)


def link_channels(
    fleet: Fleet, sender: str, receiver: str, channels: Sequence[Channel]
) -> tuple[tuple[str, float], ...]:
    """The channels a link passes, each with its bits per second alone on it. Empty if a rate is unknown.

    A channel that holds both ends comes twice: every bit crosses it twice, up to the broker and down again.
    """
    up, down = uplink_bps(fleet, sender), downlink_bps(fleet, receiver)
    if up is None or down is None:
        return ()
    passed: list[tuple[str, float]] = []
    for agent, direction, bps in ((sender, "up", up), (receiver, "down", down)):
        groups = sorted(channel.name for channel in channels if agent in channel.members)
        passed += [(name, bps) for name in groups or (f"{agent}/{direction}",)]
    return tuple(passed)
