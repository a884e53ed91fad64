"""Where the MLflow store is: an outputs folder that was moved or copied, and the addresses of the web pages."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prts_core.delivery import registry
from prts_core.io.errors import StageError
from prts_core.store.stage import StageResult
from prts_core.tracking import store as tracking_store
from prts_core.tracking.runs import stage_run
from prts_core.tracking.store import client, run_url, tracking_home, tracking_uri, ui_address
from tests.fixtures.toy_package import make, named, outcomes, register
from tests.fixtures.toy_stages import toy_manifest, toy_work


@pytest.mark.parametrize("copy", ["tmpab12", "standalone/tmpab12"])
def test_a_queued_experiment_of_dvc_is_tracked_in_the_project(tmp_path: Path, copy: str):
    there = tmp_path / ".dvc" / "tmp" / "exps" / copy / "outputs"
    assert tracking_home(there) == tmp_path / "outputs"
    assert tracking_home(tmp_path / "outputs") == tmp_path / "outputs"


def listing(folder: Path) -> set[tuple[str, int, int]]:
    return {(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def everything_in(database: Path) -> str:
    """All texts of the database, so that no place in it is forgotten."""
    with sqlite3.connect(database) as connection:
        return "\n".join(connection.iterdump())


def tracked_run(outputs: Path, key: str):
    work = toy_work(outputs, {"convert": toy_manifest("convert", "c1")}, key=key)
    (work.folder / "output" / "report.json").write_text(key)
    with stage_run(work) as tracked:
        tracked.finish(toy_manifest("sft", key), StageResult({}, {}, ("report.json",)), work.folder / "output")
    assert "fault" not in tracked.links()
    return tracked


@pytest.mark.parametrize("how", ["copied", "moved"])
def test_a_moved_or_copied_outputs_folder_works_on_its_own_files(plan, tmp_path, how, caplog):
    """A space and a % stand in the path: what MLflow stores is a quoted URI."""
    first, second = tmp_path / "old place" / "a%b", tmp_path / "new place" / "outputs"
    plan = named(plan, "line")
    make(plan, first, "w1", outcomes(118))
    register(plan, first)
    before = tracked_run(first, "k1")
    if how == "copied":
        shutil.copytree(first, second, symlinks=True)
    else:
        second.parent.mkdir()
        first.rename(second)
    left = listing(first)
    from mlflow.tracking._tracking_service import utils

    utils._artifact_repos_cache.clear()  # as in a new process

    with caplog.at_level(logging.WARNING, "prts.tracking"):
        store = client(second)
    assert [r.message for r in caplog.records if "came from" in r.message]
    version = registry.resolve_version(store, "models:/line@champion")
    assert registry.version_files(second, version, registry.PACKAGE).is_relative_to(second)
    assert store.get_run(before.run_id).info.artifact_uri.startswith(second.as_uri())
    assert Path(store.download_artifacts(before.run_id, "report.json")).read_text() == "k1"
    tracked_run(second, "k2")
    assert tracked_run(second, "k1").run_id == before.run_id  # interrupted work goes on in its run
    make(plan, second, "w2", outcomes(120))
    assert register(plan, second)["aliases"] == ["challenger", "champion"]
    assert len(list((second / "mlartifacts" / "line" / "models").iterdir())) == 2
    assert listing(first) == left and (how == "copied") == first.exists()
    assert "old%20place" not in everything_in(second / "mlflow.db")
    assert "old place" not in everything_in(second / "mlflow.db")

    caplog.clear()
    tracking_store._client.cache_clear()
    client(second)  # a second look finds nothing to do
    assert not [r for r in caplog.records if "came from" in r.message]


def test_artifacts_that_somebody_keeps_elsewhere_stay_there(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for place in ("s3://bucket/x", (tmp_path / "elsewhere").as_uri()):
        client(first).create_experiment(place.rsplit("/", 1)[1], artifact_location=place)
    tracked_run(first, "k1")
    shutil.copytree(first, second)
    places = {e.name: e.artifact_location for e in client(second).search_experiments()}
    assert places["x"] == "s3://bucket/x" and places["elsewhere"] == (tmp_path / "elsewhere").as_uri()
    assert places["quickstart"] == (second / "mlartifacts" / "quickstart").as_uri()


def test_pages_are_where_make_ui_says_or_where_it_would_start_them(tmp_path, monkeypatch):
    for name in ("PRTS_MLFLOW_UI", "PRTS_MLFLOW_PORT", "PRTS_DAGSTER_UI", "PRTS_DAGSTER_PORT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    uri = tracking_uri(tmp_path)
    assert run_url(uri, "1", "r") == "http://127.0.0.1:5000/#/experiments/1/runs/r"
    assert ui_address("dagster", tmp_path) == "http://127.0.0.1:3000"
    monkeypatch.setenv("PRTS_MLFLOW_PORT", "5055")
    monkeypatch.setenv("PRTS_DAGSTER_PORT", "3033")
    assert run_url(uri, "1", "r", tmp_path).startswith("http://127.0.0.1:5055/#")
    assert ui_address("dagster", tmp_path) == "http://127.0.0.1:3033"
    (tmp_path / "ui.json").write_text('{"mlflow": "http://127.0.0.1:5056/", "dagster": "http://127.0.0.1:3034"}')
    assert run_url(uri, "1", "r").startswith("http://127.0.0.1:5056/#")  # found beside the database
    assert run_url("sqlite:////somewhere/else.db", "1", "r", tmp_path).startswith("http://127.0.0.1:5056/#")
    assert ui_address("dagster", tmp_path) == "http://127.0.0.1:3034"
    (tmp_path / "ui.json").write_text('{"mlflow": ')
    assert run_url(uri, "1", "r").startswith("http://127.0.0.1:5055/#")
    monkeypatch.setenv("PRTS_MLFLOW_UI", "https://team.example/mlflow/")
    assert run_url(uri, "1", "r") == "https://team.example/mlflow/#/experiments/1/runs/r"
    assert run_url("http://server:80/", "1", "r") == "http://server:80/#/experiments/1/runs/r"


def test_of_two_that_fetch_one_model_the_later_takes_the_first_ones(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    target, fetched = tmp_path / "cache" / "prts" / "models" / "toy-1-9", []

    def fetch(artifact_uri: str, dst_path: str, tracking_uri: str) -> None:
        fetched.append(artifact_uri)
        time.sleep(0.3)
        (Path(dst_path) / "MLmodel").write_text("x")

    def models() -> list[str]:
        return [path.name for path in target.parent.iterdir() if path.suffix != ".lock"]

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", fetch)
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda uri: registry._downloaded(tmp_path, uri, "toy-1-9"), ["mlflow-artifacts:/1/m"] * 2)
    assert list(both) == [target, target] and len(fetched) == 1 and models() == ["toy-1-9"]

    def broken(artifact_uri: str, dst_path: str, tracking_uri: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", broken)
    with pytest.raises(StageError, match="cannot be downloaded"):
        registry._downloaded(tmp_path, "mlflow-artifacts:/1/models/m", "toy-2-9")
    assert not (target.parent / "toy-2-9").exists()
