"""A trace by what a file holds: our CSV, mahimahi's packets, or one agent's link out of a recorded session."""

from __future__ import annotations

from pathlib import Path

from scripts.traces.errors import TraceInvalid
from scripts.traces.mahimahi import read_mahimahi
from scripts.traces.session import read_session
from scripts.traces.trace import Trace, read_trace

MCAP = b"\x89MCAP"


def read_any(source: str) -> tuple[str, Trace, str]:
    """Name and trace of a file, and how it ended too early, or "".

    source: a path; of a recorded session `path:agent`, whose uplink it is, or `path:agent:downlink`.
    Raises TraceInvalid.
    """
    name, _, rest = source.partition(":")
    path = Path(name if rest and not Path(source).exists() else source)
    begin = _beginning(path)
    if begin.startswith(MCAP):
        agent, _, way = rest.partition(":")
        if not agent or way not in {"", "uplink", "downlink"}:
            raise TraceInvalid(path, 0, "is a recorded session: say whose link, as file:agent or file:agent:downlink")
        trace, cut = read_session(path, agent, "downlink" if way == "downlink" else "uplink")
        return f"{path.stem}-{agent}", trace, cut
    if begin.split(b"\n", 1)[0].strip().isdigit():
        return path.stem, read_mahimahi(path), ""
    return path.stem, read_trace(path), ""


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise TraceInvalid(path, 0, f"can't be read: {error.strerror}") from None
