"""Track a stage's execution as one MLflow run: parameters, input digests, curves, artifacts and tags that lead back.

All that goes to MLflow goes through an outbox on a thread of its own: a slow or dead server never stalls the stage and
never fails it. What could not be sent is said aloud and written into the result's provenance.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.io.errors import MissingExtraError, Skipped, Stopped
from prts_core.io.files import read_json, write_json
from prts_core.store.stage import NullRun
from prts_core.tracking.describe import (
    TAG_CHARS,
    dataset_input,
    flatten,
    manifest_tags,
    mlflow_name,
    run_name,
    work_tags,
)
from prts_core.tracking.outbox import PATIENCE_S, Outbox
from prts_core.tracking.store import (
    client,
    experiment_id,
    is_server,
    mlflow_module,
    recorded_uri,
    run_url,
    tracking_home,
    tracking_uri,
)

if TYPE_CHECKING:
    from prts_core.store.manifest import Manifest
    from prts_core.store.stage import StageResult, Work

logger = logging.getLogger("prts.tracking")
_said_missing = threading.Event()

METRIC_BATCH = 1000  # MLflow's limit
SEND_SECONDS = 5.0  # points wait so long for company
OPEN_SECONDS = 10.0  # a server may take so long to open a run before the stage starts without waiting for it
UPLOAD_BYTES_PER_S = 1_000_000  # slower than this, an upload is given up when the stage ends
# Errors that the same call would meet again: it is told and given up.
HOPELESS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class TrackedRun:
    """An open MLflow run. `log` may be called from any thread and returns at once."""

    def __init__(self, work: Work) -> None:
        self.work, self.tags, self._home = work, work_tags(work), tracking_home(work.outputs)
        self.uri, self._recorded_uri = tracking_uri(self._home), recorded_uri(self._home)
        self.run_id = self.experiment = ""  # known once the run is open
        self.store: Any = None
        self._kept = work.folder / "mlflow.json"
        self._attempt = uuid.uuid4().hex
        self._has_params: set[str] = set()
        self._lock, self._points = threading.Lock(), list[tuple[str, float, int, int | None]]()
        self._sending: list[tuple[str, float, int, int]] = []  # name, value, milliseconds, step
        self._last_step: dict[str, int] = {}
        self._told = False
        self.outbox = Outbox(_hopeless, self._tell)
        self.outbox.put("run", self._open, gate=True)
        self.outbox.put("tags", lambda: self._log_tags(self.tags))
        config = work.config
        plain = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
        self.outbox.put("parameters", lambda: self._log_params(plain))
        self.outbox.put("config.json", lambda: self.store.log_dict(self.run_id, plain, "config.json"))
        if work.inputs:
            self.outbox.put("datasets", lambda: self._log_datasets(*work.inputs.items()))

    # ---- what stages use ------------------------------------------------------------------------------------------
    def log(self, metrics: dict[str, float], step: int | None) -> None:
        """Keep one point per metric, to be sent in batches. Steps that an earlier attempt recorded are not sent again.

        step: none for a figure of the whole stage.
        """
        now = int(time.time() * 1000)
        points = [(mlflow_name(name), float(value), now, step) for name, value in metrics.items()]
        with self._lock:
            first = not self._points
            self._points += points
        if first and points:
            self.outbox.put("metrics", self._send_points, after=SEND_SECONDS)

    def finish(self, manifest: Manifest, result: StageResult, output: Path) -> None:
        """Record results, artifacts and the manifest's digests. Called once, when the stage's output is whole."""
        self.log(result.metrics, None)
        self.outbox.put("result tags", lambda: self._log_tags(manifest_tags(manifest)))
        if not manifest.parents:  # raw recordings: the run's dataset is what it made itself
            self.outbox.put("dataset", lambda: self._log_datasets(("recorded", manifest)))
        for name in result.artifacts:
            seconds = _bytes(output / name) / UPLOAD_BYTES_PER_S
            self.outbox.put(f"artifact {name}", partial(self._log_artifact, output, name), seconds=seconds)
        self.outbox.flush()

    def links(self) -> dict[str, str]:
        """Plain strings for provenance and Dagster metadata. fault: what MLflow does not have, and why."""
        out = {key: value for key, value in self.tags.items() if key.startswith(("git.", "dvc."))}
        out["tracking_uri"] = self._recorded_uri
        if self.run_id:
            out |= {
                "run_id": self.run_id,
                "experiment_id": self.experiment,
                "url": run_url(self.uri, self.experiment, self.run_id, self._home),
            }
        missing = self.outbox.missing()
        if missing and not self.run_id:
            missing = {"run": missing.get("run", "not opened in time")}
        if missing:
            out["fault"] = "; ".join(f"{what}: {why}" for what, why in missing.items())
        return out

    def close(self, status: str, error: BaseException | None = None) -> None:
        """End the run; waits for what is still to be sent, after an error only briefly."""
        patience = PATIENCE_S if error is None else PATIENCE_S / 4
        if error is not None and not isinstance(error, Skipped):
            text = f"{type(error).__name__}: {error}"
            self.outbox.put("error", lambda: self._log_tags({"prts.error": text}))
        self.outbox.flush(patience)
        if isinstance(error, Skipped):  # nothing was done: no run to look at
            self.outbox.put("end", lambda: self.store.delete_run(self.run_id))
        else:
            self.outbox.put("end", lambda: self.store.set_terminated(self.run_id, status))
        self.outbox.flush(patience)
        self.outbox.stop()

    # ---- on the outbox's thread -----------------------------------------------------------------------------------
    def _open(self) -> None:
        """Go on in the run that an interrupted attempt at the same work left behind, or create one."""
        self.store = client(self._home)
        known = read_json(self._kept) if self._kept.exists() else {}
        if known.get("tracking_uri") == self._recorded_uri and self._reopen(known["run_id"]):
            self.run_id, self.experiment = known["run_id"], known["experiment_id"]
            return
        experiment = experiment_id(self._home, self.work.recipe)
        # A server that made the run and could not say so must not make two.
        mine = f"tags.`prts.opened` = '{self._attempt}'"
        made = self.store.search_runs([experiment], mine, max_results=1) or [
            self.store.create_run(
                experiment, run_name=run_name(self.work), tags={"prts.attempts": "1", "prts.opened": self._attempt}
            )
        ]
        run_id = made[0].info.run_id
        if self._kept.parent.is_dir() and not self.outbox.stopped:  # the stage may have ended without us
            write_json(self._kept, {"run_id": run_id, "experiment_id": experiment, "tracking_uri": self._recorded_uri})
        self.run_id, self.experiment = run_id, experiment

    def _reopen(self, run_id: str) -> bool:
        """False where the store does not have the run any more."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.store.get_run(run_id)
        except MlflowException as err:
            if err.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        if run.info.lifecycle_stage != "active":
            return False
        self._has_params = set(run.data.params)
        for key in run.data.metrics:
            self._last_step[key] = max(point.step for point in self.store.get_metric_history(run_id, key))
        self.store.update_run(run_id, status="RUNNING")
        if "prts.error" in run.data.tags:
            self.store.delete_tag(run_id, "prts.error")
        self.tags["prts.attempts"] = str(int(run.data.tags.get("prts.attempts", "1")) + 1)
        return True

    def _log_params(self, plain: dict[str, Any]) -> None:
        """The configuration, leaf by leaf. MLflow cannot change a parameter: the first attempt's values stay."""
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in flatten(plain).items() if key not in self._has_params]
        self.store.log_batch(self.run_id, params=new)

    def _log_datasets(self, *inputs: tuple[str, Manifest]) -> None:
        datasets = [dataset_input(m, role, m.folder(self.work.outputs)) for role, m in inputs]
        self.store.log_inputs(self.run_id, datasets=datasets)

    def _log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        self.store.log_batch(self.run_id, tags=[RunTag(key, str(value)[:TAG_CHARS]) for key, value in tags.items()])

    def _log_artifact(self, output: Path, name: str) -> None:
        folder = Path(name).parent.as_posix()
        self.store.log_artifact(self.run_id, str(output / name), None if folder == "." else folder)

    def _send_points(self) -> None:
        """Send what waits, in batches; what the server does not take stays."""
        from mlflow.entities import Metric

        with self._lock:
            points, self._points = self._points, []
        for name, value, now, step in points:
            last = self._last_step.get(name, -1)
            if step is None or step > last:
                self._last_step[name] = max(last, 0) if step is None else step
                self._sending.append((name, value, now, self._last_step[name]))
        while self._sending and not self.outbox.stopped:
            batch = self._sending[:METRIC_BATCH]
            try:
                self.store.log_batch(self.run_id, metrics=[Metric(*point) for point in batch])
            except Exception as err:
                if _hopeless(err):
                    del self._sending[: len(batch)]
                raise
            del self._sending[: len(batch)]

    def _tell(self, what: str, err: Exception) -> None:
        """Say once that something is amiss."""
        if not self._told and not self.outbox.stopped:
            self._told = True
            said = " ".join(str(err).split())[:300]
            logger.warning("MLflow at %s does not take this run's %s: %s; the work goes on", self.uri, what, said)


