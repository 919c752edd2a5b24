"""What a release is made of: layers by digest, for one machine and one Python. Bytes that can be signed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edge_agent.release.errors import ReleaseInvalid

FORMAT = 1
LARGEST_BYTES = 1 << 20
RUNTIME_LAYER, AGENT_LAYER, MODEL_LAYER = "runtime", "agent", "model"
"""What is in them: the packages (among them what checks signatures), the agent, its model."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_PYTHON = re.compile(r"3\.\d{1,2}")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One archive. unpacked_bytes: what its files come to."""

    sha256: str
    size_bytes: int
    unpacked_bytes: int

    @property
    def file_name(self) -> str:
        """Of the archive, wherever it lies."""
        return f"{self.sha256}.layer"


@dataclass(frozen=True, kw_only=True)
class Release:
    """version: of the software; protocol: what it speaks on the bus; python: "3.11"; machine: as `uname -m` says it;
    layers by what they hold: runtime, agent, model.
    """

    version: str
    protocol: int
    machine: str
    python: str
    layers: Mapping[str, Layer]

    def to_bytes(self) -> bytes:
        """The same for equal releases, always."""
        content = {
            "format": FORMAT,
            "version": self.version,
            "protocol": self.protocol,
            "machine": self.machine,
            "python": self.python,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
        }
        return json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"

    @property
    def digest(self) -> str:
        """Of all that it is made of: 12 hexadecimal digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:12]


def read_release(content: bytes) -> Release:
    """A manifest out of bytes. Raises ReleaseInvalid, which says what is wrong with it."""
    try:
        fields = _fields(content)
        layers = {_word(name): _layer(each) for name, each in fields["layers"].items()}
        release = Release(
            version=_word(fields["version"]),
            protocol=_count(fields["protocol"]),
            machine=_word(fields["machine"]),
            python=_matching(_PYTHON, fields["python"]),
            layers=layers,
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = f"no field {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ReleaseInvalid(f"no manifest of a release: {why[:200]}") from None
    if release.to_bytes() != content:  # or one digest stood for several texts
        raise ReleaseInvalid("no manifest of a release: not written as one")
    return release


def _fields(content: bytes) -> dict[str, Any]:
    if len(content) > LARGEST_BYTES:
        raise ValueError(f"{len(content)} bytes, {LARGEST_BYTES} are allowed")
    fields = json.loads(content)
    if not isinstance(fields, dict):
        raise TypeError("no table of fields")
    if fields.get("format") != FORMAT:
        raise ValueError(f"format {fields.get('format')!r}, this program knows {FORMAT}; flash with a later one")
    return fields


def _layer(fields: Any) -> Layer:
    return Layer(
        sha256=_matching(_SHA256, fields["sha256"]),
        size_bytes=_count(fields["size_bytes"]),
        unpacked_bytes=_count(fields["unpacked_bytes"]),
    )


def _word(value: object) -> str:
    return _matching(_WORD, value)


def _matching(pattern: re.Pattern[str], value: object) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{value!r} is no value for a field")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise ValueError(f"{value!r} is no count")
    return value
