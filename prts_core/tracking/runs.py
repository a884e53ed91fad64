"""One MLflow run around one executed stage: parameters, input digests, curves, artifacts and the tags that lead back.

It knows no stage: names, configuration, inputs and results are handed in. Without MLflow a null tracker stands in and
says so once. A tracking server that fails half-way never costs a training run: points are kept and sent again later,
and what could not be sent is said aloud and written into the stage's provenance.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core import __version__
from prts_core.errors import MissingExtraError, StageError
from prts_core.files import read_json, write_json
from prts_core.tracking.source import source_tags

if TYPE_CHECKING:
    from prts_core.config.load import Plan
    from prts_core.manifest import Manifest
    from prts_core.stages.base import StageContext, StageResult

logger = logging.getLogger("prts.tracking")
_said_missing = threading.Event()

# MLflow's limits: characters of a parameter value, of a tag value, of a dataset digest; entries of one batch.
PARAM_CHARS, TAG_CHARS, DIGEST_CHARS, PARAM_BATCH, METRIC_BATCH = 6000, 5000, 36, 100, 1000
FLUSH_POINTS, FLUSH_SECONDS = 200, 5.0


class NullRun:
    """Stands in where MLflow is not installed."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Forget the point."""

    def finish(self, manifest: Manifest, result: StageResult, output: Path) -> None:
        """Nothing to finish."""

    def links(self) -> dict[str, str]:
        return {}


