"""Whether a link has changed so much, and for so long, that a plan under way is to be revised.

Pure: what was seen goes in, times are passed in. A rate that differs from its reference by less than the factor is no
change; one that does must be seen in two reports of one agent running; after a revision what was seen becomes the new
reference, so that noise smaller than the factor never moves anything twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

REVISE_FACTOR = 1.5
REVISE_INTERVAL_S = 1.0
REPORTS = 2
LATEST_SHARE = 0.8
"""Later than this share of the time that a round takes, a revision would come too late to help."""

Direction = Literal["slower", "faster", ""]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When to revise: a change by so large a factor, once in interval_s at most."""

    factor: float = REVISE_FACTOR
    interval_s: float = REVISE_INTERVAL_S


@dataclass(kw_only=True)
class Drift:
    """The links of one round. references: bits per second that each transfer is compared with.

    ends_s: so many seconds after its acceptance the last transfer ends, by what is seen now.
    """

    rule: Rule
    accepted_s: float
    predicted_s: float
    ends_s: float = 0.0
    references: dict[str, float] = field(default_factory=dict)
    _seen: dict[tuple[str, str], tuple[Direction, int]] = field(default_factory=dict)
    _revised_s: float | None = None

    def heard(self, agent: str, rates_bps: Mapping[str, float], now_s: float) -> bool:
        """An agent's report says this of its transfers. Whether the plan is to be revised now."""
        changed = False
        for transfer, rate_bps in rates_bps.items():
            direction = self._direction(transfer, rate_bps)
            before, count = self._seen.get((agent, transfer), ("", 0))
            count = count + 1 if direction and direction == before else int(bool(direction))
            self._seen[agent, transfer] = (direction, count)
            changed = changed or count >= REPORTS
        return changed and self.may(now_s)

    def revised(self, references: Mapping[str, float], now_s: float) -> None:
        """A revision was made; from now on rates are compared with these."""
        self.references.update(references)
        self._seen.clear()
        self._revised_s = now_s

    def may(self, now_s: float) -> bool:
        """Whether it is neither too late nor too soon after the last revision."""
        if now_s - self.accepted_s > LATEST_SHARE * max(self.predicted_s, self.ends_s):
            return False
        return self._revised_s is None or now_s - self._revised_s >= self.rule.interval_s

    def _direction(self, transfer: str, rate_bps: float) -> Direction:
        reference = self.references.get(transfer, 0.0)
        if reference <= 0 or rate_bps <= 0:
            return ""
        if rate_bps * self.rule.factor < reference:
            return "slower"
        return "faster" if rate_bps > reference * self.rule.factor else ""
