"""Many runs in virtual time, over all cores: every trace with every device, policy and seed.

Runs go through joblib: within `joblib.parallel_config(backend="dask")`, say, the same sweep uses a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import structlog
from joblib import Parallel, delayed

from coordinator.errors import CoordinatorError
from scripts.policies.profiles import profiles
from scripts.replay.errors import ReplayError, SettingInvalid
from scripts.replay.policies import policy_named
from scripts.replay.results import Result
from scripts.replay.setting import Place
from scripts.replay.virtual.run import Terms, run
from scripts.traces import Trace

OWN_DEVICES = ""
"""Agents have the devices that their site says."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is combined.

    traces: by name; None: links have traces or rates of their own. record: the folder of recordings.
    """

    places: Sequence[Place]
    traces: Sequence[tuple[str, Trace | None]]
    policies: Sequence[str]
    devices: Sequence[str] = (OWN_DEVICES,)
    seeds: Sequence[int] = (0,)
    timelines: bool = True
    record: Path | None = None

    @property
    def count(self) -> int:
        """Of runs."""
        return len(self.places) * len(self.traces) * len(self.policies) * len(self.devices) * len(self.seeds)


def sweep(terms: Sweep, jobs: int = -1) -> Iterator[Result]:
    """Results in order, each as soon as it and those before it are there. jobs: processes, -1: one a core.

    A policy that raises, or a fault in a run, ends that run only, and is told in its result. Raises SettingInvalid and
    ScheduleInvalid before anything is run.
    """
    if not jobs:
        raise SettingInvalid("--jobs 0: some process must do it; -1 takes one a core")
    for name in terms.policies:
        policy_named(name)
    for device in terms.devices:
        if device not in {OWN_DEVICES, *profiles()}:
            raise SettingInvalid(f"no device {device}; there are {', '.join(profiles())}")
    cells = product(terms.places, terms.traces, terms.devices, terms.seeds, terms.policies)
    if jobs == 1:
        for cell in cells:
            yield _one(_Cell(*cell), terms)
        return
    parallel = Parallel(n_jobs=jobs, return_as="generator", pre_dispatch="2*n_jobs")
    yield from parallel(delayed(_one)(_Cell(*cell), replace(terms, places=(), traces=())) for cell in cells)


class _Cell(NamedTuple):
    """Of a sweep."""

    place: Place
    trace: tuple[str, Trace | None]
    device: str
    seed: int
    policy: str


def _one(cell: _Cell, sweep_terms: Sweep) -> Result:
    place, trace, device, seed, policy = cell
    record = sweep_terms.record
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    known = policy_named(policy)
    parts = (place.name, trace[0], device, known.name, str(seed))
    file = record / f"{'-'.join(part for part in parts if part)}.mcap" if record else None
    terms = Terms(
        place=place,
        policy=known,
        trace_name=trace[0],
        trace=trace[1],
        device=device,
        seed=seed,
        timelines=sweep_terms.timelines,
        record=file,
    )
    try:
        return run(terms)
    except (ReplayError, CoordinatorError) as error:
        why = str(error)
    except Exception as error:  # noqa: BLE001  of many runs one is lost, and it is told
        why = f"a fault of ours: {type(error).__name__}: {error}"
    return Result(
        mode="virtual",
        site=place.name,
        trace=trace[0],
        device=device,
        policy=known.name,
        seed=seed,
        duration_s=place.setting.duration_s,
        questions=(),
        error=why,
    )
