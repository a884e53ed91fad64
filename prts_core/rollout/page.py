"""A benchmark as one page: rates with their intervals, what failures look like, how the value went. Opens from disk.

Everything is in the file (videos too, while they are small) and nothing is fetched. It draws the report and the rows it
is given, and knows no policy and no simulator. What it looks like is page.html.j2's.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.ext import Extension
from markupsafe import Markup

from prts_core.io.files import write_text
from prts_core.rollout.results import axis_of_row
from prts_core.statistics.after_stopping import EXACT

EMBEDDED_BYTES = 12 * 2**20  # of videos inside the page; the rest is linked
CURVES = 60  # episodes drawn a task
AXES = {"left": 48, "top": 8, "width": 244, "height": 104}  # of curves, in pixels


class OneLine(Extension):
    """Read a template as if it were one line: a page's bytes do not depend on how its template is laid out."""

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        return re.sub(r"\n\s*", "", source) if name == "page.html.j2" else source


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    extensions=[OneLine],
    undefined=StrictUndefined,
    autoescape=True,
    # As Python's own html escapes quotes, and pages always had them: markupsafe writes other bytes.
    finalize=lambda value: value if isinstance(value, Markup) else Markup(escape(str(value))),
)


def write_page(
    path: Path, report: dict[str, Any], rows: Sequence[dict[str, Any]], timing: dict[str, Any] | None = None
) -> None:
    """Write the page of one suite; videos are looked for beside it. timing (of results.py) is shown."""
    (low, high), method = interval_of(report)
    told = {name: str(value) for name, value in sorted(report["policy"].items()) if value and name != "unverified"}
    page = TEMPLATES.get_template("page.html.j2").render(
        report=report,
        rows=rows,
        timing=timing or {},
        timed=timing is not None,
        low=low,
        high=high,
        method=method,
        identity=", ".join(f"{name} {v[:23] if v.startswith('sha256:') else v}" for name, v in told.items()),
        notes=list(_notes(report, timing or {})),
        videos=list(_videos(report, rows, path.parent)),
        plots=_plots(report, rows),
        protocol=json.dumps(report["protocol"], indent=1, ensure_ascii=False),
        **AXES,
    )
    write_text(path, page)


def interval_of(report: dict[str, Any]) -> tuple[tuple[float, float], str]:
    """95 % interval of the whole suite's rate and what it is called: after an early stop, one that holds then."""
    stop = report["stopped_early"]
    if stop and stop["interval"]:
        return (stop["interval"]["lower"], stop["interval"]["upper"]), stop["method"]
    low, high = report["wilson95"]
    return (low, high), "Wilson"


def _notes(report: dict[str, Any], timing: dict[str, Any]) -> Iterator[str]:
    if stop := report["stopped_early"]:
        yield (
            f"Stopped early by a sequential test after {stop['at']} of {report['planned']} episodes: "
            f"{stop['decision']}. The tasks' intervals are those of a fixed number of episodes."
        )
        if stop["method"] == EXACT:
            yield (
                f"A run that ends when it looks good looks better than it is, and the other way round. Estimate that "
                f"errs either way equally often: {stop['interval']['estimate']:.1%}."
            )
    elif report["n"] < report["planned"]:
        yield f"{report['n']} of {report['planned']} episodes are done."
    if report.get("neighbours"):
        yield f"Rows may depend on which episodes ran side by side: {report['neighbours']}."
    if lost := timing.get("workers_lost"):
        yield f"Workers lost: {lost}; their episodes were run again and counted once."
    if converted := report.get("adapter"):
        yield f"Converted between policy and suite: {'; '.join(converted)}."
    yield from (f"Replay: {fault}" for fault in report.get("replay_faults", []))


def _videos(
    report: dict[str, Any], rows: Sequence[dict[str, Any]], folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(source, row) of every video, embedded while there is room."""
    left = EMBEDDED_BYTES
    for name in report["videos"]:
        source, size = name, (folder / name).stat().st_size
        if size <= left:
            left -= size
            source = "data:video/mp4;base64," + base64.b64encode((folder / name).read_bytes()).decode()
        yield source, rows[int(Path(name).name.split("_")[1])]


def _plots(report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Curves by axis where there are any, as tasks may be thousands; else by task."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["values"]:
            grouped.setdefault(axis_of_row(row) or "none" if report["axes"] else row["task"], []).append(row)
    return {name: _plot(own) for name, own in grouped.items()}


def _plot(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One task's curves on common axes, at most CURVES of them, spread evenly."""
    shown = [rows[i * len(rows) // min(len(rows), CURVES)] for i in range(min(len(rows), CURVES))]
    values = [v for row in shown for v in row["values"]]
    low, high = min(values), max(values)
    last = max([1, *(r for row in shown for r in row["value_rows"])])
    span = (high - low) or 1.0

    def points(row: dict[str, Any]) -> Iterator[str]:
        for step, value in zip(row["value_rows"], row["values"], strict=True):
            x = AXES["left"] + AXES["width"] * step / last
            yield f"{x:.1f},{AXES['top'] + AXES['height'] * (1 - (value - low) / span):.1f}"

    lines = [(row["success"], " ".join(points(row))) for row in sorted(shown, key=lambda row: row["success"])]
    return {"low": round(low, 2) + 0.0, "high": round(high, 2) + 0.0, "last": last, "lines": lines}
