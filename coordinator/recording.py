"""A session in one file: what the coordinator heard and told, in order and with its times.

The file is MCAP (mcap.dev), which other tools read: appended to, in chunks that are compressed and checked one by one,
so that what a crash leaves can be read up to the chunk that was not yet written. docs/recording.md has the details.

    metadata  "kvbus"       the session: version, site, when it began, what planning depended on
    channel   a topic       of kvbus, with its parameters in braces, once as "heard" and once as "told"
    message                 MessagePack: parameters of the topic, the message; log_time by the coordinator's clock
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, Literal, Self

import msgpack
import msgspec
import zstandard
from mcap.exceptions import EndOfFile, McapError
from mcap.records import Channel, Chunk, DataEnd, Message, Metadata
from mcap.stream_reader import StreamReader, breakup_chunk
from mcap.writer import CompressionType, Writer
from msgspec import Struct

from broker_config.messages import Message as BusMessage
from broker_config.topics import TOPICS, Topic
from coordinator.errors import RecordingInvalid, RecordingUnwritable
from coordinator.learning import Learned
from coordinator.settings import ChannelSettings, PlanningSettings

VERSION = 1
SUFFIX = ".mcap"
PROFILE = "kvbus"
SESSION = "kvbus"
CHUNK_BYTES = 32 * 1024
"""Before compression: what a crash can lose."""
LARGEST_RECORD_BYTES = 64 * 2**20
"""Of a file that is read; what is longer is none of ours."""
LONGEST_S = 400 * 86_400.0
"""Of a session that is read."""

_SPOILT = (
    McapError,
    zstandard.ZstdError,
    struct.error,
    ValueError,
    OSError,
    EOFError,
    MemoryError,
    OverflowError,
    KeyError,
    IndexError,
    TypeError,
)
"""What libraries raise for bytes that are no records."""

Way = Literal["heard", "told"]


class Session(Struct, frozen=True, kw_only=True):
    """What a session began with. clock_s: the coordinator's clock then; began_s: seconds since 1970."""

    site: str
    began_s: float
    clock_s: float
    planning: PlanningSettings = PlanningSettings()
    channels: tuple[ChannelSettings, ...] = ()
    learned: Learned = Learned()


@dataclass(frozen=True)
class Event:
    """One message. at_s: on the coordinator's clock; way: from where the coordinator stands."""

    at_s: float
    way: Way
    topic: Topic[Any]
    parameters: Mapping[str, str]
    message: Any


class Recording:
    """A file that is written. An existing one is never touched."""

    def __init__(self, path: Path, session: Session) -> None:
        """Raises RecordingUnwritable."""
        self.path, self._session = path, session
        self._channels: dict[tuple[Way, str], int] = {}
        try:
            self._file: BufferedWriter = open(path, "xb", opener=_private)  # noqa: SIM115  closed by `close`
        except OSError as error:
            raise RecordingUnwritable(path, error.strerror or str(error)) from None
        self._writer = Writer(self._file, chunk_size=CHUNK_BYTES, compression=CompressionType.ZSTD)
        try:
            self._writer.start(profile=PROFILE, library="kvbus")
            told = msgspec.json.encode(session).decode()
            self._writer.add_metadata(SESSION, {"version": str(VERSION), "session": told})
            self._file.flush()
        except OSError as error:
            with suppress(OSError):
                self._file.close()
            path.unlink(missing_ok=True)
            raise RecordingUnwritable(path, error.strerror or str(error)) from None

    @classmethod
    def named(cls, path: Path, session: Session) -> Self:
        """Of that name, or in that folder under the site's name and the time. Raises RecordingUnwritable."""
        try:
            folder = path.is_dir()
        except OSError as error:
            raise RecordingUnwritable(path, error.strerror or str(error)) from None
        if folder:
            began = time.strftime("%Y%m%d-%H%M%S", time.localtime(session.began_s))
            path /= f"{session.site}-{began}{SUFFIX}"
        return cls(path, session)

    def add(self, event: Event) -> None:
        """Raises RecordingUnwritable; what was written before it can be read all the same."""
        content = msgspec.to_builtins(event.message, builtin_types=(bytes,))
        data: bytes = msgpack.packb({"parameters": dict(event.parameters), "message": content}, use_bin_type=True)
        at_ns = round((self._session.began_s + event.at_s - self._session.clock_s) * 1e9)
        try:
            self._writer.add_message(self._channel(event), log_time=at_ns, publish_time=at_ns, data=data)
            self._file.flush()
        except OSError as error:
            with suppress(OSError):
                self._file.close()
            raise RecordingUnwritable(self.path, error.strerror or str(error)) from None

    def close(self) -> None:
        """With indexes, so that other tools find their way fast. Raises RecordingUnwritable."""
        try:
            if not self._file.closed:
                with self._file:
                    self._writer.finish()  # type: ignore[no-untyped-call]
        except OSError as error:
            raise RecordingUnwritable(self.path, error.strerror or str(error)) from None

    def _channel(self, event: Event) -> int:
        name = event.way, event.topic.pattern
        if name not in self._channels:
            schema = msgspec.json.encode(msgspec.json.schema(event.topic.message))
            schema_id = self._writer.register_schema(name=event.topic.pattern, encoding="jsonschema", data=schema)
            self._channels[name] = self._writer.register_channel(
                topic=event.topic.pattern,
                message_encoding="msgpack",
                schema_id=schema_id,
                metadata={"way": event.way},
            )
        return self._channels[name]


