"""robomimic and LIBERO files by a mapping: values, conventions, units, stills; refusals name what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.mapping import Mapping, load_mapping
from prts_core.config.schema import RobotConfig, VideoConfig
from prts_core.contract import Contract
from prts_core.data.convert.run import convert
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import validate_dataset
from prts_core.io.errors import ConfigError, ContractError, DataError
from prts_core.io.files import read_json
from prts_core.store.listing import digest_tree

CONFIGS = Path(__file__).parents[2] / "configs"
ROWS, SIZE = 9, 32


def arrays(seed: int, rows: int) -> dict[str, np.ndarray]:
    """One demonstration with robosuite's key names and pictures that are told apart by where they are bright."""
    rng = np.random.default_rng(seed)
    quaternion = rng.normal(size=(rows, 4))
    pictures = np.zeros((rows, SIZE, SIZE, 3), np.uint8)
    pictures[:, : SIZE // 2, :, 0] = 240  # red above
    return {
        "actions": np.c_[rng.uniform(-1, 1, (rows, 6)), np.where(np.arange(rows) > rows // 2, 1.0, -1.0)],
        "rewards": (np.arange(rows) == rows - 1).astype(float),
        "dones": np.zeros(rows, np.int64),
        "states": rng.normal(size=(rows, 5)),
        "obs/ee_pos": rng.normal(size=(rows, 3)),
        "obs/ee_ori": rng.normal(size=(rows, 3)),
        "obs/gripper_states": rng.uniform(0, 0.04, (rows, 2)),
        "obs/robot0_eef_pos": rng.normal(size=(rows, 3)),
        "obs/robot0_eef_quat": quaternion / np.linalg.norm(quaternion, axis=1, keepdims=True),
        "obs/robot0_gripper_qpos": rng.uniform(0, 0.04, (rows, 2)),
        "obs/agentview_rgb": pictures,
        "obs/eye_in_hand_rgb": pictures[:, ::-1].copy(),
        "obs/agentview_image": pictures,
        "obs/robot0_eye_in_hand_image": pictures,
        "obs/depth": np.full((rows, 8, 10), 0.7, np.float32),
    }


def write_demos(folder: Path, count: int = 3, change: Any = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, sentence in (("open_drawer", "open the drawer"), ("close_drawer", "close the drawer")):
        with h5py.File(folder / f"{name}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": sentence})
            data.attrs["env_args"] = json.dumps({"env_name": "x", "env_kwargs": {"control_freq": 20}})
            for number in range(count):
                made = arrays(number, ROWS + number)
                if change is not None:
                    change(made)
                for key, value in made.items():
                    data[f"demo_{number}/{key}"] = value
            file["mask/train"] = np.array([b"demo_0", b"demo_2"])
    return folder


def libero_robot() -> RobotConfig:
    path = CONFIGS / "robots/libero_panda.yaml"
    return check(RobotConfig, read_yaml(path), path)


def run(root: Path, folder: Path, mapping: Mapping, robot: RobotConfig | None = None, workers: int = 1) -> Path:
    convert(
        root,
        folder / "made",
        folder / "work",
        mapping=mapping,
        dataset="made",
        robot=robot,
        video=VideoConfig(),
        workers=workers,
    )
    return folder / "made"


def mapped(**changes: Any) -> Mapping:
    """A small mapping of these recordings with `changes` laid over it."""
    raw = {
        "name": "small",
        "source": "robomimic",
        "state": [{"key": "obs/ee_pos"}],
        "action": [{"key": "actions"}],
    }
    return check(Mapping, raw | changes, "here")


def test_libero(tmp_path: Path) -> None:
    root = write_demos(tmp_path / "raw")
    made = run(root, tmp_path, load_mapping(CONFIGS / "mappings/libero.yaml"), libero_robot())
    dataset = LeRobotDataset.open(made)
    assert [row.tasks[0] for row in dataset.rows] == ["close the drawer"] * 3 + ["open the drawer"] * 3
    assert dataset.fps == 20 and dataset.episodes("train") == list(range(6))
    raw = arrays(1, ROWS + 1)
    state = np.concatenate([raw["obs/ee_pos"], raw["obs/ee_ori"], raw["obs/gripper_states"]], 1)
    assert np.array_equal(dataset.states(1), state.astype(np.float32))
    assert np.array_equal(dataset.actions(1), raw["actions"].astype(np.float32))
    picture = dataset.frames(1, "observation.images.image", [0])[0]
    assert picture[-4:].mean((0, 1))[0] > 150 > 90 > picture[:4].mean((0, 1))[0]  # rotate: 180
    contract = Contract.load(made / "meta/contract.json")
    assert (contract.rotation, contract.gripper) == ("axis-angle", "-1 opens, +1 closes")
    assert contract.state[0].name == "hand_x" and contract.action[0].relative
    assert validate_dataset(made).ok


def test_conventions_units_and_order(tmp_path: Path) -> None:
    mapping = load_mapping(CONFIGS / "mappings/robomimic.yaml")
    root = write_demos(tmp_path / "raw")
    dataset = LeRobotDataset.open(run(root, tmp_path, mapping))
    raw = arrays(0, ROWS)
    angle = 2 * np.arccos(np.clip(np.abs(raw["obs/robot0_eef_quat"][:, 3]), 0, 1))  # x, y, z, w
    assert np.allclose(np.linalg.norm(dataset.states(0)[:, 3:6], axis=1), angle, atol=1e-4)
    assert dataset.contract.rotation == "axis-angle" and dataset.contract.embodiment == "made"
    assert dataset.columns(0, ["next.reward"])["next.reward"].tolist() == [0.0] * (ROWS - 1) + [1.0]
    assert {row.tasks[0] for row in dataset.rows} == {"lift the cube"}

    other = mapped(
        state=[{"key": "obs/ee_pos", "order": [2, 0], "source_unit": "m", "unit": "mm", "names": ["up", "along"]}],
        action=[
            {"key": "actions", "slice": [0, 3]},
            {
                "key": "actions",
                "slice": [6, 7],
                "source_gripper": {"open": -1, "closed": 1},
                "gripper": {"open": 1, "closed": 0},
            },
        ],
        options={"filter": "train"},
        heldout_episodes=1,
    )
    dataset = LeRobotDataset.open(run(root, tmp_path / "other", other))
    assert np.allclose(dataset.states(0), raw["obs/ee_pos"][:, [2, 0]] * 1000, rtol=1e-6)
    assert np.allclose(dataset.actions(0)[:, 3], np.where(raw["actions"][:, 6] < 0, 1, 0))
    assert [(dim.name, dim.unit) for dim in dataset.contract.state] == [("up", "mm"), ("along", "mm")]
    assert dataset.contract.gripper == "+1 opens, 0 closes"
    assert [row.source["demo"] for row in dataset.rows if row.source] == ["demo_0", "demo_2"] * 2
    assert dataset.episodes("heldout") == [3]


def test_stills_and_depth_are_kept_without_loss(tmp_path: Path) -> None:
    def grain(made: dict[str, np.ndarray]) -> None:
        rng = np.random.default_rng(1)
        made["obs/agentview_rgb"] = rng.integers(0, 256, made["obs/agentview_rgb"].shape, dtype=np.uint8)
        made["obs/depth"][0, 2:4, 1] = np.nan, 3.0

    root = write_demos(tmp_path / "raw", count=1, change=grain)
    mapping = mapped(
        cameras={"front": {"key": "obs/agentview_rgb", "store": "image", "channels": "bgr", "rotate": 90}},
        depth={"front": {"key": "obs/depth", "source_unit": "m"}},
    )
    made = run(root, tmp_path, mapping)
    dataset = LeRobotDataset.open(made)
    with h5py.File(root / "close_drawer_demo.hdf5") as file:
        frames = file["data/demo_0/obs/agentview_rgb"][:]
    stored = dataset.frames(0, "observation.images.front")
    assert np.array_equal(stored, np.rot90(frames[..., ::-1], axes=(1, 2)))
    depth = dataset.depth(0, "observation.depth.front")
    assert depth.dtype == np.uint16 and depth.shape == (ROWS, 8, 10)
    assert depth[0, 2, 1] == 0 and depth[0, 3, 1] == 3000 and depth[5, 5, 5] == 700
    assert dataset.camera_keys == ["observation.images.front"], "depth is no picture for a policy"
    feature = read_json(made / "meta/info.json")["features"]["observation.depth.front"]
    assert feature["shape"] == [8, 10, 1] and feature["info"]["depth.unit"] == "mm"
    report = validate_dataset(made)
    assert report.ok, report.markdown()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": [{"key": "obs/ee_position"}]}, ["did you mean 'obs/ee_pos'", "obs/ee_ori float64[3]", "state[0]"]),
        ({"state": [{"key": "obs/ee_pos", "width": 4}]}, ["3 wide, and the mapping says 4"]),
        ({"state": [{"key": "obs/ee_pos", "slice": [0, 4]}]}, ["3 wide, and slice [0, 4] goes beyond"]),
        ({"state": [{"key": "obs/ee_pos", "order": [3]}]}, ["order [3] goes beyond"]),
        ({"state": [{"key": "obs/ee_pos", "rotation": "6d"}]}, ["6d has 6 numbers, and 3 of obs/ee_pos are taken"]),
        ({"state": [{"key": "obs/ee_pos", "source_unit": "inch", "unit": "m"}]}, ["'inch' cannot become 'm'", "mm"]),
        ({"state": [{"key": "obs/ee_pos", "names": ["x"]}]}, ["1 names for 3 numbers"]),
        ({"state": [{"key": "obs/agentview_rgb"}]}, ["numbers[width] are needed", "uint8[32, 32, 3]"]),
        ({"cameras": {"a": {"key": "obs/depth"}}}, ["observation.images.a needs uint8", "float32[8, 10]"]),
        ({"depth": {"a": {"key": "obs/agentview_rgb"}}}, ["depth needs numbers[height, width]"]),
        ({"columns": {"timestamp": {"key": "rewards"}}}, ["belongs to the dataset itself"]),
        ({"heldout_episodes": 6}, ["hold out", "0 to 5"]),
        ({"options": {"filtre": "train"}}, ["did you mean 'filter'"]),
        ({"options": {"filter": "valid"}}, ["/mask/valid", "train"]),
    ],
)
def test_mappings_that_do_not_fit(tmp_path: Path, changes: dict, words: list[str]) -> None:
    root = write_demos(tmp_path / "raw", count=1 if "heldout_episodes" not in changes else 3)
    before = digest_tree(root)
    with pytest.raises((DataError, ConfigError)) as error:
        run(root, tmp_path, mapped(**changes))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value) and digest_tree(root) == before and not (tmp_path / "made").exists()


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"state\[0\].*action\[0\].*cameras\.top"):
        run(
            write_demos(tmp_path / "raw", count=1),
            tmp_path,
            mapped(state=[{"key": "a"}], action=[{"key": "b"}], cameras={"top": {"key": "c"}}),
        )


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"key": "obs/ee_pos", "order": [0, 1, 2, 2], "rotation": "quaternion-wxyz"}, ["row 0", "length 1", "demo_0"]),
        ({"key": "obs/ee_pos", "slice": [0, 1], "gripper": {"open": 0.08, "closed": 0}}, ["0 to 0.08", "data/demo_0"]),
    ],
)
def test_numbers_that_contradict_the_mapping(tmp_path: Path, part: dict, words: list[str]) -> None:
    root = write_demos(tmp_path / "raw", count=1)
    with pytest.raises(DataError, match="contradicts the convention") as error:
        run(root, tmp_path, mapped(state=[part]))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_depth_that_does_not_fit(tmp_path: Path) -> None:
    root = write_demos(tmp_path / "raw", count=1, change=lambda made: made["obs/depth"].__setitem__((3, 0, 0), 70.0))
    with pytest.raises(DataError, match=r"row 3.*700.* to 70000 mm.*0 to 65535 mm"):
        run(root, tmp_path, mapped(depth={"a": {"key": "obs/depth", "source_unit": "m"}}))


