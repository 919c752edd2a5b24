"""The loop that ties an agent's rooms to the bus: orders in, outcomes out, presence and telemetry all the while."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from importlib.metadata import version

from broker_config import topics
from broker_config.bus import Bus, BusState, MqttBus, Will
from broker_config.errors import BusError
from broker_config.messages import (
    AddContext,
    AnswerOrder,
    CancelOrder,
    ContextReply,
    Health,
    ListContexts,
    Order,
    PaceOrder,
    Presence,
    RemoveContext,
    SendOrder,
    Telemetry,
    TextReply,
    new_id,
)
from broker_config.transfer import Inbox
from edge_agent import health
from edge_agent.answering import Answering
from edge_agent.context_facts import ContextFacts
from edge_agent.engine import Engine
from edge_agent.errors import AgentError
from edge_agent.facts import Extractor
from edge_agent.library import Library
from edge_agent.link_quality import LinkMeter
from edge_agent.memory import Budget, ContextStore, Shelf, Spill
from edge_agent.model.exchange import expectation
from edge_agent.model.session import Model, Runtime
from edge_agent.model.text import Text
from edge_agent.notify import notify
from edge_agent.outgoing import Outgoing
from edge_agent.parts import Parts
from edge_agent.pressure import measure
from edge_agent.settings import AgentSettings, MemorySettings
from edge_agent.tasks import Tasks, last_words

log = logging.getLogger(__name__)

MEGA = 1_000_000
HEALTH_EVERY = 5
"""Reports: heat is slow, and asking for it costs some reading of files."""
OWN_LIMIT_BYTES = 1 << 62
"""Of a cache that this agent has made itself: none, for disk is bounded already."""


class Agent:
    """One agent. `run` returns only when cancelled."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._name = settings.agent
        self._instance = new_id()
        self._tasks = Tasks()
        self._started = time.monotonic()
        self._sequence = 0
        self._announced = False
        self._note = ""
        self._speed_words = ""
        self._health: Health | None = None

    async def run(self) -> None:
        """Load the model, join the bus, work until cancelled. Raises BundleInvalid, ModelUnsupported, SpillFailed."""
        bundle = self._settings.bundle_path
        compute = self._settings.compute
        runtime = Runtime(
            threads=compute.threads,
            spin=compute.spin,
            arena=compute.arena,
            flash_attention=compute.flash_attention,
            provider=compute.provider,
        )
        runtime.share_with_numpy()
        model = await asyncio.to_thread(Model, bundle, runtime, prefill_chunk=compute.prefill_chunk_tokens)
        self._engine = Engine(model, Text(bundle, model.manifest))
        self._store = await asyncio.to_thread(_store, model, self._settings.memory, self._name)
        try:
            speed = await self._engine.start()
            log.info("ready: prefill %.0f tokens/s, decode %.0f tokens/s", speed.prefill_tps, speed.decode_tps)
            self._speed_words = f"prefill {speed.prefill_tps:.0f}, decode {speed.decode_tps:.0f} tokens/s"
            notify(ready="1", status=f"looking for the broker {self._settings.broker.address}; {self._speed_words}")
            await self._join_bus()
        finally:
            await self._store.close()
            self._engine.close()

    def _buses(self) -> tuple[MqttBus, MqttBus]:
        """Control (stable id, persistent session, will) and bulk (clean session), not yet begun."""
        broker, site = self._settings.broker, self._settings.site
        will = Will(topic=topics.PRESENCE, message=self._presence("offline"), parameters={"agent": self._name})
        control = MqttBus(
            settings=broker,
            site=site,
            client_id=f"{site}-{self._name}",
            persistent=True,
            will=will,
            on_state=self._tell_state,
        )
        bulk = MqttBus(settings=broker, site=site, client_id=f"{site}-{self._name}-bulk-{self._instance}")
        return control, bulk

    async def _join_bus(self) -> None:
        """Listen, then begin the sessions (what the broker kept for us comes at once), then work until cancelled."""
        control, bulk = self._buses()
        limit = int(self._settings.memory.payload_limit_mb * MEGA)
        inbox = Inbox(bulk=bulk, control=control, agent=self._name, limit_bytes=limit)
        self._furnish(control, bulk, inbox, limit)
        await control.subscribe(topics.ORDERS, self._order, agent=self._name)
        await control.subscribe(topics.PRESENCE, self._someone, agent=self._name)
        control.add_on_connect(self._say_online)
        async with control, bulk, inbox:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._report(control), name="telemetry")
                    group.create_task(self._link.run(self._settings.telemetry.probe_interval_s), name="link probes")
                    group.create_task(self._library.prefill(), name="contexts")
                    group.create_task(self._tidy(), name="memory")
            finally:
                await self._tasks.close()
                await last_words(self._say_offline(control))

    def _furnish(self, control: Bus, bulk: Bus, inbox: Inbox, limit_bytes: int) -> None:
        """Build the rooms around the two connections."""
        self._control = control
        self._link = LinkMeter(bulk=bulk, agent=self._name)
        self._library = Library(engine=self._engine, store=self._store, folder=self._settings.folder_path)
        self._parts = Parts(
            agent=self._name,
            engine=self._engine,
            store=self._store,
            inbox=inbox,
            control=control,
            link=self._link,
            limit_bytes=limit_bytes,
        )
        self._answering = Answering(agent=self._name, engine=self._engine, parts=self._parts, control=control)
        self._outgoing = Outgoing(
            agent=self._name,
            engine=self._engine,
            store=self._store,
            facts=ContextFacts(self._engine.text, Extractor(spacy_model=self._settings.facts.spacy_model or None)),
            control=control,
            bulk=bulk,
            link=self._link,
        )

    def _order(self, order: Order, _: Mapping[str, str]) -> None:
        """Take an order; work that lasts runs as a task under the order's request."""
        match order:
            case SendOrder():
                self._tasks.start(order.request, f"send {order.transfer}", self._outgoing.carry_out(order))
            case AnswerOrder():
                self._tasks.start(order.request, f"answer {order.request}", self._answering.carry_out(order))
            case PaceOrder():
                self._outgoing.pace(order)
            case CancelOrder():
                log.info("cancel %s: %d tasks; %s", order.request, self._tasks.cancel(order.request), order.reason)
            case TextReply():
                self._parts.text_came(order)
            case AddContext() | RemoveContext() | ListContexts():
                key = f"contexts {order.correlation}"
                self._tasks.start(order.correlation, key, self._contexts(order))

    async def _contexts(self, order: AddContext | RemoveContext | ListContexts) -> None:
        error = ""
        try:
            if isinstance(order, AddContext):
                await self._library.add(order.name, order.text)
            elif isinstance(order, RemoveContext):
                await self._library.remove(order.name)
        except AgentError as failed:
            error = str(failed)
        reply = ContextReply(
            correlation=order.correlation, agent=self._name, contexts=self._store.infos(), error=error[:1024]
        )
        try:
            await self._control.publish(topics.REPLIES, reply, client=order.client)
        except BusError as failed:
            log.warning("reply to %s: %s", order.client, failed)

    def _someone(self, presence: Presence, _: Mapping[str, str]) -> None:
        """A presence under our own id. Once our own has come back, another instance's means another running agent.

        (Before that it is what an earlier run left retained. The other's "offline" counts too: two with one id cut
        each other off, and all that is ever seen of the other may be its will.)
        """
        if presence.instance == self._instance:
            self._announced = True
        elif self._announced and not self._note:
            self._note = f"another agent with id {self._name} is running (instance {presence.instance}); rename one"
            log.error("%s", self._note)

    async def _report(self, control: Bus) -> None:
        while True:
            await self._library.scan()
            if self._sequence % HEALTH_EVERY == 0:
                self._health = await asyncio.to_thread(health.measure)
            memory = measure(self._store.cache_bytes, self._store.budget_bytes)
            telemetry = Telemetry(
                agent=self._name,
                instance=self._instance,
                sequence=self._sequence,
                uptime_s=time.monotonic() - self._started,
                memory=memory,
                link=self._link.quality,
                speed=self._engine.meter.speed,
                contexts=self._store.infos(),
                sending=self._link.progress,
                queued=self._engine.turns.waiting,
                note=self._note,
                health=self._health,
            )
            self._sequence += 1
            try:
                await control.publish(topics.TELEMETRY, telemetry, agent=self._name)
            except BusError as error:
                log.info("telemetry: %s", error)
            await asyncio.sleep(self._settings.telemetry.interval_s)

    async def _tidy(self) -> None:
        """Tighten caches as memory fills, whoever fills it."""
        while True:
            await self._store.relieve()
            await asyncio.sleep(self._settings.telemetry.interval_s)

    def _presence(self, state: str) -> Presence:
        if state == "offline":
            return Presence(agent=self._name, instance=self._instance, state="offline")
        return Presence(
            agent=self._name,
            instance=self._instance,
            state="online",
            model=self._engine.model.manifest.info(),
            software=version("kvbus"),
        )

    async def _say_online(self) -> None:
        await self._control.publish(topics.PRESENCE, self._presence("online"), agent=self._name)

    def _tell_state(self, state: BusState) -> None:
        """For who looks at the service."""
        address = self._settings.broker.address
        words = {
            BusState.CONNECTED: f"at the broker {address}",
            BusState.BACKOFF: f"the broker {address} does not answer; trying again",
        }
        if state in words:
            notify(status=f"{words[state]}; {self._speed_words}")

    async def _say_offline(self, control: Bus) -> None:
        try:
            await control.publish(topics.PRESENCE, self._presence("offline"), agent=self._name)
        except BusError as error:
            log.info("could not say goodbye: %s", error)


def _store(model: Model, settings: MemorySettings, agent: str) -> ContextStore:
    """An empty store; what this agent has left on disk is taken over. Raises SpillFailed."""
    manifest, folder = model.manifest, settings.spill_path
    expected = expectation(manifest, OWN_LIMIT_BYTES, model.transform)
    limit_bytes = int(settings.spill_limit_mb * MEGA)
    return ContextStore(
        Shelf(manifest, model.transform, tightest_kl=settings.tightest_kl),
        Budget(
            limit_bytes=int(settings.cache_budget_mb * MEGA),
            share=settings.cache_budget_share,
            high=settings.high_watermark,
            low=settings.low_watermark,
        ),
        Spill(folder / agent, limit_bytes, expected, manifest.weight_precision) if folder else None,
    )
