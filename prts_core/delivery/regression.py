"""Measure a registered version on one suite, hold it against the champion's recorded episodes, promote by the rule.

The one mechanism behind the nightly run, `prts regress` and the asset `regression`. The champion is held against its
own recorded episodes: a policy does not change overnight, but code, drivers and packages do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prts_core.contract import PolicyContract
from prts_core.delivery import gate, promotion, protocol, registry
from prts_core.delivery.gate import Verdict
from prts_core.delivery.promote import evidence_of, promote
from prts_core.delivery.promotion import Decision, Evidence, Incomparable, Objection
from prts_core.delivery.resolve import resolve
from prts_core.delivery.suite_results import (
    AGAIN,
    TAG,
    SuiteResult,
    SuiteRunLog,
    episodes_of,
    result_of,
    results_of,
    write_result,
)
from prts_core.io.errors import StageError, lookup
from prts_core.io.files import read_json
from prts_core.tracking.store import client

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from prts_core.config.load import RunPlan
    from prts_core.config.model import PolicyDtype

Say = Callable[[str], None]


Missing = Incomparable | Literal["no champion", "first result"]
NOTHING_YET: dict[Missing, str] = {
    "no champion": "there is no champion to compare with",
    "first result": "the champion's first result under this protocol: later runs are compared with it",
}


@dataclass(frozen=True)
class RegressionOutcome:
    """comparison: with the champion's record, or why there is none. again: the champion's suite was run once more; its
    recorded result stays. decision: what became of the challenger, if there is one. picture: the history over
    versions."""

    name: str
    version: str
    result: SuiteResult
    comparison: Verdict | Missing
    again: bool
    decision: Decision | None
    folder: Path
    picture: Path | None
    url: str

    @property
    def verdict(self) -> Verdict | None:
        return self.comparison if isinstance(self.comparison, Verdict) else None

    @property
    def alarm(self) -> bool:
        return self.verdict is not None and self.verdict.alarm

    @property
    def incomparable(self) -> bool:
        """There is a champion, and it could not be compared with."""
        return self.verdict is None and self.comparison not in NOTHING_YET

    def said(self) -> str:
        if isinstance(self.comparison, Verdict):
            return self.comparison.reason
        return NOTHING_YET.get(self.comparison) or Objection(self.comparison, self.name).said()  # type: ignore[arg-type]


def names(plan: RunPlan) -> tuple[str, ...]:
    """What results are called: the recipe's own benchmark first, then its suites."""
    return tuple(protocol.bars(plan))


def due(plan: RunPlan, outputs: Path) -> list[tuple[str, str]]:
    """(name, version) of tonight: the champion on everything, every newer version on what it has no result on, and
    the challenger on what it has no result on under the present protocol.

    The champion first, so that the others find something to be compared with. Empty while nothing is registered.
    """
    store, model = client(outputs), plan.recipe.register.model_name
    champion = registry.version_of_alias(store, model, registry.CHAMPION)
    challenger = registry.version_of_alias(store, model, registry.CHALLENGER)
    after = 0 if champion is None else int(champion.version)
    tonight = [] if champion is None else [(name, str(champion.version)) for name in names(plan)]
    for version in sorted(registry.versions(store, model), key=lambda v: int(v.version)):
        if int(version.version) > after:
            if challenger is not None and challenger.version == version.version:
                wanted = protocol.lacking(plan, outputs, version)
            else:
                wanted = [name for name in names(plan) if name not in results_of(version)]
            tonight += [(name, str(version.version)) for name in wanted]
    return tonight


def regress(
    plan: RunPlan,
    name: str,
    version: str,
    outputs: Path,
    *,
    attempt: str,
    caller: dict[str, str] | None = None,
    say: Say = lambda text: None,
) -> RegressionOutcome:
    """Measure `models:/<the recipe's model>/<version>` on `name` and judge it; goes on where a killed run stopped.

    attempt: names a repetition (a date, a run's id), so that the same one is resumed and the next one is not. A version
    that is not champion and has a result under the present protocol is judged by that result; nothing runs. Raises
    UnavailableError where the simulator is not installed, StageError where registry or suite refuse.
    """
    model = plan.recipe.register.model_name
    lookup({known: known for known in names(plan)}, name, "suite of the recipe")
    with registry.refusals(outputs, model):
        found = registry.resolve_version(client(outputs), f"models:/{model}/{version}")
        return _regress(plan, name, found, outputs, attempt, caller or {}, say)


