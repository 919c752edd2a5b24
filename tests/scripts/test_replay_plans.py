"""A recorded session's plans, computed again: the same ones, whatever the session learned on its way."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from broker_config.messages import AnswerOrder, Ask, Planned, SendOrder, SendProgress
from coordinator import recording
from coordinator.recording import Recorded, Recording
from coordinator.settings import CoordinatorSettings, PlanningSettings
from scripts.replay.__main__ import app
from scripts.replay.again import Compared, plans_again
from scripts.replay.clock import run_virtual
from tests.coordinator.site import FakeSite, answered, fake_site, question, sent

QUESTIONS = 8


async def _session(site: FakeSite) -> None:
    """Questions whose transfers are slower than planned, so that the coordinator learns; two overlap."""
    for number in range(1, QUESTIONS + 1):
        ask = question(number, policy=["optimum", "kv", "jmsra", "token"][number % 4], max_new_tokens=4)
        await site.asker.ask(ask)
        order = await site.receiver.order(AnswerOrder, number)
        for sender in (site.pi_1, site.pi_2):
            send = await sender.order(SendOrder, number)
            sender.sending = (SendProgress(transfer=send.transfer, moved_bytes=1_000),)
            await asyncio.sleep(0.4)
            await sender.tell(
                sent(send, sender.name, payload_bytes=600_000, wire_bytes=600_000, transfer_s=0.3 + 0.05 * number)
            )
            sender.sending = ()
        await site.receiver.piece(order, 0, "the north one")
        await site.receiver.tell(answered(order))
        if number % 3:
            await site.asker.end(ask.request)
            await asyncio.sleep(1.7)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of it, in small chunks."""
    folder = tmp_path_factory.mktemp("session")

    async def run() -> None:
        settings = CoordinatorSettings(planning=PlanningSettings(policy="optimum"))
        async with fake_site(folder, settings=settings, record=folder / "a.mcap") as site:
            await _session(site)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "CHUNK_BYTES", 2_000)
        run_virtual(run())
    return folder / "a.mcap"


def test_a_recorded_sessions_plans_come_out_again(session: Path) -> None:
    found = plans_again(Recorded(session))
    assert [each.difference for each in found] == [""] * QUESTIONS
    assert all(each.recorded is not None for each in found)
    predicted_s = {each.again.predicted_e2e_s for each in found if each.again}
    assert len(predicted_s) > QUESTIONS / 2  # what was learned on the way is in them


def test_other_settings_give_other_plans_and_it_says_where(session: Path, tmp_path: Path) -> None:
    recorded = Recorded(session)
    planning = msgspec.structs.replace(recorded.session.planning, tie_fraction=1.0)
    made = Recording(tmp_path / "b.mcap", msgspec.structs.replace(recorded.session, planning=planning))
    for event in recorded:
        made.add(event)
    made.close()
    differences = [each.difference for each in plans_again(Recorded(made.path))]
    assert any("rung" in difference for difference in differences)


def test_the_command_says_how_many_are_the_same(session: Path, tmp_path: Path) -> None:
    whole = CliRunner().invoke(app, ["plans", str(session)])
    assert whole.exit_code == 0
    assert f"{QUESTIONS} of {QUESTIONS} plans are the same" in whole.stdout
    part = tmp_path / "part.mcap"
    part.write_bytes(session.read_bytes()[: session.stat().st_size // 3])
    cut = CliRunner().invoke(app, ["plans", str(part)])
    assert cut.exit_code == 0
    assert "it was cut short, as by a crash; replayed up to there" in cut.stdout
    none = CliRunner().invoke(app, ["plans", str(tmp_path / "none.mcap")])
    assert none.exit_code == 1
    assert none.stderr.strip() == (
        f"replay: {tmp_path / 'none.mcap'} can't be read as a recorded session: No such file or directory"
    )


def test_questions_may_hold_whatever_people_write(session: Path, tmp_path: Path) -> None:
    """The table is no markup."""
    made = Recording(tmp_path / "b.mcap", (recorded := Recorded(session)).session)
    for event in recorded:
        if isinstance(event.message, Ask):
            message = msgspec.structs.replace(event.message, question="[/INST] now?")
            event = replace(event, message=message)  # noqa: PLW2901
        made.add(event)
    made.close()
    shown = CliRunner().invoke(app, ["plans", str(made.path)])
    assert shown.exit_code == 0, shown.output
    assert f"{QUESTIONS} of {QUESTIONS} plans are the same" in shown.output


def test_a_plan_that_only_one_run_has_is_a_difference(session: Path) -> None:
    planned = next(e.message for e in Recorded(session) if isinstance(e.message, Planned))
    assert Compared("1", planned.report, None).difference == "only one of them has a plan"
    assert not Compared("1", None, None).difference
    assert not Compared("1", planned.report, planned.report).difference
    slower = msgspec.structs.replace(planned.report, predicted_e2e_s=planned.report.predicted_e2e_s + 1)
    assert "predicted E2E" in Compared("1", planned.report, slower).difference
