"""Promote a registered version by the rule, approve one, or go back to the earlier champion.

Operations on the live registry: each looks at it every time, does nothing twice and leaves every move in the trail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from prts_core.contract import PolicyContract
from prts_core.delivery import audit, promotion, protocol, registry
from prts_core.delivery.latency import too_slow
from prts_core.delivery.promotion import Candidate, Decision, Evidence
from prts_core.delivery.suite_results import episodes_of, results_of, write_result
from prts_core.io.errors import ConfigError, PrtsError, StageError
from prts_core.io.files import canonical_json
from prts_core.tracking.store import client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from prts_core.config.load import RunPlan

APPROVAL, WITHDRAWN = "prts.approval", "prts.withdrawn"


def evidence_of(outputs: Path, version: ModelVersion, names: Iterable[str]) -> dict[str, Evidence]:
    """What the version has recorded on those suites."""
    results = results_of(version)
    return {
        name: Evidence(found.protocol_digest, episodes_of(outputs, version, name, found), found.dtype)
        for name in names
        if (found := results.get(name)) is not None
    }


def promote(
    plan: RunPlan,
    outputs: Path,
    number: str = "",
    *,
    approve: bool = False,
    contract_change: Iterable[str] = (),
    caller: dict[str, str] | None = None,
) -> Decision:
    """Make a version of the recipe's model champion where the rule allows it.

    number: of the version; empty: @challenger. approve: put a person's approval on it first, which also lifts what a
    rollback put there. contract_change: see `promotion.decide`. StageError where there is no such version.
    """
    model = plan.recipe.register.model_name
    with _changing(outputs, model) as store:
        reference = f"models:/{model}/{number}" if number else f"models:/{model}@{registry.CHALLENGER}"
        version = registry.resolve_version(store, reference)
        if approve:
            said = {"by": audit.person(), "at": datetime.now(UTC).isoformat("T", "seconds")}
            store.set_model_version_tag(model, version.version, APPROVAL, canonical_json(said))
            _forget(store, version, WITHDRAWN)
            version = store.get_model_version(model, version.version)
        champion = registry.version_of_alias(store, model, registry.CHAMPION)
        asked, present, vacant = protocol.bars(plan), {}, False
        if champion is None:  # nobody to be compared with: the present protocol, and whoever took the champion away
            present = _present(plan, outputs, version)
            trail = audit.moves(outputs, model)
            vacant = any(move.alias == registry.CHAMPION and move.state == "done" for move in trail)
        decision = promotion.decide(
            asked,
            _candidate(outputs, version, asked),
            None if champion is None else _candidate(outputs, champion, asked),
            approval=plan.recipe.register.approval,
            contract_change=contract_change,
            present=present,
            vacant=vacant,
        )
        if decision.promote and (where := too_slow(outputs, version)):
            decision = replace(decision, objections=(promotion.Objection("latency", where),))
        for name, verdict in decision.verdicts.items():
            result = results_of(version)[name]
            if result.alarm != verdict.alarm:
                write_result(outputs, version, name, replace(result, alarm=verdict.alarm))
        if decision.promote:
            sides = {"challenger": version} | ({} if champion is None else {"champion": champion})
            audit.move_alias(
                outputs,
                model,
                registry.CHAMPION,
                "" if champion is None else str(champion.version),
                str(version.version),
                verdict="promoted",
                reason=decision.said(),
                caller=caller,
                evidence={name: {side: results_of(of)[name].digest for side, of in sides.items()} for name in asked},
            )
        return decision


def rollback(outputs: Path, reference: str, reason: str, caller: dict[str, str] | None = None) -> tuple[str, str]:
    """Make the earlier champion champion again, as the trail has it; returns the two versions, (before, after).

    reference: models:/<name>@champion. The version that goes is not promoted again until a person approves it.
    ConfigError without a reason, StageError where there is no earlier champion or the alias was moved meanwhile.
    """
    match = registry.REFERENCE.fullmatch(reference)
    if match is None or match["alias"] != registry.CHAMPION:
        raise ConfigError("Only a champion is rolled back", found=reference, expected="models:/<name>@champion")
    if not reason.strip():
        raise ConfigError("A rollback needs a reason", field="--reason", found="nothing", cure='--reason "grasps fail"')
    model = match["name"]
    champion = registry.resolve_version(client(outputs), reference)
    before = str(champion.version)
    with _changing(outputs, model) as store:
        audit.require_at(outputs, model, registry.CHAMPION, before)
        cut = audit.settle(outputs, model)
        if cut is not None and (cut.verdict, cut.after, cut.reason) == ("rolled back", before, reason[:4000]):
            return cut.before, cut.after  # this very rollback, which was killed after the alias had moved
        able = {str(version.version) for version in registry.versions(store, model) if WITHDRAWN not in version.tags}
        after = audit.earlier_champion(audit.moves(outputs, model), before, able)
        if not after:
            raise StageError(
                f"There is no earlier champion of {model!r}",
                found=f"nobody before version {before} in the trail",
                cure="`prts history` shows the trail; `prts promote --version N` takes another version",
            )
        registry.resolve_version(store, f"models:/{model}/{after}")
        store.set_model_version_tag(model, before, WITHDRAWN, reason[:4000])  # before the move: a kill leaves it safe
        _forget(store, champion, APPROVAL)
        audit.move_alias(
            outputs, model, registry.CHAMPION, before, after, verdict="rolled back", reason=reason, caller=caller
        )
    return before, after


@contextlib.contextmanager
def _changing(outputs: Path, model: str) -> Iterator[MlflowClient]:
    with registry.refusals(outputs, model), audit.aliases_locked(outputs):
        yield client(outputs)


def _candidate(outputs: Path, version: ModelVersion, names: Iterable[str]) -> Candidate:
    package = registry.version_files(outputs, version, registry.PACKAGE)
    return Candidate(
        int(version.version),
        PolicyContract.load(package / "policy_contract.json"),
        evidence_of(outputs, version, names),
        approved=APPROVAL in version.tags,
        withdrawn=WITHDRAWN in version.tags,
    )


def _present(plan: RunPlan, outputs: Path, version: ModelVersion) -> dict[str, tuple[str, int] | None]:
    """Suite on which the version has a result -> digest and number of episodes of the present protocol; none where
    this machine cannot tell it."""
    found: dict[str, tuple[str, int] | None] = {}
    for name in results_of(version):
        if name in protocol.bars(plan):
            try:
                episodes = protocol.planned(plan, name, protocol.chunk_length_of(outputs, version))
                found[name] = episodes.protocol_digest, len(episodes.keys)
            except PrtsError:
                found[name] = None
    return found


def _forget(store: MlflowClient, version: ModelVersion, tag: str) -> None:
    if tag in version.tags:
        store.delete_model_version_tag(version.name, version.version, tag)
