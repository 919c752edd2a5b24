"""Facts of held contexts: within their budget, extracted once, kept for the contexts that were asked for last."""

from __future__ import annotations

import asyncio
import threading
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.context_facts import KEPT_CONTEXTS, ContextFacts
from edge_agent.facts import Extractor, Fact, summary, within
from edge_agent.facts.fact import MAX_FACTS
from edge_agent.memory import Held
from edge_agent.model.manifest import read_manifest
from edge_agent.model.text import Text
from tests import tiny
from tests.edge_agent.agents import NORTH, SOUTH

LONG = "\n\n".join(
    [NORTH, SOUTH, "Température à München: 21,5 °C 🙂 — gauge G-17 was read on 12 March 2024 by Ada Lovelace."]
)
PLENTY = 1_024


class Recorder(Extractor):
    """Keeps the texts that it was given, and waits with each until it may go on."""

    def __init__(self) -> None:
        super().__init__(spacy_model=None)
        self.texts: list[str] = []
        self.threads: set[int] = set()
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.may_go_on.set()

    def extract(self, text: str) -> tuple[Fact, ...]:
        self.texts.append(text)
        self.threads.add(threading.get_ident())
        self.begun.set()
        assert self.may_go_on.wait(20)
        return super().extract(text)


class Numbered(Recorder):
    """Says of any text that it holds the numbers up to `count`, the first the best."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def extract(self, text: str) -> tuple[Fact, ...]:
        self.texts.append(text)
        return tuple(
            Fact(type="quantity", content=f"{number}", confidence=0.7, start=number, end=number + 1)
            for number in range(self.count)
        )


@cache
def tokenizer() -> Text:
    return Text(tiny.tiny_bundle(), read_manifest(tiny.tiny_bundle()))


def held(written: str, name: str = "report") -> Held:
    """As an agent's store holds this text."""
    ids = tokenizer().context_ids(written)
    return Held(name, tokenizer().context_id(ids), tuple(ids))


def tokens(line: str) -> int:
    """What a summary takes in the prompt."""
    return len(tokenizer().facts_ids(line))


async def test_a_budget_of_nothing_extracts_nothing() -> None:
    extractor = Recorder()
    assert await ContextFacts(tokenizer(), extractor).of(held(NORTH), 0) == ()
    assert extractor.texts == []


async def test_facts_are_those_of_the_text_as_it_was_given_and_stand_where_they_say() -> None:
    extractor = Recorder()
    facts = await ContextFacts(tokenizer(), extractor).of(held(f"\n {LONG}\n"), PLENTY)
    assert extractor.texts == [LONG]
    assert {"12 March 2024", "Ada Lovelace", "G-17"} <= {fact.content for fact in facts}
    assert all(" ".join(LONG[fact.start : fact.end].split()) == fact.content for fact in facts)


@given(st.lists(st.integers(0, 120), min_size=1, max_size=4))
async def test_every_order_gets_what_fits_its_own_budget_as_the_tokenizer_counts(budgets: list[int]) -> None:
    facts, all_of_it = ContextFacts(tokenizer(), Extractor(spacy_model=None)), _all_facts()
    for budget in budgets:
        found = await facts.of(held(LONG), budget)
        assert tokens(summary(found)) <= budget
        assert found == within(all_of_it, budget, tokens)
        assert bool(found) == any(tokens(fact.content) <= budget for fact in all_of_it)


@cache
def _all_facts() -> tuple[Fact, ...]:
    return Extractor(spacy_model=None).extract(LONG)


async def test_a_budget_that_no_fact_fits_gives_none() -> None:
    assert await ContextFacts(tokenizer(), Extractor(spacy_model=None)).of(held(NORTH), 1) == ()


async def test_no_more_facts_go_than_a_header_may_hold_and_they_are_the_best() -> None:
    found = await ContextFacts(tokenizer(), Numbered(MAX_FACTS + 50)).of(held(NORTH), 100_000)
    assert [fact.content for fact in found] == [f"{number}" for number in range(MAX_FACTS)]


async def test_a_second_order_for_a_context_does_not_extract_again() -> None:
    extractor = Recorder()
    facts = ContextFacts(tokenizer(), extractor)
    first = await facts.of(held(NORTH), 40)
    assert await facts.of(held(NORTH, "the same under another name"), 40) == first != ()
    assert len(await facts.of(held(NORTH), 12)) < len(first)
    assert extractor.texts == [NORTH]
    await facts.of(held(SOUTH), 40)
    assert extractor.texts == [NORTH, SOUTH]


