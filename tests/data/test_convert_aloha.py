"""ALOHA files: raw and compressed pictures, depth, attributes; determinism and resume by the command line; refusals."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from prts_core.cli.main import main
from prts_core.config.checked_yaml import check
from prts_core.config.mapping import Mapping, load_mapping
from prts_core.config.schema import VideoConfig
from prts_core.data.convert.run import convert
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import validate_dataset
from prts_core.io.errors import ConfigError, DataError
from prts_core.store.listing import digest_tree, list_files

ALOHA = Path(__file__).parents[2] / "configs/mappings/aloha.yaml"
CAMERAS = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
HEIGHT, WIDTH = 24, 32


def jpeg(picture: np.ndarray) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=95, subsampling=0)
    return np.frombuffer(out.getvalue(), np.uint8)


def write_episode(
    path: Path, seed: int, rows: int = 12, form: str = "raw", size: tuple[int, int] = (HEIGHT, WIDTH)
) -> None:
    """form: raw, padded (one length, as ALOHA compresses) or own (each its own length)."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["sim"], file.attrs["compress"] = False, form != "raw"
        for key in ("observations/qpos", "observations/qvel", "observations/effort", "action"):
            file[key] = rng.normal(size=(rows, 14)).astype(np.float32)
        for number, camera in enumerate(CAMERAS):
            frames = np.zeros((rows, *size, 3), np.uint8)
            frames[..., number % 3] = 40 + 10 * np.arange(rows)[:, None, None]
            key = f"observations/images/{camera}"
            if form == "raw":
                file[key] = frames
                continue
            packed = [jpeg(frame) for frame in frames]
            if form == "own":
                data = file.create_dataset(key, (rows,), h5py.vlen_dtype(np.uint8))
                for row, raw in enumerate(packed):
                    data[row] = raw
            else:
                longest = max(map(len, packed)) + 7
                file[key] = np.stack([np.pad(raw, (0, longest - len(raw))) for raw in packed])
        file["observations/images_depth/cam_high"] = rng.integers(300, 4000, (rows, 6, 8), dtype=np.uint16)


def write_all(folder: Path, count: int = 3, **how: Any) -> Path:
    for number in range(count):
        write_episode(folder / f"episode_{number}.hdf5", number, rows=10 + number % 3, **how)
    return folder


def run(root: Path, folder: Path, mapping: Mapping | None = None, workers: int = 1) -> Path:
    convert(
        root,
        folder / "made",
        folder / "work",
        mapping=mapping or load_mapping(ALOHA),
        dataset="made",
        robot=None,
        video=VideoConfig(),
        workers=workers,
    )
    return folder / "made"


@pytest.mark.parametrize("form", ["raw", "padded", "own"])
def test_values_and_pictures(tmp_path: Path, form: str) -> None:
    root = write_all(tmp_path / "raw", 11 if form == "raw" else 2, form=form)
    dataset = LeRobotDataset.open(run(root, tmp_path))
    files = [row.source["file"] for row in dataset.rows if row.source]
    assert files == [f"episode_{number}.hdf5" for number in range(len(files))], "episode_10 comes after episode_9"
    with h5py.File(root / "episode_1.hdf5") as file:
        assert np.array_equal(dataset.states(1), file["observations/qpos"][:])
        assert np.array_equal(dataset.actions(1), file["action"][:])
        efforts = dataset.columns(1, ["observation.effort"])["observation.effort"]
        assert np.array_equal(efforts, file["observations/effort"][:])
    for number, camera in enumerate(CAMERAS):
        frames = dataset.frames(1, f"observation.images.{camera}").astype(int)
        expected = np.zeros_like(frames)
        expected[..., number % 3] = 40 + 10 * np.arange(len(frames))[:, None, None]
        assert np.abs(frames - expected).max() < 14, camera
    assert dataset.fps == 50 and dataset.rows[0].model_dump()["sim"] is False
    assert dataset.contract.embodiment == "aloha" and dataset.contract.state[6].name == "left_gripper"
    if form == "raw":
        report = validate_dataset(dataset.root)
        assert report.ok, report.markdown()


