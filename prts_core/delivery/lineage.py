"""Follow a policy back to the raw files it was trained on: manifest by manifest, in the store and in MLflow.

Each step names its parents by key and by the digest that it read. A parent is followed in the store where it lies under
its key with that digest; otherwise the MLflow run that recorded it is followed, and the step says so.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from prts_core.config.schema import OWN_BENCHMARK
from prts_core.delivery import registry
from prts_core.delivery.suite_results import results_of
from prts_core.io.errors import CheckpointError, StageError
from prts_core.io.files import digest_value, read_json
from prts_core.store.entries import Entry, all_entries, entry_at
from prts_core.store.listing import list_files, tree_digest
from prts_core.store.manifest import MANIFEST, OUTPUT, STORE
from prts_core.tracking.describe import parents_of
from prts_core.tracking.store import client, has_store, mlflow_module, run_url, tracking_uri

State = Literal["on disk", "damaged", "remade", "gone", "lost"]
RAW_FILES = "files.json"


@dataclass(frozen=True)
class Step:
    """One stage's result on the way. parents: role -> digest, parent_keys: role -> key.

    state: "on disk" (it lies in the store), "damaged" (it does, but its content has changed), "remade" (what lies
    under its key came out different when it was made again; note says what), "gone" (only MLflow remembers it), "lost"
    (nothing does). files: the raw files with their digests, where this step is where they came in.
    """

    digest: str
    key: str
    state: State
    stage: str
    recipe: str = ""
    partition: str | None = None
    version: int | None = None
    content_digest: str = ""
    config_digest: str = ""
    path: str = ""
    parents: dict[str, str] = field(default_factory=dict)
    parent_keys: dict[str, str] = field(default_factory=dict)
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

    @cached_property
    def _depth(self) -> dict[str, int]:
        """Digest -> steps on the longest way down to raw files."""
        depth: dict[str, int] = {}
        waiting = [self.root]
        while waiting:
            parents = set(self.steps[waiting[-1]].parents.values())
            if unknown := parents - depth.keys():
                waiting += unknown
            else:
                depth[waiting.pop()] = 1 + max((depth[parent] for parent in parents), default=0)
        return depth

    def parents(self, step: Step) -> list[Step]:
        """The parents of a step, the latest first, so that a depth-first walk reads the chain backwards."""
        found = [self.steps[digest] for digest in dict.fromkeys(step.parents.values())]
        return sorted(found, key=lambda parent: (-self._depth[parent.digest], parent.name))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"complete": not self.missing}


def trace(reference: str, outputs: Path, verify: bool = False) -> Lineage:
    """Follow `reference` (models:/name@alias, models:/name/version, or a package folder) back to the raw files.

    verify: read every output again and compare its content digest. Raises StageError or CheckpointError when there is
    no such model or package.
    """
    records = _Records(outputs, verify)
    if registry.is_reference(reference):
        version = registry.resolve_version(client(outputs), reference)
        key, root = version.tags.get("prts.key", ""), version.tags.get("prts.manifest_digest", "")
        if not root:
            raise StageError(
                "A registered model does not say what it was made from",
                found=reference,
                field="prts.manifest_digest",
                cure="only models that `prts register` made have a lineage",
            )
        own = results_of(version).get(OWN_BENCHMARK)
        model = {
            "model_uri": f"models:/{version.name}/{version.version}",
            "aliases": ", ".join(f"@{a}" for a in sorted(version.aliases or [])),
            "content_digest": registry.content_digest_of(version),
            "success_rate": "" if own is None else f"{own.rate.estimate:.4f}",
            "mlflow_run": version.run_id or "",
            "dagster_run": version.tags.get("dagster.run_id", ""),
            "git_sha": version.tags.get("git.sha", ""),
        }
    else:
        key, root, content = records.package(Path(reference).expanduser())
        model = {"folder": reference, "content_digest": content}

    steps: dict[str, Step] = {}
    waiting = [("package", key, root)]
    while waiting:
        role, key, digest = waiting.pop()
        if digest not in steps:
            step = steps[digest] = records.step(role, key, digest)
            waiting += [(name, step.parent_keys.get(name, ""), parent) for name, parent in step.parents.items()]
    return Lineage(reference, model, root, steps)


class _Records:
    """What the store and MLflow know about results."""

    def __init__(self, outputs: Path, verify: bool) -> None:
        self.outputs, self.verify = outputs, verify
        self.tracked = has_store(outputs)

    @cached_property
    def entries(self) -> list[Entry]:
        """Every finished result in the store; read only where a result is not found by its key."""
        return [entry for entry in all_entries(self.outputs) if entry.finished]

    @cached_property
    def experiments(self) -> list[str]:
        return [experiment.experiment_id for experiment in client(self.outputs).search_experiments()]

    def package(self, folder: Path) -> tuple[str, str, str]:
        """(key, digest, content digest) of the result whose content is `folder`."""
        if not folder.is_dir():
            raise CheckpointError(
                "No such package", found=str(folder), expected="a package folder, or models:/<name>@<alias>"
            )
        content = tree_digest(list_files(folder))
        beside = entry_at(folder.parent)  # an entry of the store, or a recipe's view
        for entry in [beside] if beside.manifest.get("content_digest") == content else self.entries:
            if entry.manifest.get("content_digest") == content:
                return entry.manifest["key"], entry.manifest["digest"], content
        run = self._run(content_digest=content)
        if run is None:
            raise CheckpointError(
                "Nothing here knows how this package was made",
                file=folder,
                found=content,
                expected=f"a result under {self.outputs / STORE} or an MLflow run with this content",
                cure="give --outputs or MLFLOW_TRACKING_URI of where it was made",
            )
        return run.data.tags.get("prts.key", ""), run.data.tags["prts.manifest_digest"], content

    def step(self, role: str, key: str, digest: str) -> Step:
        """The result `key` as it was when it had this digest. role: what its child calls it."""
        entry = self._entry(key, digest)
        if entry is not None and entry.manifest.get("digest") == digest:
            return self._on_disk(entry)
        run = self._run(manifest_digest=digest) or (self._run(key=key) if key else None)
        note = "not on this disk"
        if entry is not None:
            note = f"in the store there is now {str(entry.manifest.get('digest'))[:19]} of the same key"
        if run is not None:
            step = self._remembered(run, key, digest)
        elif entry is not None:  # the same key: the same stage, configuration and parents' keys
            step = replace(self._on_disk(entry), digest=digest, content_digest="", files=())
        else:
            stage, _, partition = role.partition(":")
            return Step(digest, key, "lost", stage, partition=partition or None, note=note)
        return replace(step, state="gone" if entry is None else "remade", note=note)

    def _entry(self, key: str, digest: str) -> Entry | None:
        if key:
            found = (entry_at(path.parent) for path in (self.outputs / STORE).glob(f"*/{key}/{MANIFEST}"))
        else:
            found = (entry for entry in self.entries if entry.manifest.get("digest") == digest)
        return next(found, None)

    def _on_disk(self, entry: Entry) -> Step:
        raw, about = entry.manifest, entry.provenance
        links, output = about.get("mlflow", {}), entry.folder / OUTPUT
        whole = not self.verify or tree_digest(list_files(output)) == raw["content_digest"]
        step = Step(
            digest=raw["digest"],
            key=raw["key"],
            state="on disk" if whole else "damaged",
            stage=raw["kind"],
            recipe=about.get("recipe", ""),
            partition=raw["partition"],
            version=raw["version"],
            content_digest=raw["content_digest"],
            config_digest=digest_value(raw["config"]),
            path=output.relative_to(self.outputs).as_posix(),
            parents=raw["parent_digests"],
            parent_keys=raw["parents"],
            mlflow_run=links.get("run_id", ""),
            mlflow_url=links.get("url", ""),
            dagster_run=about.get("caller", {}).get("dagster.run_id", ""),
            git_sha=links.get("git.sha", ""),
            git_dirty=links.get("git.dirty", ""),
            dvc_rev=links.get("dvc.rev", ""),
        )
        # A result of the DVC cache came without its provenance.
        if not links and (run := self._run(manifest_digest=raw["digest"])) is not None:
            step = replace(step, **self._links(run))
        listed = output / RAW_FILES
        return replace(step, files=_files(read_json(listed))) if not step.parents and listed.exists() else step

    def _remembered(self, run: Any, key: str, digest: str) -> Step:
        """What an MLflow run recorded of a result."""
        tags = run.data.tags
        parents = parents_of(tags)
        version = tags.get("prts.version", "")
        step = Step(
            digest=digest,
            key=key or tags.get("prts.key", ""),
            state="gone",
            stage=tags.get("prts.stage", ""),
            recipe=tags.get("prts.recipe", ""),
            partition=tags.get("prts.partition") or None,
            version=int(version) if version.isdigit() else None,
            content_digest=tags.get("prts.content_digest", ""),
            config_digest=tags.get("prts.config_digest", ""),
            parents={role: parent_digest for role, (_, parent_digest) in parents.items()},
            parent_keys={role: parent_key for role, (parent_key, _) in parents.items()},
            **self._links(run),
        )
        return step if parents else replace(step, files=self._artifact_files(run))

    def _run(self, **tags: str) -> Any:
        """The newest MLflow run that ended with a result and has these `prts.` tags, or none."""
        if not self.tracked:
            return None
        wanted = " and ".join(f"tags.`prts.{name}` = '{value}'" for name, value in tags.items())
        newest = ["attributes.start_time DESC"]
        store = client(self.outputs)
        found = store.search_runs(self.experiments, filter_string=wanted, max_results=100, order_by=newest)
        return next((run for run in found if "prts.manifest_digest" in run.data.tags), None)

    def _links(self, run: Any) -> dict[str, Any]:
        tags = run.data.tags
        uri = tracking_uri(self.outputs)
        return {
            "mlflow_run": run.info.run_id,
            "mlflow_url": run_url(uri, run.info.experiment_id, run.info.run_id, self.outputs),
            "dagster_run": tags.get("dagster.run_id", ""),
            "git_sha": tags.get("git.sha", ""),
            "git_dirty": tags.get("git.dirty", ""),
            "dvc_rev": tags.get("dvc.rev", ""),
        }

    def _artifact_files(self, run: Any) -> tuple[dict[str, Any], ...]:
        """The list of raw files that a run kept as an artifact."""
        store, mlflow = client(self.outputs), mlflow_module()
        if not any(item.path == RAW_FILES for item in store.list_artifacts(run.info.run_id)):
            return ()
        with tempfile.TemporaryDirectory() as folder:
            try:
                return _files(read_json(Path(store.download_artifacts(run.info.run_id, RAW_FILES, folder))))
            except (mlflow.exceptions.MlflowException, OSError):
                return ()  # listed but gone: the step still has its content digest


def _files(raw: Any) -> tuple[dict[str, Any], ...]:
    """Rows {path, size, sha256} of a `files.json`."""
    rows = raw if isinstance(raw, list) else []
    return tuple(row for row in rows if isinstance(row, dict) and {"path", "sha256"} <= row.keys())
