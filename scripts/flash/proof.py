"""Whether a flashed agent works: its presence on the bus, and its answer about a text that it is given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broker_config import topics
from broker_config.bus import MqttBus, request
from broker_config.errors import BusError
from broker_config.messages import (
    AddContext,
    AnswerOrder,
    AnswerOutcome,
    ContextReply,
    Outcome,
    Part,
    Presence,
    RemoveContext,
    Telemetry,
    new_id,
)
from broker_config.settings import BrokerSettings
from scripts.flash.errors import HostFailed

NAME = "kvbus-self-test"
TEXT = "The kettle stands on the left shelf. The lamp in the hall was mended on Monday."
QUESTION = "Where does the kettle stand?"
TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the agent showed. software: as it names itself. Rates in tokens/s; seconds from the question on."""

    instance: str
    software: str
    answer: str
    first_token_s: float
    prefill_tps: float
    decode_tps: float


class Witness:
    """Listens to one agent from before it is restarted, so that its old presence is not taken for the new one."""

    def __init__(self, bus: MqttBus, agent: str) -> None:
        self._bus, self._agent = bus, agent
        self._known: set[str] = set()
        self._presence: Presence | None = None
        self._telemetry: Telemetry | None = None
        self._outcome: AnswerOutcome | None = None
        self._news = asyncio.Event()

    async def listen(self, *, after_restart: bool, settle_s: float = 1.0) -> None:
        """What is retained comes at once; it is of the agent as it was, if it is going to be restarted."""
        await self._bus.subscribe(topics.PRESENCE, self._present, agent=self._agent)
        await self._bus.subscribe(topics.TELEMETRY, self._told, agent=self._agent)
        await self._bus.subscribe(topics.OUTCOMES, self._ended, agent=self._agent)
        await asyncio.sleep(settle_s)
        self._known = {self._presence.instance} if self._presence and after_restart else set()

    async def prove(self, within_s: float, say: Callable[[str], None]) -> Proof:
        """Raises HostFailed with what was waited for, and what the agent says of itself."""
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(within_s):
                say("waiting for its presence on the bus")
                await self._until(self._is_new)
                say("waiting for its first report")
                await self._until(lambda: self._telemetry is not None and self._telemetry.speed is not None)
                say("asking it a question")
                outcome = await self._question()
        except TimeoutError:
            waited_s = time.monotonic() - began_s
            what = "answered" if self._is_new() else "on the bus"
            raise HostFailed(f"{self._agent} is not {what} after {waited_s:.0f} s") from None
        except BusError as error:
            raise HostFailed(f"{self._agent}: {error}") from None
        presence, telemetry = self._presence, self._telemetry
        assert presence is not None  # noqa: S101  (waited for)
        assert telemetry is not None  # noqa: S101
        assert telemetry.speed is not None  # noqa: S101
        if telemetry.note:
            raise HostFailed(f"{self._agent} says: {telemetry.note}")
        return Proof(
            instance=presence.instance,
            software=presence.software,
            answer=outcome.answer,
            first_token_s=outcome.first_token_s,
            prefill_tps=telemetry.speed.prefill_tps,
            decode_tps=telemetry.speed.decode_tps,
        )

    async def _question(self) -> AnswerOutcome:
        presence = self._presence
        if presence is None or presence.model is None:
            raise HostFailed(f"{self._agent} does not say which model it runs")
        correlation = new_id()
        client = f"flash-{correlation}"
        order = AddContext(correlation=correlation, client=client, name=NAME, text=TEXT)
        reply = await self._ask(order, correlation, client)
        held = next((each for each in reply.contexts if each.name == NAME), None)
        if reply.error or held is None:
            raise HostFailed(f"{self._agent} does not take a text: {reply.error}")
        number = new_id()
        part = Part(
            transfer=new_id(),
            sender=self._agent,
            context_id=held.context_id,
            tokens=held.tokens,
            own_tokens=0,
            rung=presence.model.ladder[0].name,
        )
        question = AnswerOrder(
            request=number,
            asker="flash",
            question=QUESTION,
            parts=(part,),
            part_timeout_s=300.0,
            expires_s=600.0,
            max_new_tokens=TOKENS,
        )
        await self._bus.publish(topics.ORDERS, question, agent=self._agent)
        await self._until(lambda: self._outcome is not None and self._outcome.request == number)
        correlation = new_id()
        await self._ask(RemoveContext(correlation=correlation, client=client, name=NAME), correlation, client)
        assert self._outcome is not None  # noqa: S101
        if self._outcome.state != "answered":
            raise HostFailed(f"{self._agent} could not answer: {self._outcome.reason or self._outcome.state}")
        return self._outcome

    async def _ask(self, order: AddContext | RemoveContext, correlation: str, client: str) -> ContextReply:
        return await request(
            self._bus,
            topics.ORDERS,
            order,
            topics.REPLIES,
            correlation=correlation,
            to={"agent": self._agent},
            reply_to={"client": client},
            timeout_s=600.0,
        )

    def _is_new(self) -> bool:
        presence = self._presence
        return presence is not None and presence.state == "online" and presence.instance not in self._known

    async def _until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._news.clear()
            await self._news.wait()

    def _present(self, presence: Presence, _: Mapping[str, str]) -> None:
        self._presence = presence
        self._news.set()

    def _told(self, telemetry: Telemetry, _: Mapping[str, str]) -> None:
        if telemetry.instance not in self._known:
            self._telemetry = telemetry
            self._news.set()

    def _ended(self, outcome: Outcome, _: Mapping[str, str]) -> None:
        if isinstance(outcome, AnswerOutcome):
            self._outcome = outcome
            self._news.set()


def bus(settings: BrokerSettings, site: str) -> MqttBus:
    """A connection of our own."""
    return MqttBus(settings=settings, site=site, client_id=f"{site}-flash-{new_id()}")
