"""Decide who becomes champion: the one rule, on recorded results alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prts_core.contract import PolicyContract, differences
from prts_core.delivery import gate
from prts_core.delivery.gate import Against, Verdict
from prts_core.io.errors import DataError

if TYPE_CHECKING:
    import polars as pl

Incomparable = Literal["unmeasured", "champion unmeasured", "protocol", "precision", "episodes"]
Why = Literal[
    Incomparable,
    Against,
    "contract",
    "champion",
    "older",
    "withdrawn",
    "approval",
    "outdated",
    "unknown",
    "vacant",
    "latency",
]
WORDS: dict[Why, str] = {
    "unmeasured": "it has no result on {subject} yet (`prts regress`)",
    "champion unmeasured": "the champion has no result on {subject} yet (`prts regress --champion`)",
    "protocol": "the two results on {subject} are of different protocols (`prts regress` and `prts regress --champion` "
    "measure by the present one)",
    "precision": "the two results on {subject} were computed in different precision (`prts regress` measures it in the "
    "champion's)",
    "episodes": "the two did not run the same episodes of {subject}",
    "alarm": "it is worse than the champion on {subject}",
    "margin": "on {subject} it may be worse than the champion by more than the margin",
    "floor": "its success rate on {subject} is not surely above the floor",
    "contract": "its contract differs from the champion's in {subject} (`prts promote --contract-change {subject}`)",
    "champion": "it is the champion",
    "older": "it is older than the champion (`prts rollback` goes back)",
    "withdrawn": "it was rolled back (`prts promote --approve`)",
    "approval": "the recipe asks for a person's approval (`prts promote --approve`)",
    "outdated": "its result on {subject} is of an earlier protocol (`prts regress`)",
    "unknown": "whether its result on {subject} is of the present protocol cannot be told here (`prts sim check`)",
    "vacant": "@champion was taken off by hand, so that a person decides who follows (`prts promote --approve`)",
    "latency": "on {subject} it takes longer for a chunk than its package's budget (the version's tags say how long; "
    "serve it on a faster machine, or package it with another package.latency_budget_ms)",
}
OWN_AFFAIR = ("contract_fingerprint", "statistics_digest", "normalization")  # of a policy: no robot sees them


@dataclass(frozen=True)
class Evidence:
    """One version's recorded result on one suite. episodes: as `gate.decide` takes them. dtype: of the policy."""

    protocol_digest: str
    episodes: pl.DataFrame
    dtype: str = "fp32"


@dataclass(frozen=True)
class PromotionBar:
    """What one suite asks: see `gate.decide`."""

    margin: float
    floor: float


@dataclass(frozen=True)
class Candidate:
    """What the rule knows of a registered version. approved, withdrawn: a person has said so."""

    version: int
    contract: PolicyContract
    evidence: Mapping[str, Evidence]
    approved: bool = False
    withdrawn: bool = False


@dataclass(frozen=True)
class Objection:
    """One reason against a promotion. subject: the suite or the contract's field that it is about, or empty."""

    why: Why
    subject: str = ""

    def said(self) -> str:
        return WORDS[self.why].format(subject=self.subject)


@dataclass(frozen=True)
class Decision:
    """verdicts: the gate's on every suite that could be compared."""

    version: int
    champion: int | None
    objections: tuple[Objection, ...]
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)

    @property
    def promote(self) -> bool:
        return not self.objections

    def said(self) -> str:
        if self.promote:
            beside = "the first champion" if self.champion is None else f"no worse than version {self.champion}"
            return f"version {self.version} is {beside} and above the floor on every suite"
        if self.version == self.champion:
            return f"version {self.version} is champion"
        return f"version {self.version} is not promoted: " + "; ".join(one.said() for one in self.objections)

    def to_json(self) -> dict[str, Any]:
        """Without figures: the results that they are computed from stand on the versions."""
        objections = [[one.why, one.subject] for one in self.objections]
        return {"promote": self.promote, "champion": self.champion, "objections": objections, "reason": self.said()}


def compare(
    suite: str, ours: Mapping[str, Evidence], theirs: Mapping[str, Evidence] | None, bar: PromotionBar, suites: int
) -> Verdict | Incomparable:
    """The gate's verdict on one suite, or why there is none. theirs: the champion's; none: there is no champion.

    suites: on how many the version is judged in all, which widens each one's bounds (`gate.shared_confidence`).
    """
    if suite not in ours:
        return "unmeasured"
    champions = None
    if theirs is not None:
        if suite not in theirs:
            return "champion unmeasured"
        if not ours[suite].protocol_digest or ours[suite].protocol_digest != theirs[suite].protocol_digest:
            return "protocol"
        if ours[suite].dtype != theirs[suite].dtype:
            return "precision"
        champions = theirs[suite].episodes
    try:
        return gate.decide(
            ours[suite].episodes, champions, bar.margin, bar.floor, confidence=gate.shared_confidence(suites)
        )
    except DataError:
        return "episodes"


def decide(
    bars: Mapping[str, PromotionBar],
    challenger: Candidate,
    champion: Candidate | None,
    *,
    approval: bool = False,
    contract_change: Iterable[str] = (),
    present: Mapping[str, tuple[str, int] | None] | None = None,
    vacant: bool = False,
) -> Decision:
    """Promote only a newer version that, on every suite of `bars`, was measured under the champion's protocol, is no
    worse than it by the margin and above the floor, raises no alarm, and means the same by its numbers.

    approval: a person's is needed too. contract_change: fields in which the contracts may differ (`cameras` allows
    `cameras[0].height`). present: suite -> digest and number of
    episodes of the protocol that a first champion must have been measured under, none: unknown.
    vacant: there was a champion, and somebody took the alias off.
    """
    if champion is not None and champion.version == challenger.version:
        return Decision(challenger.version, champion.version, (Objection("champion"),))
    against, verdicts = [], {}
    theirs = None if champion is None else champion.evidence
    for suite, bar in bars.items():
        found = compare(suite, challenger.evidence, theirs, bar, len(bars))
        if isinstance(found, Verdict):
            verdicts[suite] = found
            against += [Objection(why, suite) for why in found.against]
        else:
            against.append(Objection(found, suite))
    if champion is not None:
        against += [
            Objection("contract", name)
            for name in contract_changes(champion.contract, challenger.contract)
            if not any(name == asked or name.startswith((f"{asked}.", f"{asked}[")) for asked in contract_change)
        ]
        against += [Objection("older")] if challenger.version < champion.version else []
    else:
        for suite, asked in (present or {}).items():
            mine = challenger.evidence.get(suite)
            if asked is None:
                against.append(Objection("unknown", suite))
            elif mine is not None and (mine.protocol_digest, mine.episodes.height) != asked:
                against.append(Objection("outdated", suite))
        against += [Objection("vacant")] if vacant and not challenger.approved else []
    against += [Objection("withdrawn")] if challenger.withdrawn else []
    against += [Objection("approval")] if approval and not challenger.approved else []
    return Decision(challenger.version, None if champion is None else champion.version, tuple(against), verdicts)


def contract_changes(before: PolicyContract, now: PolicyContract) -> list[str]:
    """Fields in which two policies mean different things to a robot: `chunk_length`, `cameras[0].height`, ..."""
    found = [name for name, _, _ in differences(before, now)]
    return [name.removeprefix("contract.") for name in found if name not in OWN_AFFAIR and ".limits" not in name]
