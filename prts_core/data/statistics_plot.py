"""Draw norm statistics: every dimension's distribution with its 1 % and 99 % quantiles."""

from __future__ import annotations

from pathlib import Path

from prts_core.data.statistics import Computed
from prts_core.io.files import atomic_path


def plot(computed: Computed, path: Path) -> None:
    """One small panel per dimension: histogram over frames, q01 and q99 as lines, what lies outside them shaded. A
    dimension that is trained relative to the state has two: as recorded, and over chunks."""
    from matplotlib.figure import Figure

    contract, stats = computed.contract, computed.stats
    panels = []
    described = (
        ("state", contract.state, computed.rows, stats.state, 0),
        ("action", contract.action, computed.rows, stats.action, len(contract.state)),
    )
    for label, dims, summary, part, offset in described:
        for i, dim in enumerate(dims):
            panels.append(
                (f"{label} {dim.name}", dim.unit, summary.histogram(offset + i, 40), part.q01[i], part.q99[i])
            )
    if computed.relative is not None and computed.relative_rows is not None:
        part = computed.relative.action
        for place, i in enumerate(i for i, dim in enumerate(contract.action) if dim.relative):
            dim, shown = contract.action[i], computed.relative_rows.histogram(place, 40)
            panels.append((f"relative {dim.name}", dim.unit, shown, part.q01[i], part.q99[i]))
    columns = min(4 if len(panels) <= 16 else 6, len(panels))
    rows = -(-len(panels) // columns)
    height = 1.7 * rows + 0.6  # inches
    figure = Figure(figsize=(2.6 * columns, height))
    # Margins by hand: matplotlib's own layout engine takes longer than all panels together.
    figure.subplots_adjust(0.02, 0.45 / height, 0.98, 1 - 0.65 / height, wspace=0.08, hspace=0.75)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, unit, histogram, low, high) in zip(axes, panels, strict=False):
        axis.stairs(*histogram, fill=True, color="#4477aa")
        for edge in (low, high):
            axis.axvline(edge, color="#cc3311", linewidth=1)
        left, right = axis.get_xlim()
        axis.axvspan(left, low, color="#cc3311", alpha=0.08, linewidth=0)
        axis.axvspan(high, right, color="#cc3311", alpha=0.08, linewidth=0)
        axis.set_xlim(left, right)
        axis.set_title(title, fontsize=7)
        axis.set_xlabel("" if unit == "unknown" else unit, fontsize=6)
        axis.set_yticks([])
        axis.locator_params(axis="x", nbins=4)
        axis.tick_params(labelsize=6)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(
        f"{contract.embodiment}: {stats.count} frames of split {stats.split}; red: q01 and q99",
        fontsize=9,
        y=1 - 0.2 / height,
    )
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": None})
