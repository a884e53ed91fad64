"""What can be started with one click, for each recipe: its chain, the import of one dataset, a night's benchmark."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import dagster as dg

from assets.factory import SOURCE
from assets.recipes import RecipePage

DATA = ("collect", "convert", "validate", "stats")


@dataclass(frozen=True)
class Jobs:
    """data, imported: for one dataset, without and with its fine-tuning. observe: none without external datasets."""

    chain: Any
    data: Any
    imported: Any
    regression: Any
    observe: Any

    def all(self) -> list[Any]:
        return [job for job in vars(self).values() if job is not None]


def jobs(page: RecipePage) -> Jobs:
    def job(name: str, assets: Iterable[str], description: str) -> Any:
        selection = dg.AssetSelection.assets(*(page.key(asset) for asset in assets))
        return dg.define_asset_job(
            f"{page.identifier}_{name}", selection, description=description, tags={"prts/recipe": page.name}
        )

    stages = [stage.name for stage in page.stages]
    return Jobs(
        chain=job(
            "chain",
            [*stages, "register"],
            "The whole chain from demonstrations to a registered policy. Launch it for the partition "
            f"{page.plan.recipe.deploy!r}; other datasets of the mixture are imported before.",
        ),
        data=job("data", DATA, "One dataset from its source to validated data with statistics."),
        imported=job(
            "import_dataset",
            [name for name in (*DATA, "sft") if name in stages],
            "One dataset from its source to a fine-tuned policy. Pre-training must have run once (job `chain`).",
        ),
        regression=job(
            "nightly_benchmark",
            ["regression"],
            "One registered version on one suite: does the champion still do what it did, is a new version worse? "
            "Red when it is.",
        ),
        observe=None
        if page.external is None
        else job("look_at_sources", [SOURCE], "List the files of external datasets, so that changes are seen."),
    )
