"""Action errors as one page that opens from disk: a table by dimension, and pictures by row of the chunk."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.io.files import write_text
from prts_core.rollout.page import TEMPLATES

WORST = 20  # episodes of the table


def write_replay_page(path: Path, report: dict[str, Any], title: str, about: Sequence[str]) -> None:
    """report: of `replay`, or of a shadow. about: lines below the title."""
    picture = base64.b64encode(draw(report)).decode() if report["rows"] else ""
    episodes = sorted(report.get("episodes", []), key=lambda one: -one["relative"])
    page = TEMPLATES.get_template("replay.html.j2").render(
        report=report,
        title=title,
        about=about,
        shown=rows_shown(report),
        episodes=episodes[:WORST],
        picture=picture,
    )
    write_text(path, page)


def rows_shown(report: dict[str, Any]) -> list[int]:
    """Places in `by_row` for a table: the first row of the chunk, the last, and two between."""
    last = len(report["rows"]) - 1
    return sorted({round(last * share) for share in (0, 1 / 3, 2 / 3, 1)}) if last >= 0 else []


def relative_by_row(report: dict[str, Any]) -> np.ndarray:
    """(A, rows): mean |difference| in spreads; 0 where a dimension never moves."""
    return np.array(
        [
            np.array(one["by_row"]) / one["spread"] if one["spread"] > 1e-9 else np.zeros(len(one["by_row"]))
            for one in report["dimensions"]
        ]
    )


def draw(report: dict[str, Any]) -> bytes:
    """A PNG: the mean over dimensions by row, above a map of every dimension."""
    from matplotlib.figure import Figure

    seconds = np.array([row["seconds"] for row in report["rows"]])
    names = [f"{one['name']} [{one['unit']}]" for one in report["dimensions"]]
    figure = Figure(figsize=(9, 3.2 + 0.24 * len(names)), layout="constrained")
    axis, chart = figure.subplots(2, 1, gridspec_kw={"height_ratios": (2.2, 0.3 + 0.24 * len(names))})
    axis.plot(seconds, [row["relative"] for row in report["rows"]], color="#1f5fa8", lw=2, marker="o", ms=3)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("mean over dimensions,\nin spreads", fontsize=8)
    axis.grid(axis="y", color="0.92")
    axis.spines[["top", "right"]].set_visible(False)
    image = chart.imshow(relative_by_row(report), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    chart.set_yticks(range(len(names)), names, fontsize=7)
    places = np.unique(np.linspace(0, len(seconds) - 1, 8).round().astype(int)).tolist()
    chart.set_xticks(places, [f"{seconds[place]:.2f}" for place in places], fontsize=7)
    axis.tick_params(labelsize=7)
    chart.set_xlabel("seconds ahead (rows of the chunk)", fontsize=8)
    bar = figure.colorbar(image, ax=chart)
    bar.set_label("|difference| / spread", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    file = io.BytesIO()
    figure.savefig(file, dpi=110, metadata={"Software": None})
    return file.getvalue()