@contextmanager
def stage_run(work: Work) -> Iterator[TrackedRun | NullRun]:
    """Track one execution: experiment = recipe, run = `stage[:partition]`. An error ends it FAILED and goes on up.

    The run's id lies in `work.folder/mlflow.json`, so that the next attempt at the same work goes on in the same run.
    """
    try:
        mlflow_module()
        home = tracking_home(work.outputs)
        if not is_server(tracking_uri(home)):
            client(home)  # a database of our own that cannot be opened is a StageError
    except MissingExtraError as err:
        if not _said_missing.is_set():
            _said_missing.set()
            logger.warning("runs are not tracked: %s", err)
        yield NullRun()
        return
    tracked = TrackedRun(work)
    try:
        tracked.outbox.settled("run", OPEN_SECONDS)
        yield tracked
    except BaseException as err:  # interrupts too: every run must end, and every error goes on up
        stopped = isinstance(err, Stopped) or not isinstance(err, Exception)
        tracked.close("KILLED" if stopped else "FAILED", err)
        raise
    tracked.close("FINISHED")


def _hopeless(err: Exception) -> bool:
    return isinstance(err, FileNotFoundError) or getattr(err, "error_code", None) in HOPELESS


def _bytes(path: Path) -> int:
    """Size of a file, or of everything in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
