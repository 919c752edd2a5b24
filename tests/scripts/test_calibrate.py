"""`python -m scripts.calibrate` with the tiny models: what it keeps, and one line for every mistake."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edge_agent.errors import CacheInvalid, CalibrationInvalid
from edge_agent.kv.cache import Cache
from edge_agent.kv.calibration import Kind, apply, moments
from edge_agent.kv.calibration_file import calibration_name, find_calibration
from edge_agent.model.manifest import read_manifest
from edge_agent.model.session import Model
from edge_agent.model.text import Text
from scripts.calibrate import calibrate, pair
from scripts.calibrate.__main__ import app
from scripts.prepare_model.calibration import read_texts
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
TEXTS = read_texts(None).passages[:3]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two passages."""
    made = tmp_path / "texts"
    made.mkdir()
    for index, passage in enumerate(TEXTS[:2]):
        (made / f"{index}.txt").write_text(passage)
    return made


def caches(bundle: Path) -> list[Cache]:
    """The caches of TEXTS, each read in one go after the prompt's prefix."""
    model = Model(bundle)
    text, prefix = Text(bundle, model.manifest), model.manifest.prompt.prefix_ids
    found = []
    for passage in TEXTS:
        live = model.new_context()
        live.prefill([*prefix, *text.context_ids(passage)])
        found.append(live.extract(len(prefix), live.next_position))
    return found


def run(*arguments: object) -> tuple[int, str, str]:
    """Status, output and errors of the command; the line that says what it is at is left out."""
    done = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "200"})
    errors = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("…")]
    return done.exit_code, done.stdout, "".join(errors)