def test_robot_and_mapping_that_disagree(tmp_path: Path) -> None:
    root = write_demos(tmp_path / "raw", count=1)
    action = [{"key": "actions", "slice": [0, 6]}, {"key": "actions", "slice": [6, 7]}]
    state = [{"key": "obs/ee_pos", "names": ["x", "y", "z"]}, {"key": "obs/ee_ori"}, {"key": "obs/gripper_states"}]
    with pytest.raises(ContractError, match=r"state\[0\]\.name.*'x' in the mapping, 'hand_x'"):
        run(root, tmp_path, mapped(state=state, action=action), libero_robot())
    state[0] = {"key": "obs/ee_pos", "unit": "mm"}
    with pytest.raises(ContractError, match=r"'mm' in the mapping, 'm'"):
        run(root, tmp_path, mapped(state=state, action=action), libero_robot())
    state[0] = {"key": "obs/ee_pos"}
    action[1]["gripper"] = {"open": 1, "closed": -1}  # type: ignore[assignment]
    with pytest.raises(ContractError, match=r"\+1 opens, -1 closes.*-1 opens, \+1 closes"):
        run(root, tmp_path, mapped(state=state, action=action), libero_robot())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"state": [{"key": "a", "rotation": "euler"}]}, ["state.0.rotation", "'rpy'"]),
        ({"state": [{"key": "a", "slice": [0, 1], "order": [0]}]}, ["slice or order"]),
        ({"state": [{"key": "a", "source_gripper": {"open": 0, "closed": 1}}]}, ["say with gripper"]),
        ({"action": [{"key": "a", "gripper": {"open": 1, "closed": 1}}]}, ["different values"]),
        ({"state": []}, ["at least one part"]),
        ({"camera": {}}, ["did you mean 'cameras'"]),
        ({"fps": -1}, ["above 0"]),
        ({"cameras": {"../top": {"key": "x"}}}, ["file name", "../top"]),
    ],
)
def test_mapping_files_are_checked(tmp_path: Path, change: dict, words: list[str]) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(
        json.dumps({"name": "m", "source": "robomimic", "state": [{"key": "a"}], "action": [{"key": "a"}]} | change)
    )
    with pytest.raises(ConfigError) as error:
        load_mapping(path)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_every_mapping_of_ours_is_read() -> None:
    for path in (CONFIGS / "mappings").glob("*.yaml"):
        assert load_mapping(path).name == path.stem


def test_other_settings_are_another_conversion(tmp_path: Path) -> None:
    """A record of an episode counts only for the mapping, the video settings and the file that it was made with."""
    root = write_demos(tmp_path / "raw", count=1)
    mapping = mapped(state=[{"key": "obs/ee_pos", "slice": [0, 2]}])
    first = LeRobotDataset.open(run(root, tmp_path, mapping)).states(0)
    second = LeRobotDataset.open(run(root, tmp_path, mapped(state=[{"key": "obs/ee_pos", "slice": [1, 3]}]))).states(0)
    assert np.array_equal(first[:, 1], second[:, 0]) and not np.array_equal(first, second)
    with h5py.File(root / "close_drawer_demo.hdf5", "r+") as file:
        file["data/demo_0/obs/ee_pos"][0] = 7.0
    third = LeRobotDataset.open(run(root, tmp_path, mapped(state=[{"key": "obs/ee_pos", "slice": [1, 3]}]))).states(0)
    assert (third[0] == 7.0).all() and np.array_equal(third[1:], second[1:])