def test_pictures_that_opencv_compressed_and_depth(tmp_path: Path) -> None:
    mapping = check(
        Mapping,
        {
            "name": "m",
            "source": "aloha",
            "fps": 50,
            "task": "transfer",
            "state": [{"key": "observations/qpos"}],
            "action": [{"key": "action"}],
            "cameras": {"high": {"key": "observations/images/cam_high", "channels": "bgr", "store": "image"}},
            "depth": {"high": {"key": "observations/images_depth/cam_high"}},
        },
        "here",
    )
    root = write_all(tmp_path / "raw", 1, form="padded")
    dataset = LeRobotDataset.open(run(root, tmp_path, mapping))
    assert dataset.frames(0, "observation.images.high", [3])[0].mean((0, 1)).argmax() == 2, "red becomes blue"
    with h5py.File(root / "episode_0.hdf5") as file:
        depth = file["observations/images_depth/cam_high"][:]
    assert np.array_equal(dataset.depth(0, "observation.depth.high"), depth)


def test_workers_do_not_show(tmp_path: Path) -> None:
    root = write_all(tmp_path / "raw", 6, form="padded")
    one, three = (run(root, tmp_path / str(workers), workers=workers) for workers in (1, 3))
    rows = [[f.row for f in list_files(folder)] for folder in (one, three)]
    assert rows[0] == rows[1] and len(rows[0]) > 6 * 5


def command(root: Path, to: Path, *more: str) -> list[str]:
    return ["convert", "--source", "aloha", "--mapping", str(ALOHA), "--from", str(root), "--to", str(to), *more]


def test_a_bad_episode_keeps_what_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = write_all(tmp_path / "raw", 4, form="padded")
    with h5py.File(root / "episode_3.hdf5", "r+") as file:
        file["observations/images/cam_low"][5, :40] = 0
    before = digest_tree(root)
    assert main(command(root, tmp_path / "made", "--workers", "1")) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "cannot be decoded" in told and "episode_3.hdf5" in told and "cam_low, row 5" in told, told
    assert digest_tree(root) == before and not (tmp_path / "made/meta").exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*.mp4") if "00003" not in path.name}
    assert len(kept) == 12
    (root / "episode_3.hdf5").unlink()
    assert main(command(root, tmp_path / "made")) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert len(LeRobotDataset.open(tmp_path / "made").rows) == 3
    everything = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*.mp4")}
    assert main(command(root, tmp_path / "made")) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in everything.items()), "the second run does nothing"


def change(name: str) -> Any:
    def cut(root: Path) -> None:
        path = root / "episode_1.hdf5"
        path.write_bytes(path.read_bytes()[:3000])

    def other_size(root: Path) -> None:
        write_episode(root / "episode_1.hdf5", 1, size=(HEIGHT, WIDTH + 2))

    def short(root: Path) -> None:
        with h5py.File(root / "episode_1.hdf5", "r+") as file:
            del file["observations/qpos"]
            file["observations/qpos"] = np.zeros((5, 14), np.float32)

    def no_action(root: Path) -> None:
        with h5py.File(root / "episode_1.hdf5", "r+") as file:
            del file["action"]

    def not_finite(root: Path) -> None:
        with h5py.File(root / "episode_1.hdf5", "r+") as file:
            file["action"][4, 2] = np.inf

    def no_camera(root: Path) -> None:
        with h5py.File(root / "episode_1.hdf5", "r+") as file:
            del file["observations/images/cam_low"]

    def linked(root: Path) -> None:
        with h5py.File(root / "episode_1.hdf5", "r+") as file:
            del file["observations/qvel"]
            file["observations/qvel"] = h5py.ExternalLink("/etc/passwd", "/x")

    def empty(root: Path) -> None:
        shutil.rmtree(root)
        root.mkdir()

    return locals()[name]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("cut", ["truncated or damaged", "episode_1.hdf5"]),
        ("other_size", ["differ in width", "(24, 34, 3)", "(24, 32, 3)", "episode_0.hdf5"]),
        ("short", ["differ in length", "5 rows", "11 rows, as action has"]),
        ("no_action", ["lacks a part of the ALOHA layout", "/action"]),
        ("not_finite", ["not finite", "row 4, dimension 2", "inf", "episode_1.hdf5"]),
        ("no_camera", ["lacks a key", "observations/images/cam_low"]),
        ("linked", ["lacks a key", "observations/qvel"]),
        ("empty", ["no training recordings"]),
    ],
)
def test_bad_files(tmp_path: Path, damage: str, words: list[str]) -> None:
    root = write_all(tmp_path / "raw")
    change(damage)(root)
    before = digest_tree(root)
    with pytest.raises(DataError) as error:
        run(root, tmp_path)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value) and digest_tree(root) == before and not (tmp_path / "made/meta").exists()


