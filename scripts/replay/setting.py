"""What is replayed: agents with their devices, links and memory, and what is asked of them. A TOML file."""

from __future__ import annotations

import hashlib
import random
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from broker_config.messages import DEFAULT_QUALITY_FLOOR, ModelInfo, Speed
from broker_config.messages.base import AgentId
from coordinator.latency import EXACT_RUNG, usable
from coordinator.settings import ChannelSettings, CoordinatorSettings, PlanningSettings
from edge_agent.errors import RecipeInvalid
from edge_agent.kv.recipe import recipe
from edge_agent.settings import MemorySettings, TelemetrySettings
from scripts.policies.profiles import profiles
from scripts.policies.scenarios import ELEMENTS_PER_TOKEN, LADDER
from scripts.replay.errors import SettingInvalid
from scripts.traces import Trace, TraceError, read_trace
from scripts.traces.memory import MEMORY_KINDS, MadeMemory, MemoryTrace, made_memory, read_memory, steady
from scripts.traces.trace import LARGEST_BPS, shifted

SITES = Path(__file__).parent / "sites"
SITE = "replay"
MOST_AGENTS = 20_000
MBIT, MEGA = 1e6, 1_000_000
WINDOW_TOKENS = 8_192
BYTES_PER_TOKEN_ID = 2
DELAY_MS = 10.0
"""One way, on links whose trace says nothing of it."""

Mbps = Annotated[float, Meta(ge=0, le=LARGEST_BPS / MBIT)]
Share = Annotated[float, Meta(ge=0, le=1)]


