"""The calibration of a pair of models on disk: SENDER-RECEIVER.npz, named by the models' fingerprints.

    about             uint8: JSON with version, kind, both models and their shapes, layers
    scale, shift      float32, see Calibration
    mean

`numpy.load` opens it. It is not read that way here: numpy makes room for an array of whatever size a file declares.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct

from broker_config.files import write_whole
from edge_agent.errors import CalibrationInvalid
from edge_agent.kv.cache import Float32
from edge_agent.kv.calibration import KINDS, Calibration, Kind, Side

FILE_VERSION = 1
MAX_FILE_BYTES = 64_000_000
MAX_ABOUT_BYTES = 1 << 14

_ARRAYS = ("scale", "shift", "mean")
_MEMBERS = sorted(f"{name}.npy" for name in ("about", *_ARRAYS))
_NPY_1_0 = b"\x93NUMPY\x01\x00"
_ENCRYPTED = 1
_ZIP_FAULTS = (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, struct.error)


class _Version(Struct):
    version: int


class _About(Struct, frozen=True, kw_only=True):
    """What the file says of its arrays."""

    version: int = FILE_VERSION
    kind: Kind
    sender: Side
    receiver: Side
    layers: tuple[int, ...]

    def check(self) -> None:
        """Raise ValueError for a kind or layers that these shapes don't allow."""
        sender, receiver = self.sender, self.receiver
        if self.kind == "dimension" and (sender.kv_heads, sender.head_dim) != (receiver.kv_heads, receiver.head_dim):
            raise ValueError("it is per dimension, but the shapes of its models disagree")
        if len(self.layers) != receiver.layers or not all(0 <= layer < sender.layers for layer in self.layers):
            raise ValueError(f"its layers {self.layers} do not lead from {sender.layers} to {receiver.layers}")


def calibration_name(sender_fingerprint: str, receiver_fingerprint: str) -> str:
    """The name of a pair's file. Raises CalibrationInvalid for what is no fingerprint, and so no part of a path."""
    for fingerprint in (sender_fingerprint, receiver_fingerprint):
        if not re.fullmatch("[0-9a-f]{32}", fingerprint):
            raise CalibrationInvalid(f"{fingerprint!r} is not the fingerprint of a model")
    return f"{sender_fingerprint}-{receiver_fingerprint}.npz"


def write_calibration(calibration: Calibration, path: Path) -> None:
    """Write the file, whole or not at all. Raises CalibrationInvalid if it can't be written."""
    content = _encoded(calibration)
    if len(content) > MAX_FILE_BYTES:
        raise CalibrationInvalid(f"a calibration of {len(content):,} bytes, more than {MAX_FILE_BYTES:,}")
    try:
        write_whole(path, content)
    except OSError as error:
        raise CalibrationInvalid(f"{path} can't be written: {error.strerror}") from None


def read_calibration(path: Path) -> Calibration:
    """Read a pair's file. Raises CalibrationInvalid if it is missing, or is not whole and sound in every part."""
    try:
        return _decoded(_content(path))
    except FileNotFoundError:
        raise CalibrationInvalid(f"no calibration at {path}; make it with `python -m scripts.calibrate`") from None
    except OSError as error:
        raise CalibrationInvalid(f"calibration {path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise CalibrationInvalid(f"calibration {path} can't be used: {error}; make it again") from None


def find_calibration(folder: Path, sender: str, receiver: str) -> Calibration | None:
    """The calibration for caches of the model `sender` at the model `receiver` (fingerprints); None if there is none.

    Raises CalibrationInvalid like read_calibration, and for a file whose content names other models than its name.
    """
    path = folder / calibration_name(sender, receiver)
    if not path.exists():
        return None
    found = read_calibration(path)
    if (found.sender.fingerprint, found.receiver.fingerprint) != (sender, receiver):
        raise CalibrationInvalid(
            f"calibration {path} is for {calibration_name(found.sender.fingerprint, found.receiver.fingerprint)[:-4]}, "
            "not for the models of its name; make it again"
        )
    return found


def _encoded(calibration: Calibration) -> bytes:
    about = _About(
        kind=calibration.kind, sender=calibration.sender, receiver=calibration.receiver, layers=calibration.layers
    )
    stream = io.BytesIO()
    np.savez(
        stream,
        about=np.frombuffer(msgspec.json.encode(about), dtype=np.uint8),
        scale=np.ascontiguousarray(calibration.scale, dtype="<f4"),
        shift=np.ascontiguousarray(calibration.shift, dtype="<f4"),
        mean=np.ascontiguousarray(calibration.mean, dtype="<f4"),
    )
    return stream.getvalue()


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES:,} bytes")
    return content


def _decoded(content: bytes) -> Calibration:
    """Raises ValueError for all that can be wrong."""
    members = _members(content)
    about = _about(members["about.npy"])
    width = about.receiver.width
    folded = (about.receiver.layers, KINDS, width if about.kind == "dimension" else 1)
    shapes = {"scale": folded, "shift": folded, "mean": (about.receiver.layers, KINDS, width)}
    arrays = {name: _floats(members[f"{name}.npy"], name, shapes[name]) for name in _ARRAYS}
    return Calibration(about.sender, about.receiver, about.kind, about.layers, **arrays)


def _members(content: bytes) -> dict[str, bytes]:
    """The archive's files, all of them stored as they are, so that none is larger than the archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            found = archive.infolist()
            if sorted(info.filename for info in found) != _MEMBERS:
                raise ValueError(f"it does not hold {', '.join(_MEMBERS)} and nothing else")
            if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED for info in found):
                raise ValueError("its arrays are compressed or encrypted")
            if sum(info.file_size for info in found) > len(content):
                raise ValueError("it declares more bytes than it has")
            return {info.filename: archive.read(info) for info in found}
    except _ZIP_FAULTS as error:
        raise ValueError(f"it is damaged ({error})") from None


def _about(raw: bytes) -> _About:
    text = _unwrapped(raw, "about", "|u1", None)
    if len(text) > MAX_ABOUT_BYTES:
        raise ValueError(f"its description has more than {MAX_ABOUT_BYTES:,} bytes")
    try:
        version = msgspec.json.decode(text, type=_Version).version
        if version != FILE_VERSION:
            raise ValueError(f"version {version} is not known here (known: {FILE_VERSION})")
        about = msgspec.json.decode(text, type=_About)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"its description is not one ({error})") from None
    about.check()
    return about


def _floats(raw: bytes, name: str, shape: tuple[int, ...]) -> Float32:
    array = np.frombuffer(_unwrapped(raw, name, "<f4", shape), dtype="<f4").reshape(shape).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds a NaN or an infinity")
    return array


def _unwrapped(raw: bytes, name: str, descr: str, shape: tuple[int, ...] | None) -> bytes:
    """The content of a .npy file of that type and shape (None: one axis, of any length).

    numpy writes one header for them, padded with blanks; it is compared, not parsed.
    """
    (length,) = struct.unpack_from("<H", raw, len(_NPY_1_0)) if len(raw) >= len(_NPY_1_0) + 2 else (0,)
    start = len(_NPY_1_0) + 2
    header, content = raw[start : start + length], raw[start + length :]
    shape = shape or (len(content),)
    expected = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    if not raw.startswith(_NPY_1_0) or header.rstrip() != expected.encode():
        raise ValueError(f"{name} is not an array of type {descr} and shape {shape}")
    if len(content) != math.prod(shape) * np.dtype(descr).itemsize:
        raise ValueError(f"{name} has {len(content)} bytes, not those of shape {shape}")
    return content
