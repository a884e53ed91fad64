"""Datasets in object storage, read through the cache from a real S3 server on this machine (moto) and over HTTP."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from prts_core.cli.main import main
from prts_core.config.sources import LeRobotSource
from prts_core.data import statistics
from prts_core.data.convert.lerobot_v21 import import_lerobot
from prts_core.data.convert.lerobot_v30_export import export
from prts_core.data.index import INDEX, DatasetIndex
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.remote import REMOTE
from prts_core.io import object_storage
from prts_core.io.errors import ConfigError, DataError, PrtsError, StageError, UnavailableError
from prts_core.io.files import read_json
from prts_core.io.object_storage import RemoteFile, RemoteFolder
from prts_core.stages import chain
from prts_core.store.run_stage import untracked
from prts_core.tracking import runs
from prts_core.training.episodes import EpisodeReader
from tests.data.conftest import Converted
from tests.data.test_recording_in_recipe import planned

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
BUCKET, SECRET = "robots", "not-a-secret-but-hidden"
TOP = "observation.images.top"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of an S3 server in a process of its own."""
    port, log = free_port(), (tmp_path_factory.mktemp("s3") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, Path(log.name).read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.fixture
def s3(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> s3fs.S3FileSystem:
    """What the environment says about the server, an empty cache, and a client that fills the bucket."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "PRTS_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = s3fs.S3FileSystem(use_listings_cache=False)
    if client.exists(BUCKET):
        client.rm(BUCKET, recursive=True)
    client.mkdir(BUCKET)
    return client


@pytest.fixture(scope="module")
def v30(toy: Converted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v30")
    export(toy.root, folder / "v30", folder / "work", data_mb=0.02, video_mb=0.008)
    return folder / "v30"


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_random_access_downloads_what_is_read(
    s3: s3fs.S3FileSystem, toy: Converted, v30: Path, tmp_path: Path, version: str
) -> None:
    s3.put(str(toy.root if version == "v21" else v30), f"{BUCKET}/ours", recursive=True)
    there, ours = LeRobotDataset.open(f"s3://{BUCKET}/ours"), LeRobotDataset.open(toy.root)
    assert there.rows == ours.rows and there.contract == ours.contract

    def heavy() -> list[Path]:
        cached = (path for path in (tmp_path / "cache").glob("*/[dv]*/**/*") if path.is_file())
        return [path for path in cached if path.suffix in (".mp4", ".parquet")]

    assert heavy() == []
    frames, local = EpisodeReader(there), EpisodeReader(ours)
    assert np.array_equal(frames.rgb(4, TOP, 3), local.rgb(4, TOP, 3)) and len(heavy()) == 1
    assert np.array_equal(there.actions(1), ours.actions(1)) and len(heavy()) == 2
    assert np.array_equal(there.frames(1, TOP, [2, 5]), ours.frames(1, TOP, [2, 5]))
    again = pickle.loads(pickle.dumps(there))
    assert np.array_equal(again.actions(1), ours.actions(1))
    s3.rm(f"{BUCKET}/ours/data", recursive=True)  # what is here is not asked for again
    assert np.array_equal(there.actions(1), ours.actions(1))


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_in_a_recipe(
    s3: s3fs.S3FileSystem, toy: Converted, v30: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """The chain keeps metadata and the URL; a file that changes in the store is another source."""
    monkeypatch.setattr(runs, "stage_run", untracked)
    s3.put(str(toy.root if version == "v21" else v30), f"{BUCKET}/ours", recursive=True)
    planned(tmp_path / "configs")
    source = {"kind": "lerobot", "root": f"s3://{BUCKET}/ours"}
    (tmp_path / "configs/datasets/theirs.yaml").write_text(yaml.safe_dump({"name": "theirs", "source": source}))
    plan, outputs = planned(tmp_path / "configs", "theirs"), tmp_path / "outputs"
    stages = ("collect", "convert", "validate", "stats")
    made = {name: chain.run(name, plan, "theirs", outputs) for name in stages}
    root = made["convert"].folder(outputs)
    assert not (root / "data").exists() and not (root / "videos").exists()
    assert SECRET not in "".join(path.read_text(errors="replace") for path in outputs.rglob("*") if path.is_file())
    there, ours = LeRobotDataset.open(root), LeRobotDataset.open(toy.root)
    assert there.contract == ours.contract and made["validate"].metrics["videos_checked"] == 12
    assert np.array_equal(EpisodeReader(there).rgb(3, TOP, 4), EpisodeReader(ours).rgb(3, TOP, 4))
    stats = statistics.compute(root), statistics.compute(toy.root)
    assert np.array_equal(stats[0].stats.action.q99, stats[1].stats.action.q99)
    assert {name: chain.run(name, plan, "theirs", outputs).digest for name in stages} == {
        name: manifest.digest for name, manifest in made.items()
    }

    s3.put(str(toy.root if version == "v21" else v30), f"{BUCKET}/moved", recursive=True)
    monkeypatch.setenv("SOME_ROOT", f"s3://{BUCKET}/moved")
    named = {"kind": "lerobot", "root": "${SOME_ROOT}"}
    (tmp_path / "configs/datasets/theirs.yaml").write_text(yaml.safe_dump({"name": "theirs", "source": named}))
    moved = planned(tmp_path / "configs", "theirs")
    other = {name: chain.run(name, moved, "theirs", outputs) for name in stages}
    assert read_json(other["convert"].folder(outputs) / REMOTE)["url"] == f"s3://{BUCKET}/moved"
    DatasetIndex.open(other["stats"].folder(outputs) / INDEX, toy.root if version == "v21" else v30)

    file = f"{BUCKET}/ours/{there.info.data_file(0)}"
    s3.pipe(file, s3.cat(file)[::-1])
    with pytest.raises(StageError, match="has not run yet under this plan"):
        chain.run("stats", plan, "theirs", outputs)
    fresh = LeRobotDataset.open(root)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match="not the one that was taken over"):
        fresh.actions(0)


def test_copied_out_of_the_store(s3: s3fs.S3FileSystem, v30: Path, tmp_path: Path) -> None:
    s3.put(str(v30), f"{BUCKET}/ours", recursive=True)
    source = LeRobotSource(kind="lerobot", root=f"s3://{BUCKET}/ours", link="copy")
    import_lerobot(str(source.root), tmp_path / "out", dataset="ours", source=source, robot=None)
    whole = {path.relative_to(v30) for path in v30.rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()} == whole
    s3.rm(f"{BUCKET}/ours/videos", recursive=True)
    with pytest.raises(DataError, match="incomplete"):
        import_lerobot(str(source.root), tmp_path / "other", dataset="ours", source=source, robot=None)
    with pytest.raises(ConfigError, match="does not list"):
        RemoteFolder("http://127.0.0.1/x").listing()


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_what_needs_other_tables_is_refused_and_the_cure_works(
    s3: s3fs.S3FileSystem,
    toy: Converted,
    v30: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
) -> None:
    s3.put(str(toy.root if version == "v21" else v30), f"{BUCKET}/ours", recursive=True)
    source = LeRobotSource(kind="lerobot", root=f"s3://{BUCKET}/ours", episodes=(0, 2))
    with pytest.raises(ConfigError, match="keeps its episodes") as told:
        import_lerobot(str(source.root), tmp_path / "out", dataset="ours", source=source, robot=None)
    assert "download the folder" in str(told.value.cure)
    s3.get(f"{BUCKET}/ours", str(tmp_path / "ours"), recursive=True)
    monkeypatch.chdir(tmp_path)
    commands = str(told.value.cure).split("`")[1::2]
    assert [main(shlex.split(command)[1:]) for command in commands] == ([0] if version == "v30" else [])
    named = tmp_path / ("ours_v21" if commands else "ours")
    import_lerobot(named, tmp_path / "out", dataset="ours", source=source, robot=None)
    assert len(LeRobotDataset.open(tmp_path / "out").rows) == 2


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_a_result_that_refers_is_taken_over_with_the_files_it_was(
    s3: s3fs.S3FileSystem, toy: Converted, v30: Path, tmp_path: Path, version: str
) -> None:
    s3.put(str(toy.root if version == "v21" else v30), f"{BUCKET}/ours", recursive=True)
    source = LeRobotSource(kind="lerobot", root=f"s3://{BUCKET}/ours")
    import_lerobot(str(source.root), tmp_path / "first", dataset="ours", source=source, robot=None)
    file = f"{BUCKET}/ours/{LeRobotDataset.open(tmp_path / 'first').info.data_file(0)}"
    s3.pipe(file, s3.cat(file)[::-1])
    import_lerobot(tmp_path / "first", tmp_path / "second", dataset="ours", source=source, robot=None)
    assert read_json(tmp_path / "first" / REMOTE) == read_json(tmp_path / "second" / REMOTE), "not pinned anew"
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match="not the one that was taken over"):
        import_lerobot(tmp_path / "first", tmp_path / "second", dataset="ours", source=source, robot=None)


def test_a_changed_file_is_noticed(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    s3.pipe(f"{BUCKET}/a/one", b"first")
    url = f"s3://{BUCKET}/a"
    folder = RemoteFolder(url)
    was = folder.describe("one")
    assert was.size == 5 and was.version and folder.listing() == {"one": was}
    assert folder.fetch("one").read_bytes() == b"first"
    s3.pipe(f"{BUCKET}/a/one", b"other")  # of the same length
    assert folder.fetch("one").read_bytes() == b"first", "this process has it already"
    assert RemoteFolder(url, {"one": was}).fetch("one").read_bytes() == b"first", "the very version that is wanted"
    assert RemoteFolder(url).fetch("one").read_bytes() == b"other"
    pinned = RemoteFolder(url, {"one": was})
    assert pinned.fetch("one").read_bytes() == b"first", "another reader's version is another file"
    pinned.fetch("one").unlink()
    with pytest.raises(DataError, match="not the one that was taken over") as told:
        pinned.fetch("one")
    assert "prts convert" in str(told.value.cure)
    path = RemoteFolder(url).fetch("one")
    path.write_bytes(b"cut")  # as by a disk that lost the end
    assert RemoteFolder(url).fetch("one").read_bytes() == b"other"


def test_metadata_that_changes_does_not_change_under_a_reader(s3: s3fs.S3FileSystem, toy: Converted) -> None:
    s3.put(str(toy.root), f"{BUCKET}/ours", recursive=True)
    before = LeRobotDataset.open(f"s3://{BUCKET}/ours", np.array([1]))  # its lines are read when somebody asks
    file = f"{BUCKET}/ours/meta/episodes.jsonl"
    s3.pipe(file, s3.cat(file).splitlines()[0])
    assert len(LeRobotDataset.open(f"s3://{BUCKET}/ours").rows) == 1
    assert len(before.rows) == 6


def test_the_cache_is_bounded_and_the_least_used_leaves(
    s3: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "_KEEP_S", 0.0)
    for number in range(12):
        s3.pipe(f"{BUCKET}/b/{number}", bytes(1000))
    folder = RemoteFolder(f"s3://{BUCKET}/b", gib=5000 / 2**30)
    for number in range(12):
        folder.fetch(str(number))
        folder.fetch("0")  # used again and again: it stays
        kept = [path for path in folder.root.iterdir() if path.is_file()]
        assert sum(path.stat().st_size for path in kept) <= 5000
    assert {"0", "11"} <= {path.name.rpartition("-")[2] for path in kept}
    assert {len(path.name) for path in (folder.root / ".locks").iterdir()} == {2}, "at most 256 of them"
    under_way, cut = folder.root / ".x.partial-1", folder.root / ".y.partial-1"
    for path, age in ((under_way, 60), (cut, 7200)):
        path.write_bytes(bytes(1000))
        os.utime(path, (time.time() - 7200, time.time() - age))
    s3.pipe(f"{BUCKET}/b/more", bytes(4500))
    folder.fetch("more")
    assert under_way.exists() and not cut.exists()
    s3.pipe(f"{BUCKET}/b/large", bytes(6000))
    with pytest.raises(ConfigError, match="larger than the whole cache") as told:
        folder.fetch("large")
    assert "PRTS_CACHE_GIB" in str(told.value.cure)


def read_all(url: str, order: list[int], gib: float) -> int:
    object_storage._KEEP_S = 0.5
    folder, total = RemoteFolder(url, gib=gib), 0
    for number in order:
        data = folder.fetch(str(number)).read_bytes()
        assert data == bytes([number]) * 2000, "a half file"
        total += len(data)
    return total


def test_several_processes_share_it(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    for number in range(10):
        s3.pipe(f"{BUCKET}/c/{number}", bytes([number]) * 2000)
    rng, url = np.random.default_rng(0), f"s3://{BUCKET}/c"
    orders = [rng.permutation(10).tolist() for _ in range(3)]
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        done = pool.starmap(read_all, [(url, order, 12_000 / 2**30) for order in orders])
    assert done == [20_000] * 3
    assert not list((tmp_path / "cache").rglob("*.partial-*"))


def forked(folder: RemoteFolder, answer: multiprocessing.Queue) -> None:
    answer.put(folder.fetch("two").read_bytes())


def test_after_a_fork(s3: s3fs.S3FileSystem) -> None:
    """As workers of a data loader have it: the parent has read from the store before."""
    for name in ("one", "two"):
        s3.pipe(f"{BUCKET}/d/{name}", name.encode())
    folder = RemoteFolder(f"s3://{BUCKET}/d")
    assert folder.fetch("one").read_bytes() == b"one"
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=forked, args=(folder, answer))
    child.start()
    assert answer.get(timeout=30) == b"two"
    child.join(10)


def test_errors_say_what_to_do(s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="bucket does not exist") as told:
        LeRobotDataset.open("s3://no-such-bucket/ours")
    assert "bucket" in str(told.value.cure)
    with pytest.raises(DataError, match="missing in object storage") as told:
        LeRobotDataset.open(f"s3://{BUCKET}/nothing")
    assert f"s3://{BUCKET}/nothing/meta/info.json" in str(told.value)
    for wrong in ("ftp://x/y", f"s3://user:word@{BUCKET}/x", "https://x/y?signature=1"):
        with pytest.raises(ConfigError) as refused:
            RemoteFolder(wrong)
        assert "word" not in str(refused.value)
    monkeypatch.setenv("PRTS_CACHE_GIB", "lots")
    with pytest.raises(ConfigError, match="no such size"):
        RemoteFolder(f"s3://{BUCKET}/x")


class Cut(http.server.BaseHTTPRequestHandler):
    """Promises more than it sends."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"x" * 500)
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None: ...


class Unlisted(http.server.SimpleHTTPRequestHandler):
    """As a bucket that does not list: what is not there is refused. Says neither size nor version."""

    protocol_version = "HTTP/1.0"

    def send_header(self, keyword: str, value: str) -> None:
        if keyword not in ("Content-Length", "Last-Modified"):
            super().send_header(keyword, value)

    def send_error(self, code: int, *args: object, **more: object) -> None:
        super().send_error(403 if code == 404 else code)

    def log_message(self, *args: object) -> None: ...


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def serve() -> Iterator:
    servers = []

    def started(handler: type | functools.partial) -> str:
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))  # type: ignore[arg-type]
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield started
    for one in servers:
        one.shutdown()
        one.server_close()


