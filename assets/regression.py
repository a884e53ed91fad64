"""Asset `regression`: a registered version on a suite, red when it has fallen behind the champion.

It is no stage of the chain: its versions are those of the registry.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.factory import EVALUATION, caller, failure
from assets.launchpad import Chosen
from assets.metadata import inline_picture, table
from assets.recipes import SUITE, VERSION, RecipePage
from prts_core.delivery.regression import RegressionOutcome, regress, report_of
from prts_core.io.errors import PrtsError

CHECK = "no_significant_drop"
NIGHT_TAG = "prts/night"  # of a run: which night it belongs to, so that its second attempt resumes the first


def regression_asset(page: RecipePage, freshness: dg.FreshnessPolicy | None = None) -> dg.AssetsDefinition:
    """The asset over suites and versions; its check is theirs one by one. freshness: of the newest of all its results,
    red ones too; Dagster knows none by partition."""
    check = dg.AssetCheckSpec(
        CHECK,
        asset=page.key("regression"),
        blocking=True,
        description="The gate on pairs of the same episodes: tonight's against the champion's recorded ones.",
        partitions_def=page.measured,
    )

    @dg.asset(
        key=page.key("regression"),
        description="A registered version on one suite; promotes the challenger where the rule allows.",
        group_name=page.group(EVALUATION),
        owners=[f"team:{EVALUATION}"],
        kinds={"mlflow", "python"},
        tags={"prts/recipe": page.name},
        partitions_def=page.measured,
        deps=[page.key("register")],
        check_specs=[check],
        pool="gpu",
        freshness_policy=freshness,
        required_resource_keys={page.resource},
    )
    def regression(context: dg.AssetExecutionContext) -> Iterator[Any]:
        chosen: Chosen = getattr(context.resources, page.resource)
        key = context.partition_key
        assert isinstance(key, dg.MultiPartitionKey)
        try:
            outcome = regress(
                chosen.load(),
                key.keys_by_dimension[SUITE],
                key.keys_by_dimension[VERSION],
                chosen.outputs,
                attempt=context.run.tags.get(NIGHT_TAG, context.run.run_id),
                caller=caller(context, page.key("regression"), context.partition_key),
                say=context.log.info,
            )
        except PrtsError as err:
            raise failure(err) from err
        context.log.info("%s; %s", outcome.said(), _promotion(outcome))
        yield dg.MaterializeResult(metadata=shown(outcome), check_results=[drop_check(outcome)])

    return regression


def drop_check(outcome: RegressionOutcome) -> dg.AssetCheckResult:
    """Red on a drop. A comparison that could not be made is no pass: it warns. An alarm shows the text alone, so that
    it says which suite and version it is about."""
    verdict = outcome.verdict
    figures: dict[str, Any] = {}
    if verdict is not None:
        figures = {name: value for name, value in verdict.to_json().items() if value is not None}
    return dg.AssetCheckResult(
        passed=not outcome.alarm and not outcome.incomparable,
        check_name=CHECK,
        severity=dg.AssetCheckSeverity.WARN if outcome.incomparable else dg.AssetCheckSeverity.ERROR,
        description=f"{outcome.name}, version {outcome.version}: {outcome.said()}",
        metadata=figures,
    )


def _promotion(outcome: RegressionOutcome) -> str:
    return "there is no challenger" if outcome.decision is None else outcome.decision.said()


def shown(outcome: RegressionOutcome) -> dict[str, Any]:
    """What the asset's page shows: picture over versions, rates with their label, tasks, published numbers."""
    result = outcome.result
    out: dict[str, Any] = {}
    if outcome.picture is not None:
        out["history"] = dg.MetadataValue.md(inline_picture(outcome.picture, width=900))
    out |= {
        "mlflow_run": dg.MetadataValue.url(outcome.url),
        "success_rate": result.rate.estimate,
        "result": result.said(),
        "assets": f"stand-ins: {result.standins}" if result.standins else "the suite's own",
        "protocol_digest": result.protocol_digest,
        "verdict": outcome.said(),
        "promotion": _promotion(outcome),
        "path": dg.MetadataValue.path(str(outcome.folder.resolve())),
    }
    report = report_of(outcome.folder)
    if report is not None:
        rows = [[name, task["successes"], task["n"], *task["wilson95"]] for name, task in report["tasks"].items()]
        out["tasks"] = table(["task", "successes", "episodes", "95 % from", "95 % to"], rows)
        if told := report.get("published"):
            out["published"] = table(told["header"], told["rows"])
            out["not comparable"] = dg.MetadataValue.md("\n".join(f"- {sentence}" for sentence in told["refused"]))
    return out
