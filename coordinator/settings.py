"""The configuration of a coordinator: every field with its title and unit. `coordinator config` prints it as TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from broker_config.messages.base import AgentId
from broker_config.settings import BrokerSettings
from coordinator.drift import REVISE_FACTOR, REVISE_INTERVAL_S
from coordinator.fleet import EXPIRY_S, Channel
from coordinator.latency import TIE_FRACTION
from coordinator.learning import QUANTILE
from coordinator.policy import DEFAULT_POLICY, PressureCaps


class ChannelSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Agents whose access links share capacity, such as one Wi-Fi cell."""

    name: Annotated[
        str,
        Meta(title="name of the channel", extra={"unit": ""}, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"),
    ]
    members: Annotated[tuple[AgentId, ...], Meta(title="agents on it", extra={"unit": "agent ids"}, min_length=1)]


class PlanningSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How rounds are planned and how long they may last."""

    policy: Annotated[str, Meta(title="policy of questions that name none", extra={"unit": ""})] = DEFAULT_POLICY
    tie_fraction: Annotated[
        float,
        Meta(
            title="plans whose E2E differs by less count as equally fast, and quality decides",
            extra={"unit": "fraction"},
            ge=0,
            le=1,
        ),
    ] = TIE_FRACTION
    pressure_caps: Annotated[
        tuple[tuple[float, float], ...],
        Meta(
            title="from each memory pressure on, at most so many bits per element",
            extra={"unit": "pairs of (fraction, bits)"},
            max_length=16,
        ),
    ] = PressureCaps().steps
    round_timeout_s: Annotated[
        float, Meta(title="a question that is not answered by then ends expired", extra={"unit": "s"}, gt=0, le=86_400)
    ] = 120.0
    rate_quantile: Annotated[
        float,
        Meta(
            title="links are planned with the rate that all but this share of their last transfers reached",
            extra={"unit": "fraction"},
            ge=0,
            le=1,
        ),
    ] = QUANTILE
    revise_factor: Annotated[
        float,
        Meta(
            title="shares are revised under way when a link has become faster or slower by this factor",
            extra={"unit": "factor"},
            gt=1,
            le=1e6,
        ),
    ] = REVISE_FACTOR
    revise_interval_s: Annotated[
        float, Meta(title="time between two revisions of a round", extra={"unit": "s"}, ge=0, le=3_600)
    ] = REVISE_INTERVAL_S
    expiry_s: Annotated[
        float, Meta(title="an agent unheard for so long counts as offline", extra={"unit": "s"}, ge=1, le=3_600)
    ] = EXPIRY_S


class CoordinatorSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One coordinator for one site."""

    site: Annotated[
        str,
        Meta(
            title="name of the site, as the agents have it", extra={"unit": ""}, pattern=r"^[a-z0-9][a-z0-9_-]{0,31}\Z"
        ),
    ] = "home"
    state_folder: Annotated[
        str,
        Meta(title="folder for the journal of questions in flight and for what was learned", extra={"unit": "path"}),
    ] = "~/.local/state/kvbus"
    broker: Annotated[BrokerSettings, Meta(title="the MQTT broker")] = BrokerSettings()
    planning: Annotated[PlanningSettings, Meta(title="planning")] = PlanningSettings()
    channels: Annotated[
        tuple[ChannelSettings, ...],
        Meta(title="channels: groups of agents that share capacity", extra={"unit": "tables"}),
    ] = ()

    @property
    def state_path(self) -> Path:
        """The state folder, ~ expanded."""
        return Path(self.state_folder).expanduser()

    def site_channels(self) -> tuple[Channel, ...]:
        """The channels as the planner takes them."""
        return tuple(Channel(channel.name, channel.members) for channel in self.channels)
