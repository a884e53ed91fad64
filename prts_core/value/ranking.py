"""Which demonstrations are good: episodes ranked by how well the value under their own sentence rises, and flags.

`measure` asks the policy, `rank` only compares numbers, so that a ranking can be judged again with other thresholds.
Every threshold is relative to the episode's peers, the ranked episodes of the same instruction, by median and MAD: it
works on training episodes, and while a part of the peers is bad. What no threshold helps against is a policy that was
trained on bad episodes for so many epochs that it knows them by heart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from prts_core.data.goals import stretches
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.policy.observation import STATE, Acts
from prts_core.training.batch import chunk_windows
from prts_core.value.curves import spearman, spread_rows

ROWS, LOOKS = 12, 4  # rows of the own sentence's curve; rows at which the other sentences are asked too
Kind = Literal["reversed", "frozen", "mislabelled"]


@dataclass(frozen=True)
class Measured:
    """One episode as the policy sees it.

    rows: R rows, evenly spread. own: nats under its own sentence at each. looks: which of these rows (indices into
    `rows`, one a quarter) the others were asked at. others: sentence -> nats at the looks. moves: signal ->
    R - 1 distances from row to row; the state's in standard deviations of the dataset, a camera's in mean grey levels.
    """

    episode: int
    instruction: str
    rows: list[int]
    own: list[float]
    looks: list[int]
    others: dict[str, list[float]]
    moves: dict[str, list[float]]


@dataclass(frozen=True)
class Thresholds:
    """spread: standard deviations (1.4826 MAD) from the peers' median beyond which an episode is odd. flat: share of
    the peers' median rise below which a value is flat; below minus this share it falls. still: share of the peers'
    median move below which a signal stands still. still_share: how many more of its moves than its peers' may be still.
    min_peers: with fewer episodes of an instruction, all ranked episodes are peers.
    """

    spread: float = 3.0
    flat: float = 0.25
    still: float = 0.05
    still_share: float = 0.4
    min_peers: int = 5


@dataclass(frozen=True)
class Flag:
    reason: Kind
    detail: str


@dataclass(frozen=True)
class RankingVerdict:
    """spearman: of the value with time. rise: nats, last quarter over first. margin: nats of the own sentence over the
    best other one in the last quarter (none where there is one sentence). best: the sentence that fits best.
    score: mean of spearman, rise and margin, the last two as shares of the peers' median, each within [-1, 1]."""

    episode: int
    instruction: str
    score: float
    spearman: float
    rise: float
    margin: float | None
    best: str
    flag: Flag | None = None


@dataclass(frozen=True)
class Ranking:
    """verdicts: worst first. unsure: instruction -> why the value cannot judge its episodes (they are still ranked)."""

    verdicts: tuple[RankingVerdict, ...]
    unsure: dict[str, str] = field(default_factory=dict)

    @property
    def flagged(self) -> list[RankingVerdict]:
        return [verdict for verdict in self.verdicts if verdict.flag]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"flagged": [verdict.episode for verdict in self.flagged]}


# ---- asking the policy -------------------------------------------------------------------------------------------
def state_scale(dataset: LeRobotDataset, episodes: Sequence[int]) -> np.ndarray:
    """(D,) standard deviation of the state over these episodes; 1 where it never changes."""
    scale = np.concatenate([dataset.states(episode) for episode in episodes]).std(0)
    return np.where(scale > 0, scale, 1.0)


def measure(
    policy: Acts, dataset: LeRobotDataset, episode: int, sentences: Sequence[str], scale: np.ndarray, rows: int = ROWS
) -> Measured:
    """Ask for the value along one episode: at `rows` rows under the sentence that each follows, at a few under each
    other one.

    All rows count, not those until success: an episode's own success flags may be what is wrong with it.
    """
    at = spread_rows(dataset.length(episode), rows)
    own = dataset.instruction(episode)
    known = stretches(dataset, episode)
    followed = [next(one.instruction for one in known if row < one.end) for row in at]
    others = [text for text in sentences if text not in (own, *followed)]
    looks = spread_rows(len(at), 2 * LOOKS)[1::2] if len(at) > 1 else at
    cameras = [camera.key for camera in policy.contract.contract.cameras]
    frames = {key: dataset.frames(episode, key, at.tolist()) for key in cameras}
    state = dataset.states(episode)[at]
    chunks = chunk_windows(dataset.actions(episode), policy.contract.chunk_length)[0][at]
    which = np.concatenate([np.arange(len(at)), np.tile(looks, len(others))])
    texts = followed + [text for text in others for _ in looks]
    seen = {key: images[which] for key, images in frames.items()} | {STATE: state[which]}
    values = np.asarray(policy.value(seen, chunks[which], texts), np.float64)
    moves = {STATE: np.linalg.norm(np.diff(state, axis=0) / scale, axis=1)}
    for key, images in frames.items():
        moves[key] = np.abs(np.diff(images.astype(np.float32), axis=0)).mean((1, 2, 3))
    rest = values[len(at) :].reshape(len(others), len(looks))
    return Measured(
        episode,
        own,
        at.tolist(),
        _plain(values[: len(at)]),
        looks.tolist(),
        {text: _plain(row) for text, row in zip(others, rest, strict=True)},
        {key: _plain(steps) for key, steps in moves.items()},
    )


