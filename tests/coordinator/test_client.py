"""Asking from Python: every way a question can go comes back as a report or as one error with one line."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, cast

import pytest

from broker_config import topics
from broker_config.errors import BrokerUnreachable, RequestTimeout
from broker_config.messages import (
    AddContext,
    Ask,
    CancelAsk,
    ContextReply,
    CoordinatorPresence,
    CoordinatorRequest,
    Ended,
    GiveContext,
    ListContexts,
    Order,
    Piece,
    Planned,
    Refused,
    Remind,
    RemoveContext,
    RoundEvent,
    RoundReport,
)
from broker_config.settings import BrokerSettings
from coordinator import client as module
from coordinator.client import PRESENCE_TIMEOUT_S, REPLY_TIMEOUT_S, Client
from coordinator.errors import CoordinatorMissing, RequestImpossible, RequestRefused
from scripts.demo.processes import free_port
from scripts.replay.clock import run_virtual
from tests.coordinator.builders import context, instance, presence, telemetry
from tests.memory_bus import MemoryBroker

REPORT = context("report")


class FakeCoordinator:
    """Keeps what it is asked; `answer`, if set, says what to do with a request."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker, self.bus = broker, broker.bus()
        self.requests: list[CoordinatorRequest] = []
        self.answer: Callable[[Any], Awaitable[None]] | None = None
        self.news = asyncio.Event()

    async def start(self, state: str = "online") -> None:
        await self.bus.subscribe(topics.REQUESTS, self._take)
        online = CoordinatorPresence(instance=instance(1), state="online" if state == "online" else "offline")
        await self.bus.publish(topics.COORDINATOR, online)

    async def tell(self, ask: Ask, *events: RoundEvent) -> None:
        for event in events:
            await self.bus.publish(topics.EVENTS, event, client=ask.client)

    def _take(self, request: CoordinatorRequest, _: Mapping[str, str]) -> None:
        self.requests.append(request)
        self.news.set()
        if self.answer is not None:
            self.task = asyncio.ensure_future(self.answer(request))


def report_of(ask: Ask, state: str = "answered") -> RoundReport:
    return RoundReport(
        request=ask.request, question=ask.question, receiver=ask.receiver, policy="kv", state=cast("Any", state)
    )


Story = Callable[[Client, FakeCoordinator], Coroutine[Any, Any, None]]


def play(story: Story) -> None:
    """A client and a coordinator on the bus in memory, in virtual time."""

    async def run() -> None:
        broker = MemoryBroker()
        client, coordinator = Client(), FakeCoordinator(broker)
        client._bus = cast("Any", broker.bus())
        await story(client, coordinator)
        assert not list(cast("Any", client._bus).routes), "a subscription was left behind"

    run_virtual(run(), limit_s=1_000)


async def ask(client: Client, **changes: Any) -> RoundReport:
    return await client.ask(**{"question": "Which valve?", "sources": ["pi-1"], "receiver": "jetson-1", **changes})


def test_a_question_comes_back_as_its_report_with_its_events_on_the_way() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        async def answer(asked: Ask) -> None:
            stranger = Refused(request=instance(99), reason="another question of this client")
            events: list[RoundEvent] = [
                Planned(report=report_of(asked, "planned")),
                stranger,
                Piece(request=asked.request, text="the north one"),
                Ended(report=report_of(asked)),
                Ended(report=report_of(asked, "failed")),
            ]
            await coordinator.tell(asked, *events)

        coordinator.answer = answer
        await coordinator.start()
        seen: list[RoundEvent] = []
        report = await ask(client, policy="kv", deadline_s=3.0, max_new_tokens=7, on_event=seen.append)
        (asked,) = coordinator.requests
        assert isinstance(asked, Ask)
        assert (asked.sources, asked.policy, asked.deadline_s, asked.max_new_tokens) == (("pi-1",), "kv", 3.0, 7)
        assert report == report_of(asked)
        assert [type(event) for event in seen] == [Planned, Piece, Ended]

    play(story)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (None, 0)),
        ({"rung": "qkvcomm-6", "facts_tokens": 48}, ("qkvcomm-6", 48)),
        ({"rung": "r" * 32, "facts_tokens": 1_024}, ("r" * 32, 1_024)),
    ],
)
def test_the_rung_and_the_tokens_of_facts_travel_with_the_question(
    changes: dict[str, Any], expected: tuple[str | None, int]
) -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        async def answer(asked: Ask) -> None:
            await coordinator.tell(asked, Ended(report=report_of(asked)))

        coordinator.answer = answer
        await coordinator.start()
        await ask(client, **changes)
        (asked,) = coordinator.requests
        assert isinstance(asked, Ask)
        assert (asked.rung, asked.facts_tokens) == expected

    play(story)


