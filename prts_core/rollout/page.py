"""A benchmark as one page: rates with their intervals, what failures look like, how the value went. Opens from disk.

Everything is in the file (videos too, while they are small) and nothing is fetched. It draws the report and the rows it
is given, and knows no policy and no simulator.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from prts_core.io.files import write_text
from prts_core.rollout.results import axis_of_row
from prts_core.statistics.after_stopping import EXACT

OPEN_TASKS = 60  # more than these are folded away
EMBEDDED_BYTES = 12 * 2**20  # of videos inside the page; the rest is linked
CURVE_WIDTH, CURVE_HEIGHT, CURVES = 300, 130, 60  # pixels; episodes drawn a task
SUCCESS, FAILURE = "#1f5fa8", "#b3261e"
STYLE = f"""
:root {{ color-scheme: light; --ink: #1c2024; --soft: #60676f; --line: #dfe3e7; }}
* {{ box-sizing: border-box; }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: var(--ink); margin: 0 auto; padding: 28px 24px;
max-width: 1080px; }}
h1 {{ font-size: 22px; margin: 0 0 2px; }} h2 {{ font-size: 16px; margin: 34px 0 10px; }}
p {{ margin: 4px 0; }} .soft {{ color: var(--soft); font-size: 13px; }}
.rate {{ font-size: 46px; line-height: 1.2; font-weight: 650; letter-spacing: -1px; margin: 10px 0; }} .rate small {{
display: block; font-size: 15px; line-height: 1.45; font-weight: 400; letter-spacing: 0; color: var(--soft); }}
.label {{ background: #fff3d6; border-left: 4px solid #d99a00; padding: 8px 12px; margin: 12px 0; }}
.note {{ background: #f4f6f8; border-left: 4px solid #9aa4ae; padding: 8px 12px; margin: 8px 0; font-size: 13px; }}
table {{ border-collapse: collapse; width: 100%; }} td, th {{ padding: 4px 8px; text-align: left; font-weight: 400; }}
th {{ color: var(--soft); font-size: 12px; border-bottom: 1px solid var(--line); }}
td.n {{ text-align: right; white-space: nowrap; overflow-wrap: normal; font-variant-numeric: tabular-nums; }}
td.levels {{ color: var(--soft); font-size: 13px; width: 30%; }}
.bar {{ width: 300px; display: block; }}
td, figcaption {{ overflow-wrap: anywhere; }} tr + tr td {{ border-top: 1px solid #f0f2f4; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 16px; }}
figure {{ margin: 0; }} figure svg {{ display: block; }} figcaption {{ font-size: 13px; margin-top: 4px; }}
video {{ width: 100%; background: #000; border-radius: 4px; display: block; }}
.s {{ color: {SUCCESS}; }} .f {{ color: {FAILURE}; }} summary {{ cursor: pointer; }}
pre {{ font-size: 12px; overflow: auto; background: #f4f6f8; padding: 12px; }}
"""


def write_page(
    path: Path, report: dict[str, Any], rows: Sequence[dict[str, Any]], timing: dict[str, Any] | None = None
) -> None:
    """Write the page of one suite; videos are looked for beside it. timing (of results.py) is shown."""
    parts = [
        _head(report, timing or {}),
        _axes(report),
        "<h2>Tasks</h2>" + _tasks(report),
        _published(report),
        _gallery(report, rows, path.parent),
        _curves(report, rows),
        _episodes(rows, timed=timing is not None),
        "<h2>Protocol</h2><details><summary>every field; results are comparable only where the digest "
        f"<code>{escape(report['protocol_digest'][:23])}</code> is the same</summary>"
        f"<pre>{escape(json.dumps(report['protocol'], indent=1, ensure_ascii=False))}</pre></details>",
    ]
    title = f"{escape(report['suite'])}: {report['success_rate']:.1%}"
    write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n",
    )


def interval_of(report: dict[str, Any]) -> tuple[tuple[float, float], str]:
    """95 % interval of the whole suite's rate and what it is called: after an early stop, one that holds then."""
    stop = report["stopped_early"]
    if stop and stop["interval"]:
        return (stop["interval"]["lower"], stop["interval"]["upper"]), stop["method"]
    low, high = report["wilson95"]
    return (low, high), "Wilson"


def _head(report: dict[str, Any], timing: dict[str, Any]) -> str:
    protocol, stop = report["protocol"], report["stopped_early"]
    (low, high), method = interval_of(report)
    told = {name: str(value) for name, value in sorted(report["policy"].items()) if value and name != "unverified"}
    identity = ", ".join(f"{name} {v[:23] if v.startswith('sha256:') else v}" for name, v in told.items())
    notes = []
    if stop:
        notes.append(
            f"Stopped early by a sequential test after {stop['at']} of {report['planned']} episodes: "
            f"{stop['decision']}. The tasks' intervals are those of a fixed number of episodes."
        )
        if stop["method"] == EXACT:
            notes.append(
                f"A run that ends when it looks good looks better than it is, and the other way round. Estimate that "
                f"errs either way equally often: {stop['interval']['estimate']:.1%}."
            )
    if report["n"] < report["planned"] and not stop:
        notes.append(f"{report['n']} of {report['planned']} episodes are done.")
    if report.get("neighbours"):
        notes.append(f"Rows may depend on which episodes ran side by side: {report['neighbours']}.")
    if lost := timing.get("workers_lost"):
        notes.append(f"Workers lost: {lost}; their episodes were run again and counted once.")
    if converted := report.get("adapter"):
        notes.append(f"Converted between policy and suite: {'; '.join(converted)}.")
    notes += [f"Replay: {fault}" for fault in report.get("replay_faults", [])]
    latency = f"; {timing['latency_ms']['median']:g} ms a look (median)" if "latency_ms" in timing else ""
    return (
        f"<h1>{escape(report['suite'])}</h1><p class=soft>{escape(protocol['source'])}</p>"
        f"<p class=soft>policy: {escape(identity)}</p>"
        + "".join(f"<div class=label><b>{escape(label)}</b></div>" for label in report["labels"])
        + f"<div class=rate>{report['success_rate']:.1%} <small>[{low:.1%}, {high:.1%}] 95 %, {method}, of "
        f"{report['successes']} / {report['n']} episodes; mean over tasks {report['mean_over_tasks']:.1%}{latency}"
        "</small></div>" + "".join(f"<div class=note>{escape(note)}</div>" for note in notes)
    )


def _name(text: str) -> str:
    """A task's name, which may be broken at its underscores."""
    return escape(text).replace("_", "_<wbr>")


def _bar(score: dict[str, Any]) -> str:
    """Table cells of one rate: its bar with the interval, both in numbers, and the episodes."""
    low, high = score["wilson95"]
    x, a, b = (360 * value for value in (score["success_rate"], low, high))
    return (
        f'<td><svg class=bar height="22" viewBox="0 0 360 22"><rect y="3" width="360" height="16" rx="2" '
        f'fill="#eef1f4"/><rect y="3" width="{x:.1f}" height="16" rx="2" fill="{SUCCESS}" opacity=".75"/>'
        f'<path d="M{a:.1f} 11H{b:.1f}M{a:.1f} 6v10M{b:.1f} 6v10" stroke="#1c2024" stroke-width="1.5"/></svg></td>'
        f"<td class=n>{score['success_rate']:.0%}</td><td class=n>[{low:.0%}, {high:.0%}]</td>"
        f"<td class=n>{score['successes']} / {score['n']}</td>"
    )


def _axes(report: dict[str, Any]) -> str:
    """Rates along each axis of perturbation, where the suite has any."""
    if not report["axes"]:
        return ""
    lines = []
    for name, axis in report["axes"].items():
        levels = ", ".join(f"{level}: {one['successes']} / {one['n']}" for level, one in axis["levels"].items())
        lines.append(f"<tr><td>{escape(name)}</td>{_bar(axis)}<td class=levels>{levels}</td></tr>")
    return (
        "<h2>Axes of perturbation</h2><table><tr><th>axis<th>success with its Wilson 95 % interval<th><th><th>episodes"
        f"<th>of which at level</tr>{''.join(lines)}</table>"
    )


def _tasks(report: dict[str, Any]) -> str:
    lines = [
        f"<tr><td>{_name(name)}<div class=soft>{escape(task['instruction'])}</div></td>{_bar(task)}"
        f"<td class=n>{'-' if task['steps_of_successes'] is None else task['steps_of_successes']} "
        f"<span class=soft>of {task['max_steps']}</span></td></tr>"
        for name, task in sorted(report["tasks"].items(), key=lambda item: item[1]["success_rate"])
    ]
    table = (
        "<table><tr><th>task, worst first<th>success with its Wilson 95 % interval<th><th><th>episodes"
        f"<th>steps to success</tr>{''.join(lines)}</table>"
    )
    return table if len(lines) <= OPEN_TASKS else f"<details><summary>all {len(lines)}</summary>{table}</details>"


def _published(report: dict[str, Any]) -> str:
    """Others' numbers of the same protocol; why the rest is not there."""
    told = report.get("published")
    if not told:
        return ""
    lines = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in told["rows"]]
    header = "".join(f"<th>{escape(cell)}</th>" for cell in told["header"])
    notes = "".join(f"<p class=soft>{escape(sentence)}</p>" for sentence in told["refused"])
    return f"<h2>Published, under the same protocol</h2><table><tr>{header}</tr>{''.join(lines)}</table>{notes}"


def _gallery(report: dict[str, Any], rows: Sequence[dict[str, Any]], folder: Path) -> str:
    left, figures = EMBEDDED_BYTES, []
    for name in report["videos"]:
        path = folder / name
        row = rows[int(Path(name).name.split("_")[1])]
        size = path.stat().st_size
        source = name
        if size <= left:
            left -= size
            source = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
        kind = "s" if row["success"] else "f"
        figures.append(
            f'<figure><video src="{escape(source)}" controls loop muted autoplay playsinline></video><figcaption>'
            f"<b class={kind}>{'success' if row['success'] else 'failure'}</b> {_name(row['task'])}, initial state "
            f"{row['initial_state']}, seed {row['seed']}, {row['steps']} steps<div class=soft>"
            f"{escape(row['instruction'])}</div></figcaption></figure>"
        )
    failures = sum(not row["success"] for row in rows)
    told = f"{failures} of {len(rows)} episodes failed" + (f"; {len(figures)} shown, failures first" if figures else "")
    return f"<h2>Failures</h2><p class=soft>{told}</p><div class=grid>{''.join(figures)}</div>"


def _curves(report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    scored = [row for row in rows if row["values"]]
    if not scored:
        return ""
    grouped: dict[str, list[dict[str, Any]]] = {}  # by axis where there are any: tasks may be thousands
    for row in scored:
        grouped.setdefault(axis_of_row(row) or "none" if report["axes"] else row["task"], []).append(row)
    figures = [f"<figure>{_plot(own)}<figcaption>{_name(name)}</figcaption></figure>" for name, own in grouped.items()]
    return (
        "<h2>Value along the episodes</h2><p class=soft>Nats at every look of the policy: log of the discounted chance "
        "to reach the goal, up to a constant of the sentence. "
        "<b class=s>successes</b> solid, <b class=f>failures</b> dashed.</p>"
        f"<div class=grid>{''.join(figures)}</div>"
    )


def _plot(rows: Sequence[dict[str, Any]]) -> str:
    """One task's curves on common axes, at most CURVES of them, spread evenly."""
    shown = [rows[i * len(rows) // min(len(rows), CURVES)] for i in range(min(len(rows), CURVES))]
    values = [v for row in shown for v in row["values"]]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    last = max([1, *(r for row in shown for r in row["value_rows"])])
    span = (high - low) or 1.0
    left, top, width, height = 48, 8, CURVE_WIDTH - 56, CURVE_HEIGHT - 26

    def points(row: dict[str, Any]) -> Iterable[str]:
        for step, value in zip(row["value_rows"], row["values"], strict=True):
            yield f"{left + width * step / last:.1f},{top + height * (1 - (value - low) / span):.1f}"

    lines = [
        f'<polyline points="{" ".join(points(row))}" fill="none" stroke="{SUCCESS if row["success"] else FAILURE}" '
        f'stroke-width="1.3" opacity=".6"{"" if row["success"] else DASHES}/>'
        for row in sorted(shown, key=lambda row: row["success"])
    ]
    return (
        f'<svg width="100%" viewBox="0 0 {CURVE_WIDTH} {CURVE_HEIGHT}" font-size="10" fill="#60676f">'
        f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="#b9c1c9"/>'
        f'<text x="{left - 4}" y="{top + 8}" text-anchor="end">{round(high, 2) + 0.0:g}</text>'
        f'<text x="{left - 4}" y="{top + height}" text-anchor="end">{round(low, 2) + 0.0:g}</text>'
        f'<text x="{left}" y="{top + height + 13}">0</text>'
        f'<text x="{left + width}" y="{top + height + 13}" text-anchor="end">step {last}</text>{"".join(lines)}</svg>'
    )


DASHES = ' stroke-dasharray="4 3"'


def _episodes(rows: Sequence[dict[str, Any]], timed: bool) -> str:
    lines = "".join(
        f"<tr><td>{_name(row['task'])}<td class=n>{row['initial_state']}<td class=n>{row['seed']}"
        f"<td><span class={'s' if row['success'] else 'f'}>{'success' if row['success'] else 'failure'}</span>"
        f"<td class=n>{row['steps']}" + (f"<td class=n>{row['latency_ms']:g}" if timed else "") + "</tr>"
        for row in rows
    )
    return (
        f"<h2>Episodes</h2><details><summary>all {len(rows)}, as in episodes.parquet</summary><table><tr><th>task"
        f"<th>initial state<th>seed<th>outcome<th>steps{'<th>latency, ms' if timed else ''}</tr>{lines}"
        "</table></details>"
    )
