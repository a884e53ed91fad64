"""One registered version on one suite: run it, hold it against the champion's recorded episodes, write the verdict.

The one mechanism behind the nightly run, a new challenger's first measurement and the asset `regression`. The champion
is held against its own recorded episodes: a policy does not change overnight, but code, drivers and packages do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.config.schema import OWN_BENCHMARK, SuiteRun
from prts_core.contract import PolicyContract
from prts_core.delivery import gate, promotion, registry
from prts_core.delivery.gate import Verdict
from prts_core.delivery.suite_results import (
    AGAIN,
    TAG,
    SuiteResult,
    SuiteRunLog,
    episodes_of,
    results_of,
    write_result,
)
from prts_core.io.errors import StageError, lookup
from prts_core.io.files import read_json
from prts_core.rollout.episode_plan import Plan as EpisodePlan
from prts_core.rollout.episode_plan import Settings, make_plan
from prts_core.tracking.store import client, mlflow_module, tracking_uri

if TYPE_CHECKING:
    import polars as pl
    from mlflow.entities.model_registry import ModelVersion

    from prts_core.config.load import Plan

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """verdict: none where there was nothing to compare with; `said` tells why. again: the champion's suite was run once
    more; its recorded result stays. settled: what became of the challenger. picture: the history over versions."""

    name: str
    version: str
    result: SuiteResult
    verdict: Verdict | None
    said: str
    again: bool
    settled: str
    folder: Path
    picture: Path | None
    url: str

    @property
    def alarm(self) -> bool:
        return self.verdict is not None and self.verdict.alarm


def names(plan: Plan) -> tuple[str, ...]:
    """What results are called: the recipe's own benchmark first, then its suites."""
    return (OWN_BENCHMARK, *(run.label for run in plan.recipe.regression.suites))


def due(plan: Plan, outputs: Path) -> list[tuple[str, str]]:
    """(name, version) of tonight: the champion on everything, and every newer version on what it has no result on.

    The champion first, so that the others find something to be compared with. Empty while nothing is registered.
    """
    store, model = client(outputs), plan.recipe.register.model_name
    champion = registry.version_of_alias(store, model, registry.CHAMPION)
    after = 0 if champion is None else int(champion.version)
    tonight = [] if champion is None else [(name, str(champion.version)) for name in names(plan)]
    for version in sorted(registry.versions(store, model), key=lambda v: int(v.version)):
        if int(version.version) > after:
            have = results_of(version)
            tonight += [(n, str(version.version)) for n in names(plan) if n != OWN_BENCHMARK and n not in have]
    return tonight


def regress(
    plan: Plan, name: str, version: str, outputs: Path, *, attempt: str, caller: dict[str, str] | None = None,
    say: Say = lambda text: None,
) -> Outcome:  # fmt: skip
    """Measure `models:/<the recipe's model>/<version>` on `name` and judge it; goes on where a killed run stopped.

    attempt: names a repetition (a date, a run's id), so that the same one is resumed and the next one is not. A version
    that is not champion and has a result is judged by that result; nothing runs. Raises UnavailableError where the
    simulator is not installed, StageError where registry or suite refuse.
    """
    mlflow = mlflow_module()
    model = plan.recipe.register.model_name
    lookup({known: known for known in names(plan)}, name, "suite of the recipe")
    try:
        found = registry.resolve_version(client(outputs), f"models:/{model}/{version}")
        return _regress(plan, name, found, outputs, attempt, caller or {}, say)
    except mlflow.exceptions.MlflowException as err:
        raise StageError(
            "The MLflow registry refused", file=tracking_uri(outputs), field=f"models:/{model}/{version}",
            found=" ".join(str(err).split())[:300], cure="start the server, then run the same again",
        ) from err  # fmt: skip


