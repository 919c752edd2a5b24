"""An evaluation asks every question over every method once, whatever interrupts it, and says what it could not ask."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import msgspec
import pytest

from edge_agent.errors import ContextEmpty
from edge_agent.kv.recipe import recipe
from edge_agent.model.manifest import read_manifest
from edge_agent.model.text import Text
from scripts import relay
from scripts.calibrate.pair import calibrate
from scripts.evaluate.errors import JobLost, MethodUnknown
from scripts.evaluate.items import Item
from scripts.evaluate.method import GROUPS, PEERS, Method, method, named
from scripts.evaluate.records import Record, Results
from scripts.evaluate.relayed import ANSWER_POSITIONS, Case, Pair
from scripts.evaluate.run import Done, evaluate, left
from scripts.peers.method import Method as Codec
from tests import tiny

ITEMS = (
    Item(
        id="pump",
        dataset="site",
        context="The pump of the north tank stopped at noon because its filter was full of sand.",
        question="Why did the pump stop?",
        answers=("its filter was full of sand",),
    ),
    Item(
        id="valve",
        dataset="site",
        context="Valve 3 in the south was closed before the storm. Relay 7 failed at 14:30.",
        question="What was closed?",
        answers=(),
    ),
)
METHODS = ("text", "none", "none+facts", "float32", "q4", "fp16-l50", "qkvcomm-6+facts", "group-4", "kivi-2+facts")
TIMES = ("encode_s", "decode_s", "context_s", "answer_s")


class Alike:
    """In the place of sentence embeddings: equal texts are alike, others are not."""

    def similarity(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
        return [float(one == other) for one, other in zip(a, b, strict=True)]


def maker(bundle: Path, **changes: object) -> partial[Pair]:
    options: dict[str, object] = {"facts_tokens": 24, "spacy_model": None, "threads": 1}
    return partial(Pair, bundle, **(options | changes))  # type: ignore[arg-type]


def run(
    bundle: Path, directory: Path, items: Sequence[Item] = ITEMS, methods: Sequence[str] = METHODS, *, jobs: int = 1
) -> tuple[tuple[Record, ...], list[Done]]:
    """All records there are after this run, and what it did itself."""
    done: list[Done] = []
    with Results.open(directory, {"of": "a test"}) as results:
        work = left(items, methods, results)
        evaluate(work, maker(bundle), results, Alike(), jobs=jobs, on_item=done.append)
        return results.records, done


@pytest.fixture(scope="module")
def records(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Record]:
    found, _ = run(tiny_bundle, tmp_path_factory.mktemp("evaluation"))
    return {(record.item, record.method): record for record in found}


def test_every_question_is_asked_over_every_method_once(records: dict[tuple[str, str], Record]) -> None:
    assert list(records) == [(item.id, name) for item in ITEMS for name in METHODS]


@pytest.mark.parametrize("item", ["pump", "valve"])
@pytest.mark.parametrize("name", ["text", "float32"])
def test_the_text_and_the_lossless_cache_give_the_uncompressed_answer(
    records: dict[tuple[str, str], Record], item: str, name: str
) -> None:
    record = records[item, name]
    assert record.kl < 1e-8
    assert (record.agreement, record.self_f1, record.fidelity) == (1, 1, 1)
    assert record.answer == records[item, "text"].answer
    assert 1 <= record.positions <= ANSWER_POSITIONS


def test_a_method_that_sends_less_loses_more(records: dict[tuple[str, str], Record]) -> None:
    for item in ITEMS:
        lossless, coarse, nothing = (records[item.id, name] for name in ("float32", "q4", "none"))
        assert lossless.kl < coarse.kl < nothing.kl
        assert lossless.payload_bytes > coarse.payload_bytes > nothing.payload_bytes


def test_bytes_count_everything_and_elements_are_those_of_the_whole_cache(
    records: dict[tuple[str, str], Record], tiny_bundle: Path
) -> None:
    pair = maker(tiny_bundle)()
    case = pair.case(ITEMS[0])
    whole = 2 * tiny.LAYERS * tiny.KV_HEADS * tiny.HEAD_DIM * case.cache.entries
    for name in ("float32", "q4", "fp16-l50", "qkvcomm-6+facts", "group-4", "kivi-2+facts"):
        record = records["pump", name]
        assert (record.elements, record.fp16_bytes) == (whole, 2 * whole)
        assert record.context_tokens == case.cache.entries
    half = records["pump", "fp16-l50"].payload_bytes
    assert 2 * whole * 2 / 3 < half < 2 * whole * 2 / 3 + 600  # two of three layers, and the headers
    ids = 2 * case.cache.entries
    assert ids < records["pump", "text"].payload_bytes < ids + 700
    assert 0 < records["pump", "none+facts"].payload_bytes < 1_000
    assert records["pump", "none"].payload_bytes == 0
    for name in ("text", "none", "none+facts"):
        assert (records["pump", name].elements, records["pump", name].fp16_bytes) == (0, 2 * whole)


def test_a_peers_bytes_are_its_codes_scales_and_minima_and_facts_come_on_top(
    records: dict[tuple[str, str], Record], tiny_bundle: Path
) -> None:
    cache = maker(tiny_bundle)().case(ITEMS[0]).cache
    sizes = {name: peer.nbytes(peer.encode(cache)) for name, peer in PEERS.items()}
    assert records["pump", "group-4"].payload_bytes == sizes["group-4"]
    facts_bytes = records["pump", "none+facts"].payload_bytes
    assert records["pump", "kivi-2+facts"].payload_bytes == sizes["kivi-2"] + facts_bytes


def test_the_receiver_has_what_a_peer_gives_back(tiny_bundle: Path) -> None:
    pair = maker(tiny_bundle)()
    case = pair.case(ITEMS[0])
    whole = Codec("whole", encode=lambda cache: cache, decode=lambda cache: cache, nbytes=lambda _: 5)
    record = pair.ask(case, Method(whole.name, None, facts=False, peer=whole))
    assert record.kl < 1e-8
    assert record.payload_bytes == 5
    fine, coarse = (pair.ask(case, method(name)) for name in ("group-4", "group-2"))
    assert record.kl < fine.kl < coarse.kl


def test_facts_are_read_before_the_question_and_change_what_is_said(records: dict[tuple[str, str], Record]) -> None:
    assert 0 < records["pump", "none+facts"].facts_tokens <= 24
    assert records["pump", "none"].facts_tokens == 0
    assert records["pump", "none+facts"].kl != records["pump", "none"].kl


def test_without_references_there_are_no_scores_against_them(records: dict[tuple[str, str], Record]) -> None:
    for name in METHODS:
        record = records["valve", name]
        assert {record.exact_match, record.f1, record.completeness, record.gold_logprob} == {None}
        assert records["pump", name].gold_logprob is not None


def test_the_likeliest_choice_is_right_or_wrong(tiny_bundle: Path, tmp_path: Path) -> None:
    choices = ("its filter", "a storm at sea", "42", "?")
    items = [
        Item(id=f"{right}", dataset="x", context="The pump stopped.", question="Why?", choices=choices, right=right)
        for right in range(len(choices))
    ]
    found, _ = run(tiny_bundle, tmp_path / "choices", items, ("text", "q8"))
    by_method = {name: [record.choice for record in found if record.method == name] for name in ("text", "q8")}
    assert sorted(by_method["text"], key=str) == [0.0, 0.0, 0.0, 1.0]
    assert sorted(by_method["q8"], key=str) == [0.0, 0.0, 0.0, 1.0]
    text, reference = Text(tiny_bundle, read_manifest(tiny_bundle)), maker(tiny_bundle)().case(items[0]).reference
    means = []
    for choice in choices:
        ids = text.ids(f" {choice}")
        rows = relay.along(reference.live, reference.question[-1], ids)
        means.append(sum(float(row[token]) for row, token in zip(rows[:-1], ids, strict=True)) / len(ids))
    assert by_method["text"].index(1.0) == means.index(max(means))


def test_questions_without_choices_have_no_choice(records: dict[tuple[str, str], Record]) -> None:
    assert {record.choice for record in records.values()} == {None}


def test_the_likelihood_of_the_references_falls_with_what_is_lost(records: dict[tuple[str, str], Record]) -> None:
    assert records["pump", "float32"].gold_logprob == pytest.approx(records["pump", "text"].gold_logprob, abs=1e-5)


def test_the_uncompressed_answer_itself_is_wholly_faithful_even_if_it_is_empty(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    class Unlike(Alike):
        def similarity(self, a: Sequence[str], b: Sequence[str]) -> list[float]:
            return [0.0] * len(a)

    with Results.open(tmp_path, {}) as results:
        work = left(ITEMS, ("text", "none"), results)
        evaluate(work, maker(tiny_bundle), results, Unlike(), jobs=1, on_item=lambda _: None)
        by_method = {(record.item, record.method): record for record in results.records}
    for item in ITEMS:
        text, none = (by_method[item.id, name] for name in ("text", "none"))
        assert text.fidelity == 1
        assert none.fidelity == (none.answer == text.answer)


def test_a_run_goes_on_where_it_was_broken_off(tiny_bundle: Path, tmp_path: Path) -> None:
    first, _ = run(tiny_bundle, tmp_path, ITEMS[:1], ("text", "q4"))
    again, done = run(tiny_bundle, tmp_path, ITEMS, ("text", "q4", "none"))
    assert again[:2] == first
    assert [[record.method for record in each.records] for each in done] == [["none"], ["text", "q4", "none"]]
    assert run(tiny_bundle, tmp_path, ITEMS, ("text", "q4", "none"))[1] == []


def test_several_processes_find_the_same(
    records: dict[tuple[str, str], Record], tiny_bundle: Path, tmp_path: Path
) -> None:
    # the stand-in for embeddings works in this process, as the real one does
    found, _ = run(tiny_bundle, tmp_path, jobs=2)
    for record in found:
        untimed = dict.fromkeys(TIMES, 0.0)
        alone = records[record.item, record.method]
        assert msgspec.structs.replace(record, **untimed) == msgspec.structs.replace(alone, **untimed)
    assert len(found) == len(records)


def test_a_context_beyond_the_window_is_named_and_the_others_are_asked(tiny_bundle: Path, tmp_path: Path) -> None:
    long = msgspec.structs.replace(ITEMS[0], id="long", context=ITEMS[0].context * 100)
    found: list[Done] = []
    with Results.open(tmp_path, {}) as results:
        unfit = evaluate(
            left((long, ITEMS[0]), ("none",), results),
            maker(tiny_bundle),
            results,
            Alike(),
            jobs=1,
            on_item=found.append,
        )
        assert [record.item for record in results.records] == ["pump"]
    assert [(each.file, each.place) for each in unfit] == [("site", "long")]
    assert "window of 1024" in unfit[0].reason
    assert [bool(each.unfit) for each in found] == [True, False]


def test_an_item_with_a_blank_context_is_unfit(tiny_bundle: Path) -> None:
    with pytest.raises(ContextEmpty, match="empty"):
        maker(tiny_bundle)().case(msgspec.structs.replace(ITEMS[0], context=" \n"))


def test_another_models_cache_comes_through_its_calibration(
    tiny_bundle: Path, other_tiny_bundle: Path, tmp_path: Path
) -> None:
    texts = [item.context for item in ITEMS]
    made = calibrate(tiny_bundle, other_tiny_bundle, texts)
    pair = maker(tiny_bundle, receiver=other_tiny_bundle, calibration=made)()
    case = pair.case(ITEMS[0])
    text, cache, none = (pair.ask(case, method(name)) for name in ("text", "float32", "none"))
    assert text.kl < 1e-8
    assert cache.kl > 1e-3
    assert cache.kl != none.kl
    assert cache.payload_bytes > 0


@pytest.mark.parametrize("name", named("table,parts,codec,kivi-2+facts"))
def test_the_usual_methods_are_known(name: str) -> None:
    found = method(name)
    what = name.removesuffix("+facts")
    assert found.name == name
    assert found.facts == name.endswith("+facts")
    assert found.recipe is None or found.recipe == recipe(what)
    assert found.peer == PEERS.get(what)
    assert found.cache == (what not in {"text", "none"})


@pytest.mark.parametrize("name", ["", "q9", "facts", "text+fact", "+facts", "qkvcomm-5.5", "group-3"])
def test_an_unknown_method_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(MethodUnknown, match="group-4, group-2, kivi-2, text and none"):
        method(name)


def test_a_group_stands_for_its_methods_and_none_comes_twice() -> None:
    assert named("text, table") == GROUPS["table"]
    assert named("q3,parts") == ("q3", *GROUPS["parts"])
    with pytest.raises(MethodUnknown, match="names none"):
        named(" , ")


def test_a_method_the_model_refuses_ends_the_item_and_keeps_what_was_asked_before(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    class Refusing(Pair):
        def ask(self, case: Case, method: Method) -> Record:
            if method.name == "q4":
                raise ContextEmpty("made up")
            return super().ask(case, method)

    with Results.open(tmp_path, {}) as results:
        unfit = evaluate(
            left(ITEMS[:1], ("none", "q4"), results),
            lambda: Refusing(tiny_bundle, facts_tokens=8, spacy_model=None, threads=1),
            results,
            Alike(),
            jobs=1,
            on_item=lambda _: None,
        )
        assert [record.method for record in results.records] == ["none"]
    assert [each.reason for each in unfit] == ["made up"]


def killed() -> Pair:
    """In the place of a pair's constructor, in a process of several."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_job_that_is_killed_is_one_line(tmp_path: Path) -> None:
    with Results.open(tmp_path, {}) as results, pytest.raises(JobLost, match="fewer --jobs") as caught:
        evaluate(left(ITEMS, ("none",), results), killed, results, Alike(), jobs=2, on_item=lambda _: None)
    assert "\n" not in str(caught.value)
