"""Asset `register` of a recipe: its package in MLflow's registry, promoted where the rule allows.

An operation: it looks at the registry every time it is materialised.
"""

from typing import Any

import dagster as dg

from assets.factory import DELIVERY, caller, failure
from assets.launchpad import Chosen
from assets.metadata import table
from assets.recipes import RecipePage
from prts_core.delivery.audit import Move, moves
from prts_core.delivery.history import MOVE_COLUMNS, move_rows
from prts_core.io.errors import PrtsError
from prts_core.io.files import digest_value
from prts_core.stages import chain

SHOWN = 20  # moves of the trail on the page; `prts history` has them all


def register_asset(page: RecipePage) -> dg.AssetsDefinition:
    @dg.asset(
        key=page.key("register"),
        description="Register the package as a version of the model: @challenger always, @champion by the rule.",
        group_name=page.group(DELIVERY),
        owners=[f"team:{DELIVERY}"],
        kinds={"mlflow"},
        tags={"prts/recipe": page.name},
        deps=[page.key("package"), page.key("benchmark")],
        required_resource_keys={page.resource},
    )
    def register(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        chosen: Chosen = getattr(context.resources, page.resource)
        try:
            made = chain.register(chosen.load(), chosen.outputs, caller(context, page.key("register")))
        except PrtsError as err:
            raise failure(err) from err
        # From now on the version can be picked on the page of asset `regression`; the schedule adds it otherwise.
        context.instance.add_dynamic_partitions(str(page.versions.name), [made["model_uri"].rsplit("/", 1)[1]])
        version = digest_value([made[name] for name in ("model_uri", "aliases", "package_digest")])
        trail = moves(chosen.outputs, made["model_name"])
        return dg.MaterializeResult(data_version=dg.DataVersion(version), metadata=registration(made, trail))

    return register


def registration(made: dict[str, Any], trail: list[Move]) -> dict[str, Any]:
    """What the registry calls the model now, what the rule said, and the last moves of its aliases, newest first."""
    return {
        "model_uri": made["model_uri"],
        "aliases": ", ".join(f"@{alias}" for alias in made["aliases"]),
        "verdict": dg.MetadataValue.md(made["verdict"]["reason"]),
        "trail": table(list(MOVE_COLUMNS), move_rows(trail)[: -SHOWN - 1 : -1]),
    }