class TrackedRun:
    """An open MLflow run. `log` may be called from any thread."""

    def __init__(self, store: Any, uri: str, experiment: str, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        self.store, self.uri, self.experiment, self.run_id, self.tags = store, uri, experiment, run_id, tags
        self.faults: dict[str, str] = {}  # what could not be recorded -> why
        self._refusal: type[Exception] = MlflowException
        self._lock, self._sent_at = threading.Lock(), time.monotonic()
        self._waiting: list[tuple[str, float, int, int]] = []  # name, value, milliseconds, step
        self._last_step: dict[str, int] = {}

    # ---- what stages use ------------------------------------------------------------------------------------------
    def log(self, metrics: dict[str, float], step: int) -> None:
        """Keep one point per metric, sent in batches. Steps that an earlier attempt recorded are not sent again."""
        now = int(time.time() * 1000)
        with self._lock:
            for name, value in metrics.items():
                key = _metric_name(name)
                if step > self._last_step.get(key, -1):
                    self._last_step[key] = step
                    self._waiting.append((key, float(value), now, step))
            due = len(self._waiting) >= FLUSH_POINTS or time.monotonic() - self._sent_at > FLUSH_SECONDS
            if due:
                self._flush()

    def finish(self, manifest: Manifest, result: StageResult, output: Path) -> None:
        """Record results, artifacts and the manifest's digests. Called once, when the stage's output is whole."""
        now = int(time.time() * 1000)
        with self._lock:
            for name, value in result.metrics.items():
                key = _metric_name(name)
                self._waiting.append((key, float(value), now, self._last_step.get(key, 0)))
            self._flush()
        tags = {
            "prts.manifest_digest": manifest.digest,
            "prts.content_digest": manifest.content_digest,
            "prts.path": manifest.path,
        }
        tags |= {f"prts.contract.{name}": fingerprint for name, fingerprint in manifest.contracts.items()}
        if manifest.skipped:
            tags["prts.skipped"] = manifest.skipped
        self._try("tags", lambda: self._log_tags(tags))
        if not manifest.parents and not manifest.skipped:  # raw recordings: the run's dataset is what it made itself
            made = [_dataset(manifest, "recorded", output)]
            self._try("dataset", lambda: self.store.log_inputs(self.run_id, datasets=made))
        for name in result.artifacts:
            self._try(f"artifact {name}", lambda name=name: self._log_artifact(output, name))  # type: ignore[misc]

    def links(self) -> dict[str, str]:
        """Plain strings for provenance and Dagster metadata."""
        from prts_core.tracking.store import run_url

        out = {
            "run_id": self.run_id,
            "experiment_id": self.experiment,
            "tracking_uri": self.uri,
            "url": run_url(self.uri, self.experiment, self.run_id),
        }
        out |= {key: value for key, value in self.tags.items() if key.startswith(("git.", "dvc."))}
        return out | (
            {"fault": "; ".join(f"{what}: {why}" for what, why in self.faults.items())} if self.faults else {}
        )

    # ---- opening and closing --------------------------------------------------------------------------------------
    def describe(self, config: Any, inputs: dict[str, Manifest], outputs: Path) -> None:
        """Parameters, full configuration, tags and one dataset input per parent."""
        from mlflow.entities import Param

        plain = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
        flat = [Param(key, value) for key, value in flatten(plain).items()]
        datasets = [_dataset(m, role, m.folder(outputs)) for role, m in inputs.items()]
        self._try("tags", lambda: self._log_tags(self.tags))
        for start in range(0, len(flat), PARAM_BATCH):
            batch = flat[start : start + PARAM_BATCH]
            self._try("parameters", lambda batch=batch: self.store.log_batch(self.run_id, params=batch))  # type: ignore[misc]
        self._try("config.json", lambda: self.store.log_dict(self.run_id, plain, "config.json"))
        if datasets:
            self._try("datasets", lambda: self.store.log_inputs(self.run_id, datasets=datasets))

    def reopen(self) -> None:
        """Go on in a run that an earlier attempt at the same work left behind. Raises MlflowException."""
        self.store.update_run(self.run_id, status="RUNNING")
        run = self.store.get_run(self.run_id)
        for key in run.data.metrics:
            self._last_step[key] = max(point.step for point in self.store.get_metric_history(self.run_id, key))
        self._log_tags({"prts.attempts": str(int(run.data.tags.get("prts.attempts", "1")) + 1)})
        if "prts.error" in run.data.tags:
            self.store.delete_tag(self.run_id, "prts.error")

    def close(self, status: str, error: str | None = None) -> None:
        with self._lock:
            self._flush()
        if error is not None:
            self._try("error", lambda: self._log_tags({"prts.error": error}))
        self._try("end", lambda: self.store.set_terminated(self.run_id, status))

    # ---- inside ---------------------------------------------------------------------------------------------------
    def _flush(self) -> None:
        """Send what waits; what the server does not take is kept for the next time. The caller holds the lock."""
        from mlflow.entities import Metric

        self._sent_at = time.monotonic()
        while self._waiting:
            points = [Metric(*point) for point in self._waiting[:METRIC_BATCH]]
            if not self._try("metrics", lambda points=points: self.store.log_batch(self.run_id, metrics=points)):  # type: ignore[misc]
                return
            del self._waiting[: len(points)]

    def _try(self, what: str, call: Callable[[], Any]) -> bool:
        """One call to the store. A refusal is said aloud once and kept in `faults`; the stage goes on."""
        try:
            call()
        except self._refusal as err:
            if not self.faults:
                logger.warning("MLflow at %s does not take this run's %s: %s", self.uri, what, err)
            self.faults[what] = " ".join(str(err).split())[:300]
            return False
        self.faults.pop(what, None)
        return True

    def _log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.store.log_batch(self.run_id, tags=[RunTag(key, str(value)[:TAG_CHARS]) for key, value in tags.items()])

    def _log_artifact(self, output: Path, name: str) -> None:
        folder = Path(name).parent.as_posix()
        self.store.log_artifact(self.run_id, str(output / name), None if folder == "." else folder)


@contextmanager
def stage_run(
    stage: str,
    plan: Plan,
    config: Any,
    inputs: dict[str, Manifest],
    config_digest: str,
    context: StageContext,
    outputs: Path,
) -> Iterator[TrackedRun | NullRun]:
    """Track one stage: experiment = recipe, run = `stage[:partition]`. An error ends it FAILED and goes on up.

    The run's id lies in `context.work/mlflow.json`, so that the next attempt at the same work goes on in the same run.
    """
    try:
        tracked = _open(stage, plan, config, inputs, config_digest, context, outputs)
    except MissingExtraError as err:
        if not _said_missing.is_set():
            _said_missing.set()
            logger.warning("runs are not tracked: %s", err)
        yield NullRun()
        return
    try:
        yield tracked
    except BaseException as err:  # interrupts too: every run must end, and every error goes on up
        tracked.close("FAILED" if isinstance(err, Exception) else "KILLED", f"{type(err).__name__}: {err}")
        raise
    tracked.close("FINISHED")


def _open(
    stage: str,
    plan: Plan,
    config: Any,
    inputs: dict[str, Manifest],
    config_digest: str,
    context: StageContext,
    outputs: Path,
) -> TrackedRun:
    from prts_core.tracking.store import client, experiment_id, tracking_uri

    store, uri = client(outputs), tracking_uri(outputs)
    name = stage + (f":{context.partition}" if context.partition else "")
    source = source_tags()
    tags = {
        **source,
        **{key: str(value) for key, value in context.caller.items()},
        "prts.stage": stage,
        "prts.recipe": plan.recipe.name,
        "prts.config_file": plan.path.name,
        "prts.config_digest": config_digest,
        "prts.parents": json.dumps({role: m.digest for role, m in inputs.items()}, sort_keys=True),
        "prts.seed": str(context.seed),
        "prts.version": __version__,
        "mlflow.runName": name,
        "mlflow.source.name": f"prts {stage}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": source["git.sha"],
        "mlflow.user": os.environ.get("USER", "prts"),
    }
    if context.partition:
        tags["prts.partition"] = context.partition
    from mlflow.exceptions import MlflowException

    try:
        tracked = _reopened(store, uri, context.work / "mlflow.json", tags)
        if tracked is None:
            experiment = experiment_id(outputs, plan.recipe.name)
            run = store.create_run(experiment, run_name=name, tags={"prts.attempts": "1"})
            tracked = TrackedRun(store, uri, experiment, run.info.run_id, tags)
            write_json(
                context.work / "mlflow.json",
                {"run_id": tracked.run_id, "experiment_id": experiment, "tracking_uri": uri},
            )
    except MlflowException as err:
        raise StageError(
            "A run cannot be opened in MLflow",
            file=uri,
            found=" ".join(str(err).split())[:300],
            expected="a working tracking store",
            cure="repair or start the server, or unset MLFLOW_TRACKING_URI to track into the outputs folder",
        ) from err
    tracked.describe(config, inputs, outputs)
    return tracked


def _reopened(store: Any, uri: str, kept: Path, tags: dict[str, str]) -> TrackedRun | None:
    """The run that an interrupted attempt named in `kept`, if this store still has it."""
    from mlflow.exceptions import MlflowException

    known = read_json(kept) if kept.exists() else {}
    if known.get("tracking_uri") != uri:
        return None
    try:
        if store.get_run(known["run_id"]).info.lifecycle_stage != "active":
            return None
    except MlflowException as err:
        if err.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    tracked = TrackedRun(store, uri, known["experiment_id"], known["run_id"], tags)
    tracked.reopen()
    return tracked


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested plain data -> {"a.b.0.c": "text"}. Lists of plain values stay one JSON text; long texts are cut."""
    nested = isinstance(value, dict) or (isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value))
    if nested and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        out: dict[str, str] = {}
        for key, inner in items:
            out |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        return out
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = text if len(text) <= PARAM_CHARS else text[: PARAM_CHARS - 1] + "…"
    return {_metric_name(prefix)[:250]: shown}


def _metric_name(name: str) -> str:
    """MLflow takes letters, digits and _-. :/ in names."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _dataset(manifest: Manifest, role: str, folder: Path) -> Any:
    """One manifest as an MLflow dataset input: digest cut to MLflow's 36 characters, the whole of it in a tag."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    name = manifest.kind + (f":{manifest.partition}" if manifest.partition else "")
    digest = manifest.content_digest.removeprefix("sha256:")[:DIGEST_CHARS]
    # What a MetaDataset over a local source becomes when MLflow stores it; nothing is loaded.
    entity = Dataset(name, digest, source_type="local", source=json.dumps({"uri": str(folder.resolve())}))
    tags = {
        "mlflow.data.context": role,
        "prts.content_digest": manifest.content_digest,
        "prts.manifest_digest": manifest.digest,
    }
    return DatasetInput(entity, tags=[InputTag(key, value) for key, value in tags.items()])
