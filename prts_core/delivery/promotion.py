"""Who may become champion where a recipe lists suites: the gate must say so, and no suite may show a drop.

`register` asks here first; every new result on a suite asks again, since results come in after registration. It runs
nothing: it reads what versions have recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.config.schema import RegisterConfig
from prts_core.delivery import gate, registry
from prts_core.delivery.gate import Verdict
from prts_core.delivery.suite_results import SuiteResult, episodes_of, results_of
from prts_core.io.errors import DataError, StageError
from prts_core.tracking.store import client

if TYPE_CHECKING:
    import polars as pl
    from mlflow.entities.model_registry import ModelVersion

QUESTION, BLOCKED = "prts.question", "prts.blocked"


def verdict_tag(question: str) -> str:
    """Of a version: the gate's answer to one question (benchmark, margin, floor), as JSON."""
    return f"prts.verdict.{question}"


def promoted_tag(question: str) -> str:
    """Of a version: that the answer's promotion was carried out."""
    return f"prts.promoted.{question}"


def compare(
    own: SuiteResult, ours: pl.DataFrame, theirs: SuiteResult, champions: pl.DataFrame, config: RegisterConfig,
    suites: int,
) -> Verdict:  # fmt: skip
    """The gate on one suite's episodes. suites: on how many the version is judged, the recipe's own benchmark included.

    Raises DataError where the protocols or the episodes are not the same.
    """
    if own.protocol_digest != theirs.protocol_digest:
        raise DataError(
            "The two results were measured under different protocols", found=own.protocol_digest,
            expected=theirs.protocol_digest, cure="run the suite on the champion again",
        )  # fmt: skip
    return gate.decide(ours, champions, config.margin, config.floor, gate.shared_confidence(suites))


def held_back(
    outputs: Path, version: ModelVersion, champion: ModelVersion | None, config: RegisterConfig,
    suites: tuple[str, ...],
) -> list[str]:  # fmt: skip
    """Why the version may not become champion yet, a sentence a suite; empty where nothing stands against it."""
    own = results_of(version)
    theirs = results_of(champion) if champion is not None else {}
    said = []
    for name in suites:
        if name not in own:
            said.append(f"it has no result on {name} yet")
        elif champion is not None and name not in theirs:
            said.append(f"the champion has no result on {name} yet")
        elif champion is not None:
            try:
                verdict = compare(
                    own[name], episodes_of(outputs, version, name, own[name]),
                    theirs[name], episodes_of(outputs, champion, name, theirs[name]), config, 1 + len(suites),
                )  # fmt: skip
            except (DataError, StageError) as err:
                said.append(f"not comparable with the champion on {name}: {err.problem}")
                continue
            if verdict.alarm:
                said.append(f"regressed on {name}: {verdict.reason}")
    return said


def hold(verdict: dict[str, Any], held: list[str]) -> dict[str, Any]:
    """The chain's verdict with what the suites say of it; `gate_promotes` keeps the gate's own word."""
    out = verdict | {"gate_promotes": verdict["promote"]}
    if held:
        out |= {"promote": False, "reason": f"{verdict['reason']}; not promoted: {'; '.join(held)}"}
    return out


def settle(outputs: Path, config: RegisterConfig, suites: tuple[str, ...]) -> str:
    """Promote the challenger if the gate said so at registration and no suite holds it back; returns what was done.

    The version's tag `prts.blocked` says what holds it back. Nothing happens where no suites are listed.
    """
    if not suites:
        return ""
    store, name = client(outputs), config.model_name
    challenger = registry.version_of_alias(store, name, registry.CHALLENGER)
    champion = registry.version_of_alias(store, name, registry.CHAMPION)
    if challenger is None:
        return "there is no challenger"
    number = str(challenger.version)
    if champion is not None and str(champion.version) == number:
        return f"version {number} is champion"
    question = challenger.tags.get(QUESTION, "")
    verdict = json.loads(challenger.tags.get(verdict_tag(question), "{}"))
    if not verdict.get("gate_promotes"):
        return f"version {number} stays challenger: {verdict.get('reason', 'the gate was not asked')}"
    held = held_back(outputs, challenger, champion, config, suites)
    present = None if champion is None else str(champion.version)
    if not held and present != verdict["champion_version"]:
        held = [f"version {present} became champion since it was judged; run `prts register` again"]
    if held:
        store.set_model_version_tag(name, number, BLOCKED, "; ".join(held)[:4000])
        return f"version {number} stays challenger: {'; '.join(held)}"
    store.set_registered_model_alias(name, registry.CHAMPION, number)
    store.set_model_version_tag(name, number, promoted_tag(question), "true")
    if BLOCKED in challenger.tags:
        store.delete_model_version_tag(name, number, BLOCKED)
    return f"version {number} is promoted to champion"
