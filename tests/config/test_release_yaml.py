"""The public release's dataset YAML as it is: every field means something or is told, and the chain runs on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.load import RunPlan, load_plan, source_root
from prts_core.config.schema import RobotConfig
from prts_core.config.sources import LeRobotSource
from prts_core.data.embodiment import build_contract
from prts_core.io.errors import ConfigError, ContractError, StageError
from prts_core.stages.declarations import config_json

ROBOTS = Path(__file__).resolve().parents[2] / "configs" / "robots"
PUBLIC = """\
lerobot_datasets:
  - repo_id: lab/pour_water
    root: /data/pour_water
    state_mode: MEAN_STD
    state_relative_action: true
    embodiment_tag: arm
    train_subtask: "mixture:0.5"
    select_video_keys: [observation.images.top]
    select_state_keys: [observation.state.arm, observation.state.hand]
    select_action_keys: [action]
    load_quantile_stats: false
    weight: 2.0
  - repo_id: lab/fold
    root: ${PRTS_SHARED}/fold
    episodes: [0, 1]
    embodiment_tag: arm
  - repo_id: lab/from_the_hub
mm_datasets:
  - name: captions
    json_path: ${CAPTIONS}/captions.jsonl
    sampling_strategy: random:10%
    vision_base_path: ${CAPTIONS}/pictures
