"""What can be started with one click: the whole chain, and the import of somebody's dataset. Knows names, not work."""

from __future__ import annotations

import dagster as dg

from assets.partitions import DEPLOY
from prts_core.stages.chain import STAGES

DATA_AND_SFT = ("collect", "convert", "validate", "stats", "sft")

demo = dg.define_asset_job(
    "demo",
    selection=list(STAGES),
    description=f"The whole chain from demonstrations to a registered policy. Launch it for the partition {DEPLOY!r}.",
)

nightly_benchmark = dg.define_asset_job(
    "nightly_benchmark",
    selection=["regression"],
    description="One registered version on one suite: does the champion still do what it did, is a new version worse? "
    "Red when it is.",
)

import_dataset = dg.define_asset_job(
    "import_dataset",
    selection=list(DATA_AND_SFT),
    description="A LeRobot v2.1 folder recorded by others: import, validation, statistics and a short fine-tuning. "
    "Pre-training must have run once (job `demo`).",
)
