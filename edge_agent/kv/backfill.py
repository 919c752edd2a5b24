"""Orthogonal BackFill: what the discarded values held beyond the kept ones, added to those (methods.md 3; 2604.13349).

Of each KV head, the discarded values' part that is orthogonal to all kept values is averaged by attention, reduced to
its few strongest directions, and added to every kept value but the sinks', in the proportion of the attention lost.
Only values are filled: a residual added to rotated keys would turn them off their phase. Where the kept values span the
whole head (head_dim of them or more) nothing is orthogonal to them, and nothing is added.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_agent.errors import CacheInvalid, RecipeInvalid
from edge_agent.kv.cache import Float32, Layer
from edge_agent.kv.eviction import Places, taken
from edge_agent.kv.selection import SINK_TOKENS

Float64 = npt.NDArray[np.float64]

RANKS = {"layer": 4, "head": 2}
"""The paper's, by how entries were evicted."""
_TURNS = 12
_RELATIVE_RANK = 1e-10
"""Kept values whose singular value is less than this share of the largest span no direction of their own."""


def backfilled(layer: Layer, kept: Places, rank: int, *, exact: bool = False) -> Float32:
    """The kept values with what the discarded ones held beyond them, float32 (kv_heads, kept, head_dim).

    kept: places (kept,) or (kv_heads, kept). rank: how many directions are kept of the rest. exact: by a singular value
    decomposition instead of a few turns of a subspace. Raises RecipeInvalid for a rank below 1, CacheInvalid for a
    layer without attention mass.
    """
    if rank < 1:
        raise RecipeInvalid(f"rank {rank}: must be 1 or more")
    if layer.mass is None:
        raise CacheInvalid("a layer's attention mass was not kept, values can't be filled by it")
    values = taken(layer.values, kept).copy()
    for head in range(len(values)):
        places = kept if kept.ndim == 1 else kept[head]
        gone = np.ones(layer.entries, dtype=bool)
        gone[places] = False
        mass = layer.mass[head].astype(np.float64)
        if not gone.any() or mass[gone].sum() <= 0 or mass[places].sum() <= 0:
            continue
        added = _residual(
            layer.values[head, places].astype(np.float64),
            layer.values[head, gone].astype(np.float64),
            mass[gone],
            rank,
            exact=exact,
        )
        added *= mass[gone].sum() / mass[places].sum()
        values[head, layer.positions[places] >= SINK_TOKENS] += added.astype(np.float32)
    return values


def _residual(kept: Float64, gone: Float64, mass: Float64, rank: int, *, exact: bool) -> Float64:
    """The mean of what is orthogonal to the kept values, by mass, along its strongest directions: (head_dim,)."""
    basis = _basis(kept)
    if basis.shape[1] == kept.shape[1]:  # nothing is orthogonal to them
        return np.zeros(kept.shape[1])
    rest = gone - (gone @ basis) @ basis.T
    mean: Float64 = (mass / mass.sum()) @ rest
    directions = _directions_exact(rest, rank) if exact else _directions(rest, rank)
    along: Float64 = directions @ (directions.T @ mean)
    return along


def _basis(rows: Float64) -> Float64:
    """Orthonormal columns that span the rows, (head_dim, their rank)."""
    left, sizes, _ = np.linalg.svd(rows.T, full_matrices=False)
    kept: Float64 = left[:, sizes > _RELATIVE_RANK * max(float(sizes[0]), 1e-300)]
    return kept


def _directions_exact(rest: Float64, rank: int) -> Float64:
    """The first right singular vectors as columns, (head_dim, at most rank)."""
    _, _, right = np.linalg.svd(rest, full_matrices=False)
    found: Float64 = right[:rank].T
    return found


def _directions(rest: Float64, rank: int) -> Float64:
    """Nearly the same, by turning a subspace towards them: no decomposition of anything wider than it.

    It starts from the longest rows, has some columns to spare, and is reduced to `rank` at the end.
    """
    width = min(rank + 4, *rest.shape)
    longest = np.argsort(-np.square(rest).sum(axis=1), kind="stable")[:width]
    gram = rest.T @ rest
    subspace = np.linalg.qr(rest[longest].T)[0]
    for _ in range(_TURNS):
        subspace = np.linalg.qr(gram @ subspace)[0]
    weights, turns = np.linalg.eigh(subspace.T @ gram @ subspace)
    strongest: Float64 = subspace @ turns[:, np.argsort(-weights)[:rank]]
    return strongest
