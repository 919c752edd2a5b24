"""A scenario as arrays over its links, for everything that is computed of all of them at once.

Seconds a token, bits a token, indices of senders, receivers and requests: what `timeline` and the policies divide and
add. Channels are kept as pairs of a link and a channel, since few links pass the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from broker_config.messages import Rung
from coordinator.columns import Columns, columns_of
from coordinator.groups import Groups
from coordinator.ladders import Ladders
from coordinator.latency import RequestTerms, Scenario
from coordinator.numbers import Flags, Floats, Ints, begins, column, numbered

NEWTON_STEPS = 16
WHOLE = 1 << 30
"""Tokens of a slice that holds any context: nothing is streamed."""

_question_tokens = attrgetter("question_tokens")


class Making(NamedTuple):
    """How senders make what travels, (..., K). sent: tokens whose entries do; first: of the first slice.

    produce_s, encode_s: work; begin_s, made_s: when the first slice is made, and the last.
    """

    sent: Floats
    first: Floats
    produce_s: Floats
    encode_s: Floats
    begin_s: Floats
    made_s: Floats


class Table:
    """Columns (K,) over the links of a scenario, in their order. Seconds, bits and counts as the names say."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.count = scenario, len(scenario.links)
        self.slice_tokens = scenario.slice_tokens or WHOLE
        columns = self._columns = columns_of(scenario.links)
        self.tokens, self.elements = columns.tokens, columns.elements_per_token
        self.cached, self.generated = columns.cached > 0, columns.generated > 0
        self.request: Ints = columns.request.astype(np.intp)
        self.head_bits = 8.0 * (scenario.header_bytes + columns.bytes_per_token_id * self.tokens)
        """What goes first, whatever the medium: the header, with the ids of all tokens."""
        there_s = columns.receiver_rtt_s / 2
        self.order_s = columns.sender_rtt_s / 2
        self.back_s = self.order_s + there_s
        self._set_compute(columns)
        self._set_requests(columns, there_s + columns.receiver_overhead_s)
        self._set_channels(columns)
        self.known: Flags = self.measured & self._usable
        """Whose predictions rest on measurements only."""
        has_rungs = np.fromiter(map(bool, columns.rungs), dtype=bool, count=self.count)
        self.may_cache: Flags = has_rungs & self.known & (self.tokens > 0)

    @cached_property
    def ladders(self) -> Ladders:
        """What entries weigh and take at each rung."""
        return Ladders(self.scenario.links, self._columns)

    def ladders_of(self, rungs: list[tuple[Rung, ...]]) -> Ladders:
        """The same if links had these rungs."""
        return Ladders(self.scenario.links, self._columns._replace(rungs=rungs))

    def _set_compute(self, columns: Columns) -> None:
        """fixed, per token and per token² seconds of prefill at the receiver; what the sender takes to produce."""
        speeds, sender, receiver = columns.all_speeds, columns.sender_speed, columns.receiver_speed
        self.prefill_fixed_s, self.prefill_token_s, self.prefill_square_s = speeds.prefill_s[:, receiver]
        self._usable: Flags = speeds.usable[receiver] & speeds.usable[sender]
        made = speeds.prefill_s[:, sender] * ~(self.cached | self.generated)
        self.text_token_s = speeds.generate_s[sender] * (self.generated & ~self.cached)
        """Between two tokens of a text that is still being generated."""
        self.produce_fixed_s, self.produce_square_s = made[0], made[2]
        self.produce_token_s = made[1] + self.text_token_s

    def _set_requests(self, columns: Columns, last_s: Floats) -> None:
        """last_s: (K,) from the end of a question at the link's receiver to its first token's arrival."""
        requests = self.scenario.requests
        self.senders = Groups.of(columns.sender)
        self.receivers = Groups.of(columns.receiver)
        self.room_bits = self.receivers.least(8 * columns.receiver_room_bytes)
        """What each receiver can hold of caches on their way."""
        self.roomy = bool(np.all(self.room_bits == np.inf))
        first = np.full(len(requests), -1, dtype=np.intp)
        first[self.request[::-1]] = np.arange(self.count)[::-1]
        asked = self.asked = np.flatnonzero(first >= 0)
        """Requests that have links."""
        first = first[asked]
        behind = np.bincount(self.request, weights=self.tokens, minlength=len(requests))[asked]
        tokens = np.fromiter(map(_question_tokens, requests), dtype=np.float64, count=len(requests))[asked]
        taken_s = self.prefill_token_s[first] + self.prefill_square_s[first] * (tokens + 2 * behind)
        self.question_s, self.last_s = np.zeros((2, len(requests)))
        self.question_s[asked] = np.where(tokens > 0, self.prefill_fixed_s[first] + tokens * taken_s, 0.0)
        self.last_s[asked] = last_s[first]
        """From the end of a request's question to its first token's arrival."""
        self._set_members(self.receivers.index[first])
        questions_s = self.questions_s[self.request]
        if len(asked) > self.receivers.count:
            latest_s = np.zeros(self.receivers.count)
            np.maximum.at(latest_s, self.receivers.index, questions_s)
            questions_s = latest_s[self.receivers.index]
        self.after_s = questions_s + last_s
        """What follows the parts at a link's receiver: all its questions, what else it needs, and the token's way."""

    def _set_members(self, receivers: Ints) -> None:
        """Whose work goes before a request's question: its own, and that of earlier ones at the same receiver.

        receivers: of the requests that have links. member_link, member_request: pairs of a link and a request that it
        goes before; questions_s: by request.
        """
        self.member_link, self.member_request = np.arange(self.count), self.request
        self.questions_s, asked = self.question_s, self.asked
        if len(asked) == self.receivers.count:
            return
        deadlines_s = self.deadlines_s[asked]
        order = np.lexsort((asked, deadlines_s, receivers))
        asked, starts = asked[order], np.flatnonzero(begins(receivers[order]))
        start = np.repeat(starts, np.diff(starts, append=len(asked)))
        self.questions_s = self.question_s.copy()
        upto_s = np.cumsum(self.question_s[asked])
        self.questions_s[asked] = upto_s - (upto_s - self.question_s[asked])[start]
        place = np.empty(len(self.scenario.requests), dtype=np.intp)
        place[asked] = np.arange(len(asked))
        by_place = np.argsort(place[self.request], kind="stable")
        ends = np.cumsum(np.bincount(place[self.request], minlength=len(asked)))
        begin = (ends - np.bincount(place[self.request], minlength=len(asked)))[start]
        self.member_link = by_place[_ranges(begin, ends)]
        self.member_request = np.repeat(asked, ends - begin)

    @cached_property
    def moments(self) -> Groups:
        """Four moments of each member, one set behind the other, by the request that it goes before (asked)."""
        place = np.searchsorted(self.asked, self.member_request)
        return Groups(np.concatenate([place] * 4), len(self.asked))

    @cached_property
    def longest_first(self) -> Ints:
        """Links by receiver, of one receiver by their tokens."""
        return self.receivers.order(-self.tokens)

    def before_at_sender(self, work_s: Floats) -> Floats:
        """For each link the work of its sender for links before it, (..., K)."""
        if self.senders.alone:
            return np.zeros_like(work_s)
        return self.senders.before(work_s, self.senders.together)

    def text_at_once(self, own: Floats) -> Floats:
        """Which share of a prefill can't begin before the last of its tokens is there."""
        return np.where(self.text_token_s > 0, np.minimum(self.slice_tokens, own) / np.maximum(own, 1.0), 1.0)

    def _set_channels(self, columns: Columns) -> None:
        """Pairs (link, channel) sorted by channel, with the rate alone on it; one passed twice has half of that."""
        bps = columns.link_bps.tolist()
        ways = [channels if rate > 0 else () for channels, rate in zip(columns.channels, bps, strict=True)]
        link = np.repeat(np.arange(self.count), np.fromiter(map(len, ways), dtype=np.intp, count=self.count))
        names, alone_bps = zip(*chain.from_iterable(ways), strict=True) if link.size else ((), ())
        channel, self.channel_names = numbered(names, names)
        order = np.argsort(channel, kind="stable")
        link, channel, bit_s = link[order], channel[order], 1 / column(alone_bps)[order]
        first = begins(channel)
        anew = begins(link) | first
        if not anew.all():
            bit_s = np.add.reduceat(bit_s, anew.nonzero()[0])
            link, channel, first = link[anew], channel[anew], first[anew]
        self.pair_link, self.pair_channel, self.pair_alone_bps = link, channel, 1 / bit_s
        self.channel_starts = first.nonzero()[0]
        self.pair_snr = columns.snr[link]
        self.fdma = bool((self.pair_snr > 0).any())
        self.measured: Flags = np.zeros(self.count, dtype=bool)
        self.measured[link] = True
        free = self.scenario.airtime_free
        self.free = column([free.get(name, 1.0) for name in self.channel_names])

    @cached_property
    def deadlines_s(self) -> Floats:
        """Of each request, see `deadlines_of`."""
        return deadlines_of(self.scenario.requests)

    @cached_property
    def shared(self) -> Flags:
        """Channels that more than one link passes."""
        return np.asarray(np.bincount(self.pair_channel, minlength=len(self.free)) > 1)

    @cached_property
    def pairs_by_link(self) -> Ints:
        """Pairs sorted by link."""
        return np.argsort(self.pair_link, kind="stable")

    @cached_property
    def link_starts(self) -> Ints:
        """Where among these each link's begin, for links that have any."""
        return np.flatnonzero(begins(self.pair_link[self.pairs_by_link]))

    @cached_property
    def most_bps(self) -> Floats:
        """What each link has if it has all that is free to itself."""
        free = rates_of_shares(self.free[self.pair_channel], self.pair_snr)
        return self.least_of_pairs(self.pair_alone_bps * free)

    def used(self, rates: Floats) -> Floats:
        """The share of each channel that these rates take: (..., K) to (..., channels)."""
        return self.by_channel(self.shares_of_pairs(rates[..., self.pair_link]))

    def by_channel(self, by_pair: Floats) -> Floats:
        """Sums over the pairs of each channel, (..., pairs) to (..., channels)."""
        if not self.channel_starts.size:
            return np.zeros((*by_pair.shape[:-1], 0))
        return np.asarray(np.add.reduceat(by_pair, self.channel_starts, axis=-1))

    def shares_of_pairs(self, rates: Floats) -> Floats:
        """The share of its channel that each pair's rate takes, (..., pairs)."""
        alone = rates / self.pair_alone_bps
        return band_shares(alone, self.pair_snr) if self.fdma else alone

    def all_of_pairs(self, by_pair: Flags) -> Flags:
        """For each link whether it holds of all its pairs."""
        return np.asarray(np.bincount(self.pair_link[~by_pair], minlength=self.count) == 0)

    def tangents(self, rates: Floats) -> tuple[Floats, Floats]:
        """(slope, intercept) by pair of the share of its channel as a function of the rate, at these rates (K,)."""
        pair_rates = rates[self.pair_link]
        shares, slope = self.steepness(pair_rates)
        waves = self.fdma & (self.pair_snr > 0)
        return slope, np.where(waves, shares - slope * pair_rates, 0.0)

    def steepness(self, pair_rates: Floats) -> tuple[Floats, Floats]:
        """The share of its channel that each pair's rate takes, and how it grows with it, (..., pairs) each."""
        alone = pair_rates / self.pair_alone_bps
        if not self.fdma:
            return alone, np.broadcast_to(1 / self.pair_alone_bps, alone.shape)
        shares = band_shares(alone, self.pair_snr)
        waves = self.pair_snr > 0
        ratio = np.where(waves, self.pair_snr, 1.0) / np.clip(shares, 1e-12, 1.0)
        slope = np.log1p(np.where(waves, self.pair_snr, 1.0)) / (np.log1p(ratio) - ratio / (1 + ratio))
        return shares, np.where(waves, np.where(shares > 0, slope, 0.0), 1.0) / self.pair_alone_bps

    def one_shared_way(self, which: Flags) -> bool:
        """Whether no receiver has a choice between shared channels among these links (K,): no prices change it."""
        counts = self.shared[self.pair_channel] & which[self.pair_link]
        receivers, channels = self.receivers.index[self.pair_link[counts]], self.pair_channel[counts]
        way = np.zeros(self.receivers.count, dtype=np.intp)
        way[receivers] = channels
        return bool(np.all(way[receivers] == channels))

    def least_on_way(self, by_channel: Floats) -> Floats:
        """For each link the least of what its channels have; infinite for one that passes none."""
        return self.least_of_pairs(by_channel[self.pair_channel])

    def least_of_pairs(self, by_pair: Floats) -> Floats:
        """For each link the least of its pairs; infinite for one without."""
        found = np.full(self.count, np.inf)
        if self.link_starts.size:
            least = np.minimum.reduceat(by_pair[self.pairs_by_link], self.link_starts)
            found[self.pair_link[self.pairs_by_link][self.link_starts]] = least
        return found

    def prefill_s(self, own: Floats) -> Floats:
        """Seconds of prefilling so many leading tokens at the receiver, (..., K)."""
        taken = own * (self.prefill_token_s + self.prefill_square_s * own)
        return np.where(own > 0, self.prefill_fixed_s + taken, 0.0)

    def produce_s(self, tokens: Floats) -> Floats:
        """Seconds until a sender has so many entries of a cache that is not ready, (..., K)."""
        taken = tokens * (self.produce_token_s + self.produce_square_s * tokens)
        return np.where(tokens > 0, self.produce_fixed_s + taken, 0.0)

    def making(self, own: Floats, encode_token_s: Floats) -> Making:
        """What senders do if receivers prefill the first own tokens, (..., K), and a token takes so long to encode."""
        sent = self.sent_tokens(own)
        first = np.minimum(self.slice_tokens, sent)
        produce_s = np.where(sent > 0, self.produce_s(self.tokens), 0.0)
        encode_s = encode_token_s * sent
        start_s = self.order_s + self.before_at_sender(produce_s + encode_s)
        begin_s = start_s + self.produce_s(self.tokens - sent + first) + encode_token_s * first
        return Making(sent, first, produce_s, encode_s, begin_s, start_s + produce_s + encode_s)

    def sent_tokens(self, own: Floats) -> Floats:
        """Tokens whose entries travel in whole slices when the receiver prefills the first own ones, (..., K)."""
        begin = own if self.slice_tokens == WHOLE else np.floor(own / self.slice_tokens) * self.slice_tokens
        return np.where(own < self.tokens, self.tokens - begin, 0.0)


