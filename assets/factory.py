"""Make a recipe's assets from the declarations of its stages: keys, dependencies, partitions, checks, pools, versions.

Read this file first. What a stage computes is the library's; what its page shows beside the usual stands in `shown`.
"""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from assets.launch import STOPPED, Crashed
from assets.launchpad import Chosen
from assets.metadata import Shown, metadata
from assets.recipes import RecipePage
from assets.shown import SHOWN
from prts_core.config.load import RunPlan
from prts_core.io.errors import PrtsError, Skipped
from prts_core.stages import chain, declarations
from prts_core.store.stage import Stage

DATA, TRAINING, EVALUATION, DELIVERY = "data", "training", "evaluation", "delivery"
# stage -> (group on the page, what it is made with)
ROOMS: dict[str, tuple[str, set[str]]] = {
    "collect": (DATA, {"hdf5", "python"}),
    "convert": (DATA, {"huggingface", "parquet"}),
    "validate": (DATA, {"pandera", "polars"}),
    "stats": (DATA, {"parquet", "polars"}),
    "pretrain": (TRAINING, {"huggingface", "pytorch"}),
    "sft": (TRAINING, {"huggingface", "pytorch"}),
    "subtask": (TRAINING, {"huggingface", "pytorch"}),
    "rl": (TRAINING, {"huggingface", "pytorch"}),
    "benchmark": (EVALUATION, {"python", "pytorch"}),
    "value": (EVALUATION, {"matplotlib", "pytorch"}),
    "package": (DELIVERY, {"huggingface"}),
}
# A worker that was killed goes on from its checkpoint; a fault would only be met again (`failure`).
RETRIES = dg.RetryPolicy(max_retries=2, delay=2)
SOURCE = "source"
# Data stages cost little: once switched on (Automation on the page) they follow their sources. Training never does.
FOLLOW = dg.AutomationCondition.eager() & dg.AutomationCondition.all_deps_blocking_checks_passed()


def stage_assets(page: RecipePage) -> list[dg.AssetsDefinition]:
    """An asset a stage, keyed [recipe, stage]."""
    return [_stage_asset(page, stage) for stage in page.stages]


def dependencies(page: RecipePage, stage: Stage) -> list[dg.AssetDep]:
    """The stage's parents under this recipe; partitions are mapped as its declaration says for each dataset."""
    children = list(page.plan.datasets) if stage.partitioned else [None]
    edges: dict[str, dict[str | None, set[str]]] = {}
    for child in children:
        for parent in stage.parents(page.plan, child):
            of = edges.setdefault(parent.stage, {})
            of.setdefault(child, set()).update({parent.partition} if parent.partition else set())
    deps = [
        dg.AssetDep(page.key(parent), partition_mapping=_mapping(page, stage, declarations.STAGES[parent], edge))
        for parent, edge in edges.items()
    ]
    if stage.external and page.external is not None:
        same = {name: name for name in page.external.get_partition_keys()}
        deps.append(dg.AssetDep(page.key(SOURCE), partition_mapping=dg.StaticPartitionMapping(same)))
    return deps


def _mapping(
    page: RecipePage, stage: Stage, parent: Stage, edge: dict[str | None, set[str]]
) -> dg.PartitionMapping | None:
    if not parent.partitioned:
        return None
    if not stage.partitioned:
        used = edge[None]
        whole = used == set(page.plan.datasets)
        return None if whole else dg.SpecificPartitionsPartitionMapping(sorted(used))
    if all(parents == {child} for child, parents in edge.items()):
        return None  # each dataset its own
    children: dict[str, set[str]] = {}
    for child, parents in edge.items():
        for one in parents:
            children.setdefault(one, set()).add(str(child))
    return dg.StaticPartitionMapping(children)


