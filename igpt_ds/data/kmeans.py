"""k-means over weighted points in three dimensions, fast where the points are the colours of many images.

In: distinct points, float64 [U, 3], and how often each occurs. Out: k centres. `data/palette.py` fits palettes with it.

Lloyd iterations with longer steps run first on a grid, where all points of a cell become one point: their mean, with the sum of
their weights. The cells are about ten times fewer than the colours of a million pixels, and their centres are already close to
the result. A few iterations over the points themselves follow; the last one takes a plain Lloyd step. Distances are exact
float64 from a k-d tree, sums run in the order of the points, and draws come from one seeded generator: the same input gives the
same bits.
"""

from __future__ import annotations

import numpy as np

MAX_PLUS_PLUS = 4096  # above this, all centres are drawn at once: k-means++ costs k passes over the points
_GRID_SIDE = 64  # four grey levels a cell
_CELLS_PER_CENTRE, _MUCH_FEWER = 8, 0.7  # a grid helps if it has enough cells for k, and far fewer cells than points
_GRID_STEPS, _STEPS = 60, 20
_GRID_ENOUGH, _ENOUGH = 2e-5, 5e-5  # iterations stop when the inertia falls by less than this fraction
_STRIDE = 1.8  # a centre moves this multiple of the way to its points' mean; plain Lloyd, 1, needs twice the steps


def kmeans(points: np.ndarray, weights: np.ndarray, k: int, seed: int = 0, init: np.ndarray | None = None) -> np.ndarray:
    """Centres, float64 [k, 3], of distinct points, float64 [U, 3] in [-1, 1], with weights, float64 [U] > 0.

    init: the first centres, float64 [k, 3]. The default is k-means++ (Arthur and Vassilvitskii 2007) on the grid. For k above
    4,096 it is k distinct points drawn with probability proportional to weight^(3/5), close to the density of the centres of an
    optimal quantiser in three dimensions (Zador). A centre without points moves to the point with the largest error.
    """
    assert 1 <= k <= len(points)
    grid, mass = _grid(points, weights, k)
    if init is None:
        random = np.random.default_rng(seed)
        init = _plus_plus(grid, mass, k, random) if k <= MAX_PLUS_PLUS else _drawn(grid, mass, k, random)
    centres = np.array(init, dtype=np.float64)
    if len(grid) < len(points):
        centres = _lloyd(grid, mass, centres, _GRID_STEPS, _GRID_ENOUGH, _STRIDE)
    centres = _lloyd(points, weights, centres, _STEPS, _ENOUGH, _STRIDE)
    return _lloyd(points, weights, centres, 1, 0.0, 1.0)


def _grid(points: np.ndarray, weights: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Means and weights of the occupied cells of the grid; the points themselves if they are few or k is large."""
    cell = np.minimum((points + 1) * (_GRID_SIDE / 2), _GRID_SIDE - 1).astype(np.int64)
    _, member = np.unique((cell[:, 0] * _GRID_SIDE + cell[:, 1]) * _GRID_SIDE + cell[:, 2], return_inverse=True)
    n_cells = int(member.max()) + 1
    if _CELLS_PER_CENTRE * k <= n_cells < _MUCH_FEWER * len(points):
        return _means(points, weights, member, n_cells)
    return points, weights


def _means(points: np.ndarray, weights: np.ndarray, member: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    mass = np.bincount(member, weights, n)
    sums = np.stack([np.bincount(member, weights * points[:, axis], n) for axis in range(3)], axis=1)
    return sums / np.maximum(mass, np.finfo(np.float64).tiny)[:, None], mass


def _lloyd(
    points: np.ndarray, weights: np.ndarray, centres: np.ndarray, max_steps: int, enough: float, stride: float
) -> np.ndarray:
    from scipy.spatial import cKDTree  # lazily: only a fit needs it

    previous = np.inf
    for _ in range(max_steps):
        distance, member = cKDTree(centres).query(points)
        error = weights * distance**2
        means, mass = _means(points, weights, member, len(centres))
        centres = (centres + stride * (means - centres)).clip(-1, 1)
        empty = np.flatnonzero(mass == 0)
        if len(empty):
            centres[empty] = points[np.argsort(-error, kind="stable")[: len(empty)]]
        inertia = float(error.sum())
        if not len(empty) and previous - inertia <= enough * inertia:
            break
        previous = inertia
    return centres


def _plus_plus(points: np.ndarray, weights: np.ndarray, k: int, random: np.random.Generator) -> np.ndarray:
    """Each centre is a point drawn with probability proportional to its weighted squared distance to the centres before it."""
    chosen = [_draw(weights, random)]
    nearest = np.full(len(points), np.inf)
    for _ in range(k - 1):
        squares = points - points[chosen[-1]]
        squares *= squares
        np.minimum(nearest, squares.sum(axis=1), out=nearest)
        chosen.append(_draw(weights * nearest, random))
    return points[chosen]


def _draw(weights: np.ndarray, random: np.random.Generator) -> int:
    total = weights.cumsum()
    return int(np.searchsorted(total, random.random() * total[-1], side="right"))


def _drawn(points: np.ndarray, weights: np.ndarray, k: int, random: np.random.Generator) -> np.ndarray:
    times = random.exponential(size=len(points)) / weights**0.6  # the k smallest exponential times are such a draw
    return points[np.sort(np.argpartition(times, k - 1)[:k])]
