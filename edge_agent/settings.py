"""The configuration of an agent: every field with its title and unit. `edge-agent config` prints it as TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from broker_config.messages import FROM_IDS
from broker_config.messages.base import COORDINATOR, AgentId
from broker_config.settings import BrokerSettings


class ComputeSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the model runs."""

    threads: Annotated[
        int, Meta(title="threads of one model run; 0: one per core", extra={"unit": "threads"}, ge=0, le=256)
    ] = 1
    prefill_chunk_tokens: Annotated[
        int, Meta(title="tokens read in one run while prefilling", extra={"unit": "tokens"}, ge=8, le=8_192)
    ] = 128
    spin: Annotated[
        bool, Meta(title="whether threads spin while a run goes on; they never do between runs", extra={"unit": ""})
    ] = True
    arena: Annotated[
        bool,
        Meta(title="whether memory of a run is kept for the next: faster, a little larger", extra={"unit": ""}),
    ] = True
    provider: Annotated[
        str,
        Meta(title="execution provider of onnxruntime, if its package has another", extra={"unit": ""}, max_length=64),
    ] = "CPUExecutionProvider"
    flash_attention: Annotated[
        bool,
        Meta(title="tiled attention: less memory with long contexts, slower with short ones", extra={"unit": ""}),
    ] = False


class MemorySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much memory caches may take."""

    cache_budget_mb: Annotated[
        float, Meta(title="memory for stored KV caches, at most", extra={"unit": "MB (10^6 bytes)"}, gt=0, le=1e6)
    ] = 256.0
    cache_budget_share: Annotated[
        float,
        Meta(title="the same, as a share of what would be available without them", extra={"unit": ""}, gt=0, le=1),
    ] = 0.5
    high_watermark: Annotated[
        float, Meta(title="share of the budget above which caches are made smaller", extra={"unit": ""}, gt=0, le=1)
    ] = 0.8
    low_watermark: Annotated[
        float, Meta(title="share of the budget until which they are", extra={"unit": ""}, gt=0, le=1)
    ] = 0.6
    tightest_kl: Annotated[
        float, Meta(title="loss up to which caches are tightened in memory", extra={"unit": "nats"}, ge=0, le=100)
    ] = 0.02
    spill_folder: Annotated[
        str | None,
        Meta(title="folder for caches that memory has no room for; none: they are dropped", extra={"unit": "path"}),
    ] = None
    spill_limit_mb: Annotated[
        float, Meta(title="disk for them, at most", extra={"unit": "MB (10^6 bytes)"}, gt=0, le=1e7)
    ] = 1_024.0
    payload_limit_mb: Annotated[
        float, Meta(title="largest cache that is accepted, decoded", extra={"unit": "MB (10^6 bytes)"}, gt=0, le=1e6)
    ] = 512.0

    def __post_init__(self) -> None:
        if self.low_watermark > self.high_watermark:
            raise ValueError(f"low_watermark {self.low_watermark} is above high_watermark {self.high_watermark}")

    @property
    def spill_path(self) -> Path | None:
        """The folder for caches, ~ expanded."""
        return Path(self.spill_folder).expanduser() if self.spill_folder else None


class FactsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How facts are found in contexts, for orders that want them sent beside a cache."""

    spacy_model: Annotated[
        str,
        Meta(
            title="spaCy model that names entities, by name or path, if spaCy is installed; empty: never use spaCy",
            extra={"unit": ""},
        ),
    ] = "en_core_web_sm"


class TelemetrySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the agent reports of itself, and how often."""

    interval_s: Annotated[float, Meta(title="time between two reports", extra={"unit": "s"}, ge=0.1, le=60)] = 1.0
    probe_interval_s: Annotated[
        float, Meta(title="time between two probes of the link", extra={"unit": "s"}, ge=0.1, le=3_600)
    ] = 3.0


class AgentSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One agent on one device."""

    agent: Annotated[AgentId, Meta(title="id of this agent, unique on the site: a-z, 0-9, - and _", extra={"unit": ""})]
    bundle: Annotated[
        str, Meta(title="directory of the model bundle made by `make prepare-model`", extra={"unit": "path"})
    ]
    site: Annotated[
        str,
        Meta(
            title="name of the site; agents of one site share a coordinator",
            extra={"unit": ""},
            pattern="^[a-z0-9][a-z0-9_-]{0,31}$",
        ),
    ] = "home"
    contexts_folder: Annotated[
        str | None,
        Meta(
            title="folder of .txt and .md files to hold as contexts; published ones are kept there",
            extra={"unit": "path"},
        ),
    ] = None
    broker: Annotated[BrokerSettings, Meta(title="the MQTT broker")] = BrokerSettings()
    compute: Annotated[ComputeSettings, Meta(title="the model")] = ComputeSettings()
    memory: Annotated[MemorySettings, Meta(title="memory")] = MemorySettings()
    facts: Annotated[FactsSettings, Meta(title="facts")] = FactsSettings()
    telemetry: Annotated[TelemetrySettings, Meta(title="telemetry")] = TelemetrySettings()

    def __post_init__(self) -> None:
        if self.agent in {COORDINATOR, FROM_IDS}:
            raise ValueError(f"agent: {self.agent} is a word that reports use for something else; choose another")

    @property
    def bundle_path(self) -> Path:
        """The bundle's directory, ~ expanded."""
        return Path(self.bundle).expanduser()

    @property
    def folder_path(self) -> Path | None:
        """The contexts' folder, ~ expanded."""
        return Path(self.contexts_folder).expanduser() if self.contexts_folder else None
