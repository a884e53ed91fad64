"""Resource instances per environment, chosen by $PRTS_ENV."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from assets.dvc import DvcResource
from assets.launch import LaunchResource
from assets.launchpad import plan_resource
from assets.recipes import RecipePage
from prts_core.errors import lookup

ENVIRONMENTS = ("local", "test")


def resources(pages: Sequence[RecipePage], outputs: Path, launch: str | None = None) -> dict[str, Any]:
    """local: one machine, outputs entered into DVC. test: the same without DVC.

    launch: where stages run; by default what $PRTS_LAUNCH says, else each in a process of its own.
    """
    chosen = os.environ.get("PRTS_ENV", "local")
    lookup({known: known for known in ENVIRONMENTS}, chosen, "environment ($PRTS_ENV)")
    where = launch or os.environ.get("PRTS_LAUNCH") or "process"
    plans = {page.resource: plan_resource(page, outputs) for page in pages}
    return {**plans, "launch": LaunchResource(default=where), "dvc": DvcResource(enabled=chosen == "local")}
