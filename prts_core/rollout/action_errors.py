"""Sum up how far action chunks are from others: by dimension and by row of the chunk. It asks no policy anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prts_core.contract import Dimension


@dataclass
class ActionErrors:
    """Sums over chunks, in robot units. looks: chunks added. count (T,): rows that were compared. The others (T, A):
    absolute and squared differences, the largest one, and the reference's numbers and their squares."""

    looks: int
    count: np.ndarray
    absolute: np.ndarray
    squared: np.ndarray
    largest: np.ndarray
    reference: np.ndarray
    reference_squared: np.ndarray

    @staticmethod
    def empty(rows: int, width: int) -> ActionErrors:
        return ActionErrors(0, np.zeros(rows, np.int64), *(np.zeros((rows, width)) for _ in range(5)))

    def add(self, chunks: np.ndarray, reference: np.ndarray, known: np.ndarray) -> None:
        """chunks and reference (B, T, A); known (B, T) bool: rows that there is something to compare with."""
        found = np.where(known[..., None], chunks.astype(np.float64) - reference, 0.0)
        theirs = np.where(known[..., None], reference.astype(np.float64), 0.0)
        self.looks += len(chunks)
        self.count += known.sum(0)
        self.absolute += np.abs(found).sum(0)
        self.squared += (found**2).sum(0)
        np.maximum(self.largest, np.abs(found).max(0, initial=0.0), out=self.largest)
        self.reference += theirs.sum(0)
        self.reference_squared += (theirs**2).sum(0)

    def merge(self, other: ActionErrors) -> None:
        self.looks += other.looks
        np.maximum(self.largest, other.largest, out=self.largest)
        for name in ("count", "absolute", "squared", "reference", "reference_squared"):
            getattr(self, name).__iadd__(getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    @staticmethod
    def from_json(raw: dict[str, Any]) -> ActionErrors:
        arrays = {name: np.array(value) for name, value in raw.items() if name != "looks"}
        return ActionErrors(looks=int(raw["looks"]), **arrays)

    @property
    def spread(self) -> np.ndarray:
        """(A,) standard deviation of the reference's numbers, over all rows that were compared."""
        total = max(1, int(self.count.sum()))
        mean = self.reference.sum(0) / total
        return np.sqrt(np.maximum(self.reference_squared.sum(0) / total - mean**2, 0.0))

    def relative(self, spread: np.ndarray) -> np.ndarray:
        """(T,) mean over dimensions of mean |difference| / spread; a dimension that never moves does not count."""
        moving = spread > 1e-9
        mean = self.absolute / np.maximum(self.count, 1)[:, None]
        return (mean[:, moving] / spread[moving]).mean(-1) if moving.any() else np.zeros(len(mean))

    def summary(self, dimensions: Sequence[Dimension], control_hz: float) -> dict[str, Any]:
        """Plain data: `dimensions` (mean |difference|, RMSE, largest, spread, by row of the chunk) and `rows` (seconds
        ahead, mean over dimensions in spreads). Rows that were never compared are left out."""
        total, rows = max(1, int(self.count.sum())), np.flatnonzero(self.count)
        spread = self.spread
        mean_of_rows = self.absolute[rows] / self.count[rows, None]
        relative = self.relative(spread)
        return {
            "looks": self.looks,
            "dimensions": [
                {
                    "name": dimension.name,
                    "unit": dimension.unit,
                    "mean": float(self.absolute[:, i].sum() / total),
                    "rmse": float(np.sqrt(self.squared[:, i].sum() / total)),
                    "largest": float(self.largest[:, i].max()),
                    "spread": float(spread[i]),
                    "by_row": mean_of_rows[:, i].tolist(),
                }
                for i, dimension in enumerate(dimensions)
            ],
            "rows": [
                {"row": int(row), "seconds": float(row / control_hz), "relative": float(relative[row])} for row in rows
            ],
        }
