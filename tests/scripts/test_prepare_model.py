"""Whole preparations of the tiny model: found again, broken off, out of disk, refused."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from edge_agent.model.manifest import Manifest, read_manifest, verify_digests
from scripts.prepare_model import assembly, cache, prepare
from scripts.prepare_model.architecture import Architecture
from scripts.prepare_model.bundle import Prepared
from scripts.prepare_model.errors import DiskFull, ExportFailed, ModelRefused, PreparationError
from scripts.prepare_model.prompt import make_prompt, tokenize
from scripts.prepare_model.worker import Exported, Job, run_worker
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


def _exported(manifest: Manifest) -> Exported:
    shape = Architecture(
        layers=manifest.layers,
        kv_heads=manifest.kv_heads,
        query_heads=manifest.query_heads,
        head_dim=manifest.head_dim,
        vocabulary=manifest.vocabulary,
        window_tokens=manifest.window_tokens,
        rotary=manifest.rotary,
        eos_ids=manifest.eos_ids,
    )
    return Exported(
        fingerprint=manifest.fingerprint,
        tokenizer=manifest.tokenizer_digest,
        architecture=shape,
        check="as it was",
        samples=(),
    )


def known_export(bundle: Path) -> Callable[..., Exported]:
    """Stands in for the worker: gives what it once made of the tiny model, in no time."""

    def run(job: Job, *_: object) -> Exported:
        for name in ("model.onnx", "tokenizer.json"):
            shutil.copy(bundle / name, job.into)
        return _exported(read_manifest(bundle))

    return run


@pytest.fixture
def quick(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny bundle, with the worker replaced by its memory of it."""
    monkeypatch.setattr(assembly, "run_worker", known_export(tiny_bundle))
    return tiny_bundle


def _prepare(root: Path, limit_gb: float = 1.0) -> Prepared:
    source = tiny.tiny_source()
    return prepare(str(source), texts=source / "texts", root=root, limit_gb=limit_gb)


def _all(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "bundles").iterdir())


