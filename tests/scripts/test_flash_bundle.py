"""Bundles: the wheels a device needs and no more, and the same bytes from the same inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts.flash import bundle as bundles
from scripts.flash import wheels
from scripts.flash.archive import tree, write_layer, zip_app
from scripts.flash.bundle import Bundle, build
from scripts.flash.errors import BundleFailed
from scripts.flash.keys import site_key
from scripts.flash.wheels import NOT_IMPORTED, PYTHONS, Target, Wheel, is_unused, resolve, unpack

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_wheel_is_there_for_a_64_bit_arm_and_its_version_is_pinned(python: str) -> None:
    found = {wheel.name: wheel for wheel in resolve(Target(python=python))}
    assert {"onnxruntime", "numpy", "tokenizers", "msgspec", "msgpack", "aiomqtt", "cryptography"} <= set(found)
    assert not set(found) & set(NOT_IMPORTED)
    assert not set(found) & {"torch", "transformers", "optimum", "httpx", "hf-xet", "pygments"}
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in _constraints() if "==" in line}
    assert set(found) <= pins
    assert all(len(wheel.sha256) == 64 for wheel in found.values())


def _constraints() -> Sequence[str]:
    return (ROOT / "constraints.txt").read_text().splitlines()


def test_an_agent_runs_on_what_is_left_of_its_packages(tmp_path: Path, tiny_bundle: Path) -> None:
    """On this machine's processor: nothing that was left out is missed, when it starts or when it looks for facts."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    target = Target(python=version, machine=os.uname().machine)
    unpack(target, resolve(target), tmp_path / "all")
    for name, path in tree(tmp_path / "all").items():
        if is_unused(name):
            path.unlink()
    configuration = tmp_path / "agent.toml"
    configuration.write_text(f'agent = "a"\nbundle = "{tiny_bundle}"\n[broker]\nport = 1\nconnect_timeout_s = 0.5\n')
    program = (
        f"import sys, os; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path / 'all')!r}]\n"
        "os.environ['TYPER_USE_RICH'] = '0'\n"
        "from edge_agent.cli import app; app()"
    )
    for arguments, code, words in (
        (["check", str(configuration)], 0, "facts: "),
        (["doctor", str(configuration)], 1, "WRONG     broker"),
        (["--help"], 0, "doctor"),
        (["run"], 2, "Missing argument"),
        (["run", str(tmp_path / "none.toml")], 1, "can't read"),
    ):
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", program, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    outside = (
        f"{program.replace('app()', '')}\nimport edge_agent.agent, edge_agent.doctor\n"
        "print([m for m in map(repr, list(sys.modules.values())) if 'site-packages' in m])"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", outside], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_wheel_that_does_not_exist_is_one_line() -> None:
    with pytest.raises(BundleFailed, match=r"can't get wheels for aarch64, Python 3\.11") as caught:
        resolve(Target(python="3.11"), ["onnxruntime==0.0.1"])
    assert "\n" not in str(caught.value)


def test_archives_of_the_same_files_are_the_same(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode() * 1000)
    one = write_layer(tmp_path / "one", tree(tmp_path / "in"), compress=True)
    for path in (tmp_path / "in").iterdir():
        os.utime(path, (1, 1))
        path.chmod(0o600)
    other = write_layer(tmp_path / "other", dict(reversed(tree(tmp_path / "in").items())), compress=True)
    assert one == other
    assert zip_app({"b": b"1", "a": b"2"}) == zip_app({"a": b"2", "b": b"1"})


