"""Draw a run as one page: success before and after, what its curves say, how it acted and on what. Opens from disk.

Everything is in the file and nothing is fetched. No time is in it: equal work has equal bytes. What it looks like is
page.html.j2's and, shared with benchmarks, rollout/page.css's.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import FileSystemLoader

from prts_core.config.identity import identity
from prts_core.config.rl import RlConfig
from prts_core.io.files import write_text
from prts_core.rl.report import report
from prts_core.rollout import page as benchmark_page

if TYPE_CHECKING:
    from prts_core.rl.film import Film
    from prts_core.rl.run import Outcome

POINTS = 240  # of a line; more are averaged
WIDE = {"left": 44, "top": 10, "width": 960, "height": 240}  # the axes of the success curve, in pixels
SMALL = {"left": 44, "top": 8, "width": 264, "height": 110}
BLUE, AMBER, GREEN, VIOLET = "#1f5fa8", "#c47500", "#2f7d4f", "#7a4fa3"
INK = (BLUE, AMBER, GREEN, VIOLET)
ROLLOUTS = "env/success_once"
SHAPED = "an episode's sum as learned from"  # no metric: the mean over steps times the steps of an episode

TEMPLATES = benchmark_page.TEMPLATES.overlay(
    loader=FileSystemLoader([Path(__file__).parent, Path(benchmark_page.__file__).parent])
)


@dataclass(frozen=True)
class Panel:
    """One small chart: title, what to look for, and (name of a metric, what it is called). zero, one: the axis holds 0
    and 1."""

    title: str
    words: str
    metrics: tuple[tuple[str, str], ...]
    zero: bool = False
    one: bool = False


PANELS = (
    Panel(
        "Reward",
        "An episode's sum. What is learned from may be shaped; what is earned is not.",
        (("env/return", "earned"), (SHAPED, "learned from")),
        zero=True,
    ),
    Panel(
        "Episode length", "Steps; shorter where tasks are solved sooner.", (("env/episode_len", "steps"),), zero=True
    ),
    Panel(
        "Divergence",
        "Nats that an iteration moved the policy by. It should neither vanish nor run away.",
        (
            ("train/actor/kl", "from the policy that acted"),
            ("train/actor/kl_to_reference", "from the policy at the start"),
        ),
        zero=True,
    ),
    Panel(
        "Clipped",
        "Share of samples whose step was cut off. Much over 30 %: steps too large, or too many epochs.",
        (
            ("train/actor/clip_fraction", "ratio"),
            ("train/actor/dual_clip_fraction", "dual"),
            ("train/actor/behav_clip_fraction", "left out: too stale"),
        ),
        zero=True,
    ),
    Panel(
        "Probability ratio",
        "New over old: its mean, near 1 while the steps are small.",
        (("train/actor/ratio", "mean"), ("train/actor/proximal_ratio", "mean, to the proximal policy")),
        one=True,
    ),
    Panel(
        "Distance of the ratio from 1",
        "On average; about the clip's width where steps are as large as the clip allows.",
        (("train/actor/ratio_abs", "|ratio - 1|"),),
        zero=True,
    ),
    Panel(
        "Critic",
        "Share of the returns' variance that its values explain: 1 is all, 0 none, below 0 worse than their mean.",
        (("train/critic/explained_variance", "explained variance"),),
        zero=True,
        one=True,
    ),
    Panel("Value loss", "Of the critic.", (("train/critic/value_loss", "loss"),), zero=True),
    Panel(
        "Entropy",
        "Of the policy's actions; a fast fall is an end of exploration.",
        (("train/actor/entropy_loss", "entropy"),),
    ),
    Panel("Imitation", "Supervised loss of the decisions.", (("train/actor/imitation_loss", "loss"),), zero=True),
    Panel("Gradient", "Its norm before it is clipped.", (("train/actor/grad_norm", "norm"),), zero=True),
    Panel(
        "Learning rate",
        "Of the policy, warm-up, schedule and steering included.",
        (("train/actor/lr", "rate"),),
        zero=True,
    ),
    Panel(
        "Informative",
        "Share of episodes whose group says what is better.",
        (("rollout/informative_episodes", "episodes"), ("rollout/good", "decisions called good")),
        zero=True,
        one=True,
    ),
)
STALENESS = "rollout/data_staleness_"


def write_page(path: Path, config: RlConfig, outcome: Outcome, film: Film | None = None) -> None:
    """Write the page; film: what film.py made beside it."""
    told = report(config, outcome)
    page = TEMPLATES.get_template("page.html.j2").render(
        report=told,
        config=config,
        colours={"evaluation": BLUE, "rollouts": AMBER},
        success=_success(told, outcome),
        panels=list(_panels(outcome.rows)),
        video=_video(path.parent, film),
        film=film,
        one_set=len({json.dumps(one, sort_keys=True) for one in told["states"]["tasks"].values()}) == 1,
        settings=json.dumps(identity(config), indent=1, sort_keys=True, ensure_ascii=False),
        WIDE=WIDE,
        SMALL=SMALL,
    )
    write_text(path, page)


def _video(folder: Path, film: Film | None) -> str:
    """Where the page finds it: in itself while it is small."""
    if film is None or not (folder / film.name).exists():
        return ""
    if (folder / film.name).stat().st_size > benchmark_page.EMBEDDED_BYTES:
        return film.name
    return "data:video/mp4;base64," + base64.b64encode((folder / film.name).read_bytes()).decode()


# ---- charts --------------------------------------------------------------------------------------------------------
def _success(told: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    """The wide chart: evaluations with their band and, at the middle of what it ran, every iteration's rollouts."""
    last = max(1, told["iterations"])
    at = _Axes(WIDE, 0.0, float(last), 0.0, 1.0)
    found = told["evaluations"]
    band = [at(one["iteration"], one["wilson95"][1]) for one in found]
    band += [at(one["iteration"], one["wilson95"][0]) for one in reversed(found)]
    noisy = series(outcome.rows, ROLLOUTS)
    chosen = next(one for one in found if one["iteration"] == told["chosen"])
    return {
        "band": " ".join(band),
        "line": " ".join(at(one["iteration"], one["rate"]) for one in found),
        "dots": [at(one["iteration"], one["rate"]).split(",") for one in found],
        "chosen": at(chosen["iteration"], chosen["rate"]).split(","),
        "rollouts": " ".join(at(x + 0.5, y) for x, y in noisy),
        "y": [(at.y(v), f"{v:.0%}") for v in (0.0, 0.25, 0.5, 0.75, 1.0)],
        "x": [(at.x(v), f"{v:g}") for v in ticks(0, last, 6)],
    }


