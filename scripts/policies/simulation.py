"""Random rounds: what a split and streaming are worth beside the best choice between tokens and cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from scripts.policies.compare import Compared, compare
from scripts.policies.scenarios import Network, random_round, whole

RESAMPLES = 2_000


class Round(Struct, frozen=True, kw_only=True):
    """One random round with slices and without."""

    seed: int
    network: Network
    links: int
    streaming: Compared
    whole: Compared


class Mean(Struct, frozen=True, kw_only=True):
    """A mean over rounds with its 95 % interval by bootstrap, and the extremes."""

    mean: float
    low: float
    high: float
    least: float
    most: float


class Row(Struct, frozen=True, kw_only=True):
    """Ratios of E2E of one group of rounds; split: share of rounds in which optimum splits a link.

    gap: optimum's E2E over the bound's, less one. Named by what is compared: streaming or whole, first ours, then the
    best binary. binary: the best binary with slices over that without. jmsra is held against those of its rungs.
    """

    group: str
    rounds: int
    streaming_to_whole: Mean
    streaming_to_streaming: Mean
    whole_to_whole: Mean
    binary: Mean
    jmsra_streaming: Mean
    jmsra_whole: Mean
    split_streaming: float
    split_whole: float
    gap_streaming: Mean
    gap_whole: Mean


class Simulation(Struct, frozen=True, kw_only=True):
    """Every round, and rows over all of them and by network."""

    rounds: tuple[Round, ...]
    rows: tuple[Row, ...]


def simulation(rounds: int, hear: Callable[[str], None]) -> Simulation:
    """The networks in turn, seeds from 0; hear is told before each round."""
    networks = list(Network)
    found = []
    for seed in range(rounds):
        hear(f"round {seed + 1}")
        network = networks[seed % len(networks)]
        scenario = random_round(seed, network)
        found.append(
            Round(
                seed=seed,
                network=network,
                links=len(scenario.links),
                streaming=compare(scenario),
                whole=compare(whole(scenario)),
            )
        )
    groups = {"all": found} | {
        network.value: [each for each in found if each.network is network] for network in networks
    }
    return Simulation(rounds=tuple(found), rows=tuple(_row(name, own) for name, own in groups.items() if own))


def ratios(rounds: Sequence[Round], ours: str, binary: str) -> tuple[float, ...]:
    """optimum's E2E with ours (streaming or whole) over the best binary's with binary."""
    return tuple(getattr(each, ours).optimum / _known(getattr(each, binary).binary) for each in rounds)


def _known(binary: float | None) -> float:
    if binary is None:
        raise ValueError("too many links to try all media vectors")
    return binary


def _row(group: str, rounds: Sequence[Round]) -> Row:
    both = [(each.streaming, each.whole) for each in rounds]
    return Row(
        group=group,
        rounds=len(rounds),
        streaming_to_whole=mean(ratios(rounds, "streaming", "whole")),
        streaming_to_streaming=mean(ratios(rounds, "streaming", "streaming")),
        whole_to_whole=mean(ratios(rounds, "whole", "whole")),
        binary=mean([_known(found.binary) / _known(other.binary) for found, other in both]),
        jmsra_streaming=mean([found.jmsra / _known(found.tightest) for found, _ in both]),
        jmsra_whole=mean([found.jmsra / _known(found.tightest) for _, found in both]),
        split_streaming=float(np.mean([found.splits > 0 for found, _ in both])),
        split_whole=float(np.mean([found.splits > 0 for _, found in both])),
        gap_streaming=mean([found.optimum / found.bound - 1 for found, _ in both]),
        gap_whole=mean([found.optimum / found.bound - 1 for _, found in both]),
    )


def mean(values: Sequence[float]) -> Mean:
    """With the interval of resampled means (fixed seed)."""
    drawn = np.random.default_rng(0).choice(np.array(values), (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Mean(
        mean=float(np.mean(values)), low=float(low), high=float(high), least=float(min(values)), most=float(max(values))
    )
