"""New shares for what of a round is still on its way, when a link has changed. Pure: state in, orders out.

What is known of a transfer under way is what its sender says of it: how much arrived, and how fast, if nothing but the
network held it back. (Of a sender that says nothing, the rates of its link as measured.) A transfer slower than its
share is slow at its sender's hop, unless every transfer of the round on one channel is: then that channel is. One that
was slow and keeps its pace is tried with more (`probing`).

The new shares let all transfers that are left end as early as they can together: the least T with
Σ_i bits_i / ((T - tail_i)·alone_ic) ≤ free_c for every channel c, by bisection, where tail is the decoding to follow.
The last transfer that is left of a revised round, with its channels to itself, is paced no more.
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
from coordinator.probing import Hops
from coordinator.round import Round
from coordinator.settings import CoordinatorSettings

LEAST_CHANGE = 0.10
"""A share that changes by less is left as it is."""
SLOW = 0.75
"""Of a share; what lies above is scatter."""
LEAST_LEFT = 0.02
"""Of a transfer's bits, so many are counted as left however late it is."""
LEAST_BESIDE = 0.01
"""Where any share changes, so do those that make room for it, or have its room, if they change by more than this."""
LEAST_RATE_BPS, LARGEST_RATE_BPS = 1e3, 1e15
LAG_S = 3.0
"""For so long what is seen may still be of the share before."""
BISECTIONS = 60


@dataclass(frozen=True, kw_only=True)
class Moving:
    """A transfer that has not ended. hops: (channel, bits per second alone on it), the first `up` of them its sender's.

    measured: the same, without what was found of it under way. goodput_bps: at which it moves if only the network holds
    it back; None: not known.
    """

    transfer: str
    sender: str
    share_bps: float
    left_bits: float
    tail_s: float
    hops: Hops
    measured: Hops = ()
    up: int = 1
    goodput_bps: float | None = None

    @property
    def slow(self) -> bool:
        """Whether it stays clearly behind its share."""
        return self.goodput_bps is not None and self.goodput_bps < SLOW * self.share_bps

    @property
    def left_s(self) -> float:
        """To its end, at the rate that it has."""
        rate_bps = self.goodput_bps or self.share_bps
        return self.left_bits / max(min(rate_bps, self.share_bps), LEAST_RATE_BPS) + self.tail_s


def revise(
    telemetry: Telemetry, rounds: Collection[Round], *, fleet: Fleet, settings: CoordinatorSettings, now_s: float
) -> list[tuple[str, PaceOrder]]:
    """(agent, order) for every sender whose share changes, after this report, which the fleet already knows.

    Of rounds in which the report's agent has no part nothing changes by it.
    """
    orders: list[tuple[str, PaceOrder]] = []
    for round_ in rounds:
        if telemetry.agent not in round_.agents:
            continue
        running = [(transfer, link) for transfer, link in round_.running() if round_.paced(link)]
        if not running or (len(running) < 2 and not round_.revised):
            continue
        channels, after_s = settings.site_channels(), now_s - round_.accepted_s
        moving = [_moving(transfer, link, round_, fleet, channels, after_s=after_s) for transfer, link in running]
        round_.drift.ends_s = after_s + max(each.left_s for each in moving)
        news = _news(telemetry, running, moving, round_)
        for each in moving:
            if each.transfer in news:
                round_.probing.heard(each.transfer, each.goodput_bps and each.goodput_bps / each.share_bps)
        rates_bps = _rates(telemetry.agent, running, moving, news, fleet=fleet, round_=round_)
        drifted = round_.drift.heard(telemetry.agent, rates_bps, now_s)
        if round_.drift.may(now_s):
            free = airtime_free(fleet, settings, [other for other in rounds if other is not round_], round_.factors)
            given = _orders(moving, round_, fleet, free, drifted=drifted, now_s=now_s)
            round_.revisions += bool(given)
            orders += given
    return orders


def _orders(
    moving: list[Moving], round_: Round, fleet: Fleet, free: Mapping[str, float], *, drifted: bool, now_s: float
) -> list[tuple[str, PaceOrder]]:
    """What is to be ordered if the links have drifted, a trial has failed or is due, or a transfer has ended."""
    running = {each.transfer for each in moving}
    if len(moving) == 1 and all(free.get(name, 1.0) >= 1 for name, _ in moving[0].measured):
        return _let_go(moving[0], round_)
    failed = round_.probing.settle(running, now_s)
    trial: dict[str, Hops] = {}
    if not (drifted or failed or round_.shared_by - running):
        trial = round_.probing.due({each.transfer: each.measured for each in moving}, now_s)
        if not trial:
            return []
    known = round_.probing.hops | trial
    moving = [replace(each, hops=known.get(each.transfer, each.measured)) for each in moving]
    if drifted:
        moving = _found(moving, round_, free, now_s)
    shares = dict(zip((each.transfer for each in moving), new_shares(moving, free), strict=True))
    if trial and not any(shares[transfer] > (1 + LEAST_CHANGE) * _share(moving, transfer) for transfer in trial):
        round_.probing.put_off(trial, now_s)
        return []
    round_.probing.begin(trial)
    changed = _changed(moving, shares, round_)
    round_.drift.revised(_references(moving, shares, {each.transfer for each in changed}, fleet, round_), now_s)
    round_.shared_by = frozenset(running)
    return [_order(each, shares[each.transfer], round_) for each in changed]


def _order(each: Moving, share_bps: float, round_: Round) -> tuple[str, PaceOrder]:
    round_.revise(each.transfer, share_bps)
    round_.probing.repaced([each.transfer])
    return each.sender, PaceOrder(request=round_.ask.request, transfer=each.transfer, rate_bps=share_bps)


