"""New shares for what of a round is still on its way, when a link has changed. Pure: state in, orders out.

What is known of a transfer under way is what its sender says of it: how much arrived, and how fast, if nothing but the
network held it back. (Of a sender that says nothing, the rates of its link as measured.) A transfer slower than its
share is slow at its sender's hop, unless every transfer of the round on one channel is: then that channel is.

The new shares let all transfers that are left end as early as they can together: the least T with
Σ_i bits_i / ((T - tail_i)·alone_ic) ≤ free_c for every channel c, by bisection, where tail is the decoding to follow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from broker_config.messages import PaceOrder, SendProgress, Telemetry
from coordinator.fleet import Channel, Fleet, link_bps, link_channels
from coordinator.planning import airtime_free
from coordinator.policy import LinkPlan
from coordinator.policy.scenario import LEAST_FREE, to_plan_with
from coordinator.round import Round
from coordinator.settings import CoordinatorSettings

LEAST_CHANGE = 0.10
"""A share that changes by less is left as it is."""
SLOW = 0.75
"""Of a share; what lies above is scatter."""
LEAST_LEFT = 0.02
"""Of a transfer's bits, so many are counted as left however late it is."""
LEAST_RATE_BPS, LARGEST_RATE_BPS = 1e3, 1e15
BISECTIONS = 60


@dataclass(frozen=True, kw_only=True)
class Moving:
    """A transfer that has not ended. hops: (channel, bits per second alone on it), the first `up` of them its sender's.

    goodput_bps: at which it moves if only the network holds it back; None: not known.
    """

    transfer: str
    sender: str
    share_bps: float
    left_bits: float
    tail_s: float
    hops: tuple[tuple[str, float], ...]
    up: int = 1
    goodput_bps: float | None = None

    @property
    def slow(self) -> bool:
        """Whether it stays clearly behind its share."""
        return self.goodput_bps is not None and self.goodput_bps < SLOW * self.share_bps


def revise(
    telemetry: Telemetry, rounds: Collection[Round], *, fleet: Fleet, settings: CoordinatorSettings, now_s: float
) -> list[tuple[str, PaceOrder]]:
    """(agent, order) for every sender whose share changes, after this report, which the fleet already knows."""
    orders: list[tuple[str, PaceOrder]] = []
    for round_ in rounds:
        running = [(transfer, link) for transfer, link in round_.running() if round_.paced(link)]
        if len(running) < 2 or not round_.drift.heard(
            telemetry.agent, _rates(telemetry, running, fleet, round_), now_s
        ):
            continue
        others = [other for other in rounds if other is not round_]
        free = airtime_free(fleet, settings, others, round_.factors)
        after_s = now_s - round_.accepted_s
        moving = relocated(
            [
                _moving(transfer, link, round_, fleet, settings.site_channels(), after_s=after_s)
                for transfer, link in running
            ],
            free,
        )
        round_.hops.update({each.transfer: each.hops for each in moving if each.transfer in round_.reporting})
        shares = dict(zip((each.transfer for each in moving), new_shares(moving, free), strict=True))
        changed = [each for each in moving if abs(shares[each.transfer] / each.share_bps - 1) > LEAST_CHANGE]
        round_.drift.revised(_references(moving, shares, {each.transfer for each in changed}, fleet, round_), now_s)
        for each in changed:
            round_.revise(each.transfer, shares[each.transfer])
            order = PaceOrder(request=round_.ask.request, transfer=each.transfer, rate_bps=shares[each.transfer])
            orders.append((each.sender, order))
    return orders


def new_shares(moving: Sequence[Moving], free: Mapping[str, float]) -> tuple[float, ...]:
    """Bits per second for each, so that the last of them ends as early as possible; what is left is given out alike."""
    names = sorted({name for each in moving for name, _ in each.hops})
    room = {name: to_plan_with(free.get(name, 1.0)) for name in names}
    airtime = [{name: sum(1 / bps for at, bps in each.hops if at == name) for name in names} for each in moving]

    def rates(within_s: float) -> list[float]:
        return [each.left_bits / (within_s - each.tail_s) for each in moving]

    def used(of: Sequence[float], name: str) -> float:
        return sum(rate * each[name] for rate, each in zip(of, airtime, strict=True))

    low = max(each.tail_s for each in moving)
    bits = [each.left_bits for each in moving]
    alone_s = max(used(bits, name) / room[name] for name in names)  # if the latest tail were everybody's
    high = low + max(alone_s, 1e-9) * (1 + 1e-9)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        fits = all(used(rates(middle), name) <= room[name] for name in names)
        low, high = (low, middle) if fits else (middle, high)
    found = rates(high)
    for _ in names:  # all grow alike until a channel is full, then those that do not pass it
        full = {name for name in names if used(found, name) >= room[name] * (1 - 1e-9)}
        grows = [not any(each[name] > 0 for name in full) for each in airtime]
        growing = [rate if more else 0.0 for rate, more in zip(found, grows, strict=True)]
        spare = [(room[name] - used(found, name)) / used(growing, name) for name in names if used(growing, name) > 0]
        if not spare:
            break
        found = [rate + more * min(spare) for rate, more in zip(found, growing, strict=True)]
    return tuple(min(max(rate, LEAST_RATE_BPS), LARGEST_RATE_BPS) for rate in found)


