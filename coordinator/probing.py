"""Whether what was found slow has recovered: a paced transfer shows only that its link is no worse than its share.

So one that keeps its pace is tried with a quarter more, then with ever more as long as it keeps that too, up to what
was measured before. One that fails gets what the trial showed of it, and waits twice as long for the next. Transfers
that a channel they have in common made slow are tried together. Pure: what was seen goes in, times are passed in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from coordinator.drift import REPORTS

KEPT_PACE, PROBING = 0.9, 1.25
"""A paced transfer that kept its pace shows that the link is no worse than planned: a quarter more is tried next."""
FAILED_REPORTS = 4
"""A trial after which so many reports came without REPORTS good ones running has failed."""
WAIT_S, LONGEST_WAIT_S = 4.0, 64.0
"""Before what was found slow is tried again: the first time, and after many trials that failed."""

Hops = tuple[tuple[str, float], ...]
"""Channels that a transfer passes, with its bits per second alone on each."""


@dataclass(kw_only=True)
class _Slow:
    """Transfers slow for one reason. before: their hops, while on trial; shown: how they kept their pace in it."""

    transfers: set[str]
    next_s: float
    wait_s: float = WAIT_S
    kept_trials: int = 0
    before: dict[str, Hops] = field(default_factory=dict)
    shown: dict[str, list[float]] = field(default_factory=dict)


class Probing:
    """The slow transfers of one round. hops: what their hops are taken to carry now."""

    def __init__(self) -> None:
        self.hops: dict[str, Hops] = {}
        self._slow: list[_Slow] = []
        self._kept: dict[str, int] = {}

    def heard(self, transfer: str, pace_share: float | None) -> None:
        """A report says at what share of its pace it moves; None: something else than the network holds it back."""
        if pace_share is None:
            self._kept.pop(transfer, None)
            return
        self._kept[transfer] = self._kept.get(transfer, 0) + 1 if pace_share >= KEPT_PACE else 0
        for slow in self._slow:
            if transfer in slow.before:
                slow.shown.setdefault(transfer, []).append(pace_share)

    def found(self, hops: Mapping[str, Hops], now_s: float) -> None:
        """These are slow for one reason; a trial that was made of them has failed."""
        earlier = [slow for slow in self._slow if slow.transfers & hops.keys()]
        wait_s = max((_longer(slow.wait_s) if slow.before else slow.wait_s for slow in earlier), default=WAIT_S)
        self._forget(hops)
        self.hops.update(hops)
        self._slow.append(_Slow(transfers=set(hops), next_s=now_s + wait_s, wait_s=wait_s))

    def settle(self, running: Collection[str], now_s: float) -> bool:
        """End trials that have shown enough, forget what has ended. Whether one has failed, so that `hops` changed."""
        self._forget([transfer for transfer in self.hops if transfer not in running])
        failed = False
        for slow in self._slow:
            if not slow.before:
                continue
            if self._keeps_pace(slow):
                slow.before, slow.next_s, slow.wait_s = {}, now_s, WAIT_S
                slow.kept_trials += 1
            elif any(len(shown) >= FAILED_REPORTS for shown in slow.shown.values()):
                failed = True
                self.hops.update({transfer: self._as_shown(slow, transfer) for transfer in slow.before})
                slow.before, slow.kept_trials, slow.wait_s = {}, 0, _longer(slow.wait_s)
                slow.next_s = now_s + slow.wait_s
        return failed

    def due(self, measured: Mapping[str, Hops], now_s: float) -> dict[str, Hops]:
        """Of what has waited longest and keeps its pace, the hops to be tried, up to those measured. Empty: nothing."""
        recovered = [slow for slow in self._slow if not slow.before and self._at_most(slow, measured)]
        self._forget([transfer for slow in recovered for transfer in slow.transfers])
        waiting = [slow for slow in self._slow if not slow.before and now_s >= slow.next_s and self._keeps_pace(slow)]
        if not waiting:
            return {}
        slow = min(waiting, key=lambda slow: slow.next_s)
        more = PROBING ** (slow.kept_trials + 1)
        return {transfer: _raised(self.hops[transfer], more, measured[transfer]) for transfer in slow.transfers}

    def begin(self, hops: Mapping[str, Hops]) -> None:
        """They are tried from now on."""
        for slow in self._of(hops):
            slow.before, slow.shown = {transfer: self.hops[transfer] for transfer in slow.transfers}, {}
        self.hops.update(hops)
        self.repaced(hops)

    def put_off(self, hops: Mapping[str, Hops], now_s: float) -> None:
        """More would not change their shares now."""
        for slow in self._of(hops):
            slow.next_s = now_s + slow.wait_s

    def repaced(self, transfers: Collection[str]) -> None:
        """They have other shares from now on: how they kept the last ones says nothing."""
        for transfer in transfers:
            self._kept.pop(transfer, None)

    def _of(self, transfers: Collection[str]) -> list[_Slow]:
        return [slow for slow in self._slow if not slow.transfers.isdisjoint(transfers)]

    def _forget(self, transfers: Collection[str]) -> None:
        for transfer in transfers:
            self.hops.pop(transfer, None)
        for slow in self._slow:
            slow.transfers.difference_update(transfers)
            slow.before = {transfer: hops for transfer, hops in slow.before.items() if transfer in slow.transfers}
        self._slow = [slow for slow in self._slow if slow.transfers]

    def _keeps_pace(self, slow: _Slow) -> bool:
        """All of which something is known, in as many reports running as a change needs."""
        known = [self._kept[transfer] for transfer in slow.transfers if transfer in self._kept]
        return bool(known) and min(known) >= REPORTS

    def _at_most(self, slow: _Slow, measured: Mapping[str, Hops]) -> bool:
        """Whether there is nothing more to be tried."""
        return all(
            bps >= most
            for transfer in slow.transfers
            for (_, bps), (_, most) in _against(self.hops[transfer], measured[transfer])
        )

    def _as_shown(self, slow: _Slow, transfer: str) -> Hops:
        """What was raised for a trial, as the trial showed it."""
        share = min(1.0, fmean(slow.shown.get(transfer) or [1 / PROBING]))
        pairs = zip(self.hops[transfer], slow.before[transfer], strict=True)
        return tuple((name, bps * share if bps > before else bps) for (name, bps), (_, before) in pairs)


def _against(hops: Hops, measured: Hops) -> Iterable[tuple[tuple[str, float], tuple[str, float]]]:
    """Each hop with what was measured of it; with itself, if other channels are known now."""
    same = [name for name, _ in hops] == [name for name, _ in measured]
    return zip(hops, measured if same else hops, strict=True)


def _raised(hops: Hops, more: float, measured: Hops) -> Hops:
    return tuple((name, max(bps, min(more * bps, most))) for (name, bps), (_, most) in _against(hops, measured))


def _longer(wait_s: float) -> float:
    return min(2 * wait_s, LONGEST_WAIT_S)