def _regress(
    plan: Plan, name: str, version: ModelVersion, outputs: Path, attempt: str, caller: dict[str, str], say: Say
) -> Outcome:
    champion = registry.version_of_alias(client(outputs), version.name, registry.CHAMPION)
    is_champion = champion is not None and champion.version == version.version
    run = next((run for run in plan.recipe.regression.suites if run.label == name), None)
    package = registry.version_files(outputs, version, registry.PACKAGE)
    episodes = None if run is None else planned(run, package)
    known = results_of(version).get(name)
    if known is not None and episodes is not None and not _same(known, episodes):
        say(f"the protocol of {name} is another one now: measured anew")
        known = None
    if known is None and run is None:  # registered before results were recorded: its episodes lie with its package
        rows = gate.policy_episodes(registry.version_files(outputs, version, registry.EPISODES))
        known = SuiteResult(OWN_BENCHMARK, int(rows["success"].sum()), rows.height)
        write_result(outputs, version, name, known)
    again, fresh = known is not None and is_champion, known is None
    place = attempt if again else f"recorded-{episodes.protocol_digest[7:15]}" if episodes is not None else "recorded"
    folder = outputs / "regression" / version.name / name.replace(":", "_") / f"v{version.version}" / place
    with SuiteRunLog(outputs, plan.recipe.name, version, name, attempt, caller) as log:
        if again or fresh:
            result = measure(plan, run, package, outputs, folder, say)
            ours = gate.policy_episodes(folder / "episodes.parquet")
        else:
            assert known is not None
            result, ours = known, episodes_of(outputs, version, name, known)
        verdict, said = _judge(plan, name, version, champion, known if again else result, result, ours, outputs)
        result = replace(
            result, alarm=verdict is not None and verdict.alarm, reason=said[:2000], attempt=attempt,
            run_id=log.run_id if again or fresh else result.run_id,
        )  # fmt: skip
        log.keep(result, folder, recorded=not again)
        write_result(outputs, version, name, result, AGAIN if again else TAG)
        settled = promotion.settle(outputs, plan.recipe.register, names(plan)[1:])
        from prts_core.delivery.history import draw

        picture = draw(outputs, version.name, outputs / "regression" / version.name / "history.png")
        if picture is not None:
            log.add(picture)
        return Outcome(
            name, str(version.version), result, verdict, said, again, settled, folder, picture, log.url
        )  # fmt: skip


def planned(run: SuiteRun, package: Path) -> EpisodePlan:
    """The episodes of one suite for the policy in `package`."""
    from prts_core.sim.suites import suite

    contract = PolicyContract.load(package / "policy_contract.json")
    return make_plan(suite(run.suite), contract.chunk_length, _settings(run))


def _settings(run: SuiteRun) -> Settings:
    return Settings(run.episodes, run.tasks, run.seed, run.execute, dict(run.perturbation), run.image_size)


def _same(known: SuiteResult, episodes: EpisodePlan) -> bool:
    return (known.protocol_digest, known.n) == (episodes.protocol_digest, len(episodes.keys))


def measure(plan: Plan, run: SuiteRun | None, package: Path, outputs: Path, folder: Path, say: Say) -> SuiteResult:
    """Run the suite (none: the recipe's own benchmark, without its controls) into `folder`; resumes what lies there."""
    if run is None:
        return _own_benchmark(plan, package, folder)
    from prts_core.delivery.open_policy import open_actor
    from prts_core.rollout.run_suite import Machine, run_suite
    from prts_core.sim.suites import suite

    actor = open_actor(str(package), batch=run.batch, outputs=outputs)
    try:
        report = run_suite(actor, suite(run.suite), _settings(run), folder, Machine(workers=run.workers), say=say)
    finally:
        actor.close()
    return of_report(report)


def of_report(report: dict[str, Any]) -> SuiteResult:
    """A benchmark's report.json as a result."""
    return SuiteResult(
        suite=report["suite"], successes=report["successes"], n=report["n"],
        protocol_digest=report["protocol_digest"], standins="; ".join(report["labels"]),
    )  # fmt: skip


def _own_benchmark(plan: Plan, package: Path, folder: Path) -> SuiteResult:
    from prts_core.rollout.benchmark import Places, benchmark_policy

    config = replace(plan.benchmark, failures_wanted=0)  # no controls, no extra failures
    places = Places(policy=package, dataset=None, early=None, work=folder / "work", output=folder)
    report = benchmark_policy(config, places, conditions=("policy",))
    rows = gate.policy_episodes(folder / "episodes.parquet")
    return SuiteResult(
        OWN_BENCHMARK, int(rows["success"].sum()), rows.height, standins="; ".join(report["labels"])
    )  # fmt: skip


def _judge(
    plan: Plan, name: str, version: ModelVersion, champion: ModelVersion | None, known: SuiteResult | None,
    result: SuiteResult, ours: pl.DataFrame, outputs: Path,
) -> tuple[Verdict | None, str]:  # fmt: skip
    """(verdict, in words). The champion meets its own recorded episodes, every other version the champion's.

    known: the champion's record where this is a repetition of it.
    """
    register = plan.recipe.register
    if champion is None:
        return None, "there is no champion to compare with"
    if champion.version == version.version:
        theirs = known if known is not result else None
        if theirs is None:
            return None, "the champion's first result on this suite: later runs are compared with it"
    else:
        theirs = results_of(champion).get(name)
        if theirs is None:
            return None, f"not compared: the champion, version {champion.version}, has no result on {name} yet"
    recorded = episodes_of(outputs, champion, name, theirs)
    verdict = promotion.compare(result, ours, theirs, recorded, register, len(names(plan)))
    return verdict, verdict.reason


def report_of(folder: Path) -> dict[str, Any] | None:
    """The benchmark's own report in an outcome's folder, where there is one."""
    path = folder / "report.json"
    return read_json(path) if path.is_file() else None