class Recorded:
    """A file that is read: `session`, then its events by iterating, once. cut: how it ended too early, or ""."""

    def __init__(self, path: Path) -> None:
        """Raises RecordingInvalid."""
        self.path, self.cut = path, ""
        try:
            self._file: BufferedReader = path.open("rb")
        except OSError as error:
            raise RecordingInvalid(path, error.strerror or str(error)) from None
        self._records = self._read()
        try:
            self.session = self._begin()
        except RecordingInvalid:
            self._records.close()
            raise

    def __iter__(self) -> Iterator[Event]:
        """Raises RecordingInvalid for what is no message of ours."""
        channels: dict[int, tuple[Way, Topic[Any]]] = {}
        topics = {topic.pattern: topic for topic in TOPICS}
        with closing(self._records) as records:
            for record in records:
                if isinstance(record, Channel):
                    way: Way = "told" if record.metadata.get("way") == "told" else "heard"
                    if record.topic in topics:  # else of a program that came later
                        channels[record.id] = way, topics[record.topic]
                elif isinstance(record, Message) and record.channel_id in channels:
                    yield self._event(record, *channels[record.channel_id])

    def close(self) -> None:
        """Without having read all of it."""
        self._records.close()

    def _begin(self) -> Session:
        for record in self._records:
            if isinstance(record, Metadata) and record.name == SESSION:
                return self._session(record)
            if isinstance(record, (Channel, Message)):
                break
        raise RecordingInvalid(self.path, self.cut or "it is not a session of kvbus")

    def _session(self, record: Metadata) -> Session:
        version = record.metadata.get("version", "")
        if version != str(VERSION):
            raise RecordingInvalid(self.path, f"it has version {version or '?'}, this program reads {VERSION}")
        try:
            return msgspec.json.decode(record.metadata.get("session", ""), type=Session)
        except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
            raise RecordingInvalid(self.path, f"session: {error}") from None

    def _event(self, record: Message, way: Way, topic: Topic[Any]) -> Event:
        try:
            content = msgpack.unpackb(record.data, raw=False, strict_map_key=True)
            parameters = msgspec.convert(content["parameters"], dict[str, str], strict=True)
            message: BusMessage = msgspec.convert(
                content["message"], topic.message, strict=True, builtin_types=(bytes,)
            )
        except (ValueError, TypeError, KeyError, RecursionError, msgpack.UnpackException) as error:
            raise RecordingInvalid(self.path, f"a message of {topic.pattern}: {error}") from None
        if set(parameters) != set(topic.names) - {"site"}:
            raise RecordingInvalid(self.path, f"a message of {topic.pattern} has other parameters")
        since_s = record.log_time / 1e9 - self.session.began_s
        if not -1 <= since_s <= LONGEST_S:
            raise RecordingInvalid(self.path, f"a message {since_s:.0f} s after its beginning")
        return Event(since_s + self.session.clock_s, way, topic, parameters, message)

    def _read(self) -> Generator[object]:
        """Records, those of chunks too, until the end or where the file is cut or spoilt."""
        with self._file as file:
            bounded: Any = _Bounded(file)
            reader = StreamReader(bounded, emit_chunks=True, record_size_limit=LARGEST_RECORD_BYTES)
            try:
                for record in reader.records:
                    if isinstance(record, Chunk):
                        yield from breakup_chunk(_unpacked(record), validate_crc=True)
                    elif isinstance(record, DataEnd):
                        return
                    else:
                        yield record
                self.cut = "it ends without an end"
            except EndOfFile:
                self.cut = "it was cut short, as by a crash"
            except _SPOILT as error:
                self.cut = f"it is spoilt: {' '.join(str(error).split()) or type(error).__name__}"


class _Bounded:
    """A file of which no more is read at once than a record may have, whatever lengths it claims."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file

    def read(self, count: int = -1) -> bytes:
        """Raises ValueError for more, EndOfFile where there is not so much."""
        if not 0 <= count <= LARGEST_RECORD_BYTES:
            raise ValueError(f"a record of {count} bytes")
        data = self._file.read(count)
        if len(data) < count:
            raise EndOfFile
        return data


def _unpacked(chunk: Chunk) -> Chunk:
    """The same, not compressed. Raises ValueError if it is larger than it says or than a record may be."""
    if chunk.compression not in {"", "zstd"}:
        raise ValueError(f"a chunk compressed by {chunk.compression!r}")
    size = chunk.uncompressed_size
    if size > LARGEST_RECORD_BYTES:
        raise ValueError(f"a chunk of {size} bytes")
    if not chunk.compression:
        return chunk
    with zstandard.ZstdDecompressor(max_window_size=LARGEST_RECORD_BYTES).stream_reader(chunk.data) as stream:
        data = stream.read(size + 1)
    if len(data) != size:
        raise ValueError(f"a chunk that says it has {size} bytes")
    return replace(chunk, compression="", data=data)


def _private(path: str, flags: int) -> int:
    """Questions, texts and answers are nobody else's."""
    return os.open(path, flags, 0o600)
