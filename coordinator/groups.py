"""Things by what they have in common, sorted and summed: links by receiver, requests too, moments by request."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.numbers import Floats, Ints, numbered


class Groups:
    """N things by group. index: (N,) which group each is in; the groups are numbered from 0."""

    def __init__(self, index: Ints, count: int) -> None:
        self.index, self.count = index, count
        self.alone = count == len(index) and len(np.unique(index)) == count
        """Whether nobody shares a group."""

    @classmethod
    def of(cls, keys: Sequence[Hashable]) -> Groups:
        """By key."""
        index, distinct = numbered(keys, keys)
        return cls(index, len(distinct))

    @cached_property
    def sizes(self) -> Ints:
        """How many each group has."""
        return np.bincount(self.index, minlength=self.count)

    @cached_property
    def starts(self) -> Ints:
        """Where each group begins when things are sorted by group."""
        return np.cumsum(self.sizes) - self.sizes

    @cached_property
    def together(self) -> Ints:
        """(N,): by group, those of one as they come."""
        return np.argsort(self.index.astype(np.min_scalar_type(self.count)), kind="stable")

    @cached_property
    def _sorted(self) -> Ints:
        """Of things sorted by group, the group of each."""
        return self.index[self.together]

    @cached_property
    def _sorted_starts(self) -> Ints:
        """Of things sorted by group, where the group of each begins."""
        return np.repeat(self.starts, self.sizes)

    def order(self, values: Floats, before: Ints | None = None) -> Ints:
        """By group, and within one by value, (..., N) finite; what is equal as it was before.

        Equal counts what differs by less than 1e-15 of the largest, times the number of groups.
        before: (..., N) by group; without it as they come. What is sorted by group already is sorted fast.
        """
        before = self.together if before is None else before
        if self.alone:
            return self.together
        largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)), 1e-300)
        keys = _taken(values, before) / (4 * largest) + self._sorted
        found = np.argsort(keys, axis=-1, kind="stable")
        return before[found] if before.ndim == 1 else np.take_along_axis(before, found, axis=-1)

    def running(self, values: Floats) -> Floats:
        """Of values sorted by group, the sums up to each that begin anew with each group, (..., N)."""
        upto = np.cumsum(values, axis=-1)
        return upto if self.count == 1 else upto - (upto - values)[..., self._sorted_starts]

    def least(self, values: Floats) -> Floats:
        """The least value of each group, (groups,); infinite for one of nothing."""
        found = np.full(self.count, np.inf)
        np.minimum.at(found, self.index, values)
        return found

    def sums(self, values: NDArray[np.floating[Any]]) -> Floats:
        """The sum of each group: (..., N) to (..., groups)."""
        if values.ndim == 1:
            return np.asarray(np.bincount(self.index, values, self.count), dtype=np.float64)
        flat = values.reshape(-1, values.shape[-1])
        if len(flat) == 1:
            return self.sums(flat[0]).reshape(*values.shape[:-1], self.count)
        places = self.index + self.count * np.arange(len(flat))[:, None]
        found = np.bincount(places.ravel(), weights=flat.ravel(), minlength=self.count * len(flat))
        return np.asarray(found, dtype=np.float64).reshape(*values.shape[:-1], self.count)

    def behind(self, values: Floats, order: Ints) -> Floats:
        """For each thing the sum of its group's values from it on, in this order (..., N), by group first."""
        return self.sums(values)[..., self.index] - self.before(values, order)

    def before(self, values: Floats, order: Ints) -> Floats:
        """For each thing the sum of its group's values before it in such an order."""
        sorted_ = _taken(values, order)
        upto = np.cumsum(sorted_, axis=-1) - sorted_
        upto -= upto[..., self._sorted_starts]
        found = np.empty_like(upto)
        if order.size == order.shape[-1]:
            found[..., order.ravel()] = upto
        else:
            np.put_along_axis(found, np.broadcast_to(order, found.shape), upto, axis=-1)
        return found


def _taken(values: Floats, order: Ints) -> Floats:
    """Values (..., N) in an order, (N,) or (..., N)."""
    if order.size == order.shape[-1]:
        return values[..., order.ravel()]
    return np.take_along_axis(values, np.broadcast_to(order, values.shape), axis=-1)
