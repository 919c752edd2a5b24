"""The codec's bench: peers count every byte, stages are the codec's own, losses are a receiver's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.errors import RecipeInvalid
from edge_agent.kv.cache import Cache, concatenate
from edge_agent.kv.recipe import recipe
from scripts import relay
from scripts.bench.codec import run
from scripts.bench.codec.measured import CodecBench, CodecRow, Loss, StageRow
from scripts.bench.codec.peers import CACHEGEN, Peers, makers, peers, zstd
from scripts.bench.codec.quantized import Backend, Kept, quantized_cache
from scripts.bench.codec.report import sections
from scripts.bench.codec.stages import stages_of
from scripts.bench.measure import Timed
from scripts.peers.method import Method, assembled, tensors
from tests.scripts.caches import random_cache, random_tensor

TEXTS = ["The pump of the north tank stopped at noon because its filter was full of sand. "] * 40


@pytest.fixture(scope="module")
def subject(tiny_bundle: Path) -> run.Subject:
    return run.read(tiny_bundle, TEXTS, threads=1)


# Peers


def test_zstd_gives_back_half_precision() -> None:
    pytest.importorskip("zstandard")
    method, cache = zstd("fp16 + zstd"), random_cache()
    sent = method.encode(cache)
    assert method.nbytes(sent) == len(sent)
    for one, two in zip(tensors(cache), tensors(method.decode(sent)), strict=True):
        assert np.array_equal(one.astype(np.float16), two)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("backend", ["hqq", pytest.param("quanto", marks=pytest.mark.slow)])  # it compiles a kernel
@pytest.mark.filterwarnings("default")
def test_a_quantized_cache_gives_back_what_its_bits_allow(backend: Backend, bits: int) -> None:
    if backend == "quanto":
        pytest.importorskip("optimum.quanto")
    method = quantized_cache(backend, backend=backend, bits=bits, threads=1)
    cache = random_cache(channels=64)
    sent = method.encode(cache)
    assert 8 * method.nbytes(sent) / cache.elements == bits + 2 * 16 / 64
    for _ in range(2):  # reading changes nothing
        back = method.decode(sent)
        for one, two in zip(tensors(cache), tensors(back), strict=True):
            assert one.shape == two.shape
            assert np.abs(one - two).max() <= (one.max() - one.min()) / (2**bits - 1)


class _Part:
    def __init__(self, numbers: int, size: int) -> None:
        self._numbers, self._size = numbers, size

    def numel(self) -> int:
        return self._numbers

    def element_size(self) -> int:
        return self._size


class _Whole(_Part):
    """A tensor that consists of others, and tells torch of them."""

    def __init__(self) -> None:
        super().__init__(10**6, 4)
        self.codes, self.scale = _Part(50, 1), _Part(4, 2)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, str]]:
        return ["codes", "scale"], {}


class _Layer:
    _quantized_keys = _Whole()
    _quantized_values = (_Part(50, 1), {"scale": _Part(4, 2), "zero": _Part(4, 2), "shape": (1, 2), "axis": "0"})


def test_a_backends_bytes_are_those_of_its_codes_scales_and_zeros() -> None:
    class Filled:
        layers = (_Layer(), _Layer())

    assert Kept(Filled(), None).nbytes == 2 * (58 + 66)


def _missing(name: str) -> Method[Any]:
    raise ImportError(f"{name} is not installed\nbut could be")


def _broken(name: str) -> Method[Any]:
    def encode(cache: Cache) -> bytes:
        raise RuntimeError("")

    return Method(name, encode, lambda sent: random_cache(), len)


def test_a_peer_that_does_not_work_here_is_named_and_the_others_stay() -> None:
    made: dict[str, Callable[[str], Method[Any]]] = {"one": _missing, "two": makers(1)["groups of 32, 4 bits"]}
    found = peers(random_cache(), made | {"three": _broken})
    assert [method.name for method in found.methods] == ["two"]
    assert [str(absent) for absent in found.absent[:2]] == ["one: one is not installed", "three: RuntimeError"]
    assert found.absent[2:] == (CACHEGEN,)


def test_a_missing_backend_is_called_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(module: str) -> object:
        return None if module == "hqq" else object()

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ImportError, match=r"^hqq is not installed$"):
        quantized_cache("q", backend="hqq", bits=4, threads=1)


# Stages


@pytest.mark.parametrize("name", [rung.name for rung in run.STAGED])
def test_stages_make_the_bytes_and_the_cache_that_a_payload_does(subject: run.Subject, name: str) -> None:
    rung, cache = recipe(name), subject.cache
    payload = relay.sent(subject.model, cache, rung)
    stages = stages_of(rung, cache, subject.model.transform)
    packed = stages.pack()
    assert len(packed) == -(-cache.entries // rung.slice_tokens)
    assert all(body in payload for body in packed)
    _, wanted = relay.received(subject.model, payload)
    for one, two in zip(tensors(concatenate(stages.dequantize())), tensors(wanted), strict=True):
        assert np.array_equal(one, two)
    assert _flat(stages.unpack()) == _flat(stages.quantize())


def _flat(found: Any) -> list[int]:
    """The integers in what a stage gave."""
    if isinstance(found, np.ndarray):
        return [int(number) for number in found.reshape(-1)]
    if isinstance(found, dict):
        return [number for each in found.values() for number in _flat(each)]
    return [number for each in found for number in _flat(getattr(each, "codes", each))]


def test_a_mix_of_widths_has_no_stages(subject: run.Subject) -> None:
    with pytest.raises(RecipeInvalid):
        stages_of(recipe("qkvcomm-6"), subject.cache, subject.model.transform)


# The run


def test_the_bench_measures_every_rung_and_peer(subject: run.Subject) -> None:
    made = makers(1)
    found = peers(subject.cache, {name: made[name] for name in list(made)[:4]})
    heard: list[str] = []
    bench = run.codec_bench(subject, found, repeats=1, hear=heard.append)
    assert len(heard) == run.steps(found, 1)
    assert [row.name for row in bench.rows] == [rung.name for rung in run.RUNGS] + [m.name for m in found.methods]
    assert [row.name for row in bench.stages] == [rung.name for rung in run.STAGED]
    assert (bench.questions, bench.tokens) == (len(run.ASKED), run.TOKENS)
    assert bench.answer_positions >= bench.questions
    rows = {row.name: row for row in bench.rows}
    assert rows["float32"].loss.kl < 1e-8
    assert rows["float32"].loss.agreement == 1
    assert rows["q8"].loss.kl < rows["q4"].loss.kl
    assert rows["groups of 32, 4 bits"].loss.kl < rows["groups of 32, 2 bits"].loss.kl
    payload = relay.sent(subject.model, subject.cache, recipe("klt4"))
    assert rows["klt4"].bits_per_element == 8 * len(payload) / subject.cache.elements
    assert all(line.count("|") in {0, 8} for line in sections(bench))


def test_loss_of_the_same_cache_is_nothing_and_of_another_much(subject: run.Subject) -> None:
    assert run.loss(subject, subject.cache).kl == pytest.approx(0, abs=1e-9)
    noise = assembled([random_tensor(at, *array.shape) for at, array in enumerate(tensors(subject.cache))])
    assert run.loss(subject, noise).kl > 0.1


# Tables


def _timed(seconds: float) -> Timed:
    return Timed.of([seconds, seconds / 2, seconds * 2])


def _bench() -> CodecBench:
    row = CodecRow(
        name="klt4",
        bits_per_element=1.866,
        loss=Loss(kl=0.00712, agreement=0.9259),
        encode=_timed(0.2),
        decode=_timed(0.1),
        share_of_prefill=0.3,
    )
    stages = StageRow(
        name="klt4",
        quantize=_timed(0.1),
        pack=_timed(0.08),
        encode=_timed(0.2),
        unpack=_timed(0.04),
        dequantize=_timed(0.05),
        decode=_timed(0.1),
    )
    return CodecBench(
        tokens=512,
        threads=2,
        cache_mb=20.0,
        questions=6,
        answer_positions=27,
        prefill=_timed(1.0),
        rows=(row,),
        stages=(stages,),
        absent=Peers((), (CACHEGEN,)).absent,
        versions={"zstandard": "0.25.0"},
    )


def test_the_tables_hold_bits_loss_times_and_speeds_by_stage() -> None:
    lines = sections(_bench())
    assert "| klt4 | 1.87 | 0.0071 | 0.926 | 200 (100-400) | 100 | 30.0% |" in lines
    assert "| klt4 | 200 | 250 | 100 | 500 | 400 | 200 |" in lines


def test_the_heading_says_size_threads_and_what_the_loss_rests_on() -> None:
    heading = sections(_bench())[0]
    for said in ("512 tokens (20.0 MB", "2 thread(s)", "1.00 s", "27 positions of 6 answers", "zstandard 0.25.0"):
        assert said in heading


def test_what_is_not_measured_is_said_with_a_reason() -> None:
    said = [line for line in sections(_bench()) if line.startswith("- not measured: ")]
    assert len(said) == 1
    assert "lmcache" in said[0]