def _stage_asset(page: RecipePage, stage: Stage) -> dg.AssetsDefinition:
    group, kinds = ROOMS[stage.name]
    shown = SHOWN.get(stage.name, Shown())
    partitions = page.datasets if stage.partitioned else None
    spec = dg.AssetSpec(
        page.key(stage.name),
        deps=dependencies(page, stage),
        description=f"{stage.help[0].upper()}{stage.help[1:]}.",
        group_name=page.group(group),
        owners=[f"team:{group}"],
        kinds=kinds,
        tags={"prts/recipe": page.name, "prts/stage": stage.name},
        code_version=str(stage.version),
        partitions_def=partitions,
        automation_condition=FOLLOW if group == DATA else None,
        skippable=True,  # an optional dataset that is absent
    )

    @dg.multi_asset(
        name=f"{page.identifier}__{stage.name}",
        specs=[spec],
        check_specs=check_specs(page, stage, shown),
        can_subset=bool(shown.checks),  # without it a skip would have to report checks of nothing
        pool=stage.pool,
        retry_policy=RETRIES,
        required_resource_keys={page.resource, "launch", "dvc"},
    )
    def run(context: dg.AssetExecutionContext) -> Iterator[Any]:
        chosen: Chosen = getattr(context.resources, page.resource)
        partition = context.partition_key if stage.partitioned else None
        wanted = context.op_execution_context.selected_asset_check_keys
        try:
            plan = chosen.load()
            tags = caller(context, spec.key, partition) | {"dagster.code_version": str(stage.version)}
            manifest = context.resources.launch.run(context, stage, chosen, partition, tags)
            output = manifest.folder(chosen.outputs)
            results = shown.results(output, plan)
            context.resources.dvc.commit(plan, stage.name, partition, chosen.outputs, context.log)
            yield dg.MaterializeResult(
                asset_key=spec.key,
                data_version=dg.DataVersion(manifest.digest),
                metadata=metadata(manifest, chosen.outputs, chosen.overrides) | shown.extra(output),
                check_results=_of(spec.key, results, wanted),
            )
        except Skipped as err:
            context.log.warning(f"skipped: {err}")
            context.log_event(dg.AssetObservation(spec.key, partition=partition, metadata={"skipped": str(err)}))
            for name in _passed_over(context, page, stage, plan, partition):
                chain.note_skip(name, plan, partition, chosen.outputs, err)
                context.resources.dvc.commit(plan, name, partition, chosen.outputs, context.log)
        except PrtsError as err:
            results = shown.failed(err)
            if not results:
                raise failure(err) from err
            yield from _of(spec.key, results, wanted)
        except (KeyboardInterrupt, DagsterExecutionInterruptedError) as err:  # which Dagster itself would try again
            raise dg.Failure(STOPPED, allow_retries=False) from err
        except Crashed as err:
            raise dg.Failure(str(err)) from err
        except Exception as err:
            raise dg.Failure(f"{type(err).__name__}: {err}", allow_retries=False) from err

    return run


def _passed_over(
    context: dg.AssetExecutionContext, page: RecipePage, stage: Stage, plan: RunPlan, partition: str | None
) -> list[str]:
    """The skipped stage and those of this run that follow from it, which Dagster does not call."""
    names = [name for name, of in declarations.steps(plan) if of == partition]
    asked = context.job_def.asset_layer.selected_asset_keys
    return [name for name in names[names.index(stage.name) :] if page.key(name) in asked]


def check_specs(page: RecipePage, stage: Stage, shown: Shown) -> list[dg.AssetCheckSpec]:
    """The stage's checks; of a partitioned stage one result a dataset, so that none hides another's."""
    return [
        dg.AssetCheckSpec(
            check.name,
            asset=page.key(stage.name),
            blocking=check.blocking,
            description=check.description,
            partitions_def=page.datasets if stage.partitioned else None,
        )
        for check in shown.checks
    ]


def _of(key: dg.AssetKey, results: list[dg.AssetCheckResult], wanted: AbstractSet[dg.AssetCheckKey]) -> list[Any]:
    """Those results that this run asks for, as results of asset `key`."""
    return [
        result._replace(asset_key=key) for result in results if dg.AssetCheckKey(key, str(result.check_name)) in wanted
    ]


def caller(context: dg.AssetExecutionContext, key: dg.AssetKey, partition: str | None = None) -> dict[str, str]:
    """Tags that lead from an MLflow run back to this run of Dagster."""
    tags = {
        "dagster.run_id": context.run.run_id,
        "dagster.job": context.job_name,
        "dagster.asset_key": key.to_user_string(),
    }
    return tags if partition is None else tags | {"dagster.partition": partition}


def failure(err: PrtsError) -> dg.Failure:
    """The error's paragraph as the failure's text; trying again would not help."""
    shown = {
        name: str(value) for name in ("file", "field", "found", "expected", "cure") if (value := getattr(err, name))
    }
    return dg.Failure(description=str(err), metadata=shown, allow_retries=False)
