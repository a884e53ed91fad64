"""Packages of policies: one manifest, that of the public schema; results that are theirs; whatever the policy is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from prts_core.contract import Camera, Contract, Dimension, PolicyContract
from prts_core.delivery.open_policy import open_policy
from prts_core.delivery.packaging import write_package
from prts_core.delivery.resolve import resolve
from prts_core.delivery.skill_manifest import Terms, skill_manifest
from prts_core.delivery.verify import verify_package
from prts_core.io.errors import PrtsError
from prts_core.policy.policy import load_policy, policy_digest
from prts_core.skills.digests import package_digest
from prts_core.skills.evaluations import read_evaluations
from prts_core.skills.manifest import read_manifest, write_manifest
from prts_core.skills.registry import install
from prts_core.skills.review import review
from prts_core.skills.robot import check_robot
from tests.fixtures.tiny_network import MODEL
from tests.fixtures.tiny_policy import write_policy
from tests.skills.made_packages import raw_robot

TERMS = Terms(
    "local/tiny", "mit", "acts", 200.0, ("metaworld/faucet-open",), ("open the faucet", "close the faucet"), "fp32"
)
TASK = {
    "instruction": "open the faucet",
    "n": 4,
    "successes": 3,
    "wilson95": [0.3, 0.95],
    "expert": 1.0,
    "blind_replay": None,
    "max_steps": 100,
}


def report(policy: Path) -> dict[str, Any]:
    rates = dict.fromkeys(("untrained_success_rate", "blind_replay_success_rate", "swapped_success_rate"), 0.0)
    return {
        "suite": "metaworld",
        "source": "Meta-World",
        "labels": [],
        "protocol_digest": "sha256:protocol",
        "policy_digest": policy_digest(policy),
        "dtype": "fp32",
        "success_rate": 0.75,
        "black_image_success_rate": None,
        "tasks": {"faucet-open": TASK},
    } | rates


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_policy(tmp_path_factory.mktemp("tiny") / "policy", MODEL)


@pytest.fixture
def package(policy: Path, tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    write_package(policy, tmp_path / "package", TERMS, benchmark=report(policy), episodes_digest="sha256:e")
    return tmp_path / "package"


def sawyer(**change: Any):
    seen = {"width": 480, "height": 480, "fx": 1.0, "fy": 1.0, "cx": 1.0, "cy": 1.0}
    views = ("observation.images.top", "observation.images.wrist")
    sensors = [
        {"name": key, "modality": "rgb", "frame_id": "w", "rate_hz": 30, "intrinsics": seen, "vla_feature_key": key}
        for key in views
    ]
    modes = ["cartesian_delta", "gripper_binary"]
    able = {"embodiment_tags": ["sawyer"], "supported_control_modes": modes} | change
    return check_robot(raw_robot(name="sawyer", sensors=sensors, capabilities=able, compute_edge=None), "a test")


def test_a_package_is_one_skill_with_one_manifest(package: Path, policy: Path, tmp_path: Path, monkeypatch):
    manifest = read_manifest(package)
    assert manifest.action_contract.representation == "delta_ee_3d_plus_gripper"
    assert manifest.actions == ("open", "close") and manifest.scenes == ("metaworld",)
    assert not (package / "manifest.yaml").exists()
    found = review(package, [sawyer()])
    assert found.ok, found
    (other,) = review(package, [sawyer(embodiment_tags=["ur5e"])]).robots
    assert other.failed == ("embodiment",)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    installed, _ = install(str(package))
    assert verify_package(installed.package()).budget_ms == 200.0
    again = {p.name: p.read_bytes() for p in package.rglob("*") if p.is_file()}
    (tmp_path / "again").mkdir()
    write_package(policy, tmp_path / "again", TERMS, benchmark=report(policy), episodes_digest="sha256:e")
    assert again == {p.name: p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()}


def test_a_package_acts_as_the_policy_does(package: Path, policy: Path):
    one, two = load_policy(policy), open_policy(str(package))
    meant = one.contract.contract
    seen = {c.key: np.zeros((1, c.height, c.width, 3), np.uint8) for c in meant.cameras}
    seen["observation.state"] = np.zeros((1, len(meant.state)), np.float32)
    np.testing.assert_array_equal(one.act(seen, ["x"], [3]), two.policy.act(seen, ["x"], [3]))


def test_its_result_is_that_of_the_benchmark_and_a_forged_one_is_found(package: Path, policy: Path, tmp_path: Path):
    record = read_evaluations(package)["metaworld"]
    assert record.results["metaworld/faucet-open_success_rate"] == 0.75
    assert record.document["package_digest"] == package_digest(package) == resolve(str(package)).package_digest
    assert record.eval_config["policy_digest"] == policy_digest(policy)
    path = package / "eval" / "metaworld.json"
    honest = path.read_text()

    def refused(told: str) -> None:
        with pytest.raises(PrtsError, match=told):
            verify_package(package)

    path.write_text(honest.replace("0.75", "0.99"))
    refused("was changed")
    listed = json.loads((package / "digests.json").read_text())
    from prts_core.skills.digests import write_digests

    write_digests(package)
    refused("changed after it was made")
    path.write_text(honest)
    (package / "digests.json").write_text(json.dumps(listed))
    verify_package(package)
    other = write_policy(tmp_path / "policy", replace(MODEL, chunk_length=6))
    (tmp_path / "other").mkdir()
    write_package(other, tmp_path / "other", TERMS)
    verify_package(tmp_path / "other")
    (tmp_path / "other" / "eval").mkdir()
    (tmp_path / "other" / "eval" / "metaworld.json").write_text(honest)
    package = tmp_path / "other"
    write_digests(package)
    refused("belongs to another package")


@pytest.mark.parametrize("robot", sorted(path.stem for path in Path("configs/robots").glob("*.yaml")))
def test_every_robot_of_ours_has_a_manifest(robot: str, tmp_path: Path):
    raw = yaml.safe_load(Path(f"configs/robots/{robot}.yaml").read_text())
    action = raw.get("action") or [{"name": f"action_{n}"} for n in range(len(raw.get("relative", [0] * 7)))]
    state = tuple(Dimension(**one) for one in raw.get("state") or action)
    camera = Camera("observation.images.top", "top", 48, 48)
    dimensions = tuple(Dimension(**one) for one in action)
    meant = Contract(robot, 10, state, dimensions, (camera,), raw["rotation"], raw["gripper"])
    contract = PolicyContract(raw["embodiment_tag"], meant, 8, "QUANTILE", "sha256:x")
    made = skill_manifest(contract, replace(TERMS, tasks=()), {"a": 1})
    write_manifest(made, tmp_path)
    assert read_manifest(tmp_path) == made
    assert sum(a.n_dof or 0 for a in made.actuators_required) == len(action)
    expected = {
        "libero_panda": "delta_ee_6d_plus_gripper",
        "metaworld_sawyer": "delta_ee_3d_plus_gripper",
        "widowx_bridge": "delta_ee_6d_plus_gripper",
        "my_robot": "joint_positions",
    }
    assert made.action_contract.representation == expected.get(robot)
