"""The code location: every asset, job, schedule and sensor of the recipes of $PRTS_RECIPE. Loading runs nothing.

`dagster dev`, `dg check defs` and `dagster asset materialize --select ...` all read this module (pyproject.toml).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from assets.factory import stage_assets
from assets.recipes import RecipePage, recipe_pages
from assets.register import register_asset
from assets.regression import regression_asset
from assets.sources import source_assets
from pipelines import environments, nightly, sensors
from pipelines.jobs import jobs
from prts_core.config.places import outputs_folder

# Steps of a run side by side, as wide as cores and pools allow; each begins in milliseconds, its imports are there.
EXECUTOR = dg.multiprocess_executor.configured(
    {"start_method": {"forkserver": {"preload_modules": ["pipelines.definitions"]}}}
)


@dg.definitions
def definitions() -> dg.Definitions:
    return build(recipe_pages(), outputs_folder())


def assets_of(page: RecipePage) -> list[dg.AssetsDefinition | dg.SourceAsset]:
    with warnings.catch_warnings():  # partitioned checks and observable sources are new in Dagster
        warnings.simplefilter("ignore", dg.PreviewWarning)
        warnings.simplefilter("ignore", dg.BetaWarning)
        return [
            *source_assets(page),
            *stage_assets(page),
            register_asset(page),
            regression_asset(page, nightly.freshness()),
        ]


def build(pages: Sequence[RecipePage], outputs: Path, launch: str | None = None) -> dg.Definitions:
    """The definitions of these recipes. launch: where stages run, in place of $PRTS_LAUNCH."""
    started = {page.name: jobs(page) for page in pages}
    return dg.Definitions(
        assets=[asset for page in pages for asset in assets_of(page)],
        jobs=[job for own in started.values() for job in own.all()],
        schedules=[schedule for page in pages for schedule in nightly.schedules(page, started[page.name], outputs)],
        sensors=[sensors.alarm_sensor(outputs)],
        resources=environments.resources(pages, outputs, launch),
        executor=EXECUTOR,
    )