def test_a_senders_caches_get_the_receivers_moments(tiny_bundle: Path, other_tiny_bundle: Path) -> None:
    done: list[int] = []
    found = calibrate(tiny_bundle, other_tiny_bundle, TEXTS, threads=1, on_passage=done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert found.kind == "dimension"
    assert found.sender.fingerprint == read_manifest(tiny_bundle).fingerprint
    assert found.receiver == moments(caches(other_tiny_bundle)).side(read_manifest(other_tiny_bundle).fingerprint)
    after, ours = moments([apply(cache, found) for cache in caches(tiny_bundle)]), moments(caches(other_tiny_bundle))
    np.testing.assert_allclose(after.mean, ours.mean, atol=1e-3)
    np.testing.assert_allclose(after.deviation, ours.deviation, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["dimension", "scalar"])
def test_another_familys_model_can_hold_what_comes_of_it(
    kind: Kind, tiny_bundle: Path, tiny_gemma_bundle: Path
) -> None:
    found = calibrate(tiny_bundle, tiny_gemma_bundle, TEXTS[:1], kind=kind, threads=1)
    assert found.scale.shape == (3, 2, 1 if kind == "scalar" else tiny.KV_HEADS * tiny.HEAD_DIM)
    cache = caches(tiny_bundle)[0]
    live = Model(tiny_gemma_bundle).new_context()
    live.append(apply(cache, found))
    assert live.next_position == cache.entries
    assert np.isfinite(live.prefill([1, 2, 3])).all()


def test_a_text_longer_than_the_window_counts_as_far_as_it_goes(tiny_bundle: Path, other_tiny_bundle: Path) -> None:
    assert calibrate(tiny_bundle, other_tiny_bundle, [" ".join(TEXTS) * 4], threads=1).kind == "dimension"


def test_the_same_model_twice_is_refused_before_it_is_loaded(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pair, "Model")
    with pytest.raises(CalibrationInvalid, match="hold the same model, tiny: its caches need no calibration"):
        calibrate(tiny_bundle, tiny_bundle, TEXTS)


def test_no_texts_are_refused(tiny_bundle: Path, other_tiny_bundle: Path) -> None:
    with pytest.raises(CacheInvalid, match="no entries"):
        calibrate(tiny_bundle, other_tiny_bundle, [])


def test_the_command_keeps_a_file_that_a_receiver_finds(
    tiny_bundle: Path, other_tiny_bundle: Path, folder: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    status, out, err = run(
        "--sender", tiny_bundle, "--receiver", other_tiny_bundle, "--texts", folder, "--kind", "scalar",
        "--output", tmp_path / "pairs", "--json", report,
    )  # fmt: skip
    assert (status, err) == (0, "")
    sender, receiver = (read_manifest(bundle).fingerprint for bundle in (tiny_bundle, other_tiny_bundle))
    found = find_calibration(tmp_path / "pairs", sender, receiver)
    assert found is not None
    assert found.kind == "scalar"
    path = tmp_path / "pairs" / calibration_name(sender, receiver)
    assert f"calibration: {path}" in out
    assert "tiny → tiny: scalar, 2 passages of a given folder" in out
    written = json.loads(report.read_bytes())
    assert written["calibration"] == str(path)
    assert [layer["from_layer"] for layer in written["layers"]] == [0, 1, 2]
    assert written["layers"][1]["sigma_ratio_keys"] == pytest.approx(float(found.scale[1, 0, 0]))
    assert (written["texts"]["passages"], written["sender"]["fingerprint"]) == (2, sender)


def test_files_are_kept_in_the_cache_unless_told_otherwise(
    tiny_bundle: Path, tiny_gemma_bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVBUS_CACHE", str(tmp_path / "cache"))
    status, _, err = run("--sender", tiny_gemma_bundle, "--receiver", tiny_bundle, "--texts", folder)
    assert (status, err) == (0, "")
    names = (read_manifest(bundle).fingerprint for bundle in (tiny_gemma_bundle, tiny_bundle))
    assert [item.name for item in (tmp_path / "cache" / "calibrations").iterdir()] == [calibration_name(*names)]


@pytest.fixture
def pair_of(tiny_bundle: Path, other_tiny_bundle: Path, folder: Path) -> dict[str, object]:
    """Arguments that are right."""
    return {"--sender": tiny_bundle, "--receiver": other_tiny_bundle, "--texts": folder}


MISTAKES: list[tuple[Callable[[Path], dict[str, object]], str]] = [
    (lambda _: {"--receiver": tiny.tiny_bundle()}, "hold the same model, tiny: its caches need no calibration"),
    (lambda free: {"--receiver": free}, "manifest.json is missing; run `make prepare-model`"),
    (lambda free: {"--sender": free}, "manifest.json is missing; run `make prepare-model`"),
    (lambda free: {"--texts": free / "none"}, "none: no such folder"),
    (lambda free: {"--texts": free}, "no passage of 40 words or more"),
    (lambda _: {"--output": "/proc/none"}, "can't be written: No such file or directory"),
    (lambda free: {"--output": free, "--json": free}, "Is a directory"),
]


@pytest.mark.parametrize(("mistake", "said"), MISTAKES)
def test_a_mistake_is_one_line(
    mistake: Callable[[Path], dict[str, object]], said: str, pair_of: dict[str, object], tmp_path: Path
) -> None:
    free = tmp_path / "free"
    free.mkdir()
    arguments = {"--output": tmp_path / "pairs"} | pair_of | mistake(free)
    status, out, err = run(*(each for option in arguments.items() for each in option))
    assert (status, out) == (1, "")
    assert err.startswith("calibrate: ")
    assert said in err
    assert err.count("\n") == 1


def test_the_help_says_what_it_does_and_what_it_is_worth() -> None:
    status, out, _ = run("--help")
    assert status == 0
    words = " ".join(out.split())
    for said in ("--sender BUNDLE", "one direction", "statistics, not meaning", "$KVBUS_CACHE"):
        assert said in words


def test_ctrl_c_is_one_line_and_leaves_nothing(tiny_bundle: Path, other_tiny_bundle: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.calibrate", "--sender", tiny_bundle, "--receiver", other_tiny_bundle,
         "--output", tmp_path / "pairs"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("… read ")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    said = [line for line in err.splitlines() if not line.startswith("…")]  # rich may repeat what it was just printing
    assert (out, said) == ("", ["calibrate: interrupted; nothing of this run is kept"])
    assert not (tmp_path / "pairs").exists()
