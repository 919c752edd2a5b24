"""What the agent computes is what it should: the text's own tokens, and the join of design.md.

References are independent of the code under test: onnxruntime run directly over the whole text in one piece, the join
made of raw keys and values in float64 with complex numbers, and transformers in float64 on the tiny model.
`pytest -s` shows the distances that are measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
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
from edge_agent.model.exchange import expectation, payload_header
from edge_agent.model.manifest import Manifest, read_manifest
from edge_agent.model.rotary import rotate
from edge_agent.model.session import LiveContext, Model
from edge_agent.model.text import AnswerText, Text
from tests import tiny

Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
State = tuple[Floats, ...]
"""Raw keys and values as a graph gives them, (1, kv_heads, entries, head_dim) each: key 0, value 0, key 1, …"""

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ROOT / "scripts" / "demo" / "documents"
HOLDERS = {"pi-1": "site-north.txt", "pi-2": "site-south.txt"}
MAX_NEW_TOKENS = 12
ROPE_THETA = 100_000.0
"""SmolLM2-135M-Instruct's, from its configuration."""

ROUNDING = 1e-3
"""Logits (spread about 20) that differ by less differ by float32 rounding of sums in another order."""


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
    """The graph under onnxruntime, without any of the agent's code around it."""

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
    """The real model twice: through the agent's code, and directly."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = read_manifest(bundle)
        self.model = Model(bundle, threads=2)
        self.text = Text(bundle, self.manifest)
        self.direct = Direct(self.manifest, bundle / self.manifest.model_file)
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
        live = self.prefix.fork()
        live.prefill(ids)
        return live.extract(len(self.prefix_ids), live.entries)

    def sent(self, holder: str, rung: str, own: int = 0) -> tuple[list[int], Cache]:
        """A holder's cache through a payload: the ids to prefill, and the entries that came."""
        made = recipe(rung)
        ids = self.ids[holder]
        header = payload_header(self.manifest, self.text.context_id(ids), ids, own_tokens=own, rung=made)
        data = b"".join(encode(header, self.caches[holder], made))
        back, cache = decode(data, expectation(self.manifest, 1 << 30))
        assert cache is not None
        return back.ids(), cache

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
        live = self.joined(caches)
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


@pytest.fixture(scope="module")
def bench(bundle: Path) -> Bench:
    return Bench(bundle)


@pytest.mark.bundle
def test_one_source_on_the_lossless_rung_gives_the_very_tokens_of_text_prefill(
    bench: Bench, record_property: Callable[[str, object], None]
) -> None:
    worst = 0.0
    for each in SINGLE:
        reference, expected = bench.running_text(each)
        logits, tokens = bench.lossless(each)
        assert tokens == expected, each.question
        worst = max(worst, distance(logits, reference))
    assert worst < ROUNDING
    record_property("largest_logit_difference", worst)
    print(f"one source: {len(SINGLE)} questions, logits differ by at most {worst:.1e}")  # noqa: T201


@pytest.mark.bundle
@pytest.mark.parametrize("own", [1, 200])
def test_own_tokens_and_a_received_rest_equal_the_whole(bench: Bench, own: int) -> None:
    ids, rest = bench.sent("pi-1", "float32", own)
    assert ids == bench.ids["pi-1"][:own]
    assert rest.entries == len(bench.ids["pi-1"]) - own
    whole, expected = bench.lossless(SINGLE[0])
    logits, tokens = bench.answer([concatenate([bench.prefilled(ids), rest])], SINGLE[0].question)
    assert tokens == expected
    assert distance(logits, whole) < ROUNDING