def test_two_questions_at_once_get_their_own_answers() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        async def answer(asked: Ask) -> None:
            await asyncio.sleep(5.0 if asked.question == "slow" else 1.0)
            await coordinator.tell(asked, Ended(report=report_of(asked)))

        coordinator.answer = answer
        await coordinator.start()
        reports = await asyncio.gather(ask(client, question="slow"), ask(client, question="fast"))
        assert [report.question for report in reports] == ["slow", "fast"]

    play(story)


def test_without_a_coordinator_nothing_is_asked_and_one_line_says_how_to_start_one() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        start_s = asyncio.get_running_loop().time()
        with pytest.raises(CoordinatorMissing) as raised:
            await ask(client)
        assert str(raised.value) == "no coordinator is running for site home; start one with `coordinator run`"
        assert asyncio.get_running_loop().time() - start_s == pytest.approx(PRESENCE_TIMEOUT_S)
        await coordinator.start("offline")
        for call in (ask(client), client.give("pi-1", "report", "text"), client.coordinator()):
            with pytest.raises(CoordinatorMissing):
                await call
        assert coordinator.requests == []

    play(story)


def test_a_coordinator_that_comes_a_moment_later_is_found() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        finding = asyncio.ensure_future(client.coordinator())
        await asyncio.sleep(PRESENCE_TIMEOUT_S / 2)
        await coordinator.start()
        assert (await finding).instance == instance(1)

    play(story)


def test_a_refused_question_raises_the_line_of_whoever_refused_it() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        async def refuse(asked: Ask) -> None:
            await coordinator.tell(asked, Refused(request=asked.request, reason="pi-1 is offline"))

        coordinator.answer = refuse
        await coordinator.start()
        with pytest.raises(RequestRefused, match=r"^pi-1 is offline$"):
            await ask(client)
        assert [type(request) for request in coordinator.requests] == [Ask]

    play(story)


def test_a_client_that_was_cut_off_asks_for_the_end_it_may_have_missed() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        await coordinator.start()
        asking = asyncio.create_task(ask(client))
        await coordinator.news.wait()
        (asked,) = coordinator.requests
        assert isinstance(asked, Ask)
        await asyncio.sleep(1)
        await client._remind()  # what the bus calls at every connect
        coordinator.answer = None
        await coordinator.tell(asked, Ended(report=report_of(asked)))
        assert await asking == report_of(asked)
        assert [type(request) for request in coordinator.requests] == [Ask, Remind]
        await client._remind()
        assert len(coordinator.requests) == 2

    play(story)


def test_a_question_that_nobody_ends_is_withdrawn_after_the_time_out() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        await coordinator.start()
        with pytest.raises(RequestTimeout, match="within 20 s"):
            await ask(client, timeout_s=20.0)
        await asyncio.sleep(1)
        asked, withdrawn = coordinator.requests
        assert isinstance(asked, Ask)
        assert withdrawn == CancelAsk(request=asked.request)

    play(story)