def _panels(rows: Sequence[Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    """Those of PANELS that the run has values for, and staleness where its rollouts were asynchronous."""
    stale = sorted({name for row in rows for name in row if name.startswith(STALENESS)})
    names = tuple((name, f"{name.removeprefix(STALENESS).split('/')[0]} behind") for name in stale)
    staleness = Panel("Staleness", "Share of samples by how many versions the policy was behind.", names, True, True)
    for panel in (*PANELS, *([staleness] if len(stale) > 1 else [])):
        lines = [(label, found) for name, label in panel.metrics if (found := series(rows, name))]
        if lines:
            yield _panel(panel, lines)


def _panel(panel: Panel, lines: Sequence[tuple[str, list[tuple[float, float]]]]) -> dict[str, Any]:
    values = [y for _, found in lines for _, y in found] + [0.0] * panel.zero + [1.0] * panel.one
    nothing = panel.zero and not any(values)
    marks = [0.0, 1.0] if nothing else marks_around(min(values), max(values))
    first, last = (edge(x for _, found in lines for x, _ in found) for edge in (min, max))
    at = _Axes(SMALL, first, max(last, first + 1.0), marks[0], marks[-1])
    return {
        "title": panel.title,
        "words": panel.words,
        "lines": [
            {
                "label": label,
                "colour": INK[place % len(INK)],
                "points": " ".join(at(x, y) for x, y in found),
                "now": f"{found[-1][1]:.3g}",
            }
            for place, (label, found) in enumerate(lines)
        ],
        "y": [(at.y(v), f"{v:g}") for v in marks],
        "x": [(at.x(v), f"{v:g}") for v in (first, last)],
    }


class _Axes:
    """Values -> pixels, as texts."""

    def __init__(self, box: Mapping[str, int], x0: float, x1: float, y0: float, y1: float) -> None:
        self.box, self.x0, self.x1, self.y0, self.y1 = box, x0, x1, y0, y1

    def x(self, value: float) -> str:
        return f"{self.box['left'] + self.box['width'] * (value - self.x0) / (self.x1 - self.x0):.1f}"

    def y(self, value: float) -> str:
        return f"{self.box['top'] + self.box['height'] * (1 - (value - self.y0) / (self.y1 - self.y0)):.1f}"

    def __call__(self, x: float, y: float) -> str:
        return f"{self.x(x)},{self.y(y)}"


def series(rows: Sequence[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """(iteration, value) where the value is a number; of more than POINTS, means of neighbours."""
    found = [(float(row["iteration"]), _value(row, name)) for row in rows]
    found = [(x, y) for x, y in found if math.isfinite(y)]
    size = -(-len(found) // POINTS) or 1
    parts = [found[begin : begin + size] for begin in range(0, len(found), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _value(row: Mapping[str, float], name: str) -> float:
    if name == SHAPED:
        return _value(row, "rollout/rewards") * _value(row, "env/episode_len")
    return float(row.get(name, math.nan))


def ticks(low: float, high: float, most: int = 3, step: float | None = None) -> list[float]:
    """Multiples of `step` from low to high, which is above it; none: of a round step, at most `most` + 1 of them."""
    step = _round_step(low, high, most) if step is None else step
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [float(f"{(first + n) * step:.12g}") + 0.0 for n in range(count)]


def marks_around(low: float, high: float) -> list[float]:
    """Round numbers at equal distances, 2 to 6 of them; the axis from the first to the last holds both values."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        reach = max(abs(low), abs(high)) / 10 or 1.0
        low, high = low - reach, high + reach
    step = _round_step(low, high, 3)
    return ticks(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step=step)


def _round_step(low: float, high: float, most: int) -> float:
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    return next(size * times for times in (1, 2, 2.5, 5, 10, 20) if size * times >= raw * (1 - 1e-9))