@pytest.mark.bundle
def test_several_sources_equal_the_reference_join_in_float64(
    bench: Bench, record_property: Callable[[str, object], None]
) -> None:
    half = bench.manifest.head_dim // 2
    frequencies = ROPE_THETA ** (-np.arange(half, dtype=np.float64) / half)
    worst = 0.0
    for each in SEVERAL:
        alone = [bench.one_piece(holder) for holder in each.sources]
        past = reference_join(bench.prefix_state(), alone, frequencies)
        reference, expected = bench.direct_answer(past, each.question)
        logits, tokens = bench.lossless(each)
        assert tokens == expected, each.question
        worst = max(worst, distance(logits, reference))
    assert worst < ROUNDING
    record_property("largest_logit_difference", worst)
    print(f"join: {len(SEVERAL)} questions, logits differ from float64's by at most {worst:.1e}")  # noqa: T201


@pytest.mark.bundle
def test_how_far_the_join_is_from_running_text_is_measured(
    bench: Bench, record_property: Callable[[str, object], None]
) -> None:
    for each in [SINGLE[0], *SEVERAL]:
        reference, text_tokens = bench.running_text(each)
        logits, tokens = bench.lossless(each)
        far, nats = distance(logits, reference), kl(reference, logits)
        assert np.isfinite([far, nats]).all()
        if len(each.sources) == 1:
            assert far < ROUNDING
            assert nats < 1e-6
        said = f"{bench.words(tokens)!r}, running text {bench.words(text_tokens)!r}"
        record_property(each.question, f"logits {far:.2e}, KL {nats:.2e} nats, {said}")
        print(f"{'+'.join(each.sources)}: logits {far:.1e}, KL {nats:.1e} nats; {said}")  # noqa: T201


@pytest.mark.bundle
@pytest.mark.parametrize(("rung", "floor"), [("fp16", 1e-4), ("q8", 0.02)])
def test_lossy_rungs_still_answer_the_questions_of_the_demo(
    bench: Bench, rung: str, floor: float, record_property: Callable[[str, object], None]
) -> None:
    same, worst = 0, 0.0
    asked = SINGLE[:3] + SEVERAL[:1]
    for each in asked:
        reference, expected = bench.lossless(each)
        logits, tokens = bench.answer([bench.received(holder, rung) for holder in each.sources], each.question)
        nats = kl(reference, logits)
        assert nats < floor, each.question
        assert any(fact in bench.words(tokens).lower() for fact in each.expected), each.question
        same, worst = same + (tokens == expected), max(worst, nats)
    record_property("same_tokens", f"{same} of {len(asked)}")
    record_property("largest_kl", worst)
    print(f"{rung}: the same tokens for {same} of {len(asked)} questions, KL at most {worst:.1e} nats")  # noqa: T201


_TRANSFORMERS = """
    import json, sys
    import numpy as np, torch
    from transformers import AutoModelForCausalLM, DynamicCache

    given = json.loads(sys.argv[2])
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).double().eval()
    theta, dim = model.config.rope_theta, model.config.head_dim
    frequencies = theta ** (-np.arange(dim // 2) / (dim // 2))

    def read(ids, past=None, start=None):
        past = past or DynamicCache()
        start = past.get_seq_length() if start is None else start
        places = torch.arange(start, start + len(ids))[None]
        with torch.no_grad():
            out = model(torch.tensor([ids]), past_key_values=past, position_ids=places, use_cache=True)
        return out.logits[0, -1].numpy(), out.past_key_values

    def states(cache):
        return [(layer.keys.numpy(), layer.values.numpy()) for layer in cache.layers]

    def turned(keys, positions):
        a, b = np.split(keys, 2, axis=-1)
        angles = np.outer(positions, frequencies)
        c, s = np.cos(angles), np.sin(angles)
        return np.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    prefix, found = given["prefix"], {}
    for number, contexts in enumerate(given["joins"]):
        joined, at = states(read(prefix)[1]), len(prefix)
        for ids in contexts:
            stood = np.arange(len(prefix), len(prefix) + len(ids))
            landing = np.arange(at, at + len(ids))
            for layer, (keys, values) in enumerate(states(read(prefix + ids)[1])):
                keys = turned(turned(keys[:, :, len(prefix):], -stood), landing)
                before = joined[layer]
                joined[layer] = (
                    np.concatenate([before[0], keys], 2), np.concatenate([before[1], values[:, :, len(prefix):]], 2)
                )
            at += len(ids)
        past = DynamicCache()
        for layer, (keys, values) in enumerate(joined):
            past.update(torch.from_numpy(keys), torch.from_numpy(values), layer)
        found[f"join {number}"] = read(given["question"], past)[0]
        text = sum(contexts, list(prefix))
        found[f"text {number}"] = read(text + given["question"])[0]
    for start in given["starts"]:
        for layer, (keys, values) in enumerate(states(read(given["moved"], start=start)[1])):
            found[f"keys {start} {layer}"], found[f"values {start} {layer}"] = keys[0], values[0]
    np.savez(sys.argv[3], **found)
"""

