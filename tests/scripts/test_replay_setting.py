"""What is replayed, from files: sites, schedules, memory traces; whatever is wrong in them is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.replay.asks import Asked, context_name, read_schedule, schedule
from scripts.replay.errors import ReplayError, ScheduleInvalid, SettingInvalid
from scripts.replay.policies import policy_named
from scripts.replay.setting import SITES, MemoryTerms, RequestTerms, link_of, memory_of, read_setting
from scripts.traces import TraceInvalid
from scripts.traces.memory import MEMORY_KINDS, MadeMemory, made_memory, read_memory, write_memory
from tests.scripts.replays import agent, place, steps

AGENTS = '[[agents]]\nname = "a"\nmbps = 5\ncontexts = [100]\n[[agents]]\nname = "b"\nmbps = 5\n'
GROUP = (("agent-1", "agent-2", "agent-3"),)


def written(folder: Path, text: str) -> Path:
    path = folder / "site.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(SITES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_sites_are_good(path: Path) -> None:
    where = read_setting(path)
    assert where.name == path.stem
    asked = schedule(where, [[each.name for each in where.setting.agents]], 0)
    assert len(asked) == where.setting.requests.count


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "agents"),
        ("agents = 3", "agents"),
        ("[[agents", "site.toml: "),
        ('[[agents]]\nname = "a"\n', "length >= 2"),
        (AGENTS.replace('name = "b"', 'name = "a"'), "two agents are named a"),
        (AGENTS.replace("mbps = 5", "mbps = -1", 1), "mbps"),
        (AGENTS.replace("mbps = 5", "mbps = nan", 1), "mbps"),
        (AGENTS.replace("mbps = 5", 'device = "cray"', 1), "no device cray; there are x86, pi-4"),
        (AGENTS.replace("[100]", "[0]"), "contexts"),
        (AGENTS.replace("[100]", "[100, 100]"), "two contexts of one length"),
        (AGENTS.replace("contexts = [100]\n", ""), "no agent holds a context"),
        (AGENTS.replace("mbps", "mpbs", 1), "mpbs"),
        ("duration_s = 5\n" + AGENTS, "the first question comes after the end"),
        (AGENTS + '[[channels]]\nname = "w"\nmembers = ["c"]\n', "the member c, which is no agent"),
        (AGENTS + '[[channels]]\nname = "w"\nmembers = ["a", "a"]\n', "a is in two channels"),
        ("noise = inf\n" + AGENTS, "noise"),
        (AGENTS + "memory = { low_watermark = 0.9 }\n", "b: low_watermark 0.9 is above high_watermark"),
        (AGENTS + "[agents.speed]\nprefill_fixed_s = 0\nprefill_tps = 0\n", "agents"),
        ("copies = 10000\n" + AGENTS + "".join(f'[[agents]]\nname = "x{i}"\n' for i in range(9)), "more than 20,000"),
        ("telemetry = { interval_s = 9 }\n" + AGENTS, "never online"),
        (2 * '[[channels]]\nname = "w"\nmembers = ["a"]\n' + AGENTS, "two channels are named w"),
        ('[[channels]]\nname = "w"\nmembers = ["a"]\n' + AGENTS, "a is in a channel"),
        ("[requests]\ncount = 0\n" + AGENTS, "count"),
    ],
)
def test_a_site_that_is_wrong_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingInvalid) as caught:
        read_setting(written(tmp_path, text))
    assert said in str(caught.value)
    assert "site.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_site_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(SettingInvalid, match="can't be read"):
            read_setting(path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingInvalid, match=r"bytes\.toml"):
        read_setting(tmp_path / "bytes.toml")


def test_a_schedule_covers_all_receivers_lengths_and_numbers_of_sources_alike() -> None:
    where = place()
    asked = schedule(where, GROUP, 5)
    assert [each.at_s for each in asked] == sorted(each.at_s for each in asked)
    assert asked[0].at_s >= 15
    assert asked[-1].at_s < 90
    many = schedule(place(requests=RequestTerms(count=18, first_s=15)), GROUP, 5)
    kinds = [(each.receiver, len(each.sources), each.sources[0].partition(":")[2]) for each in many]
    assert {kind[0] for kind in kinds} == set(GROUP[0])
    assert {kind[2] for kind in kinds} == {context_name(200), context_name(600)}
    assert sum(each.deadline_s is not None for each in many) == 9
    assert all(each.receiver not in source for each in many for source in each.sources)
    assert schedule(place(), GROUP, 5) == asked
    assert schedule(place(), GROUP, 6) != asked


def test_questions_come_from_a_file_in_the_order_of_their_times(tmp_path: Path) -> None:
    lines = [
        {"at_s": 30, "receiver": "agent-2", "sources": ["agent-1:ctx-200"], "deadline_s": 3},
        {"at_s": 20.5, "receiver": "agent-1", "sources": ["agent-2", "agent-3:ctx-600"], "question": "Why?"},
    ]
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(["", *map(json.dumps, lines), ""]), encoding="utf-8")
    first, second = read_schedule(path, place().setting)
    assert first == Asked(at_s=20.5, receiver="agent-1", sources=("agent-2", "agent-3:ctx-600"), question="Why?")
    assert second.deadline_s == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"at_s": -1, "receiver": "agent-1", "sources": ["agent-2"]}', "at_s"),
        ('{"at_s": 1e400, "receiver": "agent-1", "sources": ["agent-2"]}', "line 2"),
        ('{"at_s": 1, "receiver": "agent-9", "sources": ["agent-2"]}', "there is no agent agent-9"),
        ('{"at_s": 1, "receiver": "agent-1", "sources": ["pi:x"]}', "there is no agent pi"),
        ('{"at_s": 1, "receiver": "agent-1", "sources": []}', "sources"),
        (
            '{"at_s": 1, "receiver": "agent-1", "sources": ["agent-2:ctx-7"]}',
            "holds no ctx-7; it holds ctx-200",
        ),
        ('{"at_s": 1, "receiver": "agent-1", "sources": ["agent-2", "agent-2"]}', "names a source twice"),
        ('{"at_s": 1, "receiver": "agent-1", "sources": ["agent-2"], "extra": 1}', "extra"),
        ('{"at_s": 90, "receiver": "agent-1", "sources": ["agent-2"]}', "is not before the end"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_schedule_that_is_wrong_is_refused_by_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"at_s": 1, "receiver": "agent-1", "sources": ["agent-2"]}\n' + line, encoding="utf-8")
    with pytest.raises(ScheduleInvalid) as caught:
        read_schedule(path, place().setting)
    assert "line 2" in str(caught.value)
    assert said in str(caught.value)


def test_an_empty_schedule_is_refused(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text("\n")
    with pytest.raises(ScheduleInvalid, match="holds no question"):
        read_schedule(tmp_path / "asked.jsonl", place().setting)


def test_a_link_follows_its_own_trace_or_the_run_s_from_its_place_on() -> None:
    trace = steps(1, 2, 3, 4)
    assert link_of(place(), agent("a", mbps=7.0), trace, 0) == 7e6
    late = link_of(place(), agent("a", mbps=None, offset_s=2.0), trace, 0)
    assert not isinstance(late, float)
    assert [late.at(at_s).bandwidth_bps for at_s in (0, 1, 2, 3)] == [3e6, 4e6, 1e6, 2e6]
    assert late.next_change_s(0.5) == 1.0
    firsts = {link_of(place(), agent(name, mbps=None), trace, 0).at(0).bandwidth_bps for name in "abcdefgh"}  # type: ignore[union-attr]
    assert len(firsts) > 1
    with pytest.raises(SettingInvalid, match="neither trace nor mbps"):
        link_of(place(), agent("a", mbps=None), None, 0)


@pytest.mark.parametrize("kind", sorted(MEMORY_KINDS))
def test_memory_traces_are_made_within_their_bounds_and_read_as_written(tmp_path: Path, kind: str) -> None:
    terms = MadeMemory(kind=kind, total_bytes=10**9, duration_s=600, least=0.1, most=0.6, seed=2)
    trace = made_memory(terms)
    free = [sample.available_bytes for sample in trace.samples]
    assert min(free) >= 0.1 * 10**9 - 1
    assert max(free) <= 0.6 * 10**9
    assert min(free) < 0.2 * 10**9
    write_memory(tmp_path / "m.csv", trace)
    assert read_memory(tmp_path / "m.csv", 10**9) == trace
    assert made_memory(terms) == trace


def test_memory_that_runs_out_makes_tasks_wait() -> None:
    trace = made_memory(MadeMemory(kind="ramp", total_bytes=10**9, duration_s=100, least=0.0, most=0.5))
    assert trace.at(0).stalled_share == 0
    assert trace.at(99).stalled_share > 0.8
    assert trace.at(1e9) == trace.samples[-1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 0),
        ("time_s\n0\n", 1),
        ("time_s,available_bytes\n0,-1\n", 2),
        ("time_s,available_bytes\n0,2e9\n", 2),
        ("time_s,available_bytes\n0,1\n1,1\n3,1\n", 4),
        ("time_s,available_bytes,stalled_share\n0,1,2\n", 2),
        ("time_s,available_bytes\n0,nan\n", 2),
    ],
)
def test_a_memory_trace_that_is_wrong_is_refused_by_line(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(TraceInvalid) as caught:
        read_memory(tmp_path / "m.csv", 10**9)
    assert caught.value.line == line


def test_memory_of_an_agent_is_its_trace_s_or_steady() -> None:
    where = place()
    assert memory_of(where, agent("a"), 0).at(50).available_bytes == int(0.7 * 4_096e6)
    ramp = memory_of(where, agent("a", memory=MemoryTerms(total_mb=100, trace="ramp")), 0)
    assert ramp.at(80).available_bytes < ramp.at(0).available_bytes == 70_000_000
    with pytest.raises(SettingInvalid, match="a: "):
        memory_of(where, agent("a", memory=MemoryTerms(trace="gone.csv")), 0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody", "no policy is called nobody"),
        ("nowhere:Policy", "No module named"),
        ("json:nothing", "has no attribute"),
        ("json:dumps", "has no name, or no plan"),
        ("tests.scripts.test_replay_setting:Unfinished", "TypeError"),
        ("os:abort_", "has no attribute"),
    ],
)
def test_a_policy_that_is_none_is_one_line(name: str, said: str) -> None:
    with pytest.raises(ReplayError) as caught:
        policy_named(name)
    assert said in str(caught.value)


class Unfinished:
    """Can't be made without arguments."""

    def __init__(self, must: int) -> None:
        self.must = must