@pytest.mark.parametrize("down", [False, True])
def test_a_cancelled_question_is_withdrawn_and_stays_cancelled_even_without_a_broker(down: bool) -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        await coordinator.start()
        asking = asyncio.ensure_future(ask(client))
        await coordinator.news.wait()
        coordinator.broker.down = down
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(1)
        kinds = [type(request) for request in coordinator.requests]
        assert kinds == ([Ask] if down else [Ask, CancelAsk])

    play(story)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"question": ""}, "the question is empty; ask something"),
        ({"question": "x" * 5_000}, "question: expected `str` of length <= 4096, not 5000"),
        ({"sources": []}, "it names no source; name at least one agent that holds a context"),
        ({"sources": ["pi-1", "Pi 2"]}, "a source is written pi-1, or pi-1:report for one context of it, not Pi 2"),
        ({"sources": ["pi-1"] * 65}, "sources: expected `array` of length <= 64, not 65"),
        (
            {"receiver": "the jetson"},
            "an agent's id is made of small letters, digits, '-' and '_', 32 at most, not the",
        ),
        ({"receiver": ""}, "32 at most, not nothing"),
        ({"policy": "Best!"}, "a policy's name is made of small letters, digits, '-' and '_', not Best!"),
        ({"deadline_s": 0.0}, "deadline_s: expected `float` > 0.0, not 0.0"),
        ({"deadline_s": float("nan")}, "deadline_s: expected `float` > 0.0, not nan"),
        ({"quality_floor": -1.0}, "quality_floor: expected `float` >= 0.0, not -1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected `int` >= 1, not 0"),
        (
            {"rung": "Q 6"},
            "a rung's name is made of small letters, digits, '.', '-' and '_', 32 at most, not Q 6",
        ),
        ({"rung": "q6\n"}, "a rung's name is made of small letters, digits, '.', '-' and '_', 32 at most, not q6"),
        ({"rung": ""}, "rung: expected `str` of length >= 1, not nothing"),
        ({"rung": "q" * 33}, "rung: expected `str` of length <= 32, not qqq"),
        ({"facts_tokens": -1}, "facts_tokens: expected `int` >= 0, not -1"),
        ({"facts_tokens": 1_025}, "facts_tokens: expected `int` <= 1024, not 1025"),
        ({"facts_tokens": 0.5}, "facts_tokens: expected `int`, got `float`, not 0.5"),
    ],
)
def test_a_question_that_would_be_dropped_unread_is_told_so_at_once(changes: dict[str, Any], line: str) -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        await coordinator.start()
        with pytest.raises(RequestImpossible) as raised:
            await ask(client, **changes)
        assert line in str(raised.value)
        assert "\n" not in str(raised.value)
        assert coordinator.requests == []

    play(story)


@pytest.mark.parametrize(
    ("agent", "name", "text", "line"),
    [
        ("pi-1", "report", "", "the text is empty; there is nothing to hold"),
        ("pi-1", "report", "x" * 300_000, "text: expected `str` of length <= 262144, not 300000"),
        (
            "pi-1",
            "my report",
            "text",
            "a context's name is made of letters, digits, '.', '-' and '_', 64 at most, not my",
        ),
        ("pi/1", "report", "text", "an agent's id is made of"),
    ],
)
def test_a_text_that_cannot_be_given_is_told_so_at_once(agent: str, name: str, text: str, line: str) -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        await coordinator.start()
        with pytest.raises(RequestImpossible) as raised:
            await client.give(agent, name, text)
        assert line in str(raised.value)
        assert coordinator.requests == []

    play(story)


def test_a_given_text_goes_through_the_coordinator_and_what_the_agent_holds_comes_back() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        async def hold(given: GiveContext) -> None:
            reply = ContextReply(correlation=given.correlation, agent=given.agent, contexts=(REPORT,))
            await coordinator.bus.publish(topics.REPLIES, reply, client=given.client)

        coordinator.answer = hold
        await coordinator.start()
        assert await client.give("pi-1", "report", "The valve is north.") == (REPORT,)
        (given,) = coordinator.requests
        assert isinstance(given, GiveContext)
        assert (given.agent, given.name, given.text) == ("pi-1", "report", "The valve is north.")

    play(story)


