"""What an evaluation is of: the models, their calibration, and everything else that decides its figures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.kv.calibration import Calibration
from edge_agent.kv.calibration_file import find_calibration
from edge_agent.kv.header import FORMAT_VERSION
from scripts.evaluate.errors import ExtraMissing, PairUnfit
from scripts.evaluate.relayed import ANSWER_POSITIONS, Pair
from scripts.prepare_model import Prepared, prepare
from scripts.prepare_model.cache import cache_root
from scripts.prepare_model.progress import Progress
from scripts.provenance import versions

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
        self._sender = prepare(wanted.model, weights=wanted.weights, progress=progress)
        self._receiver: Prepared | None = None
        self._calibration: Calibration | None = None
        if wanted.receiver is not None:
            self._receiver = prepare(wanted.receiver, weights=wanted.weights, progress=progress)
            folder = wanted.calibrations or cache_root() / "calibrations"
            self._calibration = _calibration(folder, self._sender, self._receiver)

    @property
    def jobs(self) -> int:
        return self._wanted.jobs

    def make_pair(self) -> partial[Pair]:
        """A Pair's constructor with its arguments, which can be sent to another process."""
        return partial(
            Pair,
            self._sender.path,
            receiver=None if self._receiver is None else self._receiver.path,
            calibration=self._calibration,
            facts_tokens=self._wanted.facts_tokens,
            spacy_model=self._wanted.spacy_model or None,
            threads=self._wanted.threads or max(1, (os.cpu_count() or 1) // self.jobs),
        )

    def run(self) -> dict[str, Any]:
        """What decides the figures, so that results of one run are never taken for another's."""
        sender, calibration = self._sender.manifest, self._calibration
        receiver = None if self._receiver is None else self._receiver.manifest
        return {
            "model": sender.name,
            "fingerprint": sender.fingerprint,
            "weights": sender.weight_precision,
            "receiver": None if receiver is None else f"{receiver.name} {receiver.fingerprint}",
            "calibration": None if calibration is None else _digest(calibration.scale, calibration.shift),
            "prompt": [sender.prefix_id, sender.prompt.facts_format],
            "profile": _digest(msgspec.json.encode(sender.profile)),
            "payload format": FORMAT_VERSION,
            "facts_tokens": self._wanted.facts_tokens,
            "extractors": versions(("yake", "spacy")) | {"model": self._wanted.spacy_model},
            "answer_positions": ANSWER_POSITIONS,
        }


def _calibration(folder: Path, sender: Prepared, receiver: Prepared) -> Calibration:
    """What makes the sender's caches the receiver's. Raises PairUnfit."""
    if sender.manifest.fingerprint == receiver.manifest.fingerprint:
        raise PairUnfit("--receiver names the sender's own model; leave it out")
    found = find_calibration(folder, sender.manifest.fingerprint, receiver.manifest.fingerprint)
    if found is None:
        raise PairUnfit(
            f"no calibration for this pair in {folder}; make it: python -m scripts.calibrate "
            f"--sender {sender.path} --receiver {receiver.path} --output {folder}"
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