def relocated(moving: Sequence[Moving], free: Mapping[str, float]) -> list[Moving]:
    """The same with the rates of hops as slow as the slow ones show: their senders' own, or a channel common to all."""
    passing = Counter(name for each in moving for name in {name for name, _ in each.hops})
    common = {
        name
        for name, count in passing.items()
        if count > 1 and all(each.slow for each in moving if any(at == name for at, _ in each.hops))
    }
    return [_slowed(each, moving, common, free) for each in moving]


def _slowed(each: Moving, moving: Sequence[Moving], common: set[str], free: Mapping[str, float]) -> Moving:
    if each.goodput_bps is None or not each.slow:
        return each
    goodput_bps = max(each.goodput_bps, LEAST_RATE_BPS)
    if any(name in common for name, _ in each.hops):
        hops = [(name, bps * goodput_bps / each.share_bps if name in common else bps) for name, bps in each.hops]
        return replace(each, hops=tuple(hops))
    hops = []
    for index, (name, bps) in enumerate(each.hops):
        others = sum(
            other.share_bps / at_bps for other in moving if other is not each for at, at_bps in other.hops if at == name
        )
        alone_bps = goodput_bps / max(LEAST_FREE, free.get(name, 1.0) - others)
        hops.append((name, min(bps, alone_bps) if index < each.up else bps))
    return replace(each, hops=tuple(hops))


def _rates(
    telemetry: Telemetry, running: Sequence[tuple[str, LinkPlan]], fleet: Fleet, round_: Round
) -> dict[str, float]:
    """What this report says of the running transfers of its agent, in bits per second."""
    said = {progress.transfer: progress for progress in telemetry.sending}
    found: dict[str, float] = {}
    for transfer, link in running:
        if link.sender == telemetry.agent and transfer in said:
            goodput_bps = said[transfer].goodput_bps
            if transfer not in round_.reporting:
                round_.reporting.add(transfer)
                round_.drift.references[transfer] = link.share_bps
            if goodput_bps is not None:
                found[transfer] = goodput_bps
        elif transfer not in round_.reporting and telemetry.agent in {link.sender, link.receiver}:
            found[transfer] = _link_rate(link, fleet, round_)
    return found


def _link_rate(link: LinkPlan, fleet: Fleet, round_: Round) -> float:
    """As measured and learned; 0 if it is not measured any more."""
    return round_.factor(link) * (link_bps(fleet, link.sender, link.receiver) or 0.0)


def _references(
    moving: Sequence[Moving], shares: Mapping[str, float], changed: Collection[str], fleet: Fleet, round_: Round
) -> dict[str, float]:
    """What rates are compared with after a revision: a share that was given, or else what was seen."""
    links = dict(round_.running())
    return {
        each.transfer: (shares[each.transfer] if each.transfer in changed else each.goodput_bps or each.share_bps)
        if each.transfer in round_.reporting
        else _link_rate(links[each.transfer], fleet, round_)
        for each in moving
    }


def _moving(
    transfer: str, link: LinkPlan, round_: Round, fleet: Fleet, channels: Sequence[Channel], *, after_s: float
) -> Moving:
    progress = _progress(fleet, link.sender, transfer)
    factor = round_.factor(link)
    measured = link_channels(fleet, link.sender, link.receiver, channels) or (("", link.link_bps / factor),)
    hops = tuple((name, min(max(factor * bps, LEAST_RATE_BPS), LARGEST_RATE_BPS)) for name, bps in measured)
    bits = 8.0 * max(1, link.planned_bytes)
    moved_bits = 8.0 * progress.moved_bytes if progress else _moved_by_plan(link, bits, after_s)
    return Moving(
        transfer=transfer,
        sender=link.sender,
        share_bps=link.share_bps,
        left_bits=max(LEAST_LEFT * bits, bits - moved_bits),
        tail_s=link.predicted.decode_s,
        hops=round_.hops.get(transfer, hops),
        up=max(1, sum(link.sender in channel.members for channel in channels)),
        goodput_bps=progress.goodput_bps if progress else None,
    )


def _moved_by_plan(link: LinkPlan, bits: float, after_s: float) -> float:
    """What should have arrived by now, if its sender does not say."""
    begins_s = link.arrive_s - bits / link.share_bps
    return min(bits, max(0.0, after_s - begins_s) * link.share_bps)


def _progress(fleet: Fleet, sender: str, transfer: str) -> SendProgress | None:
    state = fleet.agents.get(sender)
    sending = state.telemetry.sending if state and state.telemetry else ()
    return next((progress for progress in sending if progress.transfer == transfer), None)
