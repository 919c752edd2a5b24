"""What results come to: means, percentiles, misses, pairs; and results and recorded sessions as files."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.replay.errors import ResultInvalid
from scripts.replay.findings import UNANSWERED_S, agreement, by_name, cdf, compared, paired, replays_compared
from scripts.replay.results import AgentSeconds, LinkResult, QuestionResult, Result, read_results, write_results
from scripts.replay.tables import errors_of, tables_of


def question(number: int, e2e_s: float | None, **changes: object) -> QuestionResult:
    fields: dict[str, object] = {
        "number": number,
        "at_s": 10.0 * number,
        "receiver": "a",
        "tokens": 100,
        "sources": 1,
        "state": "answered" if e2e_s is not None else "expired",
        "deadline_s": None,
        "taken_e2e_s": e2e_s,
        "kl": 0.01,
        "predicted_s": 1.0,
        "links": (
            LinkResult(sender="b", tokens=100, own_tokens=0, medium="cache", rung="klt6", kl=0.01, sent_bytes=10),
        ),
    }
    return QuestionResult(**{**fields, **changes})  # type: ignore[arg-type]


def result(policy: str, *e2e_s: float | None, **changes: object) -> Result:
    fields: dict[str, object] = {
        "mode": "virtual",
        "site": "four",
        "trace": "walk",
        "device": "",
        "policy": policy,
        "seed": 0,
        "duration_s": 60.0,
        "questions": tuple(question(number, seconds) for number, seconds in enumerate(e2e_s)),
    }
    return Result(**{**fields, **changes})  # type: ignore[arg-type]


def test_a_question_that_only_others_answered_counts_as_lost_time() -> None:
    found = compared("x", [result("optimum", 1.0, 2.0, None, None), result("kv", 2.0, None, 4.0, None)])
    ours, kv = found.figures
    assert found.lost == 1
    assert ours.mean_s == pytest.approx((1 + 2 + UNANSWERED_S) / 3)
    assert kv.mean_s == pytest.approx((2 + UNANSWERED_S + 4) / 3)
    assert (ours.answered, ours.questions, kv.answered) == (2, 3, 2)
    assert (found.fixed, found.best) == ("kv", True)
    assert found.gain == pytest.approx(1 - ours.mean_s / kv.mean_s)


def test_the_better_fixed_policy_is_the_one_to_beat() -> None:
    found = compared("x", [result("optimum", 1.0, 1.0), result("token", 2.0, 2.0), result("kv", 1.5, 1.5)])
    assert found.fixed == "kv"
    assert found.gain == pytest.approx(1 / 3)
    assert (found.best, found.best_p95) == (True, True)
    worse = compared("x", [result("optimum", 3.0, 3.0), result("token", 2.0, 2.0)])
    assert worse.gain == pytest.approx(-0.5)
    assert not worse.best


def test_only_questions_of_the_same_run_are_compared() -> None:
    rows = [result("optimum", 1.0, 5.0), result("token", 2.0), result("optimum", 9.0, seed=1)]
    found = compared("x", rows)
    assert [each.questions for each in found.figures] == [1, 1]
    assert found.figures[0].mean_s == 1.0


def test_deadlines_off_by_and_media_are_counted() -> None:
    rows = (
        question(0, 2.0, deadline_s=1.0),
        question(1, 0.5, deadline_s=1.0, predicted_s=1.0),
        question(2, None, deadline_s=1.0),
        question(3, 4.0),
    )
    (figures,) = compared("x", [result("kv", questions=rows), result("kv", questions=rows, seed=1)]).figures
    assert (figures.timed, figures.missed) == (4, 2)  # what nobody answered is left out
    assert figures.off == pytest.approx(0.75)
    assert figures.media == (0, 6, 0)
    assert figures.kl == pytest.approx(0.01)
    assert figures.sent_bytes == 60


def test_groups_keep_their_order_and_leave_failed_runs_out() -> None:
    rows = [result("kv", 1.0, trace="b"), result("kv", 1.0, trace="a"), result("kv", 9.0, trace="a", seed=1, error="x")]
    groups = by_name(rows, lambda each: each.trace)
    assert [group.name for group in groups] == ["b", "a"]
    assert groups[1].figures[0].mean_s == 1.0


def test_pairs_have_intervals_that_hold_the_difference() -> None:
    first = [question(n, 2.0 + 0.1 * n) for n in range(30)]
    second = [question(n, 1.0 + 0.1 * n) for n in range(30)]
    found = paired("x", [zip(first, second, strict=True)])
    assert found is not None
    assert found.difference_s == pytest.approx((-1.0, -1.0, -1.0))
    assert found.ratio[1] < found.ratio[0] < found.ratio[2] < 1
    assert paired("x", [[(question(0, None), question(0, 1.0))]]) is None


def test_a_difference_that_scatters_by_run_is_as_uncertain_as_runs_are_few() -> None:
    gains = [0.1, 0.9] * 3
    runs = [[(question(n, 2.0), question(n, 2.0 - gain)) for n in range(200)] for gain in gains]
    by_run, at_once = paired("x", runs), paired("x", [[pair for run in runs for pair in run]])
    assert by_run is not None
    assert at_once is not None
    assert by_run.difference_s[0] == at_once.difference_s[0] == pytest.approx(-0.5)
    assert at_once.difference_s[2] - at_once.difference_s[1] < 0.06
    assert by_run.difference_s[2] - by_run.difference_s[1] > 0.5


def test_policies_of_one_run_are_no_witnesses_of_their_own() -> None:
    seconds = [[2.0 + 0.1 * (run % 2 * 9)] * 20 for run in range(4)]
    alone = replays_compared(
        [result("kv", 2.0, seed=n) for n in range(4)], [result("kv", *s, seed=n) for n, s in enumerate(seconds)]
    )
    both = replays_compared(
        [result(policy, 2.0, seed=n) for n in range(4) for policy in ("kv", "token", "optimum")],
        [result(policy, *s, seed=n) for n, s in enumerate(seconds) for policy in ("kv", "token", "optimum")],
    )
    assert both[0].difference_s == pytest.approx(alone[0].difference_s)


def test_two_replays_are_compared_run_by_run() -> None:
    before = [result("optimum", 2.0, 4.0), result("kv", 5.0, 5.0), result("kv", 1.0, seed=7)]
    after = [result("optimum", 1.0, None), result("kv", 5.0, 5.0), result("kv", 1.0, seed=8)]
    everything, ours, kv = replays_compared(before, after)
    assert (everything.name, everything.questions) == ("all", 3)
    assert (ours.questions, ours.ratio[0]) == (1, 0.5)
    assert kv.ratio[0] == 1.0
    assert replays_compared(before, [result("kv", 1.0, trace="other")]) == ()


def test_live_runs_stand_beside_their_twins() -> None:
    rows = [
        result("kv", 1.0, 2.0, 3.0, mode="live"),
        result("kv", 1.1, 2.2, None),
        result("token", 1.0, mode="live"),
        result("optimum", 1.0),
    ]
    one, everything = agreement(rows)
    assert (one.name, one.questions) == ("walk, kv", 2)
    assert one.ratio == pytest.approx(1.1)
    assert one.paired == pytest.approx(1.1)
    assert everything.questions == 2
    assert agreement([result("kv", 1.0)]) == ()


def test_a_distribution_ends_where_nothing_was_answered() -> None:
    assert cdf([result("kv", 3.0, 1.0, None, 2.0)], "kv") == ([1.0, 2.0, 3.0], [0.25, 0.5, 0.75])
    assert cdf([result("kv", 3.0)], "token") == ([], [])


def test_tables_say_what_is_best_and_what_failed() -> None:
    rows = [result("optimum", 1.0), result("kv", 2.0), result("token", 1.5, error="ValueError: odd")]
    tables = tables_of(rows)
    text = "\n".join(line for table in tables for line in table.markdown())
    assert "| walk | **1.00 / 1.00** | 2.00 / 2.00 | 50 % |" in text
    assert errors_of(rows) == ["walk, token, seed 0, virtual: ValueError: odd"]
    assert tables_of([rows[2]]) == []


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    seconds = AgentSeconds(
        agent="a", time_s=[1.0], link_mbps=[None], uplink_mbps=[2.0], pressure=[0.5], caches=[(1, 0, 2)]
    )
    rows = (result("kv", 1.0, None, agents=(seconds,)), result("token", error="x"))
    write_results(tmp_path / "r.jsonl", rows)
    assert read_results(tmp_path / "r.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no result"),
        (b"{}\n", "line 1"),
        (b"\xff\n", "line 1"),
        (b"[" * 100_000, "line 1"),
    ],
)
def test_a_file_that_holds_no_results_is_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(ResultInvalid) as caught:
        read_results(tmp_path / "r.jsonl")
    assert said in str(caught.value)
    with pytest.raises(ResultInvalid, match="can't be read"):
        read_results(tmp_path / "none.jsonl")


def test_results_of_a_later_version_are_refused(tmp_path: Path) -> None:
    write_results(tmp_path / "r.jsonl", [result("kv", 1.0, version=99)])
    with pytest.raises(ResultInvalid, match="version 99"):
        read_results(tmp_path / "r.jsonl")
