"""The results of an evaluation on disk, written so that a run can be broken off and taken up again.

run.json           what the run is of; a later run into the same directory must be of the same
results.jsonl      a line for each item under each method, in the order in which they were done
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from msgspec import Struct

from scripts.evaluate.errors import ResultsInvalid
from scripts.prepare_model.errors import free_mb, is_disk_full

RUN_NAME = "run.json"
RESULTS_NAME = "results.jsonl"


class Record(Struct, frozen=True, kw_only=True):
    """One item under one method. Scores are from 0 to 1, log-probabilities in nats a token, times in seconds.

    about, context: digests of what was asked and of its context. exact_match, f1, completeness: None where the item has
    no references. relevance, fidelity: cosines of the answer with the question and with the uncompressed answer, 1 for
    the very same; self_f1: token F1 against the latter. answer_logprob: the answer's mean under the uncompressed model,
    None for an empty answer. gold_logprob: the first reference's mean under this method. kl (nats) and agreement: over
    `positions` along the uncompressed answer. elements: values of the whole cache, where any of it is sent; fp16_bytes:
    what that cache takes in fp16; payload_bytes: all that is sent. context_s: the receiver's prefill of context sent as
    text; answer_s: from the question to the last token. choice: whether of a multiple-choice question's choices the
    right one has the best mean log-probability; None for other questions.
    """

    item: str
    dataset: str
    method: str
    about: str
    context: str
    answer: str
    exact_match: float | None
    f1: float | None
    completeness: float | None
    relevance: float
    fidelity: float
    self_f1: float
    answer_logprob: float | None
    gold_logprob: float | None
    kl: float
    agreement: float
    positions: int
    context_tokens: int
    elements: int
    payload_bytes: int
    fp16_bytes: int
    facts_tokens: int
    encode_s: float
    decode_s: float
    context_s: float
    answer_s: float
    choice: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What no two records of a run share."""
        return self.dataset, self.item, self.method


class Results:
    """A directory of results, held by one process until it is closed. Made by `open`."""

    def __init__(self, directory: Path, handle: int) -> None:
        self._path = directory / RESULTS_NAME
        self._handle = handle
        self._records: dict[tuple[str, str, str], Record] = {}

    @classmethod
    def open(cls, directory: Path, run: dict[str, Any]) -> Results:
        """Take up the results in `directory`, or begin there. run: what the run is of, anything JSON can hold.

        A last line that was cut off by the end of its process is dropped. Raises ResultsInvalid if the directory holds
        another run (naming the first field that differs), a bad line, or is in use by another evaluation.
        """
        try:
            directory.mkdir(parents=True, exist_ok=True)
            handle = os.open(directory / RESULTS_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(directory, error) from None
        results = cls(directory, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _agree(directory, run, begun=os.fstat(handle).st_size > 0)
            results._load()
        except BlockingIOError:
            results.close()
            raise ResultsInvalid(f"{directory} is in use by another evaluation") from None
        except OSError as error:
            results.close()
            raise _unwritable(directory, error) from None
        except BaseException:
            results.close()
            raise
        return results

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another evaluation have the directory. Closing twice does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    @property
    def records(self) -> tuple[Record, ...]:
        """All there are, in the order in which they were added."""
        return tuple(self._records.values())

    def has(self, dataset: str, item: str, method: str, about: str) -> bool:
        """Whether that item was done under that method. Raises ResultsInvalid if it was another question then."""
        known = self._records.get((dataset, item, method))
        if known is not None and known.about != about:
            raise ResultsInvalid(
                f"{self._path} holds results of another question {item} of {dataset}: the file has changed since, "
                "or is another one; give another directory"
            )
        return known is not None

    def add(self, record: Record) -> None:
        """Append a record to the file at once. Raises ResultsInvalid if it can't be kept, ValueError if it is known."""
        if record.key in self._records:
            raise ValueError(f"{' '.join(record.key)} is there already")
        for name in record.__struct_fields__:
            value = getattr(record, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ResultsInvalid(f"{record.item} of {record.dataset} under {record.method}: {name} is {value}")
        size = os.fstat(self._handle).st_size
        line = memoryview(msgspec.json.encode(record) + b"\n")
        try:
            while line:
                line = line[os.write(self._handle, line) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # if even that fails, the next `open` cuts the torn line off
                os.ftruncate(self._handle, size)
            raise _unwritable(self._path, error) from None
        self._records[record.key] = record

    def _load(self) -> None:
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._handle, whole)
        for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
            try:
                record = msgspec.json.decode(line, type=Record)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise ResultsInvalid(f"{self._path}, line {number}: {error}; remove the line") from None
            if record.key in self._records:
                raise ResultsInvalid(f"{self._path}, line {number}: stands there twice; remove the line")
            self._records[record.key] = record


def _agree(directory: Path, run: dict[str, Any], *, begun: bool) -> None:
    """Write run.json, or find there what `run` says. begun: whether there are results."""
    path = directory / RUN_NAME
    content = msgspec.json.encode(run)
    if begun and not path.exists():
        raise ResultsInvalid(f"{directory} holds {RESULTS_NAME} but no {RUN_NAME} to say of what; give another one")
    if not begun:
        made = directory / f".{RUN_NAME}.new"
        made.write_bytes(msgspec.json.format(content, indent=2) + b"\n")
        made.rename(path)
        return
    try:
        before = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ResultsInvalid(f"{path} is damaged ({error}); give another directory") from None
    now = msgspec.json.decode(content, type=dict[str, Any])
    for name in dict.fromkeys([*now, *before]):
        if now.get(name) != before.get(name):
            raise ResultsInvalid(
                f"{directory} holds another run: {name} is {_short(before.get(name))} there, "
                f"{_short(now.get(name))} here; give another directory or the same options"
            )


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unwritable(path: Path, error: OSError) -> ResultsInvalid:
    if is_disk_full(error):
        return ResultsInvalid(
            f"disk full while writing {path}: {free_mb(path)} MB free; make room and run the same again to go on"
        )
    return ResultsInvalid(f"{path} can't be written ({error.strerror})")
