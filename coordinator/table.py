"""A scenario as arrays over its links, for everything that is computed of all of them at once.

Seconds a token, bits a token, indices of senders, receivers and requests: what `timeline` and the policies divide and
add. Channels are kept as pairs of a link and a channel, since few links pass the same one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from broker_config.messages import Speed
from coordinator.ladders import Ladders
from coordinator.latency import Link, Scenario, prefill_s, usable
from coordinator.numbers import Flags, Floats, Ints, column

NEWTON_STEPS = 16
WHOLE = 1 << 30
"""Tokens of a slice that holds any context: nothing is streamed."""


_NUMBERS = attrgetter(
    "tokens",
    "elements_per_token",
    "bytes_per_token_id",
    "sender_rtt_s",
    "receiver_rtt_s",
    "receiver_overhead_s",
    "cached",
    "generated",
    "request",
    "snr",
)


class Groups:
    """Links by what they have in common. index: (K,) which group each is in; the groups are numbered from 0."""

    def __init__(self, keys: Sequence[Hashable]) -> None:
        numbers: dict[Hashable, int] = {}
        self.index: Ints = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.intp)
        self.count = len(numbers)
        self.alone = self.count == len(keys)
        """Whether nobody shares a group."""

    def sums(self, values: Floats) -> Floats:
        """The sum of each group: (..., K) to (..., groups)."""
        flat = values.reshape(-1, values.shape[-1])
        places = self.index + self.count * np.arange(len(flat))[:, None]
        found = np.bincount(places.ravel(), weights=flat.ravel(), minlength=self.count * len(flat))
        return np.asarray(found, dtype=np.float64).reshape(*values.shape[:-1], self.count)

    def behind(self, values: Floats, order: Ints) -> Floats:
        """For each link the sum of its group's values from it on, in this order (..., K) of all links, by group first.

        order sorts by group, and within one by whatever comes first.
        """
        return self.sums(values)[..., self.index] - self.before(values, order)

    def before(self, values: Floats, order: Ints) -> Floats:
        """For each link the sum of its group's values before it in such an order."""
        sorted_ = np.take_along_axis(values, order, axis=-1)
        upto = np.cumsum(sorted_, axis=-1) - sorted_
        groups = self.index[order]
        starts = np.concatenate([np.ones((*groups.shape[:-1], 1), dtype=bool), np.diff(groups, axis=-1) != 0], axis=-1)
        at = np.maximum.accumulate(np.where(starts, np.arange(groups.shape[-1]), 0), axis=-1)
        found = np.empty_like(upto)
        np.put_along_axis(found, order, upto - np.take_along_axis(upto, at, axis=-1), axis=-1)
        return found


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
        links = scenario.links
        self.scenario, self.count = scenario, len(links)
        self.slice_tokens = scenario.slice_tokens or WHOLE
        columns = np.array([_NUMBERS(link) for link in links], dtype=np.float64).reshape(-1, 10).T
        self.tokens, self.elements, id_bytes, sender_rtt_s, receiver_rtt_s, overheads_s = columns[:6]
        self.cached, self.generated = columns[6] > 0, columns[7] > 0
        self.request: Ints = columns[8].astype(np.intp)
        self.head_bits = 8.0 * (scenario.header_bytes + id_bytes * self.tokens)
        """What goes first, whatever the medium: the header, with the ids of all tokens."""
        self.order_s, self.back_s = sender_rtt_s / 2, (sender_rtt_s + receiver_rtt_s) / 2
        self._set_compute(links)
        self._set_requests(receiver_rtt_s / 2 + overheads_s)
        self._set_channels(links, columns[9])
        has_rungs: Flags = np.array([bool(link.rungs) for link in links], dtype=bool)
        self.may_cache: Flags = has_rungs & self.measured & self._usable & (self.tokens > 0)

    @cached_property
    def ladders(self) -> Ladders:
        """What entries weigh and take at each rung."""
        return Ladders(self.scenario.links)

    def _set_compute(self, links: Sequence[Link]) -> None:
        """fixed, per token and per token² seconds of prefill at the receiver; what the sender takes to produce."""
        speeds = {id(speed): speed for link in links for speed in (link.sender_speed, link.receiver_speed)}
        places = {key: place for place, key in enumerate(speeds)}
        terms = np.array([_prefill_terms(speed) for speed in speeds.values()], dtype=np.float64).reshape(-1, 5)
        received = terms[[places[id(link.receiver_speed)] for link in links]]
        sent = terms[[places[id(link.sender_speed)] for link in links]]
        self.prefill_fixed_s, self.prefill_token_s, self.prefill_square_s = received.T[:3]
        self._usable: Flags = (received[:, 4] > 0) & (sent[:, 4] > 0)
        produces = ~self.cached
        self.produce_fixed_s = np.where(produces & ~self.generated, sent[:, 0], 0.0)
        self.produce_token_s = np.where(produces, np.where(self.generated, sent[:, 3], sent[:, 1]), 0.0)
        self.produce_square_s = np.where(produces & ~self.generated, sent[:, 2], 0.0)
        self.text_token_s = np.where(self.generated & produces, sent[:, 3], 0.0)
        """Between two tokens of a text that is still being generated."""

    def _set_requests(self, last_s: Floats) -> None:
        """last_s: (K,) from the end of a question at the link's receiver to its first token's arrival."""
        links, requests = self.scenario.links, self.scenario.requests
        self.senders = Groups([link.sender for link in links])
        self.receivers = Groups([link.receiver for link in links])
        first = np.full(len(requests), -1, dtype=np.intp)
        first[self.request[::-1]] = np.arange(self.count)[::-1]
        behind = np.bincount(self.request, weights=self.tokens, minlength=len(requests))
        self.question_s = column(
            [
                prefill_s(links[link].receiver_speed, terms.question_tokens, int(tokens)) if link >= 0 else 0.0
                for terms, link, tokens in zip(requests, first.tolist(), behind.tolist(), strict=True)
            ]
        )
        self.last_s = np.where(first >= 0, last_s[first], 0.0) if self.count else np.zeros(len(requests))
        """From the end of a request's question to its first token's arrival."""
        self._set_members()
        questions = np.zeros(self.receivers.count)
        np.maximum.at(questions, self.receivers.index, self.questions_s[self.request])
        self.after_s = questions[self.receivers.index] + last_s
        """What follows the parts at a link's receiver: all its questions, what else it needs, and the token's way."""

    def _set_members(self) -> None:
        """Whose work goes before a request's question: its own, and that of earlier ones at the same receiver.

        member_link, member_request: pairs of a link and a request that it goes before; questions_s: by request.
        """
        requests, receiver = self.scenario.requests, np.full(len(self.scenario.requests), -1, dtype=np.intp)
        receiver[self.request] = self.receivers.index
        self.member_link, self.member_request = np.arange(self.count), self.request
        self.questions_s = self.question_s
        if np.bincount(receiver[receiver >= 0], minlength=1).max() <= 1:
            return
        by_deadline = sorted(range(len(requests)), key=lambda i: (requests[i].deadline_s or float("inf"), i))
        rank = np.empty(len(requests), dtype=np.intp)
        rank[by_deadline] = np.arange(len(requests))
        self.questions_s = self.question_s.copy()
        members: list[Ints] = []
        owners: list[Ints] = []
        for index in np.flatnonzero(receiver >= 0):
            before = (receiver == receiver[index]) & (rank <= rank[index])
            self.questions_s[index] = self.question_s[before].sum()
            links = np.flatnonzero(before[self.request])
            members.append(links)
            owners.append(np.full(len(links), index, dtype=np.intp))
        self.member_link, self.member_request = np.concatenate(members), np.concatenate(owners)

    def before_at_sender(self, work_s: Floats) -> Floats:
        """For each link the work of its sender for links before it, (..., K)."""
        if self.senders.alone:
            return np.zeros_like(work_s)
        order = np.argsort(self.senders.index, kind="stable")
        return self.senders.before(work_s, np.broadcast_to(order, work_s.shape))

    def text_at_once(self, own: Floats) -> Floats:
        """Which share of a prefill can't begin before the last of its tokens is there."""
        return np.where(self.text_token_s > 0, np.minimum(self.slice_tokens, own) / np.maximum(own, 1.0), 1.0)

    def _set_channels(self, links: Sequence[Link], snr: Floats) -> None:
        """Pairs (link, channel) sorted by channel, with the rate alone on it; one passed twice has half of that."""
        passed = [(i, name, bps) for i, link in enumerate(links) if link.link_bps > 0 for name, bps in link.channels]
        channels = Groups([name for _, name, _ in passed])
        self.channel_names = tuple(dict.fromkeys(name for _, name, _ in passed))
        link: Ints = np.array([i for i, _, _ in passed], dtype=np.intp)
        order = np.lexsort((link, channels.index))
        link, channel = link[order], channels.index[order]
        bit_s = 1 / column([bps for _, _, bps in passed])[order]
        anew = np.flatnonzero((np.diff(link, prepend=-1) != 0) | (np.diff(channel, prepend=-1) != 0))
        self.pair_link, self.pair_channel = link[anew], channel[anew]
        self.pair_alone_bps = 1 / np.add.reduceat(bit_s, anew) if anew.size else bit_s
        self.measured: Flags = np.bincount(self.pair_link, minlength=self.count) > 0
        self.pair_snr = snr[self.pair_link]
        self.channel_starts = np.searchsorted(self.pair_channel, np.arange(channels.count))
        self.pairs_by_link = np.argsort(self.pair_link, kind="stable")
        self.link_starts = np.flatnonzero(np.diff(self.pair_link[self.pairs_by_link], prepend=-1))
        free = self.scenario.airtime_free
        self.free = column([free.get(name, 1.0) for name in self.channel_names])
        self.fdma = bool(np.any(self.pair_snr > 0))
        crowd = np.bincount(self.pair_channel, minlength=channels.count)
        self.shared: Flags = crowd > 1
        """Channels that more than one link passes."""
        self.most_bps = self.least_of_pairs(
            self.pair_alone_bps * rates_of_shares(self.free[self.pair_channel], self.pair_snr)
        )
        """What each link has if it has all that is free to itself."""

    def used(self, rates: Floats) -> Floats:
        """The share of each channel that these rates take: (..., K) to (..., channels)."""
        return self.used_by_pairs(rates[..., self.pair_link])

    def used_by_pairs(self, rates: Floats) -> Floats:
        """The same of rates by pair, (..., pairs)."""
        return self.by_channel(self.shares_of_pairs(rates))

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
        ways = np.unique(np.stack([receivers, channels]), axis=1)
        return bool(np.bincount(ways[0], minlength=1).max() <= 1)

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
        begin = own if self.slice_tokens == WHOLE else own // self.slice_tokens * self.slice_tokens
        return np.where(own < self.tokens, self.tokens - begin, 0.0)


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
    some, waves = np.where(shares > 0, shares, 1.0), np.where(snr > 0, snr, 1.0)
    return np.where((snr > 0) & (shares > 0), some * np.log1p(waves / some) / np.log1p(waves), shares)


def _prefill_terms(speed: Speed | None) -> tuple[float, ...]:
    """(fixed, per token, per token²) seconds of prefill, seconds to generate a token, and 1 if usable; else all 0."""
    if speed is None or speed.prefill_tps <= 0:
        return 0.0, 0.0, 0.0, 0.0, 0.0
    generate_s = 1 / speed.decode_tps if speed.decode_tps > 0 else 0.0
    return speed.prefill_fixed_s, 1 / speed.prefill_tps, speed.prefill_s_per_token2, generate_s, float(usable(speed))
