"""Everything a device needs, put together on the laptop: layers by digest, a signed manifest for each Python.

build/device-bundle/
    layers/SHA256.layer              packages, agent, model
    releases/py3.11-aarch64.json     the manifest, and beside it .sig and .wheels.json, what it was made of
    installer.pyz                    what unpacks it there
    site.pub                         the key by which devices know later releases
    recipes.json, resolved/          from which inputs each layer was made, so that it isn't made twice: once it is all
                                     there, nothing is asked of the internet any more

The same inputs give the same bytes: files are sorted, their times fixed, wheels taken by their hashes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import msgspec

from broker_config.files import file_digest, write_whole
from broker_config.messages import PROTOCOL_VERSION
from edge_agent.errors import AgentError
from edge_agent.model.manifest import MANIFEST_NAME, read_manifest, verify_digests
from edge_agent.release.manifest import AGENT_LAYER, MODEL_LAYER, RUNTIME_LAYER, Layer, Release
from edge_agent.release.place import PUBLIC_KEY
from scripts.flash.archive import FILTERS, MTIME, Files, tree, write_layer, zip_app
from scripts.flash.errors import BundleFailed
from scripts.flash.keys import SiteKey
from scripts.flash.wheels import ROOT, UNUSED, Target, Wheel, is_unused, question, resolve, unpack

DEFAULT_FOLDER = Path("build/device-bundle")
AGENT_ROOMS = ("broker_config", "edge_agent")
LAYERS, _RECIPES = "layers", "recipes.json"
_MAIN = b"import sys\nfrom edge_agent.release.cli import main\nsys.exit(main())\n"

Say = Callable[[str, int, int], None]
"""Hears what is being made, how many bytes are in, and how many there will be (0: not known)."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What was built for one target. public_key: the site's; wheels: the packages in its runtime."""

    folder: Path
    release: Release
    signature: bytes
    public_key: bytes
    wheels: tuple[Wheel, ...]

    def archive(self, layer: Layer) -> Path:
        """Of one layer."""
        return self.folder / LAYERS / layer.file_name

    @property
    def installer(self) -> Path:
        """What unpacks it on a device."""
        return self.folder / "installer.pyz"


def build(
    folder: Path,
    target: Target,
    *,
    model: Path,
    key: SiteKey,
    requirements: Sequence[str] = (),
    say: Say = lambda *_: None,
) -> Bundle:
    """Make what isn't made yet. model: a bundle of `scripts.prepare_model`.

    Raises BundleFailed; OSError if the disk does not take it.
    """
    try:
        manifest = read_manifest(model)
        verify_digests(model, manifest)
    except AgentError as error:
        raise BundleFailed(f"no model to put on a device: {error}") from None
    recipes = _recipes(folder)
    wheels = _resolved(folder, target, requirements, say)
    runtime = [asdict(wheel) for wheel in wheels]

    def packages() -> Layer:
        with tempfile.TemporaryDirectory(prefix="kvbus-wheels-") as scratch:
            unpack(target, wheels, Path(scratch))
            files = tree(Path(scratch), leave_out=is_unused)
            return _layer(folder, files, f"packages for Python {target.python}", say, compress=True)

    own = _agent_files()
    own_digest = _digest(own)
    model_files: Files = {name: model / name for name in (MANIFEST_NAME, *(file.path for file in manifest.files))}
    model_digest = file_digest(model / MANIFEST_NAME)
    layers = {
        RUNTIME_LAYER: _made(
            folder, recipes, _key(RUNTIME_LAYER, target.machine, target.python, runtime, UNUSED), packages
        ),
        AGENT_LAYER: _made(
            folder, recipes, _key(AGENT_LAYER, own_digest), lambda: _layer(folder, own, "agent", say, compress=True)
        ),
        MODEL_LAYER: _made(
            folder,
            recipes,
            _key(MODEL_LAYER, model_digest),
            lambda: _layer(folder, model_files, "model", say, compress=False),
        ),
    }
    release = Release(
        version=f"{metadata.version('kvbus')}+{own_digest[:8]}",  # of the project, and of exactly this code
        protocol=PROTOCOL_VERSION,
        machine=target.machine,
        python=target.python,
        layers=layers,
    )
    bundle = Bundle(
        folder=folder,
        release=release,
        signature=key.sign(release.to_bytes()),
        public_key=key.public,
        wheels=wheels,
    )
    write_whole(bundle.installer, installer())
    write_whole(folder / PUBLIC_KEY, key.public)
    name = folder / "releases" / f"py{target.python}-{target.machine}"
    write_whole(name.with_name(f"{name.name}.json"), release.to_bytes())
    write_whole(name.with_name(f"{name.name}.sig"), bundle.signature)
    write_whole(name.with_name(f"{name.name}.wheels.json"), json.dumps(runtime, indent=1).encode() + b"\n")
    return bundle