async def test_a_context_without_facts_is_not_read_again_either() -> None:
    extractor = Numbered(0)
    facts = ContextFacts(tokenizer(), extractor)
    assert [await facts.of(held("..."), 40) for _ in range(2)] == [(), ()]
    assert extractor.texts == ["..."]


async def test_the_facts_of_the_contexts_asked_for_last_are_kept() -> None:
    extractor = Numbered(3)
    facts = ContextFacts(tokenizer(), extractor)
    contexts = [held(f"report {number}", f"{number}") for number in range(KEPT_CONTEXTS + 1)]
    for context in contexts[:-1]:
        await facts.of(context, 40)
    await facts.of(contexts[0], 40)  # so that the second is the one used longest ago
    assert len(extractor.texts) == KEPT_CONTEXTS
    await facts.of(contexts[-1], 40)
    extractor.texts.clear()
    for context in (contexts[0], *contexts[2:]):
        await facts.of(context, 40)
    assert extractor.texts == []
    await facts.of(contexts[1], 40)
    assert extractor.texts == ["report 1"]


async def test_a_budget_of_nothing_puts_nothing_out() -> None:
    extractor = Numbered(3)
    facts = ContextFacts(tokenizer(), extractor)
    await facts.of(held(NORTH), 40)
    for number in range(KEPT_CONTEXTS + 1):
        await facts.of(held(f"report {number}"), 0)
    await facts.of(held(NORTH), 40)
    assert extractor.texts == [NORTH]


@pytest.mark.timeout(60)
async def test_two_orders_at_once_for_one_context_are_both_served_and_hold_nobody_else_up() -> None:
    extractor = Recorder()
    extractor.may_go_on.clear()
    facts = ContextFacts(tokenizer(), extractor)
    orders = [asyncio.create_task(facts.of(held(NORTH), budget)) for budget in (40, 12)]
    await asyncio.to_thread(extractor.begun.wait, 20)
    assert not any(order.done() for order in orders)
    extractor.may_go_on.set()
    long, short = await asyncio.gather(*orders)
    assert long == await facts.of(held(NORTH), 40)
    assert short == await facts.of(held(NORTH), 12)
    assert len(short) < len(long)
    assert set(extractor.texts) == {NORTH}
    assert threading.get_ident() not in extractor.threads


async def test_an_order_that_is_withdrawn_while_facts_are_extracted_leaves_the_next_one_unharmed() -> None:
    extractor = Recorder()
    extractor.may_go_on.clear()
    facts = ContextFacts(tokenizer(), extractor)
    order = asyncio.create_task(facts.of(held(NORTH), 40))
    await asyncio.to_thread(extractor.begun.wait, 20)
    order.cancel()
    with pytest.raises(asyncio.CancelledError):
        await order
    extractor.may_go_on.set()
    assert await facts.of(held(NORTH), 40)


async def test_an_extraction_that_fails_costs_the_facts_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Extractor):
        def extract(self, text: str) -> tuple[Fact, ...]:
            raise TypeError("a library's own")

    assert await ContextFacts(tokenizer(), Broken(spacy_model=None)).of(held(NORTH), PLENTY) == ()
    assert "no facts of report" in caplog.text


@pytest.mark.timeout(60)
async def test_a_slow_extraction_delays_no_transfer_and_serves_the_next(caplog: pytest.LogCaptureFixture) -> None:
    extractor = Recorder()
    extractor.may_go_on.clear()
    facts = ContextFacts(tokenizer(), extractor)
    assert await facts.of(held(NORTH), 40, patience_s=0.01) == ()
    assert "facts of report are not ready" in caplog.text
    extractor.may_go_on.set()
    assert await facts.of(held(NORTH), 40)
    assert extractor.texts == [NORTH]


async def test_facts_put_out_while_they_are_extracted_are_none() -> None:
    extractor = Recorder()
    extractor.may_go_on.clear()
    facts = ContextFacts(tokenizer(), extractor)
    early = asyncio.create_task(facts.of(held(NORTH), 40))
    await asyncio.sleep(0)
    for number in range(KEPT_CONTEXTS):
        await facts.of(held(f"report {number}"), 40, patience_s=0)
    assert await early == ()
    extractor.may_go_on.set()