def test_an_instruction_is_needed(tmp_path: Path) -> None:
    root = write_all(tmp_path / "raw", 1)
    silent = tmp_path / "silent.yaml"
    silent.write_text("".join(line for line in ALOHA.read_text().splitlines(True) if not line.startswith("task:")))
    with pytest.raises(DataError, match=r"no instruction.*episode_0\.hdf5.*`task` in the mapping"):
        run(root, tmp_path, load_mapping(silent))
    with h5py.File(root / "episode_0.hdf5", "r+") as file:
        file.attrs["task"] = "hand over"
    assert LeRobotDataset.open(run(root, tmp_path, load_mapping(silent))).tasks == {0: "hand over"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--source", "alohaa"], ["did you mean 'aloha'", "robomimic", "lerobot_v21"]),
        (["--source", "robomimic"], ["another kind of recording", "found: aloha"]),
        (["--source", "lerobot_v21"], ["says itself what its numbers mean"]),
        (["--from", "nowhere"], ["no such recording"]),
        (["--to", "raw/inside"], ["lie in each other"]),
        (["--to", "theirs"], ["did not make"]),
        (["--set", "video.crff=3"], ["did you mean 'crf'"]),
        (["--set", "sft.steps=3"], ["only video settings"]),
        (["--format", "v3.0"], ["lerobot_v21, without --mapping"]),
    ],
)
def test_the_command_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_all(Path("raw"), 1)
    Path("theirs").mkdir()
    Path("theirs/precious").write_text("x")
    before = digest_tree(tmp_path)
    assert main([*command(Path("raw"), Path("to")), *arguments]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert all(word.lower() in told.lower() for word in words), told
    assert digest_tree(tmp_path) == before


def test_the_command_takes_video_settings_and_whole_datasets(tmp_path: Path) -> None:
    root = write_all(tmp_path / "raw", 1)
    main(command(root, tmp_path / "av1", "--set", "video.codec=libsvtav1", "--set", "video.preset=12"))
    feature = LeRobotDataset.open(tmp_path / "av1").info.features["observation.images.cam_high"]
    assert feature.info is not None and feature.info["video.codec"] == "av1"
    taken = ["convert", "--source", "lerobot_v21", "--from", str(tmp_path / "av1"), "--to", str(tmp_path / "copy")]
    assert main(taken) == 0
    ours, theirs = (
        {
            entry["path"]: entry["sha256"]
            for entry in [f.row for f in list_files(tmp_path / name)]
            if not entry["path"].startswith("meta/")
        }
        for name in ("av1", "copy")
    )
    assert ours == theirs and (tmp_path / "copy/meta/contract.json").is_file()


def test_a_mapping_is_needed(tmp_path: Path) -> None:
    root = write_all(tmp_path / "raw", 1)
    from prts_core.cli import convert as tool
    from prts_core.cli.main import build_parser

    args = build_parser("convert").parse_args(
        ["convert", "--source", "aloha", "--from", str(root), "--to", str(tmp_path / "to")]
    )
    with pytest.raises(ConfigError, match="configs/mappings"):
        tool.main(args)
