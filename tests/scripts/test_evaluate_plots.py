"""The picture is drawn whatever the results are, and a file that can't be written is one line."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from scripts.evaluate.errors import EvaluationError
from scripts.evaluate.plots import family, rate_quality
from scripts.evaluate.summary import rows
from tests.scripts.evaluated import record

METHODS = ["text", "text+facts", "none", "float32", "q8", "q4", "q4+facts", "qkvcomm-6", "q6-l70", "klt-0.7"]
SIZES = dict(zip(METHODS, (0, 0, 0, 4_000, 1_000, 500, 510, 525, 530, 240), strict=True))
RECORDS = [
    record(
        str(item),
        method,
        dataset,
        elements=1_000 if SIZES[method] else 0,
        payload_bytes=SIZES[method],
        kl=0.0 if method in {"text", "float32"} else (item + 1) / (SIZES[method] + 10),
        f1=None if dataset == "unscored" else item / 5,
    )
    for dataset in ("squad", "unscored")
    for method in METHODS
    for item in range(5)
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The pictures that are saved."""
    found: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        found.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_results_are_drawn_for_every_data_set(tmp_path: Path, texts: list[str], ending: str, begins: bytes) -> None:
    path = tmp_path / f"rate.{ending}"
    rate_quality(rows(RECORDS, METHODS), path)
    assert path.read_bytes().startswith(begins)
    assert {"squad, 5 items", "unscored, 5 items", "q4", "klt-0.7", "q6-l70", "with facts", "text", "none"} <= set(
        texts
    )
    assert texts.count("q4") == 4
    assert "q4+facts" not in texts  # named by the method beside it


@pytest.mark.parametrize("methods", [["text"], ["q4"], ["none", "q4+facts"]])
def test_few_results_are_drawn_too(tmp_path: Path, methods: list[str]) -> None:
    rate_quality(rows(RECORDS[: len(RECORDS) // 2], methods), tmp_path / "rate.png")
    assert (tmp_path / "rate.png").stat().st_size > 10_000


def test_methods_at_the_same_place_are_all_named(tmp_path: Path, texts: list[str]) -> None:
    methods = [f"method{number}" for number in range(12)]
    rate_quality(rows([record(method=method) for method in methods], methods), tmp_path / "rate.png")
    assert set(methods) <= set(texts)


def test_a_curve_joins_what_differs_in_one_number() -> None:
    assert family("q4") == family("q8") == family("q6+facts") == "q*"
    assert family("qkvcomm-4+facts") == family("qkvcomm-8")
    assert family("q6-l70") == family("q4-l70") != family("q6-l50")
    assert family("klt-0.7") == family("klt-1") == "klt-*"
    assert family("klmix4-whole") == family("klmix8-whole") == "klmix*-whole"
    assert family("fp16-e5-b4") == family("fp16-e50-b4") == "fp16-e*-b4" != family("fp16-e50") == "fp16-e*"
    assert family("klt6-h50") == family("klt8-h50") == "klt*-h50"
    assert family("float32") == family("fp16+facts") != family("fp16-l70") == "fp16-l70"
    assert len({family(method) for method in ("q6", "q6-whole", "mix6", "qkvcomm-6", "fp16", "h2o-10")}) == 6


def test_what_cannot_be_drawn_or_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no results to draw"):
        rate_quality((), tmp_path / "rate.png")
    found = rows([record()], ["q4"])
    for path, says in [
        (tmp_path / "absent" / "rate.png", "No such file or directory"),
        (tmp_path / "rate.nothing", "not supported"),
    ]:
        with pytest.raises(EvaluationError, match=says) as caught:
            rate_quality(found, path)
        assert str(caught.value).startswith(f"{path} can't be written (")
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rate.png").symlink_to("/dev/full")
    with pytest.raises(EvaluationError, match="disk full while writing"):
        rate_quality(rows([record()], ["q4"]), tmp_path / "rate.png")


def test_multiple_choice_shows_its_choices_where_others_show_f1(tmp_path: Path, texts: list[str]) -> None:
    methods = ["text", "q8", "q4"]
    chosen = [msgspec.structs.replace(each, dataset="arc", choice=1.0) for each in RECORDS if each.dataset == "squad"]
    rate_quality(rows([*RECORDS, *chosen], methods), tmp_path / "rate.png")
    assert {"F1, %", "right choice, %", "arc, 5 items"} <= set(texts)
    assert texts.count("agreement") == 1


def test_of_fewer_items_is_said_and_not_drawn_where_scores_hang_on_the_items(
    tmp_path: Path, figures: list[Figure]
) -> None:
    own = [each for each in RECORDS if each.dataset == "squad"]
    fewer = rows([each for each in own if int(each.item) < 3], ["qkvcomm-6"])
    rate_quality([*fewer, *rows(own, ["text", "q8", "q4"])], tmp_path / "rate.png")
    texts = {text.get_text() for text in figures[0].findobj(Text)}
    assert {"squad, 5 items", "qkvcomm-*, 3 items", "q*"} <= texts
    drawn = [set(np.concatenate([line.get_xdata() for line in panel.lines]).tolist()) for panel in figures[0].axes]
    assert [4.2 in each for each in drawn] == [True, True, False]
    assert all({4.0, 8.0} <= each for each in drawn)


def test_backfill_is_hollow_in_the_colour_of_the_same_without(tmp_path: Path, figures: list[Figure]) -> None:
    methods = ["fp16-e50", "fp16-e30", "fp16-e50-b4", "fp16-e30-b4", "fp16-h50-b2"]
    rate_quality(rows([record(method=method) for method in methods], methods), tmp_path / "rate.png")
    texts = [text.get_text() for text in figures[0].findobj(Annotation)]
    assert sorted(texts) == sorted(2 * ["fp16-e50", "fp16-e30", "fp16-h50-b2"])
    curves = {line.get_label(): line for line in figures[0].legends[0].get_lines()}
    plain, filled, other = (curves[name] for name in ("fp16-e*", "fp16-e*-b4", "fp16-h*-b2"))
    assert plain.get_color() == filled.get_color() != other.get_color()
    assert (plain.get_linestyle(), filled.get_linestyle(), other.get_linestyle()) == ("-", "--", "--")


def test_names_and_what_leads_to_them_keep_off_other_names(tmp_path: Path, figures: list[Figure]) -> None:
    methods = [f"{kind}{number}" for kind in ("q", "klt", "group-") for number in range(1, 8)]
    found = [
        record(method=method, kl=0.01 + at / 400, agreement=0.9 - at / 300, payload_bytes=500 + 7 * at)
        for at, method in enumerate(methods)
    ]
    rate_quality(rows(found, methods), tmp_path / "rate.png")
    for panel in figures[0].axes[:2]:
        names = panel.findobj(Annotation)
        boxes = [Text.get_window_extent(name) for name in names]
        assert len(boxes) == len(methods)
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        for name, box in zip(names, boxes, strict=True):
            if name.arrow_patch is not None:
                path = name.arrow_patch.get_path().transformed(name.arrow_patch.get_transform())
                assert not any(path.intersects_bbox(other, filled=False) for other in boxes if other is not box)