def deadlines_of(requests: Sequence[RequestTerms]) -> Floats:
    """(R,) seconds; infinite for a request without a deadline."""
    return column([terms.deadline_s or np.inf for terms in requests])


def band_shares(alone: Floats, snr: Floats) -> Floats:
    """Which share of a band gives a link this fraction of the rate that the whole band would give it.

    FDMA: r(b) = b·log2(1 + snr/b) / log2(1 + snr), concave in b; its inverse by Newton's method from above, where it
    is convex and so converges from one side. snr 0: airtime, the share is the fraction. Above 1 it goes on linearly
    with the slope there, so that what does not fit compares.
    """
    snr = np.broadcast_to(snr, alone.shape)
    waves = snr > 0
    if not waves.any():
        return alone
    found = alone.copy()
    whole = np.log1p(np.where(waves, snr, 1.0))
    at = np.clip(alone, 1e-12, 1.0)
    target = at * whole
    for _ in range(NEWTON_STEPS):
        ratio = np.where(waves, snr, 1.0) / at
        value, slope = at * np.log1p(ratio), np.log1p(ratio) - ratio / (1 + ratio)
        at = np.maximum(at - (value - target) / np.maximum(slope, 1e-300), at * 1e-3)
    beyond = (alone - 1) * whole / np.maximum(whole - snr / (1 + snr), 1e-300)
    found[waves] = np.where(alone > 0, np.where(alone > 1, 1 + beyond, at), 0.0)[waves]
    return found


def rates_of_shares(shares: Floats, snr: Floats) -> Floats:
    """Which fraction of the rate that the whole band would give a link this share of it does: undoes `band_shares`."""
    if not np.any(snr > 0):
        return shares
    some, waves = np.where(shares > 0, shares, 1.0), np.where(snr > 0, snr, 1.0)
    return np.where((snr > 0) & (shares > 0), some * np.log1p(waves / some) / np.log1p(waves), shares)


def _ranges(begin: Ints, end: Ints) -> Ints:
    """All from each begin up to its end, one range behind the other."""
    sizes = end - begin
    return np.asarray(np.arange(sizes.sum()) + np.repeat(begin - (np.cumsum(sizes) - sizes), sizes))