def test_contexts_are_listed_and_removed_without_a_coordinator_and_an_agents_refusal_is_raised() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        agent = coordinator.broker.bus()
        orders: list[Order] = []
        replies: list[asyncio.Future[None]] = []

        def take(order: Order, _: Mapping[str, str]) -> None:
            assert isinstance(order, AddContext | ListContexts | RemoveContext)
            orders.append(order)
            error = "no context called map is held" if isinstance(order, RemoveContext) else ""
            reply = ContextReply(correlation=order.correlation, agent="pi-1", contexts=(REPORT,), error=error)
            replies.append(asyncio.ensure_future(agent.publish(topics.REPLIES, reply, client=order.client)))

        await agent.subscribe(topics.ORDERS, take, agent="pi-1")
        assert await client.contexts("pi-1") == (REPORT,)
        with pytest.raises(RequestRefused, match=r"^no context called map is held$"):
            await client.remove("pi-1", "map")
        assert [type(order) for order in orders] == [ListContexts, RemoveContext]

    play(story)


def test_an_agent_that_does_not_answer_is_a_time_out_with_its_topic() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        with pytest.raises(RequestTimeout, match=f"kvbus/home/agents/pi-9/orders within {REPLY_TIMEOUT_S:g} s"):
            await client.contexts("pi-9")
        with pytest.raises(RequestImpossible, match="an agent's id is made of"):
            await client.contexts("pi/9")

    play(story)


def test_the_fleet_is_what_agents_say_of_themselves_now() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        bus = coordinator.broker.bus()
        await bus.publish(topics.PRESENCE, presence("pi-1"), agent="pi-1")
        await bus.publish(topics.TELEMETRY, telemetry("pi-1", contexts=[REPORT]), agent="pi-1")
        fleet = await client.fleet()
        state = fleet.agents["pi-1"]
        assert fleet.online("pi-1", state.last_seen_s)
        assert state.telemetry is not None
        assert state.telemetry.contexts == (REPORT,)

    play(story)


def test_a_watch_wakes_when_the_fleet_is_as_wanted() -> None:
    async def story(client: Client, coordinator: FakeCoordinator) -> None:
        bus = coordinator.broker.bus()
        async with client.watch() as watch:
            waiting = asyncio.ensure_future(watch.until(lambda fleet: "pi-2" in fleet.agents))
            for agent in ("pi-1", "pi-2"):
                await asyncio.sleep(1)
                assert not waiting.done()
                await bus.publish(topics.PRESENCE, presence(agent), agent=agent)
            assert set((await waiting).agents) == {"pi-1", "pi-2"}

    play(story)


def test_without_a_broker_one_line_names_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 0.2)
    nobody = BrokerSettings(port=free_port())
    with pytest.raises(BrokerUnreachable, match=f"^no MQTT broker at 127.0.0.1:{nobody.port}: connection refused$"):
        module.ask("Which valve?", sources=["pi-1"], receiver="jetson-1", broker=nobody)


def test_a_program_without_an_event_loop_asks_with_the_same_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    terms: dict[str, Any] = {
        "policy": "kv",
        "deadline_s": 3.0,
        "quality_floor": 0.5,
        "rung": "q6",
        "facts_tokens": 48,
        "max_new_tokens": 7,
    }
    asked: list[dict[str, Any]] = []

    class Connected(Client):
        async def __aenter__(self) -> Client:
            return self

        async def __aexit__(self, *_: object) -> None:
            return None

        async def ask(self, question: str, **given: Any) -> RoundReport:
            asked.append(given)
            return RoundReport(
                request=instance(1), question=question, receiver="jetson-1", policy="kv", state="answered"
            )

    monkeypatch.setattr(module, "Client", Connected)
    report = module.ask("Which valve?", sources=["pi-1"], receiver="jetson-1", **terms)
    assert report.question == "Which valve?"
    assert asked == [{"sources": ["pi-1"], "receiver": "jetson-1", **terms}]