def installer() -> bytes:
    """`installer.pyz`: edge_agent.release and the one module that it uses, which need nothing but Python."""
    files: dict[str, Path | bytes] = {
        f"edge_agent/release/{name}": path
        for name, path in tree(ROOT / "edge_agent" / "release").items()
        if name.endswith(".py")
    }
    files |= {"edge_agent/__init__.py": b"", "broker_config/__init__.py": b""}
    return zip_app({"__main__.py": _MAIN, "broker_config/files.py": ROOT / "broker_config" / "files.py", **files})


def _agent_files() -> dict[str, Path | bytes]:
    """The rooms that go on a device, and the project's version and licences as an installation would have them."""
    files: dict[str, Path | bytes] = {}
    for room in AGENT_ROOMS:
        files |= tree(ROOT / room, under=f"{room}/", leave_out=lambda name: "__pycache__" in name)
    version = metadata.version("kvbus")
    described = f"Metadata-Version: 2.1\nName: kvbus\nVersion: {version}\n".encode()
    files[f"kvbus-{version}.dist-info/METADATA"] = described
    for name in ("LICENSE", "NOTICE"):
        files[f"kvbus-{version}.dist-info/{name}"] = ROOT / name
    return files


def _digest(files: Files) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name]
        data = content if isinstance(content, bytes) else content.read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def _layer(folder: Path, files: Files, title: str, say: Say, *, compress: bool) -> Layer:
    total = sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in files.values())
    taken = 0

    def done(nbytes: int) -> None:
        nonlocal taken
        taken += nbytes
        say(title, taken, total)

    return write_layer(folder / LAYERS, files, compress=compress, done=done)


def _resolved(folder: Path, target: Target, requirements: Sequence[str], say: Say) -> tuple[Wheel, ...]:
    """Which wheels: asked of the index once, so that a device can be flashed where there is no internet."""
    known = folder / "resolved" / f"{_key(*question(target, requirements))[:32]}.json"
    try:
        return msgspec.json.decode(known.read_bytes(), type=tuple[Wheel, ...])
    except (OSError, msgspec.MsgspecError):
        say(f"looking for wheels for Python {target.python}", 0, 0)
        wheels = resolve(target, requirements)
        write_whole(known, msgspec.json.encode(wheels))
        return wheels


def _key(*inputs: object) -> str:
    return hashlib.sha256(json.dumps([*inputs, MTIME, str(FILTERS)]).encode()).hexdigest()


def _recipes(folder: Path) -> dict[str, Layer]:
    try:
        return msgspec.json.decode((folder / _RECIPES).read_bytes(), type=dict[str, Layer])
    except (OSError, msgspec.MsgspecError):
        return {}


def _made(folder: Path, recipes: dict[str, Layer], key: str, make: Callable[[], Layer]) -> Layer:
    """The layer of a recipe: as it was made before, if it is still there, every byte of it."""
    known = recipes.get(key)
    if known is not None:
        path = folder / LAYERS / known.file_name
        if path.exists() and file_digest(path) == known.sha256:
            return known
    layer = make()
    recipes[key] = layer
    write_whole(folder / _RECIPES, msgspec.json.encode(recipes))
    return layer
