"""Archives that are the same to the byte for the same files, whenever and wherever they are made."""

from __future__ import annotations

import io
import lzma
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, cast

from broker_config.files import file_digest
from edge_agent.release.manifest import Layer

MTIME = 1_577_836_800
"""Of every file: 2020-01-01, since zip files begin in 1980 and clocks of devices may be wrong."""
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 23}]
"""8 MiB to unpack it in: a device has little memory."""

Files = Mapping[str, Path | bytes]
"""What is to be where in an archive."""


def write_layer(folder: Path, files: Files, *, compress: bool, done: Callable[[int], None] = lambda _: None) -> Layer:
    """Write folder/SHA256.layer, a tar archive, of xz if compressed. done: called with bytes as they are taken in.

    Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=folder, prefix=".tmp-", delete=False) as file:
        unfinished = Path(file.name)
        try:
            unpacked = _pack(cast("IO[bytes]", file), files, compress=compress, done=done)
            file.flush()
            layer = Layer(sha256=file_digest(unfinished), size_bytes=unfinished.stat().st_size, unpacked_bytes=unpacked)
            unfinished.replace(folder / layer.file_name)
        finally:
            unfinished.unlink(missing_ok=True)
    return layer


def _pack(file: IO[bytes], files: Files, *, compress: bool, done: Callable[[int], None]) -> int:
    """How many bytes went in."""
    unpacked = 0
    with ExitStack() as opened:
        out = file
        if compress:
            out = opened.enter_context(
                lzma.open(file, "wb", format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=FILTERS)
            )
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for name in sorted(files):
                content = files[name]
                member = tarfile.TarInfo(name)
                member.mtime, member.mode = MTIME, 0o644
                if isinstance(content, bytes):
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                else:
                    member.size = content.stat().st_size
                    with content.open("rb") as source:
                        tar.addfile(member, source)
                unpacked += member.size
                done(member.size)
    return unpacked


def zip_app(files: Files) -> bytes:
    """A zip archive that Python runs."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            content = files[name]
            member = zipfile.ZipInfo(name, date_time=time.gmtime(MTIME)[:6])
            member.compress_type, member.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(member, content if isinstance(content, bytes) else content.read_bytes())
    return out.getvalue()


def tree(folder: Path, *, under: str = "", leave_out: Callable[[str], bool] = lambda _: False) -> dict[str, Path]:
    """All files of a folder by their names below it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not leave_out(name):
            found[f"{under}{name}"] = path
    return found
