"""Resource types that the assets are declared with: the plan they run and the data versions they leave behind.

Their instances per environment stand in `pipelines/environments.py`. They know no stage.
"""

from __future__ import annotations

import logging
from pathlib import Path

import dagster as dg

from prts_core.config.load import Plan, load_plan
from prts_core.errors import StageError
from prts_core.manifest import Manifest


class PlanResource(dg.ConfigurableResource):
    """What is run and where it goes: recipe path, `--set`-style overrides, the folder of all outputs."""

    recipe: str = "configs/quickstart.yaml"
    overrides: list[str] = []
    outputs: str = "outputs"

    def load(self) -> Plan:
        return load_plan(Path(self.recipe), self.overrides)

    @property
    def folder(self) -> Path:
        return Path(self.outputs)


class DvcResource(dg.ConfigurableResource):
    """Enters finished outputs into DVC as `dvc commit -f <stage>` would, so that `dvc repro` finds nothing to do.

    `-f` trusts the caller: assets commit only what their stage returned, after its blocking checks passed.
    enabled: off leaves DVC alone. root: the folder with `dvc.yaml` and `.dvc/`.
    """

    enabled: bool = True
    root: str = "."

    def commit(self, manifest: Manifest, outputs: Path) -> str:
        """Commit the DVC stage that declares this manifest's folder; returns what was done, in words.

        Raises a StageError where DVC itself refuses (another `dvc` holds its lock, its cache is full).
        """
        root = Path(self.root).resolve()
        if not self.enabled:
            return "DVC is switched off"
        if not (root / "dvc.yaml").is_file() or not (root / ".dvc").is_dir():
            return "this folder is no DVC repository"
        from dvc.dependency.param import MissingParamsError
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc.stage.exceptions import StageFileDoesNotExistError, StageNotFound

        logging.getLogger("dvc").setLevel(
            logging.ERROR
        )  # its words ("Updating lock file") would stand in every asset's log
        name = manifest.kind + (f"@{manifest.partition}" if manifest.partition else "")
        try:
            with Repo(str(root)) as repo:
                try:
                    stage = repo.stage.load_one(name=name)
                except (StageNotFound, StageFileDoesNotExistError):
                    return f"dvc.yaml has no stage {name!r}"
                wanted = str(manifest.folder(outputs).resolve())
                if wanted not in {str(out.fs_path) for out in stage.outs}:
                    return f"DVC stage {name!r} is about another recipe's folder"
                repo.commit(name, force=True)
        except MissingParamsError as err:
            raise StageError(
                f"dvc.yaml watches a section that the recipe lacks (stage {name!r})",
                file=root / "dvc.yaml",
                found=str(err),
                cure="write the section into the recipe; an empty one, such as `value: {}`, takes every default",
            ) from err
        except DvcException as err:
            raise StageError(
                "DVC could not take over a finished output; the output itself is in place",
                file=root / "dvc.lock",
                field=name,
                found=" ".join(str(err).split()),
                cure=f"run `dvc commit -f {name}` once the reason is gone",
            ) from err
        return f"committed as {name}"
