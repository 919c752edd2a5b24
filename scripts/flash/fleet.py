"""Several devices: one first, then some, then all; the first failure stops what has not begun."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from broker_config.errors import BusError
from scripts.flash.errors import FlashError, HostFailed

T = TypeVar("T")

logger = logging.getLogger(__name__)

AT_ONCE = 4
AT_WORK = "flash"
"""How threads are called that have a device in their hands."""
SOME = 0.25
"""The share of a fleet that is done after the first one, before the rest."""


@dataclass(frozen=True, kw_only=True)
class Ended(Generic[T]):
    """How one host ended: with a result, with an error, or not begun."""

    host: str
    result: T | None = None
    error: FlashError | None = None


def stages(hosts: Sequence[str], *, staged: bool = True) -> Iterator[tuple[str, ...]]:
    """One, some, all; or all at once. Every host once, in order."""
    hosts = tuple(dict.fromkeys(hosts))
    ends = (1, 1 + round(SOME * len(hosts)), len(hosts)) if staged else (len(hosts),)
    begin = 0
    for end in ends:
        if hosts[begin:end]:
            yield hosts[begin:end]
            begin = end


def roll_out(
    hosts: Sequence[str],
    work: Callable[[str], T],
    *,
    staged: bool = True,
    at_once: int = AT_ONCE,
    go_on: bool = False,
) -> tuple[Ended[T], ...]:
    """Do it on every host, stage by stage, until one fails (or on, for what nobody is harmed by); what has begun by
    then is ended first. A fault of ours is logged, and hides nothing of what became of the others.
    """
    ended: dict[str, Ended[T]] = {}
    failed = threading.Event()

    def one(host: str) -> Ended[T]:
        if failed.is_set() and not go_on:
            return Ended(host=host)
        result = _one(host, work)
        if result.error is not None:
            failed.set()
        return result

    for stage in stages(hosts, staged=staged):
        pool = ThreadPoolExecutor(max_workers=at_once, thread_name_prefix=AT_WORK)
        try:
            for result in pool.map(one, stage):
                ended[result.host] = result
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)  # nobody who is interrupted waits for devices
            raise
        pool.shutdown()
        if failed.is_set() and not go_on:
            break
    return tuple(ended.get(host, Ended(host=host)) for host in dict.fromkeys(hosts))


def _one(host: str, work: Callable[[str], T]) -> Ended[T]:
    try:
        return Ended(host=host, result=work(host))
    except FlashError as error:
        return Ended(host=host, error=error)
    except (BusError, OSError) as error:  # of this machine: a file, a disk
        return Ended(host=host, error=HostFailed(f"{host}: {error}"))
    except Exception as error:
        logger.exception("%s", host)
        return Ended(host=host, error=HostFailed(f"{host}: a fault of kvbus itself: {type(error).__name__}: {error}"))
