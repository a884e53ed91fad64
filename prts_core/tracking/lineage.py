"""The way back from a policy to the raw files it was trained on: manifest by manifest, on disk and in MLflow.

Each step names its parents by digest. The manifest on disk is followed where it still has that digest; where it was
replaced by a later run, the MLflow run that recorded the digest is followed, and the step says so. It knows no stage.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prts_core.errors import CheckpointError, StageError
from prts_core.files import digest_tree, read_json
from prts_core.manifest import Manifest
from prts_core.stages.base import load_provenance
from prts_core.stages.chain import STAGES
from prts_core.tracking.store import client, is_server, mlflow_module, run_url, tracking_uri

State = Literal["on disk", "damaged", "replaced", "lost"]
RAW_FILES = "files.json"


@dataclass(frozen=True)
class Step:
    """One stage's result on the way. parents: role -> digest.

    state: "on disk" (a manifest with this digest lies here), "damaged" (it does, but its content has changed),
    "replaced" (only MLflow remembers it; note says what lies on disk instead), "lost" (nothing knows this digest).
    files: the raw files with their digests, where this step is where they came in.
    """

    digest: str
    state: State
    stage: str
    recipe: str = ""
    partition: str | None = None
    content_digest: str = ""
    config_digest: str = ""
    path: str = ""
    parents: dict[str, str] = field(default_factory=dict)
    mlflow_run: str = ""
    mlflow_url: str = ""
    dagster_run: str = ""
    git_sha: str = ""
    git_dirty: str = ""
    dvc_rev: str = ""
    files: tuple[dict[str, Any], ...] = ()
    note: str = ""

    @property
    def name(self) -> str:
        return self.stage + (f":{self.partition}" if self.partition else "")


@dataclass(frozen=True)
class Lineage:
    """A model reference, what the registry says about it, and every step behind it by digest. root: the package's."""

    reference: str
    model: dict[str, str]
    root: str
    steps: dict[str, Step]

    @property
    def missing(self) -> list[Step]:
        """Steps behind which the way is not known."""
        return [step for step in self.steps.values() if step.state == "lost"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"complete": not self.missing}


def trace(reference: str, outputs: Path, verify: bool = False) -> Lineage:
    """Follow `reference` (models:/name@alias, models:/name/version, or a package folder) back to the raw files.

    verify: read every output again and compare its content digest. Raises StageError or CheckpointError when there is
    no such model or package.
    """
    from prts_core.tracking import registry

    records = _Records(outputs, verify)
    if registry.is_reference(reference):
        version = registry.resolve_version(client(outputs), reference)
        root = version.tags.get("prts.manifest_digest", "")
        if not root:
            raise StageError(
                "A registered model does not say what it was made from",
                found=reference,
                field="prts.manifest_digest",
                cure="only models that `prts register` made have a lineage",
            )
        model = {
            "model_uri": f"models:/{version.name}/{version.version}",
            "aliases": ", ".join(f"@{a}" for a in sorted(version.aliases or [])),
            "package_digest": version.tags.get("prts.package_digest", ""),
            "success_rate": version.tags.get("prts.success_rate", ""),
            "mlflow_run": version.run_id or "",
            "dagster_run": version.tags.get("dagster.run_id", ""),
            "git_sha": version.tags.get("git.sha", ""),
        }
    else:
        folder = Path(reference).expanduser()
        root, model = records.package(folder), {"folder": reference, "package_digest": digest_tree(folder)}

    steps: dict[str, Step] = {}
    waiting = [("package", "", root)]
    while waiting:
        role, recipe, digest = waiting.pop()
        if digest not in steps:
            step = steps[digest] = records.step(digest, role, recipe)
            waiting += [(parent_role, step.recipe, parent) for parent_role, parent in step.parents.items()]
    return Lineage(reference, model, root, steps)


def in_chain_order(step: Step, steps: dict[str, Step]) -> list[Step]:
    """The parents of `step`, the latest stage first, so that a depth-first walk reads the chain backwards."""
    order = {name: number for number, name in enumerate(STAGES)}
    parents = [steps[digest] for digest in dict.fromkeys(step.parents.values())]
    return sorted(parents, key=lambda p: (-order.get(p.stage, -1), p.partition or ""))


