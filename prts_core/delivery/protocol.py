"""Say how a registered version is measured: the suites of a recipe, and the episodes of each for a policy.

What a result was measured under (`SuiteResult.protocol_digest`) is compared with what is planned here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prts_core.config.schema import OWN_BENCHMARK, SuiteRun
from prts_core.contract import PolicyContract
from prts_core.delivery import registry
from prts_core.delivery.promotion import PromotionBar
from prts_core.delivery.suite_results import SuiteResult, results_of
from prts_core.io.errors import PrtsError
from prts_core.rollout.episode_plan import EpisodePlan, SuiteSettings, make_plan
from prts_core.tracking.store import client

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from prts_core.config.load import RunPlan
    from prts_core.config.model import PolicyDtype

CHUNK_LENGTH = "prts.chunk_length"


def bars(plan: RunPlan) -> dict[str, PromotionBar]:
    """Name of a result -> what it must reach: the recipe's own benchmark first, then its suites."""
    own = plan.recipe.register
    found = {OWN_BENCHMARK: PromotionBar(own.margin, own.floor)}
    for run in plan.recipe.regression.suites:
        found[run.label] = PromotionBar(
            own.margin if run.margin is None else run.margin, own.floor if run.floor is None else run.floor
        )
    return found


def run_of(plan: RunPlan, name: str) -> SuiteRun | None:
    """The recipe's suite of that name; none: its own benchmark."""
    return next((run for run in plan.recipe.regression.suites if run.label == name), None)


def settings_of(run: SuiteRun) -> SuiteSettings:
    return SuiteSettings(run.episodes, run.tasks, run.seed, run.execute, dict(run.perturbation), run.image_size)


def planned(plan: RunPlan, name: str, chunk_length: int) -> EpisodePlan:
    """The episodes of one suite, or of the recipe's own benchmark, for a policy that gives chunks of that length."""
    run = run_of(plan, name)
    if run is None:
        from prts_core.rollout.benchmark import measured

        spec, settings, _ = measured(plan.benchmark)
        return make_plan(spec, chunk_length, settings)
    from prts_core.sim.suites import suite

    return make_plan(suite(run.suite), chunk_length, settings_of(run))


def chunk_length_of(outputs: Path, version: ModelVersion) -> int:
    """Of a registered policy; its package is fetched only where the version does not say it."""
    if CHUNK_LENGTH in version.tags:
        return int(version.tags[CHUNK_LENGTH])
    package = registry.version_files(outputs, version, registry.PACKAGE)
    return PolicyContract.load(package / "policy_contract.json").chunk_length


def dtype_of(plan: RunPlan, name: str, *recorded: SuiteResult | None) -> PolicyDtype:
    """What a policy is to compute in on one suite, or on the recipe's own benchmark: as the recipe says.

    Where that is "auto": as the first of the recorded results (the champion's, then the policy's own), so that results
    can be compared whichever machine makes them; without any, as the machine takes it."""
    run = run_of(plan, name)
    asked = plan.benchmark.dtype if run is None else run.dtype
    known: list[PolicyDtype] = [one.dtype for one in recorded if one is not None]
    return known[0] if asked == "auto" and known else asked


def same(known: SuiteResult, episodes: EpisodePlan, dtype: PolicyDtype) -> bool:
    """Whether a recorded result is of the planned episodes, computed as asked (`dtype_of`)."""
    return (known.protocol_digest, known.n, known.dtype) == (episodes.protocol_digest, len(episodes.keys), dtype)


def lacking(plan: RunPlan, outputs: Path, version: ModelVersion) -> list[str]:
    """The suites on which the version has no result under the present protocol; those whose protocol cannot be told
    here (no simulator, a recipe that does not fit the policy) among them: who measures says why."""
    have = results_of(version)
    champion = registry.version_of_alias(client(outputs), version.name, registry.CHAMPION)
    champions = {} if champion is None else results_of(champion)

    def lacks(name: str) -> bool:
        try:
            episodes = planned(plan, name, chunk_length_of(outputs, version))
            return name not in have or not same(
                have[name], episodes, dtype_of(plan, name, champions.get(name), have[name])
            )
        except PrtsError:
            return True

    return [name for name in bars(plan) if lacks(name)]