def _regress(
    plan: RunPlan, name: str, version: ModelVersion, outputs: Path, attempt: str, caller: dict[str, str], say: Say
) -> RegressionOutcome:
    store, model = client(outputs), version.name
    champion = registry.version_of_alias(store, model, registry.CHAMPION)
    is_champion = champion is not None and champion.version == version.version
    package = resolve(f"models:/{model}/{version.version}", outputs).folder  # as it was registered, to the byte
    chunk = PolicyContract.load(package / "policy_contract.json").chunk_length
    episodes = protocol.planned(plan, name, chunk)
    known = results_of(version).get(name)
    champions = None if champion is None else results_of(champion).get(name)
    dtype = protocol.dtype_of(plan, name, champions, known)
    if known is not None and not protocol.same(known, episodes, dtype):
        say(f"the protocol of {name}, or what a policy computes in, is another one now: measured anew")
        known = None
    if known is not None:
        try:
            recorded = episodes_of(outputs, version, name, known)
        except StageError as err:
            say(f"{err.problem}: measured anew")
            known = None
    again = known is not None and is_champion
    from prts_core.policy.policy import resolve_dtype  # brings torch, which Dagster's page does without

    precision = resolve_dtype(dtype)
    whose = registry.content_digest_of(version)[7:15]  # version 1 of another registry is another policy
    place = (
        f"{attempt}-{precision}-{whose}" if again else f"recorded-{episodes.protocol_digest[7:15]}-{precision}-{whose}"
    )
    folder = outputs / "regression" / model / name.replace(":", "_") / f"v{version.version}" / place
    with SuiteRunLog(outputs, plan.recipe.name, version, name, attempt, caller) as log:
        if known is None or again:
            result = replace(measure_version(plan, name, package, outputs, folder, say, dtype), run_id=log.run_id)
            ours = gate.policy_episodes(folder / "episodes.parquet")
        else:
            result, ours = known, recorded
        comparison: Verdict | Missing = "no champion"
        if is_champion and known is None:
            comparison = "first result"
        elif champion is not None:
            asked = protocol.bars(plan)
            mine = {name: Evidence(result.protocol_digest, ours, result.dtype)}
            comparison = promotion.compare(name, mine, evidence_of(outputs, champion, [name]), asked[name], len(asked))
        alarm = isinstance(comparison, Verdict) and comparison.alarm
        result = replace(result, alarm=alarm, attempt=attempt)
        log.keep(result, folder, recorded=not again)
        write_result(outputs, version, name, result, AGAIN if again else TAG)
        challenger = registry.version_of_alias(store, model, registry.CHALLENGER)
        decision = None if challenger is None else promote(plan, outputs, str(challenger.version), caller=caller)
        from prts_core.delivery.history import draw

        picture = draw(outputs, model, outputs / "regression" / model / "history.png")
        if picture is not None:
            log.add(picture)
        return RegressionOutcome(
            name, str(version.version), result, comparison, again, decision, folder, picture, log.url
        )


def measure_version(
    plan: RunPlan, name: str, package: Path, outputs: Path, folder: Path, say: Say, dtype: PolicyDtype = "auto"
) -> SuiteResult:
    """Run the suite, or the recipe's own benchmark without its controls, into `folder`; resumes what lies there.

    dtype: what the policy computes in (`protocol.dtype_of`)."""
    run = protocol.run_of(plan, name)
    if run is None:
        from prts_core.rollout.benchmark import BenchmarkFolders, benchmark_policy

        config = replace(plan.benchmark, failures_wanted=0, dtype=dtype)  # no controls, no extra failures
        places = BenchmarkFolders(policy=package, dataset=None, early=None, work=folder / "work", output=folder)
        report = benchmark_policy(config, places, conditions=("policy",))
    else:
        from prts_core.delivery.open_policy import open_policy
        from prts_core.rollout.run_suite import ExecutionOptions, run_suite
        from prts_core.sim.suites import suite

        settings, options = protocol.settings_of(run), ExecutionOptions(workers=run.workers)
        policy = open_policy(str(package), batch=run.batch, outputs=outputs, dtype=dtype)
        try:
            report = run_suite(policy, suite(run.suite), settings, folder, options, say=say)
        finally:
            policy.close()
    return result_of(report, gate.policy_episodes(folder / "episodes.parquet"))


def report_of(folder: Path) -> dict[str, Any] | None:
    """The benchmark's own report in an outcome's folder, where there is one."""
    path = folder / "report.json"
    return read_json(path) if path.is_file() else None
