"""Read the history of a registered model: success on every suite over its versions, as a table and as a picture, and
the trail of its aliases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prts_core.delivery import registry
from prts_core.delivery.audit import Move, moves
from prts_core.delivery.suite_results import AGAIN, SuiteResult, results_of
from prts_core.io.files import atomic_path
from prts_core.tracking.store import client

PANEL = (5.2, 2.9)  # inches
MOVE_COLUMNS = ("when (UTC)", "alias", "from", "to", "move", "by", "reason")
CHAMPION_COLOUR, REGRESSED, PLAIN = "#c58b00", "#b3261e", "#1f5fa8"


@dataclass(frozen=True)
class Point:
    """One version's result on one suite. again: the last repetition of it, where there was one."""

    version: int
    result: SuiteResult
    again: SuiteResult | None
    champion: bool


@dataclass(frozen=True)
class History:
    """points: suite -> results by version, ascending. aliases: version -> what it is called now. moves: the trail of
    aliases, oldest first."""

    model: str
    points: dict[str, list[Point]]
    aliases: dict[int, tuple[str, ...]]
    moves: list[Move]


def read_history(outputs: Path, model: str) -> History:
    """What the registry knows. StageError where there is no such model."""
    store = client(outputs)
    versions = sorted(registry.known_versions(store, model), key=lambda version: int(version.version))
    aliases: dict[int, list[str]] = {}
    for alias, number in store.get_registered_model(model).aliases.items():
        aliases.setdefault(int(number), []).append(alias)
    points: dict[str, list[Point]] = {}
    for version in versions:
        number, again = int(version.version), results_of(version, AGAIN)
        champion = registry.CHAMPION in aliases.get(number, [])
        for name, result in results_of(version).items():
            points.setdefault(name, []).append(Point(number, result, again.get(name), champion))
    called = {number: tuple(sorted(names)) for number, names in aliases.items()}
    return History(model, dict(sorted(points.items())), called, moves(outputs, model))


def rows(history: History) -> list[list[str]]:
    """Suite, version, success with its interval and label, the gate's word; a row a result."""
    table = []
    for name, points in history.points.items():
        for point in points:
            called = " ".join(f"@{alias}" for alias in history.aliases.get(point.version, ()))
            table.append([name, f"{point.version} {called}".strip(), point.result.said(), _word(point.result)])
            if point.again is not None:
                table.append([name, f"{point.version}, {point.again.attempt}", point.again.said(), _word(point.again)])
    return table


def move_rows(trail: list[Move]) -> list[list[str]]:
    """MOVE_COLUMNS of each move, a row a move."""
    return [
        [
            move.at,
            f"@{move.alias}",
            move.before or "-",
            move.after,
            move.verdict + ("" if move.state == "done" else f" ({move.state})"),
            move.by,
            move.reason,
        ]
        for move in trail
    ]


def _word(result: SuiteResult) -> str:
    return "regressed" if result.alarm else ""


def draw(outputs: Path, model: str, path: Path) -> Path | None:
    """The picture, written to `path`; none while no version has a result."""
    history = read_history(outputs, model)
    if not history.points:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        plot(history, partial)
    return path


def plot(history: History, path: Path) -> None:
    """One panel a suite: success rate with its 95 % Wilson interval over versions. The champion is a star, a regression
    red, a repetition of the champion's suite a hollow mark beside it; stand-in assets are named above the panel."""
    from matplotlib.figure import Figure

    names = list(history.points)
    columns = min(2, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * lines + 0.75), dpi=110, layout="constrained")
    figure.suptitle(f"{history.model}: success over versions, 95 % Wilson intervals", fontsize=12)
    panels = figure.subplots(lines, columns, squeeze=False)
    every = sorted({point.version for points in history.points.values() for point in points})
    for index, axis in enumerate(panels.flat):
        if index >= len(names):
            axis.set_axis_off()
            continue
        _panel(axis, names[index], history.points[names[index]], every)
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, format="png", metadata={"Software": None})


def _panel(axis: Any, name: str, points: list[Point], every: list[int]) -> None:
    """x: the version's rank, so that gaps in the numbering do not squeeze the rest."""
    at = {version: rank for rank, version in enumerate(every)}
    axis.plot([at[p.version] for p in points], [p.result.rate.estimate for p in points], color="0.75", lw=1, zorder=1)
    for point in points:
        _mark(axis, at[point.version], point.result, champion=point.champion, again=False)
        if point.again is not None:
            _mark(axis, at[point.version] + 0.18, point.again, champion=point.champion, again=True)
    standins = any(point.result.standins for point in points)
    dtypes = sorted({point.result.dtype for point in points})
    mixed = f" ({' and '.join(dtypes)})" if dtypes != ["fp32"] else ""
    axis.set_title(name + (" (stand-in assets)" if standins else "") + mixed, fontsize=10, loc="left")
    if standins:
        axis.set_facecolor("#f7f4ec")
    axis.set_ylim(-0.03, 1.12)
    axis.set_xlim(-0.6, len(every) - 0.4)
    step = max(1, len(every) // 12)
    axis.set_xticks(range(0, len(every), step), [f"v{version}" for version in every[::step]], fontsize=8)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25 %", "50 %", "75 %", "100 %"], fontsize=8)
    axis.grid(axis="y", color="0.9", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _mark(axis: Any, x: float, result: SuiteResult, *, champion: bool, again: bool) -> None:
    rate = result.rate
    colour = REGRESSED if result.alarm else CHAMPION_COLOUR if champion else PLAIN
    axis.plot([x, x], [rate.lower, rate.upper], color=colour, lw=1.6, zorder=2)
    star = champion and not again
    axis.plot(
        [x],
        [rate.estimate],
        marker="*" if star else "o",
        ms=13 if star else 6.5,
        color=colour,
        zorder=3,
        markerfacecolor="white" if again else colour,
        linestyle="none",
    )
    if not again:
        axis.annotate(
            f"{result.successes}/{result.n}",
            (x, rate.upper),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color="0.3",
        )


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    def entry(label: str, **style: Any) -> Any:
        return Line2D([], [], linestyle="none", label=label, **style)

    return [
        entry("version", marker="o", color=PLAIN),
        entry("champion", marker="*", ms=12, color=CHAMPION_COLOUR),
        entry("significant drop", marker="o", color=REGRESSED),
        entry("run again", marker="o", color=CHAMPION_COLOUR, markerfacecolor="white"),
    ]