def _let_go(last: Moving, round_: Round) -> list[tuple[str, PaceOrder]]:
    """Paced no more, once."""
    if not round_.shared_by or round_.shared_by == {last.transfer}:
        return []
    round_.shared_by = frozenset({last.transfer})
    round_.revise(last.transfer, min(bps for _, bps in last.measured))
    return [(last.sender, PaceOrder(request=round_.ask.request, transfer=last.transfer, rate_bps=None))]


def _share(moving: Sequence[Moving], transfer: str) -> float:
    return next(each.share_bps for each in moving if each.transfer == transfer)


def _changed(moving: Sequence[Moving], shares: Mapping[str, float], round_: Round) -> list[Moving]:
    """Those that get another share; of what a plan said of later ones nothing holds then."""
    ratios = {each.transfer: shares[each.transfer] / each.share_bps for each in moving}
    if all(abs(ratio - 1) <= LEAST_CHANGE for ratio in ratios.values()):
        return []
    stepping = {transfer for transfer, link in round_.running() if link.later_rates}
    return [each for each in moving if abs(ratios[each.transfer] - 1) > LEAST_BESIDE or each.transfer in stepping]


def _found(moving: Sequence[Moving], round_: Round, free: Mapping[str, float], now_s: float) -> list[Moving]:
    """The same with the rates of hops as the slow ones show them, which is remembered of them."""
    common, changed = _common(moving), relocated(moving, free)
    alike: dict[str, dict[str, Hops]] = {}
    for each in changed:
        if each.slow and each.transfer in round_.reporting:
            reason = next((name for name, _ in each.hops if name in common), f"hop of {each.transfer}")
            alike.setdefault(reason, {})[each.transfer] = each.hops
    for hops in alike.values():
        round_.probing.found(hops, now_s)
    return changed


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
    common = _common(moving)
    return [_slowed(each, moving, common, free) for each in moving]


def _common(moving: Sequence[Moving]) -> set[str]:
    """Channels on which several are, and all of them slow."""
    passing = Counter(name for each in moving for name in {name for name, _ in each.hops})
    return {
        name
        for name, count in passing.items()
        if count > 1 and all(each.slow for each in moving if any(at == name for at, _ in each.hops))
    }


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


def _news(
    telemetry: Telemetry, running: Sequence[tuple[str, LinkPlan]], moving: Sequence[Moving], round_: Round
) -> set[str]:
    """Transfers of which the report's agent says something that it has not said before."""
    said = {progress.transfer: progress for progress in telemetry.sending}
    news = set()
    for (transfer, link), each in zip(running, moving, strict=True):
        if link.sender != telemetry.agent or transfer not in said:
            continue
        if transfer not in round_.reporting or link.later_rates:
            round_.drift.references[transfer] = each.share_bps
        if said[transfer] != round_.reporting.get(transfer):
            news.add(transfer)
        round_.reporting[transfer] = said[transfer]
    return news


def _rates(
    agent: str,
    running: Sequence[tuple[str, LinkPlan]],
    moving: Sequence[Moving],
    news: Collection[str],
    *,
    fleet: Fleet,
    round_: Round,
) -> dict[str, float]:
    """What an agent's report says of its running transfers, in bits per second."""
    found: dict[str, float] = {}
    for (transfer, link), each in zip(running, moving, strict=True):
        if transfer in news:
            if each.goodput_bps is not None:
                found[transfer] = each.goodput_bps
        elif transfer not in round_.reporting and agent in {link.sender, link.receiver}:
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
    goodput_bps = progress.goodput_bps if progress else None
    factor = round_.factor(link)
    measured = link_channels(fleet, link.sender, link.receiver, channels) or (("", link.link_bps / factor),)
    hops = tuple((name, min(max(factor * bps, LEAST_RATE_BPS), LARGEST_RATE_BPS)) for name, bps in measured)
    bits = 8.0 * max(1, link.planned_bytes)
    moved_bits = 8.0 * progress.moved_bytes if progress else _moved_by_plan(link, bits, after_s)
    return Moving(
        transfer=transfer,
        sender=link.sender,
        share_bps=_share_now(link, after_s, goodput_bps),
        left_bits=max(LEAST_LEFT * bits, bits - moved_bits),
        tail_s=link.predicted.decode_s,
        hops=round_.probing.hops.get(transfer, hops),
        measured=hops,
        up=max(1, sum(link.sender in channel.members for channel in channels)),
        goodput_bps=goodput_bps,
    )


def _share_now(link: LinkPlan, after_s: float, goodput_bps: float | None) -> float:
    """Its share at this time; while it changes as planned, the one that is nearest to what is seen."""
    steps = [(0.0, link.share_bps), *sorted((step.after_s, step.rate_bps) for step in link.later_rates)]
    ends_s = [*(start_s for start_s, _ in steps[1:]), float("inf")]
    lately = [
        rate_bps
        for (start_s, rate_bps), end_s in zip(steps, ends_s, strict=True)
        if start_s <= max(0.0, after_s) and end_s > after_s - LAG_S
    ]
    return lately[-1] if goodput_bps is None else min(max(goodput_bps, min(lately)), max(lately))


def _moved_by_plan(link: LinkPlan, bits: float, after_s: float) -> float:
    """What should have arrived by now, if its sender does not say."""
    begins_s = link.arrive_s - bits / link.share_bps
    return min(bits, max(0.0, after_s - begins_s) * link.share_bps)


def _progress(fleet: Fleet, sender: str, transfer: str) -> SendProgress | None:
    state = fleet.agents.get(sender)
    sending = state.telemetry.sending if state and state.telemetry else ()
    return next((progress for progress in sending if progress.transfer == transfer), None)
