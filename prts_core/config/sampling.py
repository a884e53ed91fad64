"""Choose some of many entries, as a `sampling_strategy` of the public release says."""

from __future__ import annotations

import numpy as np

from prts_core.io.errors import ConfigError


def choose(count: int, strategy: str, seed: int) -> list[int]:
    """Ascending indices into `count` entries that a sampling strategy keeps. A share is rounded up; more than there
    are means all."""
    name, colon, amount = strategy.strip().partition(":")
    if name == "all" and not colon:
        return list(range(count))
    text = amount.strip()
    number = text.removesuffix("%").strip()
    try:
        value = float(number) if text.endswith("%") else int(number)
    except ValueError:
        value = -1
    if name not in ("first", "end", "random") or not 0 < value < float("inf") or (text.endswith("%") and value > 100):
        raise ConfigError(
            "A sampling strategy is not understood",
            field="sampling_strategy",
            found=strategy,
            expected='"all", "first:N", "end:N" or "random:N", N a number above 0 or a share such as "10%"',
        )
    wanted = min(count, int(np.ceil(count * value / 100)) if text.endswith("%") else int(value))
    if name == "first":
        return list(range(wanted))
    if name == "end":
        return list(range(count - wanted, count))
    return sorted(np.random.default_rng(seed).choice(count, wanted, replace=False).tolist())
