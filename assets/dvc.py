"""Enter finished results into DVC after a Dagster run, so that `dvc repro` finds them done."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import dagster as dg

from prts_core.config.load import RunPlan, load_plan
from prts_core.io.errors import PrtsError, Skipped, StageError
from prts_core.stages import chain
from prts_core.stages.dvc_file import DvcFile
from prts_core.store.views import viewed

POLL_S = 0.5


class DvcResource(dg.ConfigurableResource):
    """Does `dvc commit -f` for an asset. Nothing that it meets fails the asset: the result is in the store.

    `-f` trusts the caller: assets commit only what their stage returned, after its blocking checks passed.
    enabled: off leaves DVC alone. root: the folder with `.dvc/`. patience: seconds to wait for another `dvc`.
    """

    enabled: bool = True
    root: str = "."
    patience: float = 60.0

    def commit(self, plan: RunPlan, stage: str, partition: str | None, outputs: Path, log: Any) -> bool:
        """Commit the view of this stage; true where DVC has it now. What was or was not done is a line of `log`."""
        if not self.enabled:
            return False
        if not (Path(self.root) / ".dvc").is_dir():
            log.info("DVC: this folder is no DVC repository")
        elif plan.overrides:
            log.info("DVC: a run with changed values is not entered; DVC keeps what the recipe's file says")
        else:
            try:
                file = DvcFile(plan, outputs, Path(self.root))
                if file.path.is_file():
                    log.info(f"DVC: committed as {commit(file, stage, partition, self.patience)}")
                    return True
                log.info(f"DVC: the recipe has no DVC file; `{file.command}` writes one")
            except PrtsError as err:
                log.warning(f"DVC: {err}")
        return False


def commit(file: DvcFile, stage: str, partition: str | None, patience: float = 60.0) -> str:
    """Commit what the recipe's view shows of this stage; returns DVC's name for it.

    Raises StageError where the DVC file is not what the recipe says now, another `dvc` holds its lock for longer than
    `patience` seconds, or DVC refuses.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    file.require_current()
    _require_shown(file, stage, partition)
    target = file.target(stage, partition)
    logging.getLogger("dvc").setLevel(logging.ERROR)  # its words would stand in every asset's log
    give_up = time.monotonic() + patience
    try:
        while True:
            try:
                with Repo(os.fspath(file.root)) as repo:
                    repo.commit(target, force=True)
                return target
            except LockError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(POLL_S)
    except DvcException as err:
        raise StageError(
            "DVC could not take over a finished result; the result itself is in place",
            file=file.path.relative_to(file.root).with_suffix(".lock"),
            field=target,
            found=" ".join(str(err).split()),
            cure=f"run `dvc commit -f {target}` once the reason is gone",
        ) from err


def _require_shown(file: DvcFile, stage: str, partition: str | None) -> None:
    """StageError where the recipe has been edited since the run began: DVC would write the new values beside the old
    result, and never make the one that they mean."""
    now, outputs = load_plan(file.plan.path), file.root / file.outputs
    try:
        meant = chain.store(outputs).resolve(stage, now, partition).key
    except Skipped:
        meant = None  # the view says that the dataset is not here
    shown = viewed(outputs, now.recipe.name, stage, partition)
    if meant != (shown and shown.key):
        raise StageError(
            "The recipe was changed while the stage ran: its result is in the store, not in DVC",
            file=now.path,
            cure=f"run `{now.command(stage, partition, Path(file.outputs))}` for what the recipe says now",
        )
