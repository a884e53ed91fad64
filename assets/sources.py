"""Watch datasets that were made elsewhere: an observable source a recipe, a partition a dataset.

Its data version is the listing of the dataset's files, so that new or changed files show `collect` as stale for that
dataset alone.
"""

import dagster as dg

from assets.factory import DATA, SOURCE
from assets.launchpad import Chosen
from assets.recipes import RecipePage
from prts_core.io.errors import PrtsError
from prts_core.store.listing import tree_digest
from prts_core.store.sources import listing

DATA_VERSION = "dagster/data_version"


def source_assets(page: RecipePage) -> list[dg.SourceAsset]:
    """The recipe's source asset; none where every dataset is recorded here."""
    if page.external is None:
        return []
    datasets, key = page.external.get_partition_keys(), page.key(SOURCE)

    @dg.observable_source_asset(
        key=key,
        description="Files of the datasets that were made elsewhere, as they lie there now.",
        group_name=page.group(DATA),
        partitions_def=page.external,
        tags={"prts/recipe": page.name},
        required_resource_keys={page.resource},
    )
    def source(context: dg.AssetExecutionContext) -> dg.DataVersionsByPartition:
        chosen: Chosen = getattr(context.resources, page.resource)
        plan = chosen.load()
        for dataset in datasets:
            try:
                files = listing(plan, dataset, chosen.outputs)
            except PrtsError as err:
                context.log.warning(f"{dataset}: nothing to observe: {err}")
                continue
            context.log_event(
                dg.AssetObservation(
                    key,
                    partition=dataset,
                    tags={DATA_VERSION: tree_digest(files)},
                    metadata={"files": len(files), "bytes": sum(file.size for file in files)},
                )
            )
        return dg.DataVersionsByPartition({})  # the observations above say more

    return [source]