def _python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _tiny_command(cache_root: Path) -> subprocess.Popen[str]:
    source = tiny.tiny_source()
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.prepare_model", "--model", str(source), "--texts", str(source / "texts")],
        cwd=ROOT,
        text=True,
        env={**os.environ, cache.CACHE_VARIABLE: str(cache_root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _wait_for(process: subprocess.Popen[str], words: str) -> None:
    for line in process.stderr or ():
        if words in line:
            return
    pytest.fail(f"the preparation ended before it said {words!r}")


def test_a_bundle_is_whole_and_describes_its_model(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    verify_digests(tiny_bundle, manifest)
    assert (len(manifest.layers), manifest.kv_heads, manifest.query_heads) == (3, 2, 4)
    assert (manifest.head_dim, manifest.vocabulary, manifest.window_tokens) == (16, 512, 1024)
    assert manifest.layers[0].sliding_window is None
    expected = 1.0 / 10_000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(manifest.rotary[0], expected, rtol=1e-6)
    assert manifest.eos_ids == (0,)
    listed = {entry.path for entry in manifest.files}
    assert {"model.onnx", "tokenizer.json", "NOTICE"} <= listed
    assert listed | {"manifest.json"} == {path.name for path in tiny_bundle.iterdir()}
    assert str(tiny.tiny_source().parent) not in (tiny_bundle / "manifest.json").read_text()


def test_the_ladder_runs_from_lossless_to_tightest_with_honest_bits(tiny_bundle: Path) -> None:
    ladder = read_manifest(tiny_bundle).ladder
    assert [rung.name for rung in ladder] == ["float32", "fp16", "q8", "q6", "q4"]
    assert ladder[0].kl < 1e-8
    assert ladder[0].agreement == 1.0
    assert all(tighter.kl > looser.kl for looser, tighter in itertools.pairwise(ladder[1:]))
    for rung, bits in zip(ladder, (32, 16, 8, 6, 4), strict=True):
        assert bits < rung.bits_per_element < bits * 1.3 + 0.3


def test_pieces_of_the_prompt_tokenize_alone_as_they_do_together(tiny_bundle: Path) -> None:
    import tokenizers  # noqa: PLC0415

    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))
    prompt = make_prompt(tokenizer)
    pieces = [
        prompt.prefix,
        prompt.context_format.format(text="The pump ran for 3 hours."),
        prompt.question_format.format(question="How long did it run?"),
    ]
    apart = [token for piece in pieces for token in tokenize(tokenizer, piece)]
    assert apart == list(tokenize(tokenizer, "".join(pieces)))
    assert prompt.prefix_ids == tokenize(tokenizer, prompt.prefix)


def test_the_second_run_finds_the_bundle_and_imports_no_torch(quick: Path, tmp_path: Path) -> None:
    made = _prepare(tmp_path)
    assert not made.found
    code = """
        import sys
        from pathlib import Path
        from scripts.prepare_model import prepare
        found = prepare(sys.argv[1], texts=Path(sys.argv[1]) / "texts", root=Path(sys.argv[2]))
        heavy = {"torch", "transformers", "optimum", "onnx"} & set(sys.modules)
        print(found.found, found.path, sorted(heavy))
    """
    out, err = _python(code, str(tiny.tiny_source()), str(tmp_path)).communicate(timeout=60)
    assert out.split() == ["True", str(made.path), "[]"], err


def test_a_bundle_damaged_in_the_cache_is_made_again(quick: Path, tmp_path: Path) -> None:
    made = _prepare(tmp_path)
    (made.path / "model.onnx").write_bytes(b"short")
    again = _prepare(tmp_path)
    assert (again.found, again.path) == (False, made.path)
    verify_digests(again.path, read_manifest(again.path))
    assert _all(tmp_path) == [made.path.name]


def test_the_limit_is_kept_and_what_left_is_named(quick: Path, tmp_path: Path) -> None:
    old = tmp_path / "bundles" / "old-model-0"
    old.mkdir(parents=True)
    (old / "model.onnx").write_bytes(b"x" * 1000)
    made = _prepare(tmp_path, limit_gb=0)
    assert made.removed == ("old-model-0",)
    assert _all(tmp_path) == [made.path.name]


@pytest.mark.parametrize("moment", ["export", "ladder", "write"])
def test_killed_in_the_middle_it_leaves_nothing_that_a_later_run_trusts(
    moment: str, quick: Path, tmp_path: Path
) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from scripts.prepare_model import assembly, cache, prepare
        from tests.scripts.test_prepare_model import known_export
        moment, source, root, bundle = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])

        def stop(*_, **__):
            print("now", flush=True)
            time.sleep(60)

        def half(job, *_):
            (Path(job.into) / "model.onnx").write_bytes(b"half")
            stop()

        assembly.run_worker = half if moment == "export" else known_export(bundle)
        if moment == "ladder":
            assembly.ladder.measure = stop
        if moment == "write":
            cache.put_in_place = stop
        prepare(source, texts=Path(source) / "texts", root=root)
    """
    process = _python(code, moment, str(tiny.tiny_source()), str(tmp_path), str(quick))
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n", process.stderr and process.stderr.read()
        process.kill()
    left = _all(tmp_path)
    assert left
    assert all(name.startswith(".tmp-") for name in left)
    made = _prepare(tmp_path)
    assert not made.found
    assert _all(tmp_path) == [made.path.name]
    verify_digests(made.path, read_manifest(made.path))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_worker_ends_with_the_process_that_started_it(how: signal.Signals, tmp_path: Path) -> None:
    with _tiny_command(tmp_path) as process:
        _wait_for(process, "load torch")
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(how)
        process.wait(30)
        gone, alive = psutil.wait_procs(workers, timeout=30)
    assert gone
    assert not alive


def test_ctrl_c_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with _tiny_command(tmp_path) as process:
        _wait_for(process, "load torch")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    said = [line for line in err.splitlines() if not line.startswith("…")]  # a stage may just have begun
    assert (out, said) == ("", ["prepare_model: interrupted; nothing of this run is kept"])
    assert _all(tmp_path) == []


@pytest.mark.parametrize("step", ["_write_manifest", "_bring_source"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    step: str, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assembly, step, full)
    with pytest.raises(DiskFull, match=r"disk full while writing the bundle of tiny: \d+ MB free") as caught:
        _prepare(tmp_path)
    assert "\n" not in str(caught.value)
    assert _all(tmp_path) == []


def test_too_little_disk_for_the_default_model_is_said_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "free_mb", lambda _: 12)
    with pytest.raises(PreparationError, match="12 MB are free"):
        prepare(root=tmp_path)


def _worker_that_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    script = tmp_path / "worker.sh"
    script.write_text(f"#!/bin/sh\n{code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    job = Job(name="tiny", scratch=str(tmp_path), into=str(tmp_path), check_text="text")
    run_worker(job, tmp_path / "log.txt", lambda _: None)


def test_a_worker_out_of_disk_is_known_by_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DiskFull):
        _worker_that_says(tmp_path, monkeypatch, "echo 'write: No space left on device' >&2; exit 1")


def test_a_worker_that_was_killed_is_named_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportFailed, match=r"was killed \(out of memory\?\).*loading"):
        _worker_that_says(tmp_path, monkeypatch, "echo loading >&2; kill -9 $$")


def test_a_model_that_is_not_a_causal_language_model_is_refused_by_name(tmp_path: Path) -> None:
    model = tmp_path / "reader"
    shutil.copytree(tiny.tiny_source(), model)
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused, match="reader is not a causal language model: BertForMaskedLM"):
        prepare(str(model), texts=model / "texts", root=tmp_path / "cache")
    assert _all(tmp_path / "cache") == []


@pytest.mark.slow
def test_the_fingerprint_does_not_depend_on_place_sharding_or_export_but_on_a_weight(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    moved, changed = tmp_path / "moved", tmp_path / "changed"
    code = """
        import sys, torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        model.save_pretrained(sys.argv[2], max_shard_size="50KB")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-4
        model.save_pretrained(sys.argv[3])
    """
    process = _python(code, str(tiny.tiny_source()), str(moved), str(changed))
    assert process.communicate(timeout=60) is not None
    assert process.returncode == 0
    prints = []
    for model in (moved, changed):
        shutil.copy(tiny.tiny_source() / "tokenizer.json", model)
        made = prepare(str(model), texts=tiny.tiny_source() / "texts", root=tmp_path / "cache")
        prints.append(made.manifest.fingerprint)
    ours = read_manifest(tiny_bundle).fingerprint
    assert prints[0] == ours != prints[1]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(disk)], check=False).returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        with _tiny_command(disk) as process:
            _, err = process.communicate(timeout=100)
        assert process.returncode == 1
        assert "disk full while writing" in err.splitlines()[-1]
        assert "MB free" in err.splitlines()[-1]
        assert _all(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.bundle
def test_the_real_bundle_has_the_shape_of_smollm2(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert (len(manifest.layers), manifest.kv_heads, manifest.query_heads, manifest.head_dim) == (30, 3, 9, 64)
    assert manifest.elements_per_token * 2 == 23_040
    assert (manifest.vocabulary, manifest.window_tokens) == (49_152, 8_192)
    assert 80 <= len(manifest.prompt.prefix_ids) <= 110
    assert "Apache License" in (bundle / "LICENSE").read_text()
    assert "Hugging Face" in (bundle / "NOTICE").read_text()
    by_name = {rung.name: rung for rung in manifest.ladder}
    assert by_name["float32"].kl < 1e-9
    assert by_name["q8"].kl < 0.002 < by_name["q4"].kl < 0.5
