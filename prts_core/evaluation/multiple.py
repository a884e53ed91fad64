"""Several tests at once: p-values adjusted so that the chance of one false alarm among them keeps its level.

It knows neither suites nor policies: names and p-values in, names and adjusted p-values out.
"""

from __future__ import annotations

from collections.abc import Mapping

from prts_core.errors import PrtsError


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values, in the order given (Holm 1979, Scandinavian Journal of Statistics 6:65-70).

    Rejecting where the adjusted one is at most alpha makes any false rejection at most as likely as alpha, whatever the
    dependence between the tests. Raises PrtsError for what is no probability.
    """
    for name, p in p_values.items():
        if not 0.0 <= p <= 1.0:
            raise PrtsError("A p-value must lie between 0 and 1", field=name, found=p)
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}
