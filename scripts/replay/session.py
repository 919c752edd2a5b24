"""What came of a recorded session, as results: of each policy that questions were asked under."""

from __future__ import annotations

from pathlib import Path

from broker_config.messages import Ended, Presence, RoundReport
from coordinator.recording import Recorded
from scripts.replay.asks import Asked, Taken
from scripts.replay.results import QuestionResult, Result, Seconds, question_result


def session_results(path: Path) -> tuple[tuple[Result, ...], str]:
    """By policy, in order of appearance; and how the recording ended too early, or "". Raises RecordingInvalid.

    A policy's questions are numbered as they ended, so that those that were asked under every policy in turn can be
    compared. What an agent's link really did is not known.
    """
    recorded = Recorded(path)
    seconds, last_s = Seconds(), 0.0
    ends: list[tuple[float, RoundReport]] = []
    kls: dict[str, float] = {}
    for event in recorded:
        at_s = event.at_s - recorded.session.clock_s
        last_s = max(last_s, at_s)
        if event.way == "heard":
            seconds.add(event, at_s)
            if isinstance(event.message, Presence) and event.message.model is not None:
                model = event.message.model
                kls |= {rung.name: rung.kl for rung in (*model.baselines, *model.ladder)}
        elif isinstance(event.message, Ended):
            ends.append((at_s, event.message.report))
    by_policy: dict[str, list[QuestionResult]] = {}
    for at_s, report in ends:
        known = by_policy.setdefault(report.policy, [])
        known.append(_question(len(known), at_s, report, kls))
    results = tuple(
        Result(
            mode="recorded",
            site=recorded.session.site,
            trace=path.stem,
            device="",
            policy=policy,
            seed=0,
            duration_s=last_s,
            questions=tuple(questions),
            agents=seconds.agents,
        )
        for policy, questions in by_policy.items()
    )
    return results, recorded.cut


def _question(number: int, ended_s: float, report: RoundReport, kls: dict[str, float]) -> QuestionResult:
    asked = Asked(
        at_s=max(0.0, ended_s - (report.total_s or 0.0)),
        receiver=report.receiver,
        sources=tuple(f"{link.sender}:{link.context}" for link in report.links) or (report.receiver,),
        deadline_s=report.deadline_s or None,
    )
    return question_result(number, asked, Taken(report), kls)
