"""What can be started with one click: the whole chain, and the import of somebody's dataset. Knows names, not work."""

from __future__ import annotations

import dagster as dg

from assets.partitions import DEPLOY

DATA_AND_SFT = ("collect", "convert", "validate", "stats", "sft")

demo = dg.define_asset_job(
    "demo",
    selection="*",
    description=f"The whole chain from demonstrations to a registered policy. Launch it for the partition {DEPLOY!r}.",
)

import_dataset = dg.define_asset_job(
    "import_dataset",
    selection=list(DATA_AND_SFT),
    description="A LeRobot v2.1 folder recorded by others: import, validation, statistics and a short fine-tuning. "
    "Pre-training must have run once (job `demo`).",
)