TINY_TEXTS = ("The pump stopped at noon.", "Valve 3 was closed because of the storm, and opened again.", "All is well.")
TINY_JOINS = ((0,), (1,), (0, 1), (1, 0), (2, 0, 1))
STARTS = (0, 1, 500)


@pytest.fixture(scope="module")
def tiny_ids(tiny_bundle: Path) -> tuple[list[list[int]], list[int]]:
    text = Text(tiny_bundle, read_manifest(tiny_bundle))
    return [text.context_ids(each) for each in TINY_TEXTS], text.question_ids("Why was the valve closed?")


@pytest.fixture(scope="module")
def by_transformers(
    tiny_bundle: Path, tiny_ids: tuple[list[list[int]], list[int]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Float64]:
    """The joins and moves as transformers has them, in float64. In a process of its own, for torch's sake."""
    contexts, question = tiny_ids
    given = {
        "prefix": list(read_manifest(tiny_bundle).prompt.prefix_ids),
        "joins": [[contexts[index] for index in join] for join in TINY_JOINS],
        "question": question,
        "moved": contexts[1],
        "starts": STARTS,
    }
    found = tmp_path_factory.mktemp("transformers") / "found.npz"
    code = textwrap.dedent(_TRANSFORMERS)
    arguments = [str(tiny.tiny_source()), json.dumps(given), str(found)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with np.load(found) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("number", range(len(TINY_JOINS)))
def test_the_join_equals_transformers_in_float64(
    tiny_bundle: Path, tiny_ids: tuple[list[list[int]], list[int]], by_transformers: dict[str, Float64], number: int
) -> None:
    contexts, question = tiny_ids
    model = Model(tiny_bundle)
    prefix = model.new_context()
    prefix.prefill(model.manifest.prompt.prefix_ids)
    live = prefix.fork()
    for index in TINY_JOINS[number]:
        alone = prefix.fork()
        alone.prefill(contexts[index])
        live.append(alone.extract(prefix.entries, alone.entries))
    logits = live.prefill(question)
    join, text = by_transformers[f"join {number}"], by_transformers[f"text {number}"]
    assert distance(logits, join) < 1e-4
    if len(TINY_JOINS[number]) == 1:
        assert distance(join, text) < 1e-9  # one source: the join is the text
    else:
        assert distance(join, text) > 1e-2  # several: they do not see each other, and that shows


@pytest.mark.parametrize("start", STARTS)
def test_a_moved_cache_holds_what_transformers_computes_at_that_place(
    tiny_bundle: Path, tiny_ids: tuple[list[list[int]], list[int]], by_transformers: dict[str, Float64], start: int
) -> None:
    model = Model(tiny_bundle)
    live = model.new_context()
    live.prefill(tiny_ids[0][1])
    for index, layer in enumerate(live.extract(0, live.entries).layers):
        moved = rotate(layer.keys, layer.positions + np.int32(start), model.frequencies(index))
        assert distance(moved, by_transformers[f"keys {start} {index}"]) < 1e-4
        assert distance(layer.values, by_transformers[f"values {start} {index}"]) < 1e-4
