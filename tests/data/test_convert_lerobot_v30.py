"""LeRobot v2.1 to v3.0 and back: equal rows, equal packets, equal words; what breaks the layout is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prts_core.config.places import shared_folder
from prts_core.config.schema import VideoConfig
from prts_core.data.convert.lerobot_v30 import import_dataset
from prts_core.data.convert.lerobot_v30_export import export
from prts_core.data.convert.remux import Piece, cut, join
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.lerobot_v21.seal import SEAL, compare, read_seal
from prts_core.io.errors import DataError
from prts_core.io.files import read_json, read_jsonl, write_json
from prts_core.store.listing import digest_tree
from tests.data.conftest import Converted

SMALL = {"data_mb": 0.004, "video_mb": 0.004}  # several files of each kind, even of toys


def packets(path: Path) -> list[tuple]:
    with av.open(str(path)) as container:
        return [(bytes(p), p.pts, p.dts, p.is_keyframe, p.time_base) for p in container.demux(video=0) if p.size]


def back(v30: Path, folder: Path, workers: int = 2) -> LeRobotDataset:
    import_dataset(v30, folder / "back", folder / "back_work", dataset="toy", robot=None, workers=workers)
    return LeRobotDataset.open(folder / "back")


def same(old: LeRobotDataset, new: LeRobotDataset) -> None:
    for name in ("info.json", "episodes.jsonl", "tasks.jsonl", "episodes_stats.jsonl"):
        read: Callable = read_json if name == "info.json" else read_jsonl
        assert read(old.root / "meta" / name) == read(new.root / "meta" / name), name
    for episode in old.episodes():
        assert new.table(episode).equals(old.table(episode), check_metadata=True)
        for key in old.info.video_keys:
            paths = [data.root / data.info.video_file(episode, key) for data in (old, new)]
            assert packets(paths[0]) == packets(paths[1])


@pytest.fixture(scope="module")
def v30(toy: Converted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy dataset as v3.0, in several files. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("v30")
    export(toy.root, folder / "v30", folder / "work", **SMALL)
    return folder / "v30"


def test_round_trip(toy: Converted, v30: Path, tmp_path: Path) -> None:
    assert len(list((v30 / "data").rglob("*.parquet"))) > 1
    assert len(list((v30 / "videos").rglob("*.mp4"))) > 2
    made = back(v30, tmp_path)
    same(LeRobotDataset.open(toy.root), made)
    assert made.contract == toy.contract  # carried along, with units that no other file knows
    assert made.rows[0].seed is not None and made.rows[0].spans[0].action_text == "reach it"


def test_g1_bottle_round_trip(tmp_path: Path) -> None:
    root = shared_folder() / "data/g1_bottle"
    if not root.is_dir():
        pytest.skip("g1_bottle is not on this machine ($PRTS_SHARED)")
    export(root, tmp_path / "v30", tmp_path / "work")
    same(LeRobotDataset.open(root), back(tmp_path / "v30", tmp_path))


def test_layout(v30: Path) -> None:
    sealed = read_seal(v30)
    assert sealed is not None and list(compare(v30, sealed)) == []
    info = read_json(v30 / "meta/info.json")
    assert info["codebase_version"] == "v3.0" and "total_videos" not in info
    episodes = pa.concat_tables(pq.read_table(path) for path in sorted((v30 / "meta/episodes").glob("*/*.parquet")))
    assert len(set(episodes.column("data/file_index").to_pylist())) > 1
    for row in episodes.to_pylist():
        file = info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
        inside = pq.read_table(v30 / file).filter(pa.compute.field("episode_index") == row["episode_index"])
        assert inside.column("index").to_pylist() == list(range(row["dataset_from_index"], row["dataset_to_index"]))
        key = "observation.images.top"
        span = row[f"videos/{key}/to_timestamp"] - row[f"videos/{key}/from_timestamp"]
        assert span == pytest.approx(row["length"] / info["fps"])
    pooled = read_json(v30 / "meta/stats.json")["action"]
    actions = np.concatenate([np.stack(pq.read_table(p).column("action").to_pylist()) for p in data_files(v30)])
    assert np.allclose(pooled["mean"], actions.mean(0)) and np.allclose(pooled["std"], actions.std(0), atol=1e-6)
    assert pooled["count"] == [len(actions)]


def test_first_rows(toy: Converted) -> None:
    opened = LeRobotDataset.open(toy.root)
    assert opened.starts == [sum(row.length for row in opened.rows[:episode]) for episode in opened.episodes()]


def data_files(root: Path) -> list[Path]:
    return sorted((root / "data").rglob("*.parquet"))


def test_same_bytes_for_any_workers_and_after_a_cut(toy: Converted, v30: Path, tmp_path: Path) -> None:
    export(toy.root, tmp_path / "one", tmp_path / "work", workers=1, **SMALL)
    assert digest_tree(tmp_path / "one") == digest_tree(v30)
    made = back(v30, tmp_path, workers=1)
    whole, kept = digest_tree(made.root), made.root / made.info.video_file(0, made.camera_keys[0])
    stamp = kept.stat().st_mtime_ns
    (made.root / made.info.data_file(1)).unlink()  # as if killed before it was written
    (made.root / "data/chunk-000/.episode_000009.parquet.partial-1").write_text("half")
    assert digest_tree(back(v30, tmp_path, workers=3).root) == whole
    assert kept.stat().st_mtime_ns == stamp  # finished work is kept


def test_a_changed_source_is_cut_anew(v30: Path, tmp_path: Path) -> None:
    copy = unsealed(v30, tmp_path / "v30")
    made = back(copy, tmp_path)
    path = data_files(copy)[0]
    table = pq.read_table(path)
    position = table.column_names.index("next.success")
    pq.write_table(table.set_column(position, "next.success", pa.array([True] * len(table))), path)
    os.utime(path, ns=(1, 1))
    assert back(copy, tmp_path).columns(0, ["next.success"])["next.success"].all()
    assert made.root == tmp_path / "back"


def unsealed(root: Path, copy: Path) -> Path:
    shutil.copytree(root, copy)
    (copy / SEAL).unlink()
    return copy


def test_a_sealed_source_that_has_changed_is_refused(toy: Converted, v30: Path, tmp_path: Path) -> None:
    for root, work in ((toy.root, export), (v30, back)):
        copy = shutil.copytree(root, tmp_path / work.__name__)
        with data_files(copy)[0].open("ab") as file:
            file.write(b"more")
        with pytest.raises(DataError, match="since it was sealed"):
            export(copy, tmp_path / "out", tmp_path / "work") if work is export else back(copy, tmp_path)


# ---- refusals ------------------------------------------------------------------------------------------------------
def edit_info(root: Path, **changes: object) -> None:
    write_json(root / "meta/info.json", read_json(root / "meta/info.json") | changes)


def edit_episodes(root: Path, column: str, value: object) -> None:
    path = next((root / "meta/episodes").glob("*/*.parquet"))
    rows = pq.read_table(path).to_pylist()
    rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows), path)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "version": (lambda root: edit_info(root, codebase_version="v2.1"), "codebase_version"),
    "escape": (lambda root: edit_info(root, data_path="../{chunk_index}/{file_index}.parquet"), "data_path"),
    "attribute": (lambda root: edit_info(root, data_path="data/{chunk_index.__class__}.parquet"), "data_path"),
    "totals": (lambda root: edit_info(root, total_frames=1), "total_frames"),
    "gap": (lambda root: edit_episodes(root, "dataset_from_index", 3), "dataset_from_index"),
    "length": (lambda root: edit_episodes(root, "length", -1), "length"),
    "time": (lambda root: edit_episodes(root, "videos/observation.images.top/from_timestamp", 99.0), "frames"),
    "task": (lambda root: edit_episodes(root, "tasks", ["never heard of"]), "never heard of"),
    "no stats": (lambda root: edit_episodes(root, "stats/action/mean", None), "stats.action.mean"),
    "table": (lambda root: shorten(data_files(root)[0]), "table"),
    "video": (lambda root: shorten(next((root / "videos").rglob("*.mp4"))), "video"),
    "missing": (lambda root: data_files(root)[0].unlink(), "incomplete"),
    "tasks": (lambda root: (root / "meta/tasks.parquet").unlink(), "tasks.parquet"),
}


@pytest.mark.parametrize("fault", BAD)
def test_refuses(v30: Path, tmp_path: Path, fault: str) -> None:
    copy = unsealed(v30, tmp_path / "v30")
    break_it, word = BAD[fault]
    break_it(copy)
    before = digest_tree(copy)
    with pytest.raises(DataError, match=word):
        back(copy, tmp_path)
    assert digest_tree(copy) == before
    assert not (tmp_path / "back/meta/info.json").exists()


def test_export_refuses_what_is_v30_already(v30: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Only a dataset of LeRobot v2\.1"):
        export(v30, tmp_path / "again", tmp_path / "work")


def test_export_refuses_wrong_numbers(toy: Converted, tmp_path: Path) -> None:
    copy = unsealed(toy.root, tmp_path / "v21")
    path = copy / LeRobotDataset.open(copy).info.data_file(1)
    table = pq.read_table(path)
    position = table.column_names.index("index")
    pq.write_table(table.set_column(position, table.schema.field("index"), pa.array(range(len(table)))), path)
    with pytest.raises(DataError, match="numbered wrongly"):
        export(copy, tmp_path / "v30", tmp_path / "work")


# ---- packets -------------------------------------------------------------------------------------------------------
def encode(path: Path, frames: np.ndarray, **options: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("options", [{"g": "10", "bf": "3"}, {"g": "12", "bf": "2", "x264-params": "open-gop=1"}])
def test_frames_that_are_not_stored_in_order(tmp_path: Path, options: dict[str, str]) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
    parts, lengths = [tmp_path / "a.mp4", tmp_path / "b.mp4"], [40, 25]
    for path, length in zip(parts, lengths, strict=True):
        encode(path, frames[:length], **options)
    whole = tmp_path / "whole.mp4"
    join(parts, lengths, whole, 20)
    assert np.array_equal(video.decode(whole), np.concatenate([video.decode(path) for path in parts]))
    pieces = [Piece(0.0, 40, tmp_path / "a2.mp4"), Piece(2.0, 25, tmp_path / "b2.mp4")]
    cut(whole, pieces, 20)
    assert [packets(piece.output) for piece in pieces] == [packets(path) for path in parts]

    inner = [Piece(0.15, 10, tmp_path / "c.mp4")]
    with pytest.raises(DataError, match="keyframe"):
        cut(whole, inner, 20)
    cut(whole, inner, 20, VideoConfig(crf=1))
    again, wanted = video.decode(tmp_path / "c.mp4").astype(int), video.decode(whole, range(3, 13))
    assert len(again) == 10 and np.abs(again - wanted).mean() < 8


def test_a_video_of_another_length_is_refused(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", np.zeros((9, 32, 32, 3), np.uint8))
    for frames in (8, 10):
        with pytest.raises(DataError, match="one frame for each row"):
            join([tmp_path / "a.mp4"], [frames], tmp_path / "whole.mp4", 20)
    with pytest.raises(DataError, match=r"rate|one frame for each row"):
        join([tmp_path / "a.mp4"], [9], tmp_path / "whole.mp4", 30)
    assert not (tmp_path / "whole.mp4").exists()


def test_more_of_a_line_survives(toy: Converted, v30: Path) -> None:
    path = next((v30 / "meta/episodes").glob("*/*.parquet"))
    assert json.loads(pq.read_table(path).column("prts/more")[0].as_py())["source"]["demo"] == "demo_0"
