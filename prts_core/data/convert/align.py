"""Put streams that tick on their own into rows at one fixed rate: which message of each stream stands in each row."""

from __future__ import annotations

from typing import Literal

import numpy as np

from prts_core.io.errors import DataError

Hold = Literal["last", "nearest"]
_SECOND = 1_000_000_000


def rows(times: dict[str, np.ndarray], fps: float, where: object) -> np.ndarray:
    """Times (T,) int64 of the rows: from the moment when every stream has begun until the first one ends.

    times: stream -> its messages' times in any order. Raises DataError where the streams never overlap.
    """
    start = max(int(stamps.min()) for stamps in times.values())
    end = min(int(stamps.max()) for stamps in times.values())
    if end < start:
        first = min(times, key=lambda name: times[name].max())
        last = max(times, key=lambda name: times[name].min())
        raise DataError(
            "Two topics of a recording never overlap",
            file=where,
            field=f"{first}, {last}",
            found=f"{first} ends {(start - end) / _SECOND:.3f} s before {last} begins",
            expected="topics recorded at the same time, by one clock",
            cure="record them together, or choose another `clock` in the mapping's options",
        )
    # In whole nanoseconds from the start, so that rows do not drift over a long recording.
    count = int((end - start) * fps / _SECOND + 1e-9) + 1
    return start + np.rint(np.arange(count) * (_SECOND / fps)).astype(np.int64)


def choose(times: np.ndarray, at: np.ndarray, hold: Hold, tolerance_s: float, topic: str, where: object) -> np.ndarray:
    """Ordinals (T,) of the messages that stand at the row times `at`.

    last: the newest that is not younger than the row, so that no row sees its future; nearest: the closest in time, the
    earlier of two. Raises DataError where it is further than `tolerance_s` away.
    """
    order = np.argsort(times, kind="stable")
    stamps = times[order]
    before = np.clip(np.searchsorted(stamps, at, side="right") - 1, 0, len(stamps) - 1)
    if hold == "nearest":
        after = np.minimum(before + 1, len(stamps) - 1)
        before = np.where(np.abs(stamps[after] - at) < np.abs(at - stamps[before]), after, before)
    off = np.abs(stamps[before] - at) / _SECOND
    if (off > tolerance_s).any():
        row = int(np.flatnonzero(off > tolerance_s)[0])
        raise DataError(
            "A topic has a gap",
            file=where,
            field=f"{topic}, row {row}, {(int(at[row]) - int(at[0])) / _SECOND:.3f} s after the first",
            found=f"the {hold} message is {off[row]:.3f} s away ({int((off > tolerance_s).sum())} such rows)",
            expected=f"at most {tolerance_s:.3f} s",
            cure="leave the recording out, or allow more with options.tolerance_s",
        )
    return order[before].astype(np.int64)
