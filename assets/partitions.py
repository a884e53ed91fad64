"""What the assets are split by: datasets and suites of the recipe that $PRTS_RECIPE names, versions of its model.

Runs nothing. Versions are added as they are registered (pipelines/nightly.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import dagster as dg

from prts_core.config.load import Plan, load_plan
from prts_core.evaluation.regression import names

RECIPE_VARIABLE = "PRTS_RECIPE"
DEFAULT_RECIPE = "configs/quickstart.yaml"


def recipe_path() -> Path:
    """The recipe of this code location, relative to the project's folder unless absolute."""
    return Path(os.environ.get(RECIPE_VARIABLE, DEFAULT_RECIPE))


PLAN: Plan = load_plan(recipe_path())
DATASETS = dg.StaticPartitionsDefinition(list(PLAN.datasets))
DEPLOY = PLAN.recipe.deploy
SUITE, VERSION = "suite", "version"
VERSIONS = dg.DynamicPartitionsDefinition(name=f"versions_of_{PLAN.recipe.register.model_name}")
REGRESSION = dg.MultiPartitionsDefinition({SUITE: dg.StaticPartitionsDefinition(list(names(PLAN))), VERSION: VERSIONS})


def of_datasets(asset: str, *names: str) -> dg.AssetDep:
    """An unpartitioned asset's dependency on `asset` for the datasets `names` only."""
    return dg.AssetDep(asset, partition_mapping=dg.SpecificPartitionsPartitionMapping(list(names)))


def of_mixture(asset: str) -> dg.AssetDep:
    """Pre-training depends on the datasets of its mixture, not on every dataset there is."""
    return of_datasets(asset, *PLAN.mixture)


def of_deployed(asset: str) -> dg.AssetDep:
    """Evaluation and delivery depend on the dataset whose policy goes out."""
    return of_datasets(asset, DEPLOY)
