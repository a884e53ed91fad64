"""The code location: every asset, job, schedule and sensor of the project. Loading it runs nothing.

`dagster dev`, `dg check defs` and `dagster asset materialize --select ...` all read this module (pyproject.toml).
"""

from __future__ import annotations

import dagster as dg

from assets import (
    benchmark,
    collect,
    convert,
    package,
    pretrain,
    register,
    regression,
    sft,
    stats,
    subtask,
    validate,
    value,
)
from pipelines import environments, jobs, nightly, sensors

ASSETS = [
    collect.collect,
    convert.convert,
    validate.validate,
    stats.stats,
    pretrain.pretrain,
    sft.sft,
    subtask.subtask,
    benchmark.benchmark,
    value.value,
    package.package,
    register.register,
    regression.regression,
]


@dg.definitions
def definitions() -> dg.Definitions:
    """One process at a time: training already uses every core."""
    return dg.Definitions(
        assets=ASSETS,
        jobs=[jobs.demo, jobs.import_dataset, jobs.nightly_benchmark],
        schedules=[nightly.every_night],
        sensors=[sensors.alarm],
        resources=environments.resources(),
        executor=dg.in_process_executor,
    )
