"""Tables are Markdown that holds together, and name what they compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.evaluate import tables
from scripts.evaluate.summary import Row, rows
from tests.scripts.evaluated import record

METHODS = ["text", "q6", "q4", "q4+facts", "qkvcomm-6", "qkvcomm-6+facts"]
RECORDS = [
    record(
        str(item),
        method,
        dataset,
        f1=(item % 4) / 4,
        exact_match=float(item % 3 == 0 or "facts" in method),
        kl=0.0 if method == "text" else 0.001 * (item + 1),
        elements=0 if method == "text" else 1_000,
        gold_logprob=-1.5 + (0.25 if "facts" in method else 0),
    )
    for dataset in ("squad", "site")
    for method in METHODS
    for item in range(12)
]
ROWS = rows(RECORDS, METHODS)


def cells(table: str) -> list[list[str]]:
    """The lines of a table; every one has as many cells as the first."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert len({len(line) for line in found}) == 1
    return found


@pytest.mark.parametrize("table", [tables.quality, tables.costs])
def test_every_data_set_has_a_table_with_a_line_for_each_method(table: Callable[[Sequence[Row]], str]) -> None:
    text = table(ROWS)
    assert [line for line in text.splitlines() if line.startswith("**")] == [
        "**squad**, 12 items",
        "**site**, 12 items",
    ]
    assert [line[0] for line in cells(text)] == ["method", "---", *METHODS] * 2
    assert table(()) == ""


def test_multiple_choice_has_a_column_where_there_is_any() -> None:
    chosen = [record(item, method, choice=float(item == "1")) for item in ("1", "2") for method in METHODS]
    line = cells(tables.quality(rows(chosen, METHODS)))
    assert (line[0][-1], line[2][-1][:6]) == ("right choice", "50.0 (")
    assert "right choice" not in tables.quality(ROWS)


def test_quality_shows_sizes_percents_and_intervals() -> None:
    lines = cells(tables.quality(ROWS))
    text, q6 = (dict(zip(lines[0], line, strict=True)) for line in lines[2:4])
    assert (text["bits/element"], text["KL, nats"], text["agreement"]) == ("–", "0.00000", "0.950")
    assert (q6["bits/element"], q6["× fp16"]) == ("4.00", "4.00")
    assert q6["F1"].startswith("37.5 (")
    low, high = map(float, q6["F1"].removeprefix("37.5 (").removesuffix(")").split("–"))
    assert 0 < low < 37.5 < high < 75
    assert q6["KL, nats"].startswith("0.00650 (0.00")


def test_a_tiny_kl_is_not_shown_as_nothing() -> None:
    assert [tables.kl_text(kl) for kl in (0.0, 2.3e-7, 1e-5, 0.0123456)] == ["0.00000", "2e-07", "0.00001", "0.01235"]


def test_costs_shows_bytes_and_times_of_an_item() -> None:
    lines = cells(tables.costs(ROWS))
    q6 = dict(zip(lines[0], lines[3], strict=True))
    assert (q6["kB sent"], q6["saved in all, MB"], q6["F1 % per Mbit"]) == ("0.5", "0.0", "9,375.00")
    assert (q6["encode, ms"], q6["decode, ms"], q6["answer, ms"]) == ("10.0", "20.0", "470.0")


def test_facts_are_shown_as_what_they_add_to_their_method() -> None:
    head, _, *lines = cells(tables.facts(RECORDS))
    assert [line[:3] for line in lines] == [
        [dataset, method, "12"] for dataset in ("squad", "site") for method in ("q4", "qkvcomm-6")
    ]
    first = dict(zip(head, lines[0], strict=True))
    assert first["F1, points"] == "+0.0"
    assert first["EM, points"].startswith("+66.7 (+")
    assert first["log p of the reference, nats"] == "+0.250"
    assert tables.facts([record()]) == "No method was run both with and without facts.\n"


def test_facts_without_references_have_no_difference() -> None:
    lacking = [record(method=method, exact_match=None, f1=None, gold_logprob=None) for method in ("q4", "q4+facts")]
    assert cells(tables.facts(lacking))[2] == ["squad", "q4", "1", "–", "–", "–"]


def test_the_papers_figures_stand_beside_ours() -> None:
    head, _, *lines = cells(tables.paper(ROWS))
    assert [line[:2] for line in lines] == [["squad", "qkvcomm-6"], ["squad", "qkvcomm-6+facts"]]
    assert lines[0][2:10] == ["0.727", "0.500", "0.935", "-0.500", "5.68", "4.00", "1,928.0", "0.0"]
    assert head[-1] == "F1"
    assert tables.paper(rows([record()], ["q4"])) == "Nothing of the paper's Table I was run.\n"


def test_the_papers_table_has_a_row_for_each_set_and_width() -> None:
    assert [(row.dataset, row.bits) for row in tables.TABLE_1] == [
        (dataset, bits) for dataset in ("squad", "hotpot", "narrativeqa") for bits in (4, 6, 8)
    ]


@given(st.text(min_size=1, max_size=12))
def test_no_name_of_a_file_breaks_a_table(name: str) -> None:
    table = tables.facts([record(dataset=name, method=method) for method in ("q4", "q4+facts")])
    assert table.count("\n") == 3
    assert table.replace("\\|", "").splitlines()[2].count("|") == 7
