"""Where the MLflow store of a run folder is, and the one quiet way to a client of it.

`MLFLOW_TRACKING_URI` (and `MLFLOW_REGISTRY_URI`) choose a server; without them runs go to `<outputs>/mlflow.db` and
artifacts to `<outputs>/mlartifacts`. Nothing global in MLflow is set, so that several run folders may be open in one
process. It does not know what is logged.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from prts_core.errors import StageError, require

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow's web page as `make ui` starts it; links point there when the store is a local file.
DEFAULT_UI = "http://127.0.0.1:5000"
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def mlflow_module() -> Any:
    """Import MLflow (1-2 s, so only when it is needed) with telemetry and its chatter off, or a MissingExtraError."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    module = require("mlflow", "pipeline")
    for name in ("mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return module


def tracking_uri(outputs: Path) -> str:
    """`$MLFLOW_TRACKING_URI`, or the sqlite file in `outputs`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{outputs.resolve() / 'mlflow.db'}"


def is_server(uri: str) -> bool:
    return urlparse(uri).scheme in ("http", "https", "databricks")


def client(outputs: Path) -> MlflowClient:
    """A client of the store that `outputs` uses; made once per process and store (opening one takes seconds).

    Raises StageError when the store cannot be opened.
    """
    uri = tracking_uri(outputs)
    if not is_server(uri):
        outputs.mkdir(parents=True, exist_ok=True)
    return _client(uri, os.environ.get("MLFLOW_REGISTRY_URI") or uri, str(outputs.resolve()))


@lru_cache(maxsize=8)
def _client(uri: str, registry_uri: str, outputs: str) -> MlflowClient:
    mlflow = mlflow_module()
    faults: tuple[type[Exception], ...] = (mlflow.exceptions.MlflowException, OSError)
    if not is_server(uri):
        faults += (require("sqlalchemy.exc", "pipeline").SQLAlchemyError,)
    # Opening a database makes its tables where they are missing, which two processes must not do at once.
    lock = contextlib.nullcontext() if is_server(uri) else _locked(Path(outputs) / ".mlflow.lock")
    try:
        with lock:
            made = mlflow.MlflowClient(tracking_uri=uri, registry_uri=registry_uri)
            made.search_experiments(max_results=1)
    except faults as err:
        raise StageError(
            "The MLflow store cannot be opened",
            file=uri,
            found=" ".join(str(err).split())[:300],
            expected="a reachable server or a writable sqlite file",
            cure="start the server, or unset MLFLOW_TRACKING_URI to track into the outputs folder",
        ) from err
    return made


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def experiment_id(outputs: Path, name: str) -> str:
    """The experiment `name`, made (or brought back from MLflow's bin) where needed."""
    mlflow, store, uri = mlflow_module(), client(outputs), tracking_uri(outputs)
    for _ in range(2):
        found = store.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                store.restore_experiment(found.experiment_id)
            return found.experiment_id
        place = None if is_server(uri) else (outputs.resolve() / "mlartifacts" / name).as_uri()
        try:
            return store.create_experiment(name, artifact_location=place)
        except mlflow.exceptions.MlflowException as err:
            if err.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was quicker: look again
                raise
    raise StageError("An MLflow experiment can be neither found nor made", field=name, file=uri)


def ui_address(uri: str) -> str:
    """Where MLflow's web page is: the server itself, or `$PRTS_MLFLOW_UI` (default: what `make ui` starts)."""
    if urlparse(uri).scheme in ("http", "https"):
        return uri.rstrip("/")
    return os.environ.get("PRTS_MLFLOW_UI", DEFAULT_UI).rstrip("/")


def run_url(uri: str, experiment: str, run_id: str) -> str:
    return f"{ui_address(uri)}/#/experiments/{experiment}/runs/{run_id}"


def model_version_url(uri: str, name: str, version: str) -> str:
    return f"{ui_address(uri)}/#/models/{name}/versions/{version}"


def local_path(uri: str) -> Path | None:
    """The folder behind a `file:` URI or a plain path; none for anything remote."""
    parts = urlparse(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(uri) if parts.scheme == "" else None