"""
ARM = "embodiment_tag: arm\nrelative: [true, true, false]\n"


def plan_of(folder: Path, public: str = PUBLIC, recipe: str = "", deploy: str = "lab__pour_water") -> RunPlan:
    files = {
        "datasets/lab.yaml": public,
        "robots/arm.yaml": ARM,
        "models/m.yaml": "name: m\nchunk_length: 5\n",
        "r.yaml": f"name: r\ndatasets: [lab]\ndeploy: {deploy}\nmodel: m\n{recipe}",
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return load_plan(folder / "r.yaml")


def test_every_field_means_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTIONS", str(tmp_path))
    (tmp_path / "captions.jsonl").write_text("{}\n")
    plan = plan_of(tmp_path)
    with pytest.warns(UserWarning) as told:
        datasets = plan.datasets
    notes = " ".join(str(note.message) for note in told)
    assert "state_mode MEAN_STD is not used" in notes and "load_quantile_stats false changes nothing" in notes
    pour, fold, hub = (datasets[f"lab__{name}"] for name in ("pour_water", "fold", "from_the_hub"))
    assert isinstance(pour.source, LeRobotSource) and isinstance(fold.source, LeRobotSource)
    assert pour.source.select_state == ("observation.state.arm", "observation.state.hand")
    assert pour.source.select_video == ("observation.images.top",) and pour.source.select_action == ("action",)
    assert pour.train_subtask == "mixture:0.5" and fold.train_subtask is False
    assert fold.source.episodes == (0, 1)
    assert isinstance(hub.source, LeRobotSource) and hub.source.repo_id == "lab/from_the_hub" and not hub.source.root
    # state_relative_action: the tag's mask where it is true, none of it where it is not
    pouring, folding = plan.robot("lab__pour_water"), plan.robot("lab__fold")
    assert pouring is not None and pouring.relative == (True, True, False)
    assert folding is not None and folding.relative == ()
    assert config_json("stats", plan, "lab__pour_water")["chunk_length"] == 5
    assert config_json("stats", plan, "lab__fold")["chunk_length"] is None
    # weights, image-text data and subtasks reach the stages
    pretrain = config_json("pretrain", plan)
    assert pretrain["mixture"] == {"lab__pour_water": 2.0, "lab__fold": 1.0, "lab__from_the_hub": 1.0}
    assert pretrain["train_subtask"] == {"lab__pour_water": "mixture:0.5"}
    captions = pretrain["image_text"]["captions"]
    assert captions["sampling_strategy"] == "random:10%"
    assert str(tmp_path) not in str(pretrain)  # no machine's paths in a configuration
    assert config_json("sft", plan, "lab__pour_water")["train_subtask"] == {"lab__pour_water": "mixture:0.5"}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("{repo_id: a, root: b, embodiement_tag: c}", "did you mean 'embodiment_tag'"),
        ("{root: b}", "repo_id"),
        ("{repo_id: a, root: b, train_subtask: 'mixture'}", r"train_subtask.*mixture:W"),
        ("{repo_id: a, root: b, state_mode: QUANTILES}", "did you mean 'QUANTILE'"),
        ("{repo_id: a, root: b, state_relative_action: true}", "embodiment_tag"),
        ("{repo_id: a, root: b, episodes: [x]}", "episodes"),
        ("{repo_id: a, root: b}, {repo_id: a, root: c}", "one name"),
    ],
)
def test_entries_are_checked(tmp_path: Path, entry: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)lab\.yaml.*{words}|{words}"):
        _ = plan_of(tmp_path, f"lerobot_datasets: [{entry}]\n", deploy="a").datasets


@pytest.mark.parametrize(
    ("public", "words"),
    [
        ("lerobot_datasets: {a: b}\n", "list is expected"),
        ("lerobot_datasets: []\nlerobot: 1\n", "Unknown key"),
        ("mm_datasets: [{name: a, json_path: b, sampling_strategy: last:3}]\n", "sampling_strategy"),
        ("mm_datasets: [{name: a}]\n", "json_path"),
    ],
)
def test_the_file_is_checked(tmp_path: Path, public: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _ = plan_of(tmp_path, public).datasets


def test_optional_and_revision_may_stand_in_an_entry(tmp_path: Path) -> None:
    entry = "lerobot_datasets:\n  - {repo_id: lab/pour_water, optional: true, revision: v2.1}\n"
    dataset = plan_of(tmp_path, entry).datasets["lab__pour_water"]
    assert dataset.optional and isinstance(dataset.source, LeRobotSource) and dataset.source.revision == "v2.1"


def test_a_hub_dataset_is_looked_for_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    source = LeRobotSource(kind="lerobot", repo_id="lab/nothing_of_this_name")
    assert not source_root(source).exists()
    with pytest.raises(StageError, match="owner/name"):
        source_root(LeRobotSource(kind="lerobot", repo_id="../lab//x"))


MASKS = {
    "libero_panda": "TTTTTTF",
    "flexiv": "TTTTTTTF",
    "realman_dual_arm": "T" * 14 + "FF",
    "arx_dual_arm": "TTTTTTF" * 2,
    "galaxea_r1_pro": "TTTTTTTF" * 2,
    "agibot_g2": "T" * 14 + "F" * 7,
    "full_state_relative": "T" * 32,
    "full_absolute": "F" * 32,
}


@pytest.mark.parametrize("tag", MASKS)
def test_the_eight_public_tags(tag: str) -> None:
    path = ROBOTS / f"{tag}.yaml"
    robot = check(RobotConfig, read_yaml(path), path)
    assert robot.embodiment_tag == tag and robot.truncate == tag.startswith("full_")
    flags = tuple(flag == "T" for flag in MASKS[tag])
    assert (robot.relative or tuple(dim.relative for dim in robot.action)) == flags
    width = 9 if robot.truncate else len(flags)
    state = len(robot.state) or width
    contract = build_contract(
        dataset="d",
        robot=robot,
        robot_type=None,
        control_hz=20,
        state=[""] * state,
        action=[""] * width,
        cameras={},
    )
    assert tuple(dim.relative for dim in contract.action) == flags[:width]
    with pytest.raises(ContractError, match="disagree on the width"):
        build_contract(
            dataset="d",
            robot=robot,
            robot_type=None,
            control_hz=20,
            state=[""] * 40,
            action=[""] * 33,
            cameras={},
        )


@pytest.mark.parametrize("name", ["libero", "my_robot"])
def test_the_committed_public_datasets(tmp_path: Path, name: str) -> None:
    (tmp_path / "r.yaml").write_text(f"name: r\ndatasets: [{name}]\ndeploy: {name}\nmodel: tiny\n")
    for folder in ("datasets", "robots", "models"):
        (tmp_path / folder).symlink_to(ROBOTS.parent / folder)
    plan = load_plan(tmp_path / "r.yaml")
    robot = plan.robot(name)
    assert robot is not None and len(robot.action) == 7 and not any(dim.relative for dim in robot.action)
    assert plan.mixture == {name: 1.0}
