"""Sum up any number of rows in bounded memory, two summaries into one: moments, range and quantiles.

Moments are fp64: two passes over a block that lies in the cache, pairwise sums, and blocks merged by Chan, Golub and
LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979). Quantiles are exact below
2**18 rows, else of rank error < 1e-4 (Manku, Rajagopalan and Lindsay, SIGMOD 1998): docs/quantile_sketch.md proves it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK = 1 << 18  # B: folds take at least so many items
FOLD = 8
STRIP = 1 << 17  # numbers, 1 MiB in fp64


class StreamingSummary:
    """Of `count` rows with D dimensions. mean, m2 (sum of squared distances from the mean), low, high: (D,) float64.

    items: weight -> arrays (D, m) float32, unsorted. error: how many ranks a quantile may be off, at most.
    """

    def __init__(self, width: int) -> None:
        self.count, self.error = 0, 0
        self.mean, self.m2 = np.zeros(width), np.zeros(width)
        self.low, self.high = np.full(width, np.inf), np.full(width, -np.inf)
        self.items: dict[int, list[np.ndarray]] = {}

    @staticmethod
    def of(values: np.ndarray) -> StreamingSummary:
        """Of (D, n) float32, dimensions first. The array now belongs to the summary, which may sort it.

        Raises FloatingPointError where a number is not finite.
        """
        summary = StreamingSummary(len(values))
        summary.count = values.shape[1]
        if not summary.count:
            return summary
        summary.mean, summary.m2 = _moments(values)
        summary.items[1] = [values]
        summary._settle()
        if summary.error:  # sorted, NaN last
            low, high = values[:, 0], values[:, -1]
        else:
            low, high = values.min(1), values.max(1)
        summary.low, summary.high = low.astype(np.float64), high.astype(np.float64)
        if not np.isfinite(summary.low).all() or not np.isfinite(summary.high).all():
            raise FloatingPointError("a number is not finite")
        constant = summary.low == summary.high  # its mean is itself, to the bit
        summary.mean[constant], summary.m2[constant] = summary.low[constant], 0.0
        return summary

    def merge(self, other: StreamingSummary) -> None:
        """Take in the rows of another summary. Moments round: merge in one order to get the same bits."""
        if not other.count:
            return
        self.mean, self.m2 = _chan(self.count, self.mean, self.m2, other.count, other.mean, other.m2)
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self.count, self.error = self.count + other.count, self.error + other.error
        for weight, arrays in other.items.items():
            self.items.setdefault(weight, []).extend(arrays)
        self._settle()

    @property
    def std(self) -> np.ndarray:
        """The population's."""
        return np.sqrt(self.m2 / max(self.count, 1))

    @property
    def rank_error(self) -> float:
        """Bound of |rank of an estimated quantile - its true rank| / rows; 0 where quantiles are exact."""
        return (self.error + 1) / self.count if self.error else 0.0

    def quantiles(self, wanted: Sequence[float]) -> np.ndarray:
        """(len(wanted), D) float64, linear between neighbouring ranks as numpy's default."""
        if not self.error:
            joined = self._joined(1)
            return np.stack([np.quantile(line.astype(np.float64), wanted) for line in joined], axis=1)
        self.items = {weight: [self._joined(weight)] for weight, arrays in self.items.items() if arrays}
        for arrays in self.items.values():
            arrays[0].sort(axis=1)
        weights = np.concatenate([np.full(arrays[0].shape[1], weight) for weight, arrays in self.items.items()])
        place = np.asarray(wanted) * (self.count - 1)
        low = place.astype(np.int64)
        out = np.empty((len(wanted), len(self.mean)))
        for dimension in range(len(self.mean)):
            line = np.concatenate([arrays[0][dimension] for arrays in self.items.values()])
            order = line.argsort(kind="stable")  # merges what is sorted already
            rows = weights[order].cumsum()  # at or below each item
            below, above = (
                line[order[np.searchsorted(rows, rank, "right")]].astype(np.float64)
                for rank in (low, np.minimum(low + 1, self.count - 1))
            )
            out[:, dimension] = below + (above - below) * (place - low)
        return out

    def histogram(self, dimension: int, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows in each bin, edges (bins + 1,)) from min to max, as near as the items tell."""
        span = (self.low[dimension], self.high[dimension])
        edges = np.histogram_bin_edges([], bins, span)
        total = np.zeros(bins, np.int64)
        for weight, arrays in self.items.items():
            for array in arrays:
                total += weight * np.histogram(array[dimension], bins, (edges[0], edges[-1]))[0]
        return total, edges

    def _joined(self, weight: int) -> np.ndarray:
        arrays = self.items[weight]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)

    def _settle(self) -> None:
        """Fold every weight that has its fill, the lightest first."""
        weight = 1
        while weight in self.items:
            if sum(array.shape[1] for array in self.items[weight]) >= BLOCK:
                joined = self._joined(weight)
                joined.sort(axis=1)
                whole = joined.shape[1] // FOLD * FOLD
                rest = joined[:, whole:].copy()  # copies: a view would keep the whole block alive
                self.items[weight] = [rest] if rest.shape[1] else []
                self.items.setdefault(weight * FOLD, []).append(joined[:, FOLD // 2 : whole : FOLD].copy())
                self.error += FOLD // 2 * weight
            weight *= FOLD


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, sum of squared distances from it) of (D, n) float32, in fp64 and in strips that stay in the cache."""
    width, rows = values.shape
    strip = max(1, STRIP // max(1, width))
    mean, m2 = np.zeros(width), np.zeros(width)
    with np.errstate(invalid="ignore"):  # infinities are told of by who asked
        for first in range(0, rows, strip):
            wide = values[:, first : first + strip].astype(np.float64)
            own = wide.mean(1)
            wide -= own[:, None]
            mean, m2 = _chan(first, mean, m2, wide.shape[1], own, np.einsum("ij,ij->i", wide, wide))
    return mean, m2


def _chan(
    count: int, mean: np.ndarray, m2: np.ndarray, more: int, its_mean: np.ndarray, its_m2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sum of squares of `count` rows and `more` rows together."""
    if not count:
        return its_mean, its_m2
    delta, share = its_mean - mean, more / (count + more)
    return mean + delta * share, m2 + its_m2 + np.square(delta) * (count * share)
