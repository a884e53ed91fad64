"""Find registered models in MLflow: versions by what they hold or by alias, their files and stored episodes.

A version carries the package folder and the benchmark episodes it was judged by, so that a later challenger can be
compared with it anywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.io.errors import StageError, suggest
from prts_core.io.locks import locked, try_locked
from prts_core.tracking.store import client, every, local_path, mlflow_module, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
UNUSED_DAYS = 30  # after which a downloaded model leaves the cache
PACKAGE, EPISODES = "artifacts/package", "artifacts/episodes.parquet"
REFERENCE = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@contextlib.contextmanager
def refusals(outputs: Path, model: str) -> Iterator[None]:
    """Tell what MLflow refuses inside as a StageError."""
    mlflow = mlflow_module()
    try:
        yield
    except mlflow.exceptions.MlflowException as err:
        raise StageError(
            "The MLflow registry refused",
            file=tracking_uri(outputs),
            field=f"models:/{model}",
            found=" ".join(str(err).split())[:300],
            expected="a working registry and a name without / : .",
            cure="start the server or correct `register.model_name`, then run the same again",
        ) from err


def is_reference(text: str) -> bool:
    return text.startswith("models:")


def content_digest_of(version: ModelVersion) -> str:
    """The digest over every file of a registered package; "" where the version has none."""
    tags = version.tags  # versions of before have no content_digest, and this under the other name
    return str(tags.get("prts.content_digest") or tags.get("prts.package_digest", ""))


def find_version(store: MlflowClient, name: str, content_digest: str) -> ModelVersion | None:
    """The registered version of `name` that holds the package with this digest; the newest of several."""
    found = [v for v in versions(store, name) if content_digest_of(v) == content_digest]
    return max(found, key=lambda v: int(v.version), default=None)


def version_of_alias(store: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    mlflow = mlflow_module()
    try:
        return store.get_model_version_by_alias(name, alias)
    except mlflow.exceptions.MlflowException as err:
        if err.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model, no such alias
            return None
        raise


def resolve_version(store: MlflowClient, reference: str) -> ModelVersion:
    """`models:/<name>@<alias>` or `models:/<name>/<version>` -> the version; a StageError lists what there is."""
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise StageError(
            "This is no model reference", found=reference, expected="models:/<name>@<alias> or models:/<name>/<version>"
        )
    name, alias, number = match["name"], match["alias"], match["version"]
    present = known_versions(store, name)
    if alias is not None:
        found = version_of_alias(store, name, alias)
        known = sorted(store.get_registered_model(name).aliases)
        problem = f"Model {name!r} has no alias {alias!r}{suggest(alias, known)}"
        expected = ", ".join(f"@{a}" for a in known) or "an alias; there is none"
        cure = (
            "the gate has promoted no version yet; take @challenger or a version number" if alias == CHAMPION else None
        )
    else:
        found = next((v for v in present if str(v.version) == number), None)
        problem = f"Model {name!r} has no version {number}"
        expected, cure = ", ".join(sorted((str(v.version) for v in present), key=int)), None
    if found is None:
        raise StageError(problem, found=reference, expected=expected, cure=cure)
    return found


def version_files(outputs: Path, version: ModelVersion, inner: str) -> Path:
    """Local path of the file or folder `inner` of a registered version.

    A store on this machine is read in place; from a server it is downloaded once into the user's cache.
    """
    store = client(outputs)
    uri = store.get_model_version_download_uri(version.name, version.version)
    if uri.startswith("models:/"):
        uri = store.get_logged_model(uri.removeprefix("models:/")).artifact_location
    root = local_path(uri)
    if root is None:
        root = _downloaded(outputs, uri, f"{version.name}-{version.version}-{version.creation_timestamp}")
    if not (root / inner).exists():
        raise StageError(
            f"Version {version.version} of {version.name!r} holds no {inner}",
            file=root,
            expected="a model that `prts register` stored",
            cure="run `prts register` again, or choose another version",
        )
    return root / inner


def _downloaded(outputs: Path, uri: str, name: str) -> Path:
    """The model's folder in the user's cache: fetched by one process while others wait, removed when nobody has asked
    for it for UNUSED_DAYS."""
    mlflow = mlflow_module()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prts" / "models"
    target = cache / name
    with locked(cache / f".{name}.lock"):
        if not target.exists():
            partial = cache / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            try:
                mlflow.artifacts.download_artifacts(
                    artifact_uri=uri, dst_path=str(partial), tracking_uri=tracking_uri(outputs)
                )
            except (mlflow.exceptions.MlflowException, OSError) as err:
                raise StageError("A registered model cannot be downloaded", file=uri, found=str(err)[:300]) from err
            inside = [path for path in partial.iterdir() if (path / "MLmodel").exists()]
            (inside[0] if inside else partial).rename(target)
            shutil.rmtree(partial, ignore_errors=True)
        os.utime(target)
    for other in cache.glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError), try_locked(cache / f".{other.name}.lock") as free:
            if free and time.time() - other.stat().st_mtime > UNUSED_DAYS * 86400:
                shutil.rmtree(other, ignore_errors=True)
    return target


def known_versions(store: MlflowClient, name: str) -> list[Any]:
    """Every version of a model; StageError with the names that there are where it has none."""
    found = versions(store, name)
    if not found:
        names = sorted(m.name for m in store.search_registered_models())
        raise StageError(
            f"No registered model {name!r}{suggest(name, names)}",
            found=name,
            expected=", ".join(names) or "a registered model; there is none yet",
            cure="run `prts register`, or set MLFLOW_TRACKING_URI or --outputs to where it was registered",
        )
    return found


def versions(store: MlflowClient, name: str | None = None) -> list[Any]:
    """Every version of a model, or of all of them, in no order; none where there is no such model."""
    wanted = None if name is None else f"name = '{name}'"
    return every(lambda token: store.search_model_versions(wanted, page_token=token))
