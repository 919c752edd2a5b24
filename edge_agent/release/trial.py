"""A release on trial: it stays if it is confirmed in time, and else the one before it is back.

Nothing unconfirmed outlives a restart of the device or its time. So whatever happens to the laptop, the link or the
device's power in the middle of an update, the device ends with a release that has once worked.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

from edge_agent.release.errors import DeviceBusy, NothingInstalled, ReleaseError
from edge_agent.release.place import Place, Trial

LOOK_S = 1.0


class Service(Protocol):
    """The agent as the system runs it."""

    def watch_trial(self) -> None:
        """Have the system watch over the trial, whatever becomes of who began it."""

    def restart(self) -> None:
        """Run what is current now."""

    def stop(self) -> None:
        """Run nothing, not after a restart of the device either."""


def boot_id() -> str:
    """Another after each start of the device."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def since_boot_s() -> float:
    """By a clock that nobody sets, and that goes on while the device sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def begin(place: Place, release: str, service: Service, *, within_s: float) -> None:
    """Use a release for now. Raises NothingInstalled, DeviceBusy, SystemFailed; then what was in use is."""
    if release not in place.names():
        raise NothingInstalled(f"no release {release} here")
    if place.trial() is not None:
        raise DeviceBusy("another release is on trial here; it ends by itself")
    previous = place.current()
    place.begin(Trial(release=release, previous=previous, boot=boot_id(), until_s=since_boot_s() + within_s))
    try:
        service.watch_trial()
        place.use("current", release)
        service.restart()
    except ReleaseError as error:
        undo(place, service, str(error))
        raise


def confirm(place: Place, release: str) -> None:
    """It works: it stays, and the one before it is the way back. Raises NothingInstalled if it isn't on trial."""
    trial = place.trial()
    if trial is None and place.current() == release:
        return  # confirmed already: whoever asks again has not heard the first answer
    if trial is None or trial.release != release:
        raise NothingInstalled(place.failure() or f"{release} is not on trial here")
    if trial.previous is not None and trial.previous != release:
        place.use("previous", trial.previous)
    place.end()
    place.forget_unused()


def undo(place: Place, service: Service, why: str) -> str | None:
    """Go back to what was in use before the trial; its name, None if nothing was.

    Raises SystemFailed; then the trial isn't over, and whoever watches it tries again.
    """
    trial = place.trial()
    if trial is None:
        return place.current()
    place.use("current", trial.previous)
    if trial.previous is None:
        service.stop()
    else:
        service.restart()
    place.end(failure=f"{trial.release} is not in use: {why}")
    return trial.previous


def back(place: Place, service: Service, *, within_s: float) -> str:
    """Put the release before the current one on trial; its name. Raises NothingInstalled."""
    previous = place.previous()
    if previous is None or previous not in place.names():
        raise NothingInstalled("there is no earlier release here to go back to")
    begin(place, previous, service, within_s=within_s)
    return previous


def settle(place: Place, service: Service) -> bool:
    """At the start of the device: a trial that began before it has failed. Whether there was one."""
    trial = place.trial()
    if trial is None or trial.boot == boot_id():
        return False
    undo(place, service, "the device was restarted before it was confirmed")
    return True


def watch(place: Place, service: Service) -> None:
    """Until the trial ends; it fails when its time is over."""
    while (trial := place.trial()) is not None:
        if since_boot_s() >= trial.until_s or trial.boot != boot_id():
            undo(place, service, "it was not confirmed in time")
            return
        time.sleep(LOOK_S)
