"""Open the MLflow store of an outputs folder, quietly, and say where its web page is.

`MLFLOW_TRACKING_URI` (and `MLFLOW_REGISTRY_URI`) choose a server; without them runs go to `<outputs>/mlflow.db` and
artifacts to `<outputs>/mlartifacts`. Nothing global in MLflow is set, so that several outputs folders may be open in
one process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from prts_core.io.errors import StageError, require
from prts_core.io.locks import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("prts.tracking")

# What `make ui` wrote when it started the two pages, and where it starts them otherwise.
UI_FILE = "ui.json"
UI_PORTS = {"mlflow": "5000", "dagster": "3000"}
# Where MLflow keeps absolute places of files in its database. MLflow takes no relative ones: it makes them absolute.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
)
# One call to a dead or hanging server ends within seconds: MLflow's own 120 s and 7 retries are minutes.
QUIET = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
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
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each retry; our own warning says it once
    return module


def tracking_home(outputs: Path) -> Path:
    """Where work in `outputs` is tracked: there, or the project's own outputs where this is the copy of the project in
    which DVC runs a queued experiment (`dvc exp run --temp`), and which it removes afterwards."""
    parts = outputs.resolve().parts
    for at in range(len(parts) - 3):
        if parts[at : at + 3] == (".dvc", "tmp", "exps"):
            below = at + (5 if parts[at + 3] == "standalone" else 4)  # of --temp, of --queue
            return Path(*parts[:at], *parts[below:])
    return outputs


def tracking_uri(outputs: Path) -> str:
    """`$MLFLOW_TRACKING_URI`, or the sqlite file in `outputs`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _own_database(outputs)


def recorded_uri(outputs: Path) -> str:
    """How records name the store, so that they hold where `outputs` has moved: its own database without the path."""
    uri = tracking_uri(outputs)
    return "sqlite:///mlflow.db" if uri == _own_database(outputs) else uri


def _own_database(outputs: Path) -> str:
    return f"sqlite:///{outputs.resolve() / 'mlflow.db'}"


def has_store(outputs: Path) -> bool:
    """Whether anything can have been tracked. Looking must not create a database."""
    named = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("MLFLOW_REGISTRY_URI")
    return bool(named) or (outputs / "mlflow.db").exists()


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
    lock = contextlib.nullcontext() if is_server(uri) else locked(Path(outputs) / ".mlflow.lock")
    try:
        with lock:
            if uri == _own_database(Path(outputs)):
                follow_move(Path(outputs))
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


def follow_move(outputs: Path) -> None:
    """Make the database of an outputs folder that was moved or copied name the files that lie in it now.

    Otherwise MLflow would go on reading and writing where the folder was. Nothing is done where nothing has moved.
    """
    database, here = outputs.resolve() / "mlflow.db", outputs.resolve().as_uri()
    if not database.exists():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            return
        with connection:  # one transaction
            rows = connection.execute("SELECT artifact_location FROM experiments").fetchall()
            matches = (re.fullmatch(r"(file://.*)/mlartifacts/[^/]+", place or "") for (place,) in rows)
            for old in sorted({match[1] for match in matches if match} - {here}):
                _replace_prefix(connection, tables, old, here)
                logger.warning("%s came from %s: MLflow's records name the files here now", database, local_path(old))


def _replace_prefix(connection: sqlite3.Connection, tables: set[str], old: str, new: str) -> None:
    texts = [(table, column, f"{old}/mlartifacts/", f"{new}/mlartifacts/") for table, column in PLACES]
    # Inputs of runs are named as JSON {"uri": "/path"}.
    plain = [json.dumps({"uri": f"{local_path(uri)}/"})[:-2] for uri in (old, new)]
    for table, column, before, after in [*texts, ("datasets", "dataset_source", *plain)]:
        if table in tables:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                (after, len(before) + 1, len(before), before),
            )


def every(page: Callable[[str | None], Any]) -> list[Any]:
    """What a search of MLflow finds on all its pages. page: the one of a token; none: the first."""
    found, token = [], None
    while True:
        found += (part := page(token))
        if not (token := part.token):
            return found


@contextlib.contextmanager
def patient(seconds: int = 3600) -> Iterator[None]:
    """Let a server take its time to answer, as it may after it was sent a large model."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name, QUIET[name])
    os.environ[name] = str(max(seconds, int(before)))
    try:
        yield
    finally:
        os.environ[name] = before


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


def ui_address(page: str, outputs: Path | None = None) -> str:
    """Where the web page of "mlflow" or "dagster" is, without a slash at the end.

    `$PRTS_MLFLOW_UI` (`$PRTS_DAGSTER_UI`), else what `make ui` wrote into `outputs`, else the port in
    `$PRTS_MLFLOW_PORT` (`$PRTS_DAGSTER_PORT`) of this machine.
    """
    name = page.upper()
    said = os.environ.get(f"PRTS_{name}_UI")
    if not said and outputs is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not there, half written, or not ours
            said = json.loads((outputs / UI_FILE).read_text()).get(page)
    port = os.environ.get(f"PRTS_{name}_PORT") or UI_PORTS[page]
    return str(said or f"http://127.0.0.1:{port}").rstrip("/")


def _mlflow_page(uri: str, outputs: Path | None) -> str:
    """The server's own page, or for a database the one that `make ui` starts on it."""
    if urlparse(uri).scheme in ("http", "https"):
        return uri.rstrip("/")
    if outputs is None and uri.startswith("sqlite:///"):
        outputs = Path(uri.removeprefix("sqlite:///")).parent
    return ui_address("mlflow", outputs)


def run_url(uri: str, experiment: str, run_id: str, outputs: Path | None = None) -> str:
    """outputs: where `make ui` left its address; by default the folder that a database `uri` lies in."""
    return f"{_mlflow_page(uri, outputs)}/#/experiments/{experiment}/runs/{run_id}"


def local_path(uri: str) -> Path | None:
    """The folder behind a `file:` URI or a plain path; none for anything remote."""
    parts = urlparse(uri)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(uri) if parts.scheme == "" else None
