"""What the agent computes with the real model is what it should: the text's own tokens, and the join of design.md.

With float32 weights the references are independent of the code under test: the graph as optimum exported it, run
directly over the whole text in one piece, and the join made of raw keys and values in float64 with complex numbers.
With 8-bit weights, which no other graph has, they are the same graph reading the text itself, and the same join given
to it. Differential tests against transformers on tiny models are in test_join and test_gaps.
`pytest -s` shows the distances that are measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from edge_agent.kv.cache import Cache, concatenate
from edge_agent.kv.payload import encode
from edge_agent.kv.reader import decode
from edge_agent.kv.recipe import recipe
from edge_agent.model.exchange import expectation, to_send
from edge_agent.model.manifest import Manifest, read_manifest
from edge_agent.model.session import LiveContext, Model, Runtime
from edge_agent.model.text import AnswerText, Text
from scripts.prepare_model import PreparationError, exported_graph

Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
State = tuple[Floats, ...]
"""Raw keys and values as a graph gives them, (1, kv_heads, entries, head_dim) each: key 0, value 0, key 1, …"""

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ROOT / "scripts" / "demo" / "documents"
HOLDERS = {"pi-1": "site-north.txt", "pi-2": "site-south.txt"}
MAX_NEW_TOKENS = 12
ROPE_THETA, HEAD_DIM = 100_000.0, 64
"""SmolLM2-135M-Instruct's, from its configuration."""