@pytest.fixture
def few_wheels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Packages of one file, without an index; what was asked of it."""
    asked: list[str] = []

    def resolved(target: Target, requirements: Sequence[str] = ()) -> tuple[Wheel, ...]:
        asked.append(target.python)
        return (Wheel(name="one", version="1", sha256="0" * 64),)

    def unpacked(_: Target, found: Sequence[Wheel], folder: Path) -> None:
        for wheel in found:
            (folder / wheel.name / "tests").mkdir(parents=True)
            (folder / wheel.name / "__init__.py").write_text(f"# {wheel.version}\n")
            (folder / wheel.name / "tests" / "test_x.py").write_text("assert False\n")

    monkeypatch.setattr(bundles, "resolve", resolved)
    monkeypatch.setattr(bundles, "unpack", unpacked)
    return asked


def built(folder: Path, tmp_path: Path, model: Path, python: str = "3.11") -> Bundle:
    return build(folder, Target(python=python), model=model, key=site_key(tmp_path / "key.pem"))


def test_a_bundle_is_the_same_wherever_it_is_made_and_made_once(
    tmp_path: Path, tiny_bundle: Path, few_wheels: list[str]
) -> None:
    one, other = (built(tmp_path / name, tmp_path, tiny_bundle) for name in ("one", "other"))
    assert one.release == other.release
    assert one.signature == other.signature
    assert one.installer.read_bytes() == other.installer.read_bytes()
    assert set(one.release.layers) == {"runtime", "agent", "model"}
    for layer in one.release.layers.values():
        assert one.archive(layer).read_bytes() == other.archive(layer).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "layers").iterdir()}
    asked = len(few_wheels)
    again = built(tmp_path / "one", tmp_path, tiny_bundle)
    assert again.release == one.release
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "layers").iterdir()} == before
    assert len(few_wheels) == asked  # no internet is needed any more
    one.archive(one.release.layers["agent"]).unlink()
    damaged = one.archive(one.release.layers["model"])
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + b"x")
    assert built(tmp_path / "one", tmp_path, tiny_bundle).release == one.release
    assert damaged.read_bytes() == content
    assert not list((tmp_path / "one" / "layers").glob(".*"))


def test_releases_for_other_pythons_share_what_is_the_same(
    tmp_path: Path, tiny_bundle: Path, other_tiny_bundle: Path, few_wheels: list[str]
) -> None:
    one, other = (built(tmp_path / "b", tmp_path, tiny_bundle, python) for python in ("3.11", "3.13"))
    assert one.release.layers["agent"] == other.release.layers["agent"]
    assert one.release.layers["model"] == other.release.layers["model"]
    assert one.release.digest != other.release.digest
    third = built(tmp_path / "b", tmp_path, other_tiny_bundle)
    changed = {name for name in third.release.layers if third.release.layers[name] != one.release.layers[name]}
    assert changed == {"model"}
    assert few_wheels == ["3.11", "3.13"]


def test_what_only_tests_and_compilers_read_stays_behind() -> None:
    for name in (
        "numpy/_core/tests/test_x.py",
        "numpy/_core/include/x.h",
        "a/b.pyi",
        "onnxruntime/tools/x.py",
        "bin/f",
    ):
        assert is_unused(name)
    for name in (
        "numpy/__init__.py",
        "numpy/testing/__init__.py",
        "a.dist-info/licenses/LICENSE",
        "a.dist-info/METADATA",
    ):
        assert not is_unused(name)


def test_no_model_and_a_damaged_one_are_one_line(tmp_path: Path, few_wheels: list[str]) -> None:
    with pytest.raises(BundleFailed, match="no model to put on a device"):
        built(tmp_path / "b", tmp_path, tmp_path / "none")


def test_the_sites_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "site.pem"
    one = site_key(path)
    assert site_key(path).public == one.public
    assert path.stat().st_mode & 0o077 == 0
    path.chmod(0o644)
    with pytest.raises(BundleFailed, match="chmod 600"):
        site_key(path)
    path.write_text("no key")
    with pytest.raises(BundleFailed, match="is no private key"):
        site_key(path)


def test_what_wheels_are_is_asked_again_when_their_versions_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = Target(python="3.11")
    before = wheels.question(target)
    (tmp_path / "constraints.txt").write_text("numpy==1\n")
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    assert wheels.question(target) != before


def test_a_wheel_from_elsewhere_takes_the_place_of_the_usual_one(tmp_path: Path) -> None:
    """A build of onnxruntime for a GPU, say: its name is another, its module the same."""
    name = "onnxruntime_gpu-9.9-py3-none-any.whl"
    made = zip_app(
        {
            "onnxruntime/__init__.py": b"# of a GPU\n",
            "onnxruntime_gpu-9.9.dist-info/METADATA": b"Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 9.9\n",
            "onnxruntime_gpu-9.9.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "onnxruntime_gpu-9.9.dist-info/RECORD": b"",
        }
    )
    (tmp_path / name).write_bytes(made)
    target = Target(python="3.12")
    found = resolve(target, [f"onnxruntime-gpu @ file://{tmp_path}/{name}"])
    (gpu,) = [wheel for wheel in found if wheel.name.startswith("onnxruntime")]
    assert (gpu.name, gpu.version) == ("onnxruntime-gpu", "9.9")
    unpack(target, [gpu], tmp_path / "out")
    assert (tmp_path / "out" / "onnxruntime" / "__init__.py").read_bytes() == b"# of a GPU\n"
    (tmp_path / name).write_bytes(made + b" ")
    with pytest.raises(BundleFailed, match="can't get wheels"):
        unpack(target, [gpu], tmp_path / "again")
