"""Pictures of the value: curves with the frames they belong to, and the demonstrations a ranking found worst.

It draws what it is given and asks no policy anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.data.goals import goal_row
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.value.curves import Curve
from prts_core.value.ranking import Measured, Ranking, RankingVerdict

FRAMES = 7  # under every curve
PANEL = 4.8  # inches
REASON_COLOURS = {"reversed": "#b3261e", "frozen": "#1f5fa8", "mislabelled": "#8a4b00"}


def plot_curves(path: Path, curves: Sequence[Curve], dataset: LeRobotDataset, camera: str, title: str) -> None:
    """One panel an episode: its own sentence bold, others thin, the camera's frames below on the same time axis."""
    sentences = sorted({text for curve in curves for text in curve.instructions})
    colours = {text: f"C{i % 10}" for i, text in enumerate(sentences)}
    dashes = {text: ("-", "--", ":")[i // 10 % 3] for i, text in enumerate(sentences)}
    with _Figure(path, len(curves), title) as figure:
        for curve, (axis, strip) in zip(curves, figure.panels(), strict=True):
            seconds = curve.rows / dataset.fps
            for text, values in zip(curve.instructions, curve.values, strict=True):
                own = text == curve.own
                axis.plot(
                    seconds,
                    values,
                    color=colours[text],
                    linestyle=dashes[text],
                    lw=2.8 if own else 1.1,
                    alpha=1.0 if own else 0.75,
                    zorder=3 if own else 2,
                )
            axis.set_title(f"episode {curve.episode}: {curve.own}", color=colours.get(curve.own, "black"), **_TITLE)
            success = goal_row(dataset, curve.episode)
            if success is not None and success < curve.rows[-1]:
                axis.axvline(success / dataset.fps, color="0.4", lw=1, ls=":")
                axis.annotate(
                    "success",
                    (success / dataset.fps, 0),
                    xycoords=("data", "axes fraction"),
                    xytext=(-3, 3),
                    textcoords="offset points",
                    ha="right",
                    fontsize=7,
                    color="0.4",
                )
            figure.strip(strip, axis, dataset, curve.episode, camera, seconds[0], seconds[-1])
        figure.legend([(text, {"color": colours[text], "linestyle": dashes[text]}) for text in sentences])


def plot_ranking(
    path: Path, ranking: Ranking, measured: Sequence[Measured], dataset: LeRobotDataset, camera: str, count: int = 9
) -> None:
    """The worst demonstrations, flagged ones first: their curve over the band of their peers (10 to 90 %)."""
    by_episode = {one.episode: one for one in measured}
    worst = [*ranking.flagged, *(verdict for verdict in ranking.verdicts if not verdict.flag)][:count]
    flagged = len(ranking.flagged)
    title = f"{flagged} of {len(measured)} demonstrations are flagged" + (
        f"; the {count} worst" if flagged > count else ""
    )
    with _Figure(path, len(worst), title) as figure:
        for verdict, (axis, strip) in zip(worst, figure.panels(), strict=True):
            _draw_verdict(axis, verdict, by_episode, dataset.fps)
            last = by_episode[verdict.episode].rows[-1] / dataset.fps
            figure.strip(strip, axis, dataset, verdict.episode, camera, 0.0, last)
        figure.legend(
            [
                ("this demonstration, own sentence", {"color": "black", "lw": 2.6}),
                ("peers: 10 to 90 %, median", {"color": "0.6", "lw": 7, "alpha": 0.6}),
                ("sentence that fits better", {"color": REASON_COLOURS["mislabelled"], "linestyle": "--"}),
            ]
        )


def _draw_verdict(axis: Any, verdict: RankingVerdict, by_episode: dict[int, Measured], fps: float) -> None:
    one = by_episode[verdict.episode]
    seconds = np.array(one.rows) / fps
    share = np.linspace(0, 1, 24)
    peers = np.array(
        [
            np.interp(share, np.linspace(0, 1, len(m.own)), m.own)
            for m in by_episode.values()
            if m.instruction == one.instruction
        ]
    )
    low, middle, high = np.quantile(peers, (0.1, 0.5, 0.9), axis=0)
    axis.fill_between(share * seconds[-1], low, high, color="0.6", alpha=0.35, lw=0)
    axis.plot(share * seconds[-1], middle, color="0.5", lw=1)
    axis.plot(seconds, one.own, color="black", lw=2.6, marker="o", ms=3)
    if verdict.best != one.instruction:
        colour = REASON_COLOURS["mislabelled"]
        axis.plot(seconds[one.looks], one.others[verdict.best], color=colour, ls="--", marker="s", ms=4)
        axis.annotate(
            verdict.best,
            (seconds[one.looks[-1]], one.others[verdict.best][-1]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=colour,
            bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1},
        )
        axis.margins(y=0.15)
    reason = verdict.flag.reason if verdict.flag else "not flagged"
    colour = REASON_COLOURS.get(reason, "black")
    axis.set_title(f"episode {verdict.episode}: {reason} ({verdict.score:+.2f})", color=colour, **_TITLE)
    axis.set_title(one.instruction, fontsize=9, loc="right")


_TITLE: dict[str, Any] = {"fontsize": 10, "fontweight": "bold", "loc": "left"}


class _Figure:
    """A grid of panels, each a curve above a strip of frames; saved when the block ends without an error."""

    def __init__(self, path: Path, count: int, title: str) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        self.path, self.count, self.pyplot = path, count, plt
        self.columns = min(3, count)
        self.lines = -(-count // self.columns)
        self.figure = plt.figure(figsize=(PANEL * self.columns, 3.7 * self.lines + 0.9), layout="constrained")
        self.figure.suptitle(title, fontsize=12)

    def __enter__(self) -> _Figure:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.figure.savefig(self.path, dpi=110, metadata={"Software": None})
        self.pyplot.close(self.figure)

    def panels(self) -> list[tuple[Any, Any]]:
        grid = self.figure.subfigures(self.lines, self.columns, squeeze=False)
        made = []
        for part in list(grid.flat)[: self.count]:
            axis, strip = part.add_gridspec(2, 1, height_ratios=(4, 1), hspace=0.02).subplots(sharex=True)
            axis.set_ylabel("value (nats)", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(axis="y", color="0.92", lw=0.8)
            axis.spines[["top", "right"]].set_visible(False)
            made.append((axis, strip))
        return made

    def strip(
        self, strip: Any, axis: Any, dataset: LeRobotDataset, episode: int, camera: str, first: float, last: float
    ) -> None:
        """Frames below a curve, each in the middle of the time it stands for."""
        last = max(last, first + 1.0 / dataset.fps)
        moments = first + (np.arange(FRAMES) + 0.5) / FRAMES * (last - first)
        at = np.clip((moments * dataset.fps).round().astype(int), 0, dataset.length(episode) - 1)
        frames = dataset.frames(episode, camera, sorted(set(at.tolist())))
        order = np.searchsorted(np.unique(at), at)
        gap = np.full((frames.shape[1], max(1, frames.shape[2] // 40), 3), 255, np.uint8)
        shown = [part for frame in frames[order] for part in (gap, frame)][1:]
        strip.imshow(np.concatenate(shown, axis=1), extent=(first, last, 0, 1), aspect="auto")
        strip.set_yticks([])
        strip.spines[["top", "right", "left", "bottom"]].set_visible(False)
        strip.set_xlabel("time (s)", fontsize=8)
        strip.tick_params(labelsize=8)
        axis.set_xlim(first, last)

    def legend(self, entries: list[tuple[str, dict[str, Any]]]) -> None:
        lines = [self.pyplot.Line2D([], [], label=text, **style) for text, style in entries]
        width = max(len(text) for text, _ in entries)
        columns = max(1, min(len(entries), int(self.columns * PANEL * 13 // (width + 8))))
        self.figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