def _plain(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


# ---- comparing ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Facts:
    """What is compared of one episode. margin: nats of its own sentence over the next best, mean of all looks;
    margin_end: at the last look, in the last quarter. best: the sentence of the highest mean."""

    spearman: float
    rise: float
    margin: float
    margin_end: float
    best: str


def rank(measured: Sequence[Measured], thresholds: Thresholds | None = None) -> Ranking:
    """Score and flag every episode against its peers.

    - frozen: the state or a camera stands still far more than in its peers, or the value is flat where theirs rises.
    - mislabelled: another sentence fits better over the whole episode, far from what the peers show.
    - reversed: the value falls where its peers' rises.
    An episode that does not move is not asked which sentence it fits, and one with a wrong sentence not how it rises.
    """
    limits = thresholds or Thresholds()
    facts = [_facts(one) for one in measured]
    verdicts, unsure = [], {}
    by_sentence: dict[str, list[int]] = {}
    for index, one in enumerate(measured):
        by_sentence.setdefault(one.instruction, []).append(index)
    for sentence, own in by_sentence.items():
        peers = own if len(own) >= limits.min_peers else list(range(len(measured)))
        group = _Peers([measured[i] for i in peers], [facts[i] for i in peers], limits)
        if group.why_unsure:
            unsure[sentence] = group.why_unsure
        verdicts += [group.verdict(measured[i], facts[i]) for i in own]
    return Ranking(tuple(sorted(verdicts, key=lambda v: (v.score, v.episode))), unsure)


def _facts(one: Measured) -> _Facts:
    own = np.array(one.own)
    part = max(1, len(own) // 4)
    rise = float(own[-part:].mean() - own[:part].mean())
    if not one.others:
        return _Facts(spearman(own), rise, float("nan"), float("nan"), one.instruction)
    fits = {text: float(np.mean(values)) for text, values in one.others.items()}
    fits[one.instruction] = float(own[one.looks].mean())
    best = max(fits, key=lambda text: fits[text])
    margin = fits.pop(one.instruction) - max(fits.values())
    margin_end = float(own[one.looks[-1]]) - max(values[-1] for values in one.others.values())
    return _Facts(spearman(own), rise, margin, margin_end, best)


def middle(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Median and robust standard deviation (1.4826 MAD); nan where there is nothing."""
    values = np.asarray(values, np.float64)
    if not len(values) or np.isnan(values).any():
        return float("nan"), float("nan")
    median = float(np.median(values))
    return median, 1.4826 * float(np.median(np.abs(values - median)))


class _Peers:
    """The ranked episodes of one instruction, and what is usual among them."""

    def __init__(self, measured: list[Measured], facts: list[_Facts], limits: Thresholds) -> None:
        self.limits = limits
        self.rise, self.rise_spread = middle([f.rise for f in facts])
        self.margin, self.margin_spread = middle([f.margin for f in facts])
        self.margin_end = middle([f.margin_end for f in facts])[0]
        steps = {key: [step for one in measured for step in one.moves[key]] for key in measured[0].moves}
        self.step = {key: float(np.median(found)) if found else 0.0 for key, found in steps.items()}
        self.share = {key: middle([self.still(m, key) for m in measured]) for key in self.step}
        self.rises = self.rise > 0 and float(np.median([f.spearman for f in facts])) > 0.5
        self.tells = self.margin > 0

    @property
    def why_unsure(self) -> str:
        faults = [] if self.rises else [f"its value does not rise (median {self.rise:.2f} nats)"]
        if self.margin <= 0:
            faults.append(f"it does not stand above the other sentences (median {self.margin:.2f} nats)")
        return "; ".join(faults)

    def still(self, one: Measured, key: str) -> float:
        """Share of moves in which a signal stands still; 0 for one that hardly moves in any peer."""
        steps = np.array(one.moves[key])
        return float((steps < self.limits.still * self.step[key]).mean()) if len(steps) and self.step[key] > 0 else 0.0

    def verdict(self, one: Measured, facts: _Facts) -> RankingVerdict:
        parts = [facts.spearman]
        if self.rise > 0:
            parts.append(float(np.clip(facts.rise / self.rise, -1, 1)))
        if self.margin_end > 0:
            parts.append(float(np.clip(facts.margin_end / self.margin_end, -1, 1)))
        margin = None if np.isnan(facts.margin_end) else round(facts.margin_end, 4)
        return RankingVerdict(
            one.episode,
            one.instruction,
            round(float(np.mean(parts)), 4),
            round(facts.spearman, 4),
            round(facts.rise, 4),
            margin,
            facts.best,
            self.flag(one, facts),
        )

    def flag(self, one: Measured, facts: _Facts) -> Flag | None:
        limits = self.limits
        shares = {key: self.still(one, key) for key in self.share}
        stuck = [
            key
            for key, (usual, spread) in self.share.items()
            if shares[key] > usual + max(limits.still_share, limits.spread * spread)
        ]
        if stuck:
            share = max(shares[key] for key in stuck)
            usual = max(self.share[key][0] for key in stuck)
            return Flag("frozen", f"{', '.join(stuck)} still {share:.0%} of the time, peers {usual:.0%}")
        if self.tells and facts.margin < min(0.0, self.margin - limits.spread * self.margin_spread):
            said = f"{facts.best!r} fits better by {-facts.margin:.2f} nats, peers' own does by {self.margin:.2f}"
            return Flag("mislabelled", said)
        if self.rises and facts.rise < self.rise - limits.spread * self.rise_spread:
            if facts.rise < -limits.flat * self.rise and facts.spearman < 0:
                return Flag("reversed", f"falls by {-facts.rise:.2f} nats, peers rise by {self.rise:.2f}")
            if abs(facts.rise) < limits.flat * self.rise:
                return Flag("frozen", f"changes by {facts.rise:+.2f} nats, peers rise by {self.rise:.2f}")
        return None
