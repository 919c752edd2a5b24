"""Backfill is set against the eviction it fills, over the same items; its picture and its table say the same."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from scripts.evaluate import report, tables
from scripts.evaluate.errors import EvaluationError
from scripts.evaluate.method import GROUPS
from scripts.evaluate.records import Record
from scripts.evaluate.recovery import Backfill, damage_recovery, pairs, recoveries
from scripts.evaluate.summary import Estimate
from tests.scripts.evaluated import record
from tests.scripts.test_evaluate_tables import cells

KL = {"text": 0.0, "none": 2.0, "fp16": 0.01, "fp16-e5": 1.0, "fp16-e5-b4": 0.7, "fp16-h50": 0.2, "fp16-h50-b2": 0.3}
METHODS = list(KL)
SCORE = {"text": 0.8, "none": 0.0, "fp16": 0.8, "fp16-e5": 0.3, "fp16-e5-b4": 0.5, "fp16-h50": 0.9, "fp16-h50-b2": 0.7}


def asked(dataset: str, item: int, method: str) -> Record:
    """An item's record; the n-th one's figures are off by n hundredths."""
    off, chosen = item / 100, dataset == "arc"
    return record(
        str(item),
        method,
        dataset,
        kl=KL[method] + (off if KL[method] else 0),
        f1=SCORE[method] - off,
        choice=float(SCORE[method] > 0.4) if chosen else None,
    )


RECORDS = [asked(dataset, item, method) for dataset in ("squad", "arc") for method in METHODS for item in range(6)]
FOUND = recoveries(RECORDS, METHODS)
"""On either data set at 5 % by layer, at 50 % by head."""


def test_a_method_that_backfills_belongs_to_the_one_that_only_evicts() -> None:
    assert pairs(["klt6-h30-b2", "klt6-h30", "fp16", "fp16-e10-b4", "none"]) == (
        Backfill("klt6-h30-b2", "klt6-h30", 0.3, "head"),
    )
    assert pairs(["q4-l70-e5+facts", "q4-l70-e5-b12+facts", "q4-l70-e5-b12"]) == (
        Backfill("q4-l70-e5-b12+facts", "q4-l70-e5+facts", 0.05, "layer"),
    )
    assert len(pairs(GROUPS["eviction"])) == 10


def test_a_curve_joins_pairs_that_differ_in_their_share() -> None:
    curves = [
        each.curve
        for name in ("fp16-e5-b4", "fp16-e50-b4", "fp16-e50-b2", "fp16-h50-b4", "q4-e5-b4", "fp16-e5-b4+facts")
        for each in pairs([name, name.replace("-b4", "").replace("-b2", "")])
    ]
    assert curves[0] == curves[1] == "fp16-e*-b4, by layer (-e)"
    assert len(set(curves)) == 5


def test_damage_is_what_eviction_loses_and_recovery_what_backfill_regains() -> None:
    assert [(each.dataset, each.method.evicted, each.items) for each in FOUND] == [
        (dataset, name, 6) for dataset in ("squad", "arc") for name in ("fp16-e5", "fp16-h50")
    ]
    low, high = FOUND[:2]
    assert low.kl_damage.mean == pytest.approx(1.025)
    assert low.kl_damage.low < 1.025 < low.kl_damage.high
    assert low.kl_recovery.mean == pytest.approx(0.3)
    assert high.kl_recovery.mean == pytest.approx(-0.1)
    assert low.f1_damage is not None
    assert low.f1_recovery is not None
    assert low.f1_damage.mean == pytest.approx(0.5)
    assert low.f1_recovery.mean == pytest.approx(0.2)
    assert low.f1_recovery.high - low.f1_recovery.low < 1e-9  # paired: the items' own spread is not in it
    assert low.choice_damage is low.choice_recovery is None


def test_multiple_choice_is_judged_by_its_choices() -> None:
    low, high = FOUND[2:]
    assert (low.f1_damage, low.f1_recovery) == (None, None)
    assert (low.choice_damage, low.choice_recovery) == (Estimate(1, 1, 1, 6), Estimate(1, 1, 1, 6))
    assert (high.choice_damage, high.choice_recovery) == (Estimate(0, 0, 0, 6), Estimate(0, 0, 0, 6))


def test_only_items_that_all_methods_have_done_are_counted() -> None:
    begun = [each for each in RECORDS if each.item != "5" or each.method == "fp16-e5"]
    assert {each.items for each in recoveries(begun, METHODS)} == {5}


def test_without_the_uncompressed_run_there_is_no_damage_but_in_kl() -> None:
    methods = ["fp16-e5", "fp16-e5-b4"]
    found = recoveries(RECORDS, methods)[0]
    assert (found.kl_damage, found.f1_damage) == (FOUND[0].kl_damage, None)
    assert found.f1_recovery == FOUND[0].f1_recovery
    assert recoveries(RECORDS, ["text", "fp16-e5"]) == ()


def test_the_table_shows_both_and_only_the_metrics_there_are() -> None:
    lines = cells(tables.backfill(FOUND[:2]))
    assert lines[0] == ["method", "kept", "KL, nats: damage", "recovery", "F1, points: damage", "recovery"]
    name, kept, damage, recovery, lost, gained = lines[2]
    assert (name, kept, recovery, lost, gained) == ("fp16-e5-b4", "5 %", "+0.300", "+50.0", "+20.0")
    assert damage.startswith("1.025 (1.0")
    assert lines[3][3] == "-0.100"
    assert cells(tables.backfill(FOUND[2:]))[0][4:] == ["right choice, points: damage", "recovery"]
    both = tables.backfill(FOUND)
    assert "**squad**, 6 items" in both
    assert cells(both)[2][6:] == ["–", "–"]


def test_every_data_set_is_drawn_and_every_point_named(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "damage.png"
    damage_recovery(FOUND, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {
        "squad, 6 items",
        "arc, 6 items",
        "damage by eviction: F1, points",
        "recovery by backfill: right choice, points",
        "fp16-e*-b4, by layer (-e)",
        "fp16-h*-b2, by head (-h)",
    } <= set(texts)
    assert (texts.count("5 %"), texts.count("50 %")) == (4, 4)


def test_points_at_the_same_place_are_all_named(tmp_path: Path, texts: list[str]) -> None:
    shares = (5, 10, 20, 30, 50)
    methods = ["text", *(f"fp16-{by}{share}{rank}" for by in "eh" for share in shares for rank in ("", "-b2"))]
    damage_recovery(recoveries([record(method=method) for method in methods], methods), tmp_path / "damage.png")
    assert [texts.count(f"{share} %") for share in shares] == [4] * 5


def test_results_without_references_are_drawn_too(tmp_path: Path) -> None:
    bare = [msgspec.structs.replace(each, f1=None, choice=None) for each in RECORDS]
    damage_recovery(recoveries(bare, METHODS), tmp_path / "damage.png")
    assert (tmp_path / "damage.png").stat().st_size > 10_000


def test_what_cannot_be_drawn_or_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no method with backfill and without"):
        damage_recovery((), tmp_path / "damage.png")
    with pytest.raises(EvaluationError, match="can't be written"):
        damage_recovery(FOUND, tmp_path / "absent" / "damage.png")


@pytest.mark.parametrize(("methods", "drawn"), [(METHODS, True), (["text", "fp16", "fp16-e5"], False)])
def test_a_report_has_both_where_methods_backfill(tmp_path: Path, methods: list[str], *, drawn: bool) -> None:
    run = {"model": "m", "weights": "int8", "fingerprint": "0" * 64, "receiver": None}
    made = report.report(RECORDS, command=("evaluate",), run=run, methods=methods, skipped=(), notes=())
    text = report.markdown(made, RECORDS)
    written = report.write(made, text, tmp_path)
    assert ("**What backfill gives back**" in text) == drawn
    assert (tmp_path / "damage-recovery.png" in written) == drawn
    assert all(path.stat().st_size for path in written)
    assert len(msgspec.json.decode((tmp_path / "evaluate.json").read_bytes())["recoveries"]) == (4 if drawn else 0)