def test_a_cut_connection(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRTS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UnavailableError) as told:
        RemoteFolder(serve(Cut)).fetch("data/file")
    assert "again" in str(told.value.cure)
    assert not [path for path in (tmp_path / "cache").rglob("file*") if path.is_file()]
    port = free_port()
    with pytest.raises(UnavailableError, match="cannot be read"):
        RemoteFolder(f"http://127.0.0.1:{port}").fetch("data/file")


def test_a_server_that_is_gone_and_no_secret_in_words(s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(PrtsError) as told:
        LeRobotDataset.open(f"s3://{BUCKET}/ours")
    assert SECRET not in str(told.value) and "AWS_ENDPOINT_URL" in str(told.value.cure)
    assert SECRET not in object_storage._said(OSError(f"signed with {SECRET}"))


@pytest.mark.parametrize("handler", [Quiet, Unlisted])
def test_over_http(
    serve, toy: Converted, v30: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: type
) -> None:
    monkeypatch.setenv("PRTS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(v30, tmp_path / "www")
    (tmp_path / "www/meta/contract.json").unlink()
    url = serve(functools.partial(handler, directory=str(tmp_path / "www")))
    there, ours = LeRobotDataset.open(url), LeRobotDataset.open(toy.root)
    assert there.rows == ours.rows
    assert np.array_equal(there.frames(5, TOP, [0, 7]), ours.frames(5, TOP, [0, 7]))


def test_a_remote_file_is_what_the_store_says() -> None:
    described = object_storage._described({"size": 3, "ETag": '"abc"'})
    assert described == RemoteFile(3, "abc")
    assert object_storage._described({"size": None}) == RemoteFile(0, "")
    assert os.environ.get("PRTS_CACHE_GIB") is None
