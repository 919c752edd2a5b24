"""Agents in virtual time: what they do is what the coordinator's model says where nothing changes, and goes on where
links break, memory fills or a policy fails.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import structlog

from coordinator.latency import Scenario
from coordinator.policy import POLICIES, Plan, get_policy
from coordinator.recording import Recorded
from scripts.policies.scenarios import LADDER
from scripts.replay.again import plans_again
from scripts.replay.results import Result
from scripts.replay.setting import MemoryTerms, RequestTerms, SharedTerms
from scripts.replay.sweep import Sweep, sweep
from scripts.traces.generate import Made, made
from tests.scripts.replays import agent, changed, place, replayed, steps

TRACE = made(Made(kind="walk", duration_s=120, median_bps=8e6, seed=3))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_on_steady_links_questions_take_what_was_predicted(policy: str) -> None:
    result = replayed(place(requests=RequestTerms(count=18, first_s=15, sources=(1, 2)), duration_s=240), policy)
    assert [question.state for question in result.questions] == ["answered"] * 18
    off = [each.e2e_s / each.predicted_s - 1 for each in result.questions if each.e2e_s and each.predicted_s]
    assert abs(statistics.median(off)) < 0.08
    assert max(map(abs, off)) < 0.6
    media = {link.medium for question in result.questions for link in question.links}
    assert media <= {"token": {"tokens"}, "kv": {"cache"}, "jmsra": {"tokens", "cache"}}.get(policy, media)


def test_what_travels_weighs_what_its_rung_says() -> None:
    result = replayed(place(requests=RequestTerms(count=6, first_s=15, sources=(1,))), "kv")
    ladder = {rung.name: rung.bits_per_element for rung in LADDER}
    for question in result.questions:
        (link,) = question.links
        bits = link.tokens * 11_520 * ladder[link.rung]
        assert link.sent_bytes == pytest.approx(bits / 8 + link.tokens * 2 + 600, rel=0.02)


def test_a_link_that_gets_slower_makes_caches_later_and_tokens_not() -> None:
    slow = place(*(agent(f"agent-{number}", mbps=4.0) for number in (1, 2, 3)))
    for policy, later in (("kv", 0.8), ("token", 0.0)):
        fast, slowed = (_mean(replayed(each, policy)) for each in (place(), slow))
        assert slowed >= fast * (1 + later) * 0.98
        assert later or slowed == pytest.approx(fast, rel=0.05)


def test_a_run_is_the_same_to_the_byte_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys, structlog\n"
        "from pathlib import Path\n"
        "from tests.scripts.replays import place, replayed\n"
        "from tests.scripts.test_replay_virtual import TRACE\n"
        "structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))\n"
        "from scripts.replay.setting import AgentTerms\n"
        "where = place(*(AgentTerms(name=f'a{i}', contexts=(200, 600)) for i in range(3)), noise=0.1, size_noise=0.1)\n"
        "replayed(where, trace=TRACE, trace_name='walk', record=Path(sys.argv[1]))\n"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)], check=True, env=_environment(seed), timeout=60
        )
    one, other = ((tmp_path / seed).read_bytes() for seed in ("1", "2"))
    assert len(one) > 10_000
    assert one == other


def test_its_recording_replays_to_the_same_plans(tmp_path: Path) -> None:
    result = replayed(place(duration_s=120.0), trace=TRACE, record=tmp_path / "a.mcap")
    compared = plans_again(Recorded(tmp_path / "a.mcap"))
    assert len(compared) == len(result.questions)
    assert [each.difference for each in compared] == [""] * len(compared)


def test_another_seed_is_another_run_and_the_same_one_the_same() -> None:
    where = place(requests=RequestTerms(count=6, first_s=15), noise=0.1)
    one, again, other = (replayed(where, seed=seed) for seed in (1, 1, 2))
    assert [question.e2e_s for question in one.questions] == [question.e2e_s for question in again.questions]
    assert [question.e2e_s for question in one.questions] != [question.e2e_s for question in other.questions]


def test_an_outage_delays_questions_and_ends_none_for_ever() -> None:
    """Of 25 s, longer than an agent may be silent: questions to it are refused, asked again, and answered."""
    outage = steps(*([20.0] * 25), *([0.0] * 25), *([20.0] * 100))
    agents = [agent("agent-1", mbps=None), *(agent(f"agent-{number}", mbps=None) for number in (2, 3))]
    agents = [msgspec.structs.replace(each, offset_s=0.0) for each in agents]
    where = place(*agents, requests=RequestTerms(count=10, first_s=15, patience_s=60), duration_s=120.0)
    result = replayed(where, "kv", trace=outage)
    assert len(result.questions) == 10
    assert sum(question.refused for question in result.questions) > 0
    assert all(question.state in {"answered", "failed", "expired"} for question in result.questions)
    assert sum(question.state == "answered" for question in result.questions) >= 7
    late = [question for question in result.questions if question.at_s > 60]
    assert late
    assert all(question.state == "answered" for question in late)


def test_a_link_that_is_never_there_ends_every_question_with_a_reason() -> None:
    agents = [agent("agent-1", mbps=0.0), agent("agent-2"), agent("agent-3")]
    result = replayed(place(*agents, requests=RequestTerms(count=8, first_s=15, patience_s=5, sources=(2,))))
    assert {question.state for question in result.questions} <= {"refused", "failed", "expired", "answered"}
    unheard = [question for question in result.questions if question.state == "refused"]
    assert unheard
    assert all("agent-1" in question.reason for question in unheard)


def test_caches_are_tightened_as_memory_fills_and_sent_so() -> None:
    memory = MemoryTerms(total_mb=400, available=0.6, least=0.02, trace="ramp", cache_budget_mb=60)
    agents = [agent("agent-1", memory=memory), agent("agent-2", contexts=()), agent("agent-3", contexts=())]
    result = replayed(place(*agents, requests=RequestTerms(count=8, first_s=15, sources=(1,))), "kv")
    (told,) = [each for each in result.agents if each.agent == "agent-1"]
    assert told.caches[0] == (2, 0, 0)
    assert told.time_s[-1] > 88
    exact, coded, none = told.caches[-1]
    assert exact < 2
    assert coded + none > 0
    assert told.pressure[0] < 0.8 < told.pressure[-1]
    rungs = [link.rung for question in result.questions for link in question.links if link.medium == "cache"]
    assert rungs[0] != rungs[-1] or rungs[-1] == "klt6"


def test_contexts_that_are_not_cached_are_read_first() -> None:
    agents = [agent(f"agent-{number}", cached=False) for number in (1, 2, 3)]
    result = replayed(place(*agents))
    assert all(each.caches[0][2] == 2 for each in result.agents)
    assert all(each.caches[-1] == (2, 0, 0) for each in result.agents)


def test_agents_of_one_cell_share_its_rate() -> None:
    """Every bit passes it twice."""
    names = [f"agent-{number}" for number in (1, 2, 3)]
    cell = (SharedTerms(name="cell", members=tuple(names), mbps=3.0),)
    requests = RequestTerms(count=6, first_s=15, sources=(1,))
    own = replayed(place(*(agent(name, mbps=3.0) for name in names), requests=requests), "kv")
    shared = replayed(place(*(agent(name, mbps=None) for name in names), requests=requests, channels=cell), "kv")
    assert _mean(shared) > 1.4 * _mean(own)
    assert [question.state for question in shared.questions] == ["answered"] * 6


def test_copies_ask_for_themselves() -> None:
    result = replayed(changed(place(), copies=3))
    assert len(result.questions) == 18
    assert {agent.agent for agent in result.agents} == {f"agent-{n}-{k}" for n in (1, 2, 3) for k in (1, 2, 3)}
    for question in result.questions:
        group = question.receiver.rsplit("-", 1)[1]
        assert all(link.sender.endswith(f"-{group}") for link in question.links)


class Raising:
    """A policy with a fault."""

    name = "raising"

    def plan(self, scenario: Scenario) -> Plan:
        raise ZeroDivisionError("of its own")


class Mine:
    """A policy of the user's own."""

    name = "mine"

    def plan(self, scenario: Scenario) -> Plan:
        return get_policy("token").plan(scenario)