FREQUENCIES = ROPE_THETA ** (-np.arange(HEAD_DIM // 2, dtype=np.float64) / (HEAD_DIM // 2))

ROUNDING = 1e-3
"""Logits (spread about 20) that differ by less differ by float32 rounding of sums in another order."""

QUANTIZED_KL = 0.05
"""Nats between distributions that differ by rounding, where activations in 8 bits make it show: 0.023 were seen."""


@dataclass(frozen=True)
class Question:
    """One question of the demo."""

    question: str
    sources: tuple[str, ...]
    expected: tuple[str, ...]


QUESTIONS = [
    Question(entry["question"], tuple(entry["sources"]), tuple(entry["expected"]))
    for entry in json.loads((DOCUMENTS / "questions.json").read_text())
]
SINGLE = [each for each in QUESTIONS if len(each.sources) == 1]
SEVERAL = [each for each in QUESTIONS if len(each.sources) > 1]


class Direct:
    """The export under onnxruntime, without any of the agent's code around it."""

    def __init__(self, manifest: Manifest, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 2
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        states = [node.name for node in self._session.get_inputs() if node.name.startswith("past_key_values")]
        self._states = sorted(states, key=lambda name: (int(name.split(".")[1]), name))
        self.empty: State = tuple(
            np.zeros((1, manifest.kv_heads, 0, manifest.head_dim), dtype=np.float32) for _ in self._states
        )

    def run(self, ids: Sequence[int], past: State) -> tuple[Floats, State]:
        """Logits (vocabulary,) after the last of ids, all read in one run, and the state with them."""
        entries = past[0].shape[2]
        feeds: dict[str, Any] = dict(zip(self._states, past, strict=True))
        feeds["input_ids"] = np.array([ids], dtype=np.int64)
        feeds["attention_mask"] = np.ones((1, entries + len(ids)), dtype=np.int64)
        feeds["position_ids"] = np.arange(entries, entries + len(ids), dtype=np.int64)[None]
        names = ["logits", *(name.replace("past_key_values", "present") for name in self._states)]
        logits, *states = self._session.run(names, feeds)
        return logits[0, -1], tuple(states)

    def answer(self, past: State, question: Sequence[int], over: Callable[[int], bool]) -> tuple[Floats, list[int]]:
        """First logits and greedy tokens."""
        first, past = self.run(question, past)
        logits, tokens = first, [int(np.argmax(first))]
        while not over(tokens[-1]) and len(tokens) < MAX_NEW_TOKENS:
            logits, past = self.run([tokens[-1]], past)
            tokens.append(int(np.argmax(logits)))
        return first, tokens


def turned(keys: npt.NDArray[Any], positions: npt.NDArray[Any], frequencies: Float64) -> Float64:
    """Keys (…, entries, head_dim) rotated by their positions, in float64: dimension d and d + half as one number."""
    half = keys.shape[-1] // 2
    numbers = keys[..., :half].astype(np.float64) + 1j * keys[..., half:].astype(np.float64)
    numbers = numbers * np.exp(1j * np.outer(positions.astype(np.float64), frequencies))
    return np.concatenate([numbers.real, numbers.imag], axis=-1)


def reference_join(prefix: State, alone: Sequence[State], frequencies: Float64) -> State:
    """design.md's join: after the prefix's entries those of each context, which was prefilled alone behind the prefix,
    keys turned from where they stood to where they land."""
    start = prefix[0].shape[2]
    joined = [state.astype(np.float64) for state in prefix]
    for context in alone:
        stood = np.arange(start, context[0].shape[2])
        moved_by = joined[0].shape[2] - start
        for index, state in enumerate(context):
            entries = state[:, :, start:].astype(np.float64)
            if index % 2 == 0:
                entries = turned(turned(entries, -stood, frequencies), stood + moved_by, frequencies)
            joined[index] = np.concatenate([joined[index], entries], axis=2)
    return tuple(state.astype(np.float32) for state in joined)


class Bench:
    """A bundle of the real model through the agent's code, and the export it was made from directly."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = read_manifest(bundle)
        self.model = Model(bundle, Runtime(threads=2))
        self.text = Text(bundle, self.manifest)
        self.prefix_ids = list(self.manifest.prompt.prefix_ids)
        self.ids = {
            holder: self.text.context_ids((DOCUMENTS / name).read_text(encoding="utf-8"))
            for holder, name in HOLDERS.items()
        }
        self._sent: dict[tuple[str, str], Cache] = {}
        self._one_piece: dict[tuple[str, ...], State] = {}
        self._lossless: dict[Question, tuple[Floats, list[int]]] = {}
        self._running: dict[Question, tuple[Floats, list[int]]] = {}

    @cached_property
    def direct(self) -> Direct:
        try:
            return Direct(self.manifest, exported_graph(None))
        except PreparationError as error:
            pytest.fail(f"{error}: python -m scripts.prepare_model (or leave these tests out with -m 'not bundle')")

    @cached_property
    def prefix(self) -> LiveContext:
        live = self.model.new_context()
        live.prefill(self.prefix_ids)
        return live

    @cached_property
    def caches(self) -> dict[str, Cache]:
        """Each holder's own cache of its document."""
        return {holder: self.prefilled(ids) for holder, ids in self.ids.items()}

    def prefilled(self, ids: Sequence[int]) -> Cache:
        """What stands behind the prefix, as a cache."""
        live = self.reading(ids)
        return live.extract(self.prefix.next_position, live.next_position)

    def reading(self, *texts: Sequence[int]) -> LiveContext:
        """What has read texts one after another behind the prefix."""
        live = self.prefix.fork()
        for ids in texts:
            live.prefill(ids)
        return live

    def sent(self, holder: str, rung: str, own: int = 0) -> tuple[list[int], Cache]:
        """A holder's cache through a payload: the ids to prefill, and the entries that came."""
        made = recipe(rung)
        ids = self.ids[holder]
        context_id = self.text.context_id(ids)
        data = b"".join(
            encode(*to_send(self.manifest, context_id, ids, self.caches[holder], own_tokens=own, rung=made))
        )
        back, cache = decode(data, expectation(self.manifest, 1 << 30))
        assert cache is not None
        return back.ids()[: back.own_tokens], cache

    def received(self, holder: str, rung: str) -> Cache:
        """A whole cache as a receiver has it."""
        if (holder, rung) not in self._sent:
            self._sent[holder, rung] = self.sent(holder, rung)[1]
        return self._sent[holder, rung]

    def joined(self, caches: Sequence[Cache]) -> LiveContext:
        live = self.prefix.fork()
        for cache in caches:
            live.append(cache)
        return live

    def answer(self, caches: Sequence[Cache], question: str) -> tuple[Floats, list[int]]:
        """First logits and greedy tokens, by the agent's code."""
        return self.greedy(self.joined(caches), question)

    def greedy(self, live: LiveContext, question: str) -> tuple[Floats, list[int]]:
        """First logits and greedy tokens after a question."""
        first = live.prefill(self.text.question_ids(question))
        logits, tokens = first, [int(np.argmax(first))]
        while not self.over(tokens[-1]) and len(tokens) < MAX_NEW_TOKENS:
            logits = live.prefill([tokens[-1]])
            tokens.append(int(np.argmax(logits)))
        return first, tokens

    def lossless(self, asked: Question) -> tuple[Floats, list[int]]:
        """First logits and greedy tokens when every source sends its cache on the lossless rung."""
        if asked not in self._lossless:
            caches = [self.received(holder, "float32") for holder in asked.sources]
            self._lossless[asked] = self.answer(caches, asked.question)
        return self._lossless[asked]

    def running_text(self, asked: Question) -> tuple[Floats, list[int]]:
        """First logits and greedy tokens of the text read in one piece."""
        if asked not in self._running:
            self._running[asked] = self.direct_answer(self.one_piece(*asked.sources), asked.question)
        return self._running[asked]

    def one_piece(self, *holders: str) -> State:
        """Prefix and documents read as running text: the first and the prefix in one run, each further one in one."""
        if holders not in self._one_piece:
            before = self.one_piece(*holders[:-1]) if holders[:-1] else self.direct.empty
            ids = self.ids[holders[-1]] if holders[:-1] else self.prefix_ids + self.ids[holders[-1]]
            self._one_piece[holders] = self.direct.run(ids, before)[1]
        return self._one_piece[holders]

    def own_join(self, holders: Sequence[str]) -> LiveContext:
        """The reference join of what this very graph computed, keys turned in float64, put into a buffer as it is."""
        alone = [_state(self.reading(self.ids[holder])) for holder in holders]
        live = self.prefix.fork()
        for index, state in enumerate(reference_join(_state(live), alone, FREQUENCIES)):
            if index == 0:
                live.reserve(state.shape[2] - live.entries)
            live._buffer._block[index // 2, index % 2, :, : state.shape[2]] = state[0]
        live._buffer.note(np.arange(live.next_position, state.shape[2], dtype=np.int32))
        live._next_position = state.shape[2]
        return live

    def prefix_state(self) -> State:
        """The prefix's entries: the same in a run with a document, since nothing depends on what follows."""
        return tuple(state[:, :, : len(self.prefix_ids)] for state in self.one_piece("pi-1"))

    def direct_answer(self, past: State, question: str) -> tuple[Floats, list[int]]:
        return self.direct.answer(past, self.text.question_ids(question), self.over)

    def over(self, token: int) -> bool:
        """Whether the answer ends with this token."""
        return token in self.manifest.eos_ids or "\n" in self.text.decode([token])

    def words(self, tokens: Sequence[int]) -> str:
        answer = AnswerText(self.text, self.manifest)
        for token in tokens:
            answer.take(token)
        return answer.answer


def kl(reference: Floats, other: Floats) -> float:
    """Kullback-Leibler divergence of the next token's distribution, nats, in float64."""
    logs = [each - np.logaddexp.reduce(each) for each in (reference.astype(np.float64), other.astype(np.float64))]
    return float(np.sum(np.exp(logs[0]) * (logs[0] - logs[1])))


def distance(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())


def _state(live: LiveContext) -> State:
    """What a live context holds, as raw keys and values."""
    layers = range(live._buffer.form.layers)
    kinds = ((live._buffer.keys(layer), live._buffer.layer_values(layer)) for layer in layers)
    return tuple(array[None].copy() for pair in kinds for array in pair)


@pytest.fixture(scope="module")
def exact(exact_bundle: Path) -> Bench:
    """With float32 weights."""
    return Bench(exact_bundle)


@pytest.fixture(scope="module")
def bench(bundle: Path) -> Bench:
    """With the weights that agents use."""
    return Bench(bundle)


@pytest.mark.bundle
def test_one_source_on_the_lossless_rung_gives_the_very_tokens_of_text_prefill(
    exact: Bench, record_property: Callable[[str, object], None]
) -> None:
    worst = 0.0
    for each in SINGLE:
        reference, expected = exact.running_text(each)
        logits, tokens = exact.lossless(each)
        assert tokens == expected, each.question
        worst = max(worst, distance(logits, reference))
    assert worst < ROUNDING
    record_property("largest_logit_difference", worst)
    print(f"one source: {len(SINGLE)} questions, logits differ by at most {worst:.1e}")  # noqa: T201


@pytest.mark.bundle
@pytest.mark.parametrize("own", [1, 200])
def test_own_tokens_and_a_received_rest_equal_the_whole(exact: Bench, own: int) -> None:
    ids, rest = exact.sent("pi-1", "float32", own)
    assert ids == exact.ids["pi-1"][:own]
    assert rest.entries == len(exact.ids["pi-1"]) - own
    whole, expected = exact.lossless(SINGLE[0])
    logits, tokens = exact.answer([concatenate([exact.prefilled(ids), rest])], SINGLE[0].question)
    assert tokens == expected
    assert distance(logits, whole) < ROUNDING


@pytest.mark.bundle
def test_several_sources_equal_the_reference_join_in_float64(
    exact: Bench, record_property: Callable[[str, object], None]
) -> None:
    worst = 0.0
    for each in SEVERAL:
        alone = [exact.one_piece(holder) for holder in each.sources]
        past = reference_join(exact.prefix_state(), alone, FREQUENCIES)
        reference, expected = exact.direct_answer(past, each.question)
        logits, tokens = exact.lossless(each)
        assert tokens == expected, each.question
        worst = max(worst, distance(logits, reference))
    assert worst < ROUNDING
    record_property("largest_logit_difference", worst)
    print(f"join: {len(SEVERAL)} questions, logits differ from float64's by at most {worst:.1e}")  # noqa: T201


@pytest.mark.bundle
def test_how_far_the_join_is_from_running_text_is_measured(
    exact: Bench, record_property: Callable[[str, object], None]
) -> None:
    for each in [SINGLE[0], *SEVERAL]:
        reference, text_tokens = exact.running_text(each)
        logits, tokens = exact.lossless(each)
        far, nats = distance(logits, reference), kl(reference, logits)
        assert np.isfinite([far, nats]).all()
        if len(each.sources) == 1:
            assert far < ROUNDING
            assert nats < 1e-6
        said = f"{exact.words(tokens)!r}, running text {exact.words(text_tokens)!r}"
        record_property(each.question, f"logits {far:.2e}, KL {nats:.2e} nats, {said}")
        print(f"{'+'.join(each.sources)}: logits {far:.1e}, KL {nats:.1e} nats; {said}")  # noqa: T201


@pytest.mark.bundle
def test_with_the_default_weights_one_source_gives_the_very_tokens_of_text_prefill(
    bench: Bench, record_property: Callable[[str, object], None]
) -> None:
    far = nats = 0.0
    for each in SINGLE:
        reference, expected = bench.greedy(bench.reading(bench.ids[each.sources[0]]), each.question)
        logits, tokens = bench.lossless(each)
        assert tokens == expected, each.question
        far, nats = max(far, distance(logits, reference)), max(nats, kl(reference, logits))
    record_property("largest_logit_difference", far)
    record_property("largest_kl", nats)
    print(f"{bench.manifest.weight_precision}, one source: logits {far:.1e}, KL {nats:.1e} nats at most")  # noqa: T201
    assert far < ROUNDING


@pytest.mark.bundle
def test_with_the_default_weights_several_sources_give_the_very_tokens_of_the_reference_join(
    bench: Bench, record_property: Callable[[str, object], None]
) -> None:
    far = nats = 0.0
    for each in SEVERAL:
        reference, expected = bench.greedy(bench.own_join(each.sources), each.question)
        logits, tokens = bench.lossless(each)
        assert tokens == expected, each.question
        far, nats = max(far, distance(logits, reference)), max(nats, kl(reference, logits))
    record_property("largest_logit_difference", far)
    record_property("largest_kl", nats)
    print(f"{bench.manifest.weight_precision}, join: logits {far:.1e}, KL {nats:.1e} nats at most")  # noqa: T201
    assert nats < QUANTIZED_KL


@pytest.mark.bundle
def test_how_far_the_default_weights_are_from_exact_ones_is_measured(
    exact: Bench, bench: Bench, record_property: Callable[[str, object], None]
) -> None:
    same, nats = 0, 0.0
    for each in QUESTIONS:
        reference, expected = exact.lossless(each)
        logits, tokens = bench.lossless(each)
        same, nats = same + (tokens == expected), max(nats, kl(reference, logits))
        assert any(fact in bench.words(tokens).lower() for fact in each.expected), each.question
    record_property("same_tokens", f"{same} of {len(QUESTIONS)}")
    record_property("largest_kl", nats)
    print(f"{bench.manifest.weight_precision} from fp32: {same} of {len(QUESTIONS)} the same, KL {nats:.1e}")  # noqa: T201


@pytest.mark.bundle
@pytest.mark.parametrize(
    ("weights", "rung", "floor"),
    [("exact", "fp16", 1e-4), ("exact", "q8", 0.02), ("bench", "fp16", QUANTIZED_KL), ("bench", "q8", QUANTIZED_KL)],
)
def test_lossy_rungs_still_answer_the_questions_of_the_demo(
    request: pytest.FixtureRequest,
    weights: str,
    rung: str,
    floor: float,
    record_property: Callable[[str, object], None],
) -> None:
    bench: Bench = request.getfixturevalue(weights)
    same, worst = 0, 0.0
    asked = SINGLE[:3] + SEVERAL[:1]
    for each in asked:
        reference, expected = bench.lossless(each)
        logits, tokens = bench.answer([bench.received(holder, rung) for holder in each.sources], each.question)
        nats = kl(reference, logits)
        worst = max(worst, nats)
        assert any(fact in bench.words(tokens).lower() for fact in each.expected), each.question
        same += tokens == expected
    record_property("same_tokens", f"{same} of {len(asked)}")
    record_property("largest_kl", worst)
    print(f"{weights}, {rung}: the same tokens for {same} of {len(asked)} questions, KL at most {worst:.1e} nats")  # noqa: T201
    assert worst < floor
