"""A relay within one process is what a sender and a receiver would do, and its losses are measured right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax as by_scipy
from scipy.stats import entropy

from edge_agent.kv.recipe import recipe
from edge_agent.model.session import Model
from edge_agent.model.text import Text
from scripts import relay

CONTEXT = "The pump of the north tank stopped at noon because its filter was full of sand."
QUESTION = "Why did the pump stop?"
MOST = 8


class Session:
    def __init__(self, bundle: Path) -> None:
        self.model = Model(bundle)
        self.text = Text(bundle, self.model.manifest)
        self.prefix = relay.after_prefix(self.model)
        self.ids = self.text.context_ids(CONTEXT)
        self.cache = relay.read_context(self.prefix, self.ids)
        self.question = self.text.question_ids(QUESTION)
        self.reference = relay.uncompressed(self.model, self.text, self.prefix, self.cache, self.question, most=MOST)


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Session:
    return Session(tiny_bundle)


def rows(positions: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=(positions, 11)).astype(np.float32)


@given(st.integers(1, 4), st.integers(0, 99), st.integers(0, 99))
def test_divergence_is_the_relative_entropy_in_nats(positions: int, one: int, other: int) -> None:
    log_p, log_q = (relay.log_softmax(rows(positions, seed)) for seed in (one, other))
    np.testing.assert_allclose(log_p, by_scipy(rows(positions, one).astype(np.float64), axis=-1), atol=1e-12)
    np.testing.assert_allclose(
        relay.divergence(log_p, log_q), entropy(np.exp(log_p), np.exp(log_q), axis=-1), atol=1e-9
    )


def test_the_uncompressed_answer_is_that_of_the_text(session: Session) -> None:
    live = session.prefix.fork(room=256)
    live.prefill(session.ids)
    last = relay.read_question(live, session.question)
    answer, said = relay.greedy(live, last, session.model.manifest, session.text, most=MOST - 1)
    assert (answer, said) == (session.reference.answer, session.reference.said)
    assert session.reference.positions == len(answer) + 1


def test_along_the_uncompressed_answer_every_argmax_is_its_next_token(session: Session) -> None:
    assert list(session.reference.log_p.argmax(-1)[:-1]) == session.reference.answer


def test_nothing_of_an_answer_stays(session: Session) -> None:
    live = relay.behind(session.prefix, session.cache, session.cache.entries)
    last = relay.read_question(live, session.question)
    at = live.next_position
    before = relay.along(live, last, session.reference.answer)
    relay.greedy(live, last, session.model.manifest, session.text, most=MOST)
    assert live.next_position == live.entries == at
    assert np.array_equal(relay.along(live, last, session.reference.answer), before)


@pytest.mark.parametrize(("rung", "exact"), [("float32", True), ("q3", False)])
def test_the_lossless_rung_costs_nothing_and_a_tight_one_something(session: Session, rung: str, exact: bool) -> None:
    model, reference = session.model, session.reference
    header, cache = relay.received(model, relay.sent(model, session.cache, recipe(rung)))
    assert header.tokens == session.cache.entries
    live = relay.behind(session.prefix, cache, header.tokens)
    log_q = relay.along(live, relay.read_question(live, reference.question), reference.answer)
    loss = relay.divergence(reference.log_p, log_q)
    assert loss.shape == (reference.positions,)
    assert (loss.max() < 1e-8) == exact
    assert relay.agreeing(reference.log_p, reference.log_p) == reference.positions


def test_a_context_is_read_with_the_attention_it_gets(session: Session) -> None:
    for layer in session.cache.layers:
        assert layer.mass is not None
        assert layer.mass.shape == layer.keys.shape[:2]
        assert (layer.mass.sum(axis=1) < 1).all()  # the rest is the prefix's
