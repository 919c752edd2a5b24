"""Whole preparations of the tiny model: found again, broken off, out of disk, refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from edge_agent.kv.cache import Float32
from edge_agent.kv.transform import TRANSFORM_FILE, Transform
from edge_agent.model.manifest import read_manifest, verify_digests
from edge_agent.model.session import LiveContext
from scripts.prepare_model import assembly, cache, calibration, exported_graph, ladder, prepare, quality, source
from scripts.prepare_model.__main__ import app
from scripts.prepare_model.bundle import Prepared
from scripts.prepare_model.errors import DiskFull, ExportFailed, ModelRefused, PreparationError, SourceUnavailable
from scripts.prepare_model.export_graph import ExportGraph
from scripts.prepare_model.graph import storing, weights
from scripts.prepare_model.graph.editing import Graph
from scripts.prepare_model.progress import Clock, Progress
from scripts.prepare_model.prompt import make_prompt, tokenize
from scripts.prepare_model.worker import Exported, ExportJob, Job, Outcome, RewriteJob, rewrite_all, run_worker
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]


def known_export(bundle: Path, jobs: list[Job] | None = None) -> Callable[..., Outcome]:
    """Stands in for the worker: what it once exported of the tiny model, in no time; rewrites in this process."""
    export = _tiny_export(bundle)

    def run(job: Job, *_: object) -> Outcome:
        if jobs is not None:
            jobs.append(job)
        if isinstance(job, RewriteJob):
            return rewrite_all(job, lambda _: None)
        for path in export.iterdir():
            if path.name != cache.EXPORT_NAME:
                shutil.copy(path, job.into)
        noted = cache.find_export(export)
        assert noted is not None
        return msgspec.json.decode(noted, type=Exported)

    return run


@pytest.fixture
def jobs() -> list[Job]:
    """What the worker was asked for."""
    return []


@pytest.fixture
def quick(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]) -> Path:
    """The tiny bundle, with the worker replaced by its memory of it."""
    monkeypatch.setattr(assembly, "run_worker", known_export(tiny_bundle, jobs))
    return tiny_bundle


def _prepare(root: Path, limit_gb: float = 1.0, weights: str = "int8") -> Prepared:
    source = tiny.tiny_source()
    return prepare(str(source), texts=source / "texts", root=root, limit_gb=limit_gb, weights=weights)


def _tiny_export(bundle: Path) -> Path:
    """The export that the tiny bundle was made from."""
    directory = tiny.tiny_source()
    found, texts = source.resolve(str(directory)), calibration.read_texts(directory / "texts")
    return assembly.export_place(found, texts, cache.shaping_versions(), bundle.parents[1])


def _tiny_exports(bundle: Path, root: Path) -> Path:
    """The export that the tiny bundle was made from, alone in another cache."""
    kept = _tiny_export(bundle)
    return Path(shutil.copytree(kept, root / "exports" / kept.name))


def _titles(prepared: Prepared) -> list[str]:
    return [title for title, _ in prepared.stages]


def _all(root: Path, room: str = "bundles") -> list[str]:
    return sorted(path.name for path in (root / room).glob("*")) + sorted(
        path.name for path in (root / room).glob(".tmp-*")
    )


def _python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _tiny_command(cache_root: Path, *more: str) -> subprocess.Popen[str]:
    source = tiny.tiny_source()
    command = [sys.executable, "-m", "scripts.prepare_model", "--model", str(source), "--texts", str(source / "texts")]
    return subprocess.Popen(
        [*command, *more],
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


def test_the_ladder_runs_from_lossless_to_tightest_and_nothing_in_it_is_beaten(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    lossless, *others = manifest.ladder
    assert (lossless.name, lossless.agreement) == ("float32", 1.0)
    assert lossless.kl < 1e-8
    assert 32 < lossless.bits_per_element < 32 * 1.3 + 0.3
    bits = [rung.bits_per_element for rung in manifest.ladder]
    assert bits == sorted(bits, reverse=True)
    assert {rung.name for rung in others if rung.transformed} == {r.name for r in others if r.name.startswith("klt")}
    tight = [rung for rung in others if rung.transformed]
    assert len(tight) >= 5
    assert tight[-1].bits_per_element < 1.5
    assert tight[-1].kl > tight[0].kl
    assert ladder.front(manifest.ladder) == manifest.ladder


def test_plain_widths_and_the_papers_recipes_stand_beside_the_ladder(tiny_bundle: Path) -> None:
    baselines = {rung.name: rung for rung in read_manifest(tiny_bundle).baselines}
    assert list(baselines) == ["q6", "q4", "qkvcomm-8", "qkvcomm-6", "qkvcomm-4"]
    assert baselines["q4"].kl > baselines["q6"].kl
    for name, bits in (("q6", 6), ("q4", 4), ("qkvcomm-8", 4), ("qkvcomm-6", 4), ("qkvcomm-4", 4)):
        assert (
            bits < baselines[name].bits_per_element < bits * 1.3 + 0.3
        )  # of the three layers two are sent, at 8 and 4
    assert all(baselines[name].kl > baselines["q6"].kl for name in list(baselines)[2:])


def test_the_transform_in_a_bundle_is_the_one_it_names_whatever_the_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    transform = Transform.load(tiny_bundle / TRANSFORM_FILE)
    assert (transform.id, transform.layers, transform.width) == (manifest.transform, tiny.LAYERS, 2 * 2 * 16)
    root = tmp_path / "cache"
    _tiny_exports(tiny_bundle, root)
    assert _prepare(root, weights="int4").manifest.transform == manifest.transform


def test_pieces_of_the_prompt_tokenize_alone_as_they_do_together(tiny_bundle: Path) -> None:
    import tokenizers  # noqa: PLC0415

    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_bundle / "tokenizer.json"))
    prompt = make_prompt(tokenizer)
    pieces = [
        prompt.prefix,
        prompt.context_format.format(text="The pump ran for 3 hours."),
        prompt.facts_format.format(facts="pump; 3 hours"),
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
    assert made.removed[0] == "old-model-0"
    assert [name.rsplit("-", 1)[0] for name in made.removed[1:]] == ["tiny"]  # the export, which was used before
    assert _all(tmp_path) == [made.path.name]
    assert _all(tmp_path, "exports") == []


@pytest.mark.parametrize("moment", ["export", "rewrite", "compare", "ladder", "write"])
def test_killed_in_the_middle_it_leaves_nothing_that_a_later_run_trusts(
    moment: str, quick: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from scripts.prepare_model import assembly, cache, prepare
        from scripts.prepare_model.worker import RewriteJob
        from tests.scripts.test_prepare_model import known_export
        moment, source, root, bundle = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])

        def stop(*_, **__):
            print("now", flush=True)
            time.sleep(60)

        known, put = known_export(bundle), cache.put_in_place

        def half(job, *_):
            if moment == "export":
                (Path(job.into) / "model.onnx").write_bytes(b"half")
                stop()
            if isinstance(job, RewriteJob):
                (Path(job.into) / "int8").mkdir()
                (Path(job.into) / "int8" / "model.onnx").write_bytes(b"half")
                stop()
            return known(job)

        assembly.run_worker = half if moment in {"export", "rewrite"} else known
        if moment == "compare":
            assembly.quality.compare = stop
        if moment == "ladder":
            assembly.ladder.measure = stop
        if moment == "write":
            cache.put_in_place = lambda made, target: stop() if target.parent.name == "bundles" else put(made, target)
        prepare(source, texts=Path(source) / "texts", root=root)
    """
    process = _python(code, moment, str(tiny.tiny_source()), str(tmp_path), str(quick))
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n", process.stderr and process.stderr.read()
        process.kill()
    left = _all(tmp_path, "exports" if moment == "export" else "bundles")
    assert left
    assert all(name.startswith(".tmp-") for name in left)
    made = _prepare(tmp_path)
    assert not made.found
    assert (_all(tmp_path), len(_all(tmp_path, "exports"))) == ([made.path.name], 1)
    assert len(jobs) == (2 if moment == "export" else 1)  # a whole export is kept
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
    assert _all(tmp_path) == _all(tmp_path, "exports") == []


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
    assert all(not name.startswith(".tmp-") for name in _all(tmp_path, "exports"))