class _Records:
    """What this disk and the MLflow store know about manifests, by digest."""

    def __init__(self, outputs: Path, verify: bool) -> None:
        self.outputs, self.verify = outputs, verify
        self.manifests: dict[str, Manifest] = {}
        for path in sorted((outputs / "runs").glob("**/manifest.json")):
            if (
                not any(part.startswith("work-") for part in path.relative_to(outputs).parts)
                and path.parent.name != "output"
            ):
                manifest = Manifest.load(path)
                self.manifests[manifest.digest] = manifest
        uri = tracking_uri(outputs)
        # Looking must not create a store.
        self.tracked = is_server(uri) or bool(os.environ.get("MLFLOW_TRACKING_URI")) or (outputs / "mlflow.db").exists()

    def package(self, folder: Path) -> str:
        """Digest of the manifest whose content is `folder`."""
        if not folder.is_dir():
            raise CheckpointError(
                "No such package", found=str(folder), expected="a package folder, or models:/<name>@<alias>"
            )
        content = digest_tree(folder)
        for digest, manifest in self.manifests.items():
            if manifest.content_digest == content:
                return digest
        run = self._run("prts.content_digest", content)
        if run is None:
            raise CheckpointError(
                "Nothing here knows how this package was made",
                file=folder,
                found=content,
                expected=f"a manifest under {self.outputs / 'runs'} or an MLflow run with this content",
                cure="give --outputs or MLFLOW_TRACKING_URI of where it was made",
            )
        return run.data.tags["prts.manifest_digest"]

    def step(self, digest: str, role: str, recipe: str) -> Step:
        """The step with this manifest digest. role, recipe: what the child calls it, for a step nothing remembers."""
        manifest = self.manifests.get(digest)
        run = (
            None
            if manifest is not None and load_provenance(self.outputs, manifest)
            else self._run("prts.manifest_digest", digest)
        )
        if manifest is not None:
            return self._on_disk(manifest, run)
        stage, _, partition = role.partition(":")
        if run is None:
            return Step(
                digest, "lost", stage, recipe, partition=partition or None, note=self._instead(stage, recipe, partition)
            )
        tags = run.data.tags
        step = Step(
            digest=digest,
            state="replaced",
            stage=tags.get("prts.stage", stage),
            recipe=tags.get("prts.recipe", ""),
            partition=tags.get("prts.partition") or None,
            content_digest=tags.get("prts.content_digest", ""),
            config_digest=tags.get("prts.config_digest", ""),
            path=tags.get("prts.path", ""),
            parents=json.loads(tags.get("prts.parents", "{}")),
            note=self._instead(
                tags.get("prts.stage", stage), tags.get("prts.recipe", ""), tags.get("prts.partition", "")
            ),
        )
        step = replace(step, **self._links(run))
        return step if step.parents else replace(step, files=self._artifact_files(run))

    def _on_disk(self, manifest: Manifest, run: Any) -> Step:
        provenance = load_provenance(self.outputs, manifest)
        links, caller = provenance.get("mlflow", {}), provenance.get("caller", {})
        step = Step(
            digest=manifest.digest,
            state="damaged" if self.verify and not manifest.verify(self.outputs) else "on disk",
            stage=manifest.kind,
            recipe=manifest.recipe,
            partition=manifest.partition,
            content_digest=manifest.content_digest,
            config_digest=manifest.config_digest,
            path=manifest.path,
            parents=manifest.parents,
            mlflow_run=links.get("run_id", ""),
            mlflow_url=links.get("url", ""),
            dagster_run=caller.get("dagster.run_id", ""),
            git_sha=links.get("git.sha", ""),
            git_dirty=links.get("git.dirty", ""),
            dvc_rev=links.get("dvc.rev", ""),
            note=f"skipped: {manifest.skipped}" if manifest.skipped else "",
        )
        if run is not None:  # the folder came without its provenance, for example from the DVC cache
            step = replace(step, **self._links(run))
        listed = manifest.folder(self.outputs) / RAW_FILES
        return replace(step, files=_files(read_json(listed))) if not manifest.parents and listed.exists() else step

    def _instead(self, stage: str, recipe: str, partition: str) -> str:
        """What lies at the place of a step whose digest is not on disk."""
        here = [
            m
            for m in self.manifests.values()
            if m.kind == stage and (not recipe or m.recipe == recipe) and (m.partition or "") == (partition or "")
        ]
        if not here:
            return "not on this disk"
        return f"on disk there is now {here[0].digest[:19]} instead"

    def _run(self, tag: str, value: str) -> Any:
        """The newest MLflow run with this tag, or none."""
        if not self.tracked:
            return None
        store = client(self.outputs)
        experiments = [e.experiment_id for e in store.search_experiments()]
        found = store.search_runs(
            experiments,
            filter_string=f"tags.`{tag}` = '{value}'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return found[0] if found else None

    def _links(self, run: Any) -> dict[str, Any]:
        tags = run.data.tags
        return {
            "mlflow_run": run.info.run_id,
            "mlflow_url": run_url(tracking_uri(self.outputs), run.info.experiment_id, run.info.run_id),
            "dagster_run": tags.get("dagster.run_id", ""),
            "git_sha": tags.get("git.sha", ""),
            "git_dirty": tags.get("git.dirty", ""),
            "dvc_rev": tags.get("dvc.rev", ""),
        }

    def _artifact_files(self, run: Any) -> tuple[dict[str, Any], ...]:
        """The list of raw files that a run kept as an artifact."""
        import tempfile

        store, mlflow = client(self.outputs), mlflow_module()
        if not any(item.path == RAW_FILES for item in store.list_artifacts(run.info.run_id)):
            return ()
        with tempfile.TemporaryDirectory() as folder:
            try:
                return _files(read_json(Path(store.download_artifacts(run.info.run_id, RAW_FILES, folder))))
            except mlflow.exceptions.MlflowException:
                return ()  # listed but gone: the step still has its content digest


def _files(raw: Any) -> tuple[dict[str, Any], ...]:
    """Rows {path, size, sha256} of a `files.json`."""
    rows = raw if isinstance(raw, list) else []
    return tuple(row for row in rows if isinstance(row, dict) and {"path", "sha256"} <= row.keys())
