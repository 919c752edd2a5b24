"""What an evaluation is of: the models, their calibration, and everything else that decides its figures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.kv.calibration import Calibration
from edge_agent.kv.calibration_file import find_calibration
from edge_agent.kv.payload import FORMAT_VERSION
from edge_agent.model.manifest import Manifest, read_manifest
from scripts.evaluate.errors import ExtraMissing, MethodUnknown, ResultsInvalid
from scripts.evaluate.relayed import ANSWER_POSITIONS, Pair
from scripts.prepare_model import prepare
from scripts.prepare_model.cache import cache_root
from scripts.prepare_model.progress import Progress

NEEDED = ("matplotlib", "scipy", "torch", "transformers")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command was given."""

    model: str | None
    weights: str
    receiver: str | None
    calibrations: Path | None
    facts_tokens: int
    spacy_model: str
    threads: int
    jobs: int


class Setup:
    """The bundles, prepared if they are not yet. Raises PreparationError, EvaluationError."""

    def __init__(self, wanted: Wanted, progress: Progress) -> None:
        self._wanted = wanted
        self.bundle = prepare(wanted.model, weights=wanted.weights, progress=progress).path
        self.manifest: Manifest = read_manifest(self.bundle)
        self._receiver: Path | None = None
        self.receiver: Manifest | None = None
        self.calibration: Calibration | None = None
        if wanted.receiver is not None:
            self._receiver = prepare(wanted.receiver, weights=wanted.weights, progress=progress).path
            self.receiver = read_manifest(self._receiver)
            self.calibration = self._find(wanted.calibrations or cache_root() / "calibrations")

    @property
    def jobs(self) -> int:
        return self._wanted.jobs

    def make_pair(self) -> partial[Pair]:
        """A Pair's constructor with its arguments, which can be sent to another process."""
        return partial(
            Pair,
            self.bundle,
            receiver=self._receiver,
            calibration=self.calibration,
            facts_tokens=self._wanted.facts_tokens,
            spacy_model=self._wanted.spacy_model or None,
            threads=self._wanted.threads or max(1, (os.cpu_count() or 1) // self.jobs),
        )

    def run(self) -> dict[str, Any]:
        """What decides the figures, so that results of one run are never taken for another's."""
        receiver, calibration = self.receiver, self.calibration
        return {
            "model": self.manifest.name,
            "fingerprint": self.manifest.fingerprint,
            "weights": self.manifest.weight_precision,
            "receiver": None if receiver is None else f"{receiver.name} {receiver.fingerprint}",
            "calibration": None if calibration is None else _digest(calibration.scale, calibration.shift),
            "prompt": [self.manifest.prefix_id, self.manifest.prompt.facts_format],
            "profile": _digest(msgspec.json.encode(self.manifest.profile)),
            "payload format": FORMAT_VERSION,
            "facts_tokens": self._wanted.facts_tokens,
            "extractors": {name: _version(name) for name in ("yake", "spacy")} | {"model": self._wanted.spacy_model},
            "answer_positions": ANSWER_POSITIONS,
        }

    def _find(self, folder: Path) -> Calibration:
        if self.receiver is None or self.receiver.fingerprint == self.manifest.fingerprint:
            raise MethodUnknown("--receiver names the sender's own model; leave it out")
        found = find_calibration(folder, self.manifest.fingerprint, self.receiver.fingerprint)
        if found is None:
            raise ResultsInvalid(
                f"no calibration for this pair in {folder}; make it: python -m scripts.calibrate "
                f"--sender {self.bundle} --receiver {self._receiver} --output {folder}"
            )
        return found


def require_packages(names: Sequence[str] = NEEDED) -> None:
    """Raise ExtraMissing, naming the first package that is not installed: better now than after hours."""
    missing = next((name for name in names if util.find_spec(name) is None), None)
    if missing is not None:
        raise ExtraMissing(f"{missing} is not installed: evaluations need the extras `export` and `evaluate`")


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.tobytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"