def test_an_export_that_fills_the_disk_is_one_line(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(assembly, "_bring_source", full)
    with pytest.raises(DiskFull, match=r"disk full while writing the export of tiny: \d+ MB free"):
        exported_graph(str(tiny.tiny_source()), root=tmp_path)
    assert _all(tmp_path, "exports") == []


@pytest.mark.parametrize("weights", ["fp32", "int4", "int8"])
def test_a_disk_that_fills_while_weights_are_written_is_one_line(
    weights: str, quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = storing.save

    def full(graph: Graph, path: Path) -> None:
        if path.parent.name == weights:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(graph, path)

    monkeypatch.setattr(storing, "save", full)
    with pytest.raises(DiskFull, match="disk full while writing") as caught:
        _prepare(tmp_path)
    assert "\n" not in str(caught.value)
    assert _all(tmp_path) == []


def test_a_second_precision_is_made_from_the_kept_export_without_torch(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tiny_exports(tiny_bundle, tmp_path / "cache")
    (tmp_path / "blocked").mkdir()
    for name in ("torch", "transformers", "optimum"):
        (tmp_path / "blocked" / f"{name}.py").write_text("raise ImportError('not for a rewrite')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "blocked"))
    monkeypatch.chdir(ROOT)
    made = _prepare(tmp_path / "cache", weights="int4")
    assert made.manifest.weight_precision == "int4"
    assert "rewrite the graph" in _titles(made)
    assert not {"load torch and transformers", "export to ONNX"} & set(_titles(made))


def test_bundles_of_all_precisions_come_from_one_export(quick: Path, tmp_path: Path, jobs: list[Job]) -> None:
    made = {weights: _prepare(tmp_path, weights=weights) for weights in ("int8", "fp32", "int4")}
    assert [type(job) for job in jobs] == [ExportJob, RewriteJob, RewriteJob, RewriteJob]
    assert len({prepared.path for prepared in made.values()}) == 3
    assert len({prepared.manifest.fingerprint for prepared in made.values()}) == 1
    assert all(prepared.manifest.weight_precision == weights for weights, prepared in made.items())
    sizes = [made[weights].size_bytes for weights in ("int4", "int8", "fp32")]
    assert sizes == sorted(sizes)
    for other in ("fp32", "int4"):  # what the first found out is not found out again
        assert not {"profile the layers", "compare with the export"} & set(_titles(made[other]))
        for field in ("profile", "precisions"):
            assert getattr(made[other].manifest, field) == getattr(made["int8"].manifest, field)
    assert "quantize the weights to int8" not in _titles(made["int4"])


def _cut(export: Path) -> None:
    path = export / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def _without_a_file(export: Path) -> None:
    (export / "tokenizer.json").unlink()


def _without_note(export: Path) -> None:
    (export / cache.EXPORT_NAME).unlink()


def _half_a_note(export: Path) -> None:
    path = export / cache.EXPORT_NAME
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("harm", [_cut, _without_a_file, _without_note, _half_a_note])
def test_an_export_damaged_in_the_cache_is_made_again(
    harm: Callable[[Path], None], quick: Path, tmp_path: Path, jobs: list[Job]
) -> None:
    export = _tiny_exports(quick, tmp_path)
    harm(export)
    made = _prepare(tmp_path)
    assert [type(job) for job in jobs] == [ExportJob, RewriteJob]
    assert _all(tmp_path, "exports") == [export.name]
    _prepare(tmp_path, weights="fp32")
    assert [type(job) for job in jobs[2:]] == [RewriteJob]
    verify_digests(made.path, made.manifest)


def test_a_rewritten_graph_that_differs_from_the_export_is_one_line_and_leaves_no_bundle(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph: Graph) -> None:
        name = next(name for name, value in graph.weights.items() if value.ndim == 2)
        graph.weights[name] = graph.weights[name] * np.float32(1.01)

    monkeypatch.setattr(weights, "to_fp32", wrong)
    with pytest.raises(ExportFailed, match=r"differs from the export: largest logit difference [\d.]+ over") as caught:
        _prepare(tmp_path)
    assert "\n" not in str(caught.value)
    assert _all(tmp_path) == []


def test_a_rewritten_graph_that_gives_nan_differs_from_the_export(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LiveContext.step

    def nan_first(self: LiveContext, *arguments: Any, **more: Any) -> Float32:
        rows = step(self, *arguments, **more)
        if self.next_position <= 128:
            rows[0, 0] = np.nan
        return rows

    monkeypatch.setattr(LiveContext, "step", nan_first)
    noted = cache.find_export(_tiny_export(tiny_bundle))
    assert noted is not None
    source = tiny.tiny_source()
    export = ExportGraph(
        exported_graph(str(source), texts=source / "texts", root=tiny_bundle.parents[1]),
        msgspec.json.decode(noted, type=Exported).architecture,
    )
    with pytest.raises(ExportFailed, match="largest logit difference nan over 300 tokens"):
        quality.compare(export, tiny_bundle, list(range(1, 301)))


def test_a_rewritten_graph_that_does_not_run_is_one_line(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Graph) -> None:
        graph.nodes[-1].op_type = "NoSuchOperator"

    monkeypatch.setattr(weights, "to_fp32", broken)
    with pytest.raises(ExportFailed, match=r"the rewritten graph does not run: .*NoSuchOperator") as caught:
        _prepare(tmp_path)
    assert "\n" not in str(caught.value)
    assert _all(tmp_path) == []


def test_a_graph_that_is_not_understood_is_one_line_of_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    export = _tiny_exports(tiny_bundle, tmp_path)
    noted = cache.find_export(export)
    assert noted is not None
    exported = msgspec.json.decode(noted, type=Exported)
    shape = exported.architecture
    layers = (msgspec.structs.replace(shape.layers[0], scale=0.3), *shape.layers[1:])
    exported = msgspec.structs.replace(exported, architecture=msgspec.structs.replace(shape, layers=layers))
    (export / cache.EXPORT_NAME).unlink()
    cache.note_export(export, msgspec.json.encode(exported))
    with _tiny_command(tmp_path) as process:
        out, err = process.communicate(timeout=60)
    said = [line for line in err.splitlines() if not line.startswith("…")]
    words = "layer 0: scores are scaled by 0.25 in the graph, by 0.3 in the model"
    assert (process.returncode, out) == (1, "")
    assert said == [f"prepare_model: the exported graph is not understood at {words}"]
    assert _all(tmp_path) == []


def test_a_graph_error_keeps_its_line_through_the_worker(tmp_path: Path, tiny_bundle: Path) -> None:
    export = _tiny_exports(tiny_bundle, tmp_path)
    (export / "model.onnx").write_bytes(b"")
    noted = cache.find_export(tiny_bundle.parents[1] / "exports" / export.name)
    assert noted is not None
    job = RewriteJob(
        scratch=str(tmp_path), export=str(export), into=str(tmp_path / "out"),
        architecture=msgspec.json.decode(noted, type=Exported).architecture, texts=((1, 2, 3),),
    )  # fmt: skip
    with pytest.raises(PreparationError, match=r"the exported graph is not understood at model\.onnx") as caught:
        run_worker(job, tmp_path / "log.txt", Clock(Progress()))
    assert "\n" not in str(caught.value)


def test_the_manifest_compares_precisions(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert [each.weights for each in manifest.precisions] == ["fp32", "int8", "int4"]
    exact, near, far = manifest.precisions
    assert (exact.kl_nats, exact.agreement) == (0, 1)
    assert 0 < near.kl_nats < far.kl_nats
    assert 1 > near.agreement > far.agreement
    assert exact.size_bytes > near.size_bytes > far.size_bytes > 0
    assert len({each.tokens for each in manifest.precisions}) == 1
    assert all(each.load_s > 0 and each.perplexity > 1 for each in manifest.precisions)
    graph = sum(path.stat().st_size for path in tiny_bundle.glob("model.onnx*"))
    assert exact.size_bytes == graph
    assert "largest logit difference" in manifest.made_with["rewrite check"]


def test_the_command_takes_weights_and_reports_precisions(tiny_bundle: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    root = tiny.tiny_source().parent
    with _tiny_command(root, "--weights", "fp32", "--json", str(report)) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found = json.loads(report.read_bytes())
    assert found["weights"] == "fp32"
    assert [each["weights"] for each in found["precisions"]] == ["fp32", "int8", "int4"]
    assert {"size_bytes", "load_s", "tokens", "nll_nats", "kl_nats", "agreement"} <= set(found["precisions"][0])
    for words in ("weight precisions", "fp32 (this bundle)", "perplexity", "rewrite: largest logit difference"):
        assert words in out


def test_help_names_the_weights_and_another_choice_is_refused() -> None:
    help_text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert "--weights" in help_text
    assert all(choice in help_text for choice in ("fp32", "int8", "int4"))
    refused = CliRunner().invoke(app, ["--weights", "int3"])
    assert refused.exit_code == 2
    assert "int3" in refused.output


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
    job = ExportJob(name="tiny", scratch=str(tmp_path), into=str(tmp_path), check_text="text")
    run_worker(job, tmp_path / "log.txt", Clock(Progress()))


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
@pytest.mark.parametrize("exported", [False, True])
def test_a_disk_that_is_really_full_is_one_line_and_leaves_nothing(
    exported: bool, tiny_bundle: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    kept = sum(path.stat().st_size for path in _tiny_export(tiny_bundle).iterdir())
    size = kept + 400_000 if exported else 700_000  # room for the export and part of the weights
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], check=False).returncode:
        pytest.skip("a small disk can't be mounted here")
    try:
        if exported:
            _tiny_exports(tiny_bundle, disk)
        with _tiny_command(disk) as process:
            _, err = process.communicate(timeout=100)
        assert process.returncode == 1
        assert "disk full while writing" in err.splitlines()[-1]
        assert "MB free" in err.splitlines()[-1]
        assert _all(disk) == []
        assert len(_all(disk, "exports")) == exported
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.bundle
def test_the_real_bundle_has_the_shape_of_smollm2(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert (len(manifest.layers), manifest.kv_heads, manifest.query_heads, manifest.head_dim) == (30, 3, 9, 64)
    assert manifest.elements_per_token * 2 == 23_040
    assert (manifest.vocabulary, manifest.window_tokens) == (49_152, 8_192)
    assert 100 <= len(manifest.prompt.prefix_ids) <= 130
    assert "Apache License" in (bundle / "LICENSE").read_text()
    assert "Hugging Face" in (bundle / "NOTICE").read_text()
    by_name = {rung.name: rung for rung in (*manifest.ladder, *manifest.baselines)}
    assert by_name["float32"].kl == 0  # the receiver's run is the sender's own, bit for bit
    assert by_name["q6"].kl < 0.02 < by_name["q4"].kl < 0.5
    within = [rung for rung in manifest.ladder if rung.kl <= 0.02]
    assert min(rung.bits_per_element for rung in within) < 16 / 8
    assert 8 <= len(manifest.ladder) <= 14  # which are on the front depends on how a processor rounds


@pytest.mark.bundle
def test_the_real_bundle_is_int8_and_close_to_float32(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest.weight_precision == "int8"
    exact, near, far = manifest.precisions
    assert (exact.weights, near.weights, far.weights) == ("fp32", "int8", "int4")
    assert abs(near.nll_nats - exact.nll_nats) < 0.03
    assert near.kl_nats < 0.02 < far.kl_nats
    assert far.size_bytes < near.size_bytes < exact.size_bytes / 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gemma_270m_is_prepared_from_end_to_end() -> None:
    try:
        source.resolve("gemma-3-270m")
    except SourceUnavailable as error:
        pytest.skip(str(error))
    made = prepare("gemma-3-270m")
    manifest = made.manifest
    windows = {layer.sliding_window for layer in manifest.layers}
    assert (len(manifest.rotary), windows) == (2, {512, None})
    checked = re.search(r"difference ([\de.+-]+) over (\d+) tokens", manifest.made_with["rewrite check"])
    assert checked is not None
    assert float(checked[1]) <= quality.LARGEST_LOGIT_DIFFERENCE
    assert int(checked[2]) > 512
    exact, near, _ = manifest.precisions
    assert near.size_bytes < exact.size_bytes / 2
    assert abs(near.nll_nats - exact.nll_nats) < 0.1