class MemoryTerms(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device's memory. trace: a file, or a kind that is made ("ramp", "sawtooth", "spikes"); without it the share
    `available` stays. cache_budget_mb and the marks: as an agent's settings have them.
    """

    total_mb: Annotated[float, Meta(ge=1, le=1e7)] = 4_096.0
    available: Share = 0.7
    least: Share = 0.03
    trace: str | None = None
    cache_budget_mb: Annotated[float, Meta(gt=0, le=1e6)] = 256.0
    high_watermark: Annotated[float, Meta(gt=0, le=1)] = 0.8
    low_watermark: Annotated[float, Meta(gt=0, le=1)] = 0.6


class AgentTerms(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One agent. device: a named speed profile, so many times as fast as `faster` says; or speed, as agents report it.

    trace: of its access link, both ways; without it and without mbps, the run's. It begins at offset_s, or, of the
    run's, anywhere, by the seed. contexts: lengths in tokens; one of n is named ctx-n. cached: whether their caches are
    there at the start.
    """

    name: AgentId
    device: str = "pi-5"
    faster: Annotated[float, Meta(gt=0, le=1e3)] = 1.0
    speed: Speed | None = None
    trace: str | None = None
    mbps: Mbps | None = None
    offset_s: Annotated[float, Meta(ge=0, le=1e9)] | None = None
    delay_ms: Annotated[float, Meta(ge=0, le=60_000)] = DELAY_MS
    contexts: Annotated[tuple[Annotated[int, Meta(ge=1, le=WINDOW_TOKENS)], ...], Meta(max_length=64)] = ()
    cached: bool = True
    memory: MemoryTerms = MemoryTerms()


class SharedTerms(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A channel that several agents share, such as one Wi-Fi cell: every bit of theirs passes it, each way."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    members: Annotated[tuple[AgentId, ...], Meta(min_length=1)]
    trace: str | None = None
    mbps: Mbps | None = None
    offset_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0


class RequestTerms(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked. file: JSON Lines (docs/replay.md); else so many questions of each group, evenly from first_s on:
    of every receiver, from every number of sources and of every length of contexts alike, in a drawn order.

    Every deadline_every-th has a deadline, of deadline_s and deadline_token_s for each token of its contexts. One that
    is refused, such as while an agent is offline, is asked again each second for patience_s.
    """

    file: str | None = None
    count: Annotated[int, Meta(ge=1, le=1_000_000)] = 50
    first_s: Annotated[float, Meta(ge=0, le=1e9)] = 20.0
    sources: Annotated[tuple[Annotated[int, Meta(ge=1, le=64)], ...], Meta(min_length=1)] = (1, 2, 3)
    deadline_every: Annotated[int, Meta(ge=0)] = 2
    deadline_s: Annotated[float, Meta(gt=0, le=86_400)] = 2.0
    deadline_token_s: Annotated[float, Meta(ge=0, le=1)] = 0.004
    quality_floor: Annotated[float, Meta(ge=0, le=1e6)] = DEFAULT_QUALITY_FLOOR
    max_new_tokens: Annotated[int, Meta(ge=1, le=4_096)] = 8
    patience_s: Annotated[float, Meta(ge=0, le=86_400)] = 60.0


class Setting(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A site and what happens there.

    noise, size_noise: standard deviations of the logarithms of seconds of work, and of sizes of caches, against what is
    expected. copies: the agents, so many times, each group with questions of its own. model: another than
    SmolLM2-135M-Instruct.
    """

    agents: Annotated[tuple[AgentTerms, ...], Meta(min_length=2, max_length=4_096)]
    channels: tuple[SharedTerms, ...] = ()
    requests: RequestTerms = RequestTerms()
    duration_s: Annotated[float, Meta(gt=0, le=1e7)] = 600.0
    copies: Annotated[int, Meta(ge=1, le=10_000)] = 1
    planning: PlanningSettings = PlanningSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    noise: Annotated[float, Meta(ge=0, le=2)] = 0.05
    size_noise: Annotated[float, Meta(ge=0, le=2)] = 0.03
    answer_tokens: Annotated[int, Meta(ge=1, le=4_096)] = 8
    model: ModelInfo | None = None


@dataclass(frozen=True)
class Place:
    """A setting by its name, with the directory that names of files in it are relative to."""

    setting: Setting
    folder: Path
    name: str


def read_setting(path: Path) -> Place:
    """Raises SettingInvalid."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        setting = msgspec.convert(content, Setting)
    except OSError as error:
        raise SettingInvalid(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of msgspec
        raise SettingInvalid(f"{path}: {error}") from None
    try:
        check(setting)
    except SettingInvalid as error:
        raise SettingInvalid(f"{path}: {error}") from None
    return Place(setting, path.parent, path.stem)


def check(setting: Setting) -> None:
    """What no single field shows. Raises SettingInvalid."""
    names = [agent.name for agent in setting.agents]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingInvalid(f"two agents are named {twice[0]}")
    for agent in setting.agents:
        _check_agent(agent)
    _check_channels(setting)
    _check_model(setting.model)
    if len(setting.agents) * setting.copies > MOST_AGENTS:
        raise SettingInvalid(f"{len(setting.agents)} agents, {setting.copies} times, are more than {MOST_AGENTS:,}")
    if setting.telemetry.interval_s >= setting.planning.expiry_s:
        raise SettingInvalid("agents that report less often than expiry_s are never online")
    if not setting.requests.file and not any(agent.contexts for agent in setting.agents):
        raise SettingInvalid("no agent holds a context: nothing can be asked")
    if setting.requests.first_s >= setting.duration_s:
        raise SettingInvalid("the first question comes after the end")


def _check_agent(agent: AgentTerms) -> None:
    if agent.speed is None and agent.device not in profiles():
        raise SettingInvalid(f"{agent.name}: no device {agent.device}; there are {', '.join(profiles())}")
    if agent.speed is not None and not (usable(agent.speed) and agent.speed.decode_tps > 0):
        raise SettingInvalid(f"{agent.name}: each of the rates of its speed must be above 0")
    try:
        memory_settings(agent.memory)
    except ValueError as error:
        raise SettingInvalid(f"{agent.name}: {error}") from None
    if len(set(agent.contexts)) < len(agent.contexts):
        raise SettingInvalid(f"{agent.name} holds two contexts of one length; their names would be the same")


def _check_channels(setting: Setting) -> None:
    channels = [channel.name for channel in setting.channels]
    if twice := [name for name in channels if channels.count(name) > 1]:
        raise SettingInvalid(f"two channels are named {twice[0]}")
    names = {agent.name for agent in setting.agents}
    members = [member for channel in setting.channels for member in channel.members]
    if unknown := [member for member in members if member not in names]:
        raise SettingInvalid(f"a channel has the member {unknown[0]}, which is no agent")
    if twice := [member for member in members if members.count(member) > 1]:
        raise SettingInvalid(f"{twice[0]} is in two channels")
    for agent in setting.agents:
        if agent.name in members and (agent.trace is not None or agent.mbps is not None):
            raise SettingInvalid(
                f"{agent.name} is in a channel, whose rate is its link's; it can't have one of its own"
            )


def _check_model(model: ModelInfo | None) -> None:
    """Raises SettingInvalid for rungs that can't be replayed."""
    rungs = [rung.name for rung in model.ladder] if model is not None else [EXACT_RUNG]
    for name in rungs:
        try:
            made = recipe(name)
        except RecipeInvalid as error:
            raise SettingInvalid(f"rung {name} of the model: {error}") from None
        if made.needs_mass or made.eviction is not None:
            raise SettingInvalid(f"rung {name} of the model chooses by a cache's attention: not in virtual time")
    if EXACT_RUNG not in rungs:
        raise SettingInvalid(f"the model's ladder lacks {EXACT_RUNG}, as which caches are computed")


def copied(setting: Setting) -> tuple[Setting, tuple[tuple[str, ...], ...]]:
    """With all agents and channels written out; and the names of each group."""
    if setting.copies == 1:
        return setting, (tuple(agent.name for agent in setting.agents),)
    agents, channels, groups = [], [], []
    for number in range(1, setting.copies + 1):
        group = [msgspec.structs.replace(agent, name=f"{agent.name}-{number}") for agent in setting.agents]
        agents += group
        groups.append(tuple(agent.name for agent in group))
        channels += [
            msgspec.structs.replace(
                channel, name=f"{channel.name}-{number}", members=tuple(f"{name}-{number}" for name in channel.members)
            )
            for channel in setting.channels
        ]
    return (
        msgspec.structs.replace(setting, agents=tuple(agents), channels=tuple(channels), copies=1),
        tuple(groups),
    )


def model_of(setting: Setting) -> ModelInfo:
    """The model that all agents run."""
    if setting.model is not None:
        return setting.model
    return ModelInfo(
        name="SmolLM2-135M-Instruct",
        fingerprint=digest("model"),
        tokenizer=digest("tokenizer"),
        prefix=digest("prefix"),
        weight_precision="int8",
        elements_per_token=ELEMENTS_PER_TOKEN,
        bytes_per_token_id=BYTES_PER_TOKEN_ID,
        window_tokens=WINDOW_TOKENS,
        transform=digest("transform"),
        ladder=LADDER,
    )


def speed_of(agent: AgentTerms) -> Speed:
    """What its device does."""
    return agent.speed or profiles()[agent.device].speed(agent.faster)


def settings_of(setting: Setting, policy: str) -> CoordinatorSettings:
    """Of a coordinator that plans by this policy."""
    return CoordinatorSettings(
        site=SITE,
        planning=msgspec.structs.replace(setting.planning, policy=policy),
        channels=tuple(ChannelSettings(name=each.name, members=each.members) for each in setting.channels),
    )


def memory_settings(terms: MemoryTerms) -> MemorySettings:
    """As an agent has them."""
    return MemorySettings(
        cache_budget_mb=terms.cache_budget_mb,
        high_watermark=terms.high_watermark,
        low_watermark=terms.low_watermark,
        cache_budget_share=1.0,
    )


def memory_of(place: Place, agent: AgentTerms, seed: int) -> MemoryTrace:
    """What a device's other work leaves. Raises SettingInvalid."""
    terms, total_bytes = agent.memory, int(agent.memory.total_mb * MEGA)
    if terms.trace is None:
        return steady(total_bytes, terms.available)
    try:
        if terms.trace in MEMORY_KINDS:
            return made_memory(
                MadeMemory(
                    kind=terms.trace,
                    total_bytes=total_bytes,
                    duration_s=place.setting.duration_s,
                    least=min(terms.least, terms.available),
                    most=terms.available,
                    seed=_seed_of(seed, agent.name),
                )
            )
        return read_memory(place.folder / terms.trace, total_bytes)
    except (TraceError, ValueError) as error:
        raise SettingInvalid(f"{agent.name}: {error}") from None


def link_of(place: Place, terms: AgentTerms | SharedTerms, trace: Trace | None, seed: int) -> Trace | float:
    """The rate of an access link or a channel: its own, or the run's trace. Raises SettingInvalid."""
    if terms.mbps is not None:
        return terms.mbps * MBIT
    if terms.trace is not None:
        try:
            return shifted(read_trace(place.folder / terms.trace), terms.offset_s or 0.0)
        except TraceError as error:
            raise SettingInvalid(f"{terms.name}: {error}") from None
    if trace is None:
        raise SettingInvalid(f"{terms.name} has neither trace nor mbps; name a trace for the run")
    if terms.offset_s is not None:
        return shifted(trace, terms.offset_s)
    return shifted(trace, trace.duration_s * random.Random(f"{seed} {terms.name} offset").random())


def digest(*parts: object) -> str:
    """A digest as messages have them, of these words."""
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:32]


def _seed_of(seed: int, name: str) -> int:
    return int(digest(seed, name)[:8], 16)