def test_a_policy_that_raises_ends_its_own_run_only() -> None:
    names = ("token", f"{__name__}:Raising", f"{__name__}:Mine")
    token, raising, mine = sweep(Sweep(places=[place()], traces=[("", None)], policies=names), jobs=1)
    assert raising.policy == "raising"
    assert raising.error == "ZeroDivisionError: of its own"
    assert (token.error, mine.error) == ("", "")
    assert [each.e2e_s for each in token.questions] == pytest.approx([each.e2e_s for each in mine.questions])


def test_a_sweep_over_cores_gives_what_it_gives_in_turn() -> None:
    terms = Sweep(
        places=[place(*(agent(f"agent-{number}", mbps=None) for number in (1, 2, 3)))],
        traces=[("walk", TRACE), ("steady", steps(10.0))],
        policies=("kv", "token"),
        timelines=False,
    )
    one, other = ([msgspec.structs.replace(each, seconds=0.0) for each in sweep(terms, jobs)] for jobs in (1, 2))
    assert one == other
    assert [(each.trace, each.policy) for each in one] == [
        ("walk", "kv"),
        ("walk", "token"),
        ("steady", "kv"),
        ("steady", "token"),
    ]


async def test_nothing_is_left_running() -> None:
    before = len(asyncio.all_tasks())
    await asyncio.to_thread(replayed)
    assert len(asyncio.all_tasks()) == before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_agents_for_ten_minutes_in_flat_memory() -> None:
    code = (
        "import resource, structlog\n"
        "from tests.scripts.replays import agent, place, replayed\n"
        "from scripts.replay.setting import AgentTerms, RequestTerms\n"
        "from scripts.replay.virtual.run import Terms, run\n"
        "from scripts.traces.generate import Made, made\n"
        "from coordinator.policy import get_policy\n"
        "structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))\n"
        "agents = [AgentTerms(name=f'a{i}', contexts=(200, 600)) for i in range(4)]\n"
        "asked = RequestTerms(count=4, first_s=15.0)\n"
        "where = place(*agents, copies=250, duration_s=600.0, requests=asked)\n"
        "trace, marks = made(Made(kind='walk', duration_s=600, median_bps=8e6)), []\n"
        "def hear(at_s):\n"
        "    marks.append((at_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))\n"
        "terms = Terms(place=where, policy=get_policy('optimum'), trace=trace, timelines=False)\n"
        "result = run(terms, hear)\n"
        "early = next(rss for at_s, rss in marks if at_s > 120)\n"
        "answered = sum(question.state == 'answered' for question in result.questions)\n"
        "print(answered, len(result.questions), early, marks[-1][1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=_environment("0"), timeout=900
    )
    answered, asked, early_kib, last_kib = map(int, done.stdout.split())
    assert asked == 1_000
    assert answered >= 990
    assert last_kib < 1.15 * early_kib


def _mean(result: Result) -> float:
    return statistics.mean(question.e2e_s for question in result.questions if question.e2e_s)


def _environment(seed: str) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root}
