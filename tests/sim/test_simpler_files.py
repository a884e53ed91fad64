"""SimplerEnv without its simulator: what its suites say, whose assets are enough, what an installation refuses."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.places import shared_folder
from prts_core.config.schema import RobotConfig
from prts_core.contract import Contract, Dimension
from prts_core.data.convert.conventions import convert_rotation
from prts_core.io.errors import ConfigError, ContractError, DataError, SimulatorError, UnavailableError
from prts_core.io.locks import locked
from prts_core.rollout.episode_plan import rendered_at
from prts_core.sim import installer
from prts_core.sim.adapter import adapt
from prts_core.sim.installations import Installation
from prts_core.sim.suites import part, suite
from prts_core.sim.suites.simpler import install
from prts_core.sim.suites.simpler.assets import BRIDGE, NEEDED, missing, unavailable
from prts_core.sim.suites.simpler.environment import SimplerEnvironment, controller_angles, matrix_of, rpy_of
from prts_core.sim.suites.simpler.spec import SUITE, TASKS, contract, suites_of

ROOT = Path(__file__).parents[2]
EGGPLANT = "widowx_put_eggplant_in_basket"


def test_the_protocol_is_the_published_one():
    (found,) = suites_of({"standins": "stand-in assets", "unavailable": {EGGPLANT: "a mesh"}}).values()
    assert found.name == SUITE and found.standins == "stand-in assets"
    assert EGGPLANT not in {task.name for task in found.tasks} and len(found.tasks) == 3
    assert {task.max_steps for task in found.tasks} == {60} and found.contract.control_hz == 5.0
    assert {task.initial_states for task in found.tasks} == {found.episodes_per_task} == {24}
    assert "arXiv:2405.05941" in found.source and "judged by the last" in found.source
    assert [(camera.height, camera.width) for camera in found.contract.cameras] == [(480, 640)]
    whole = suites_of({})[SUITE]
    assert [task.max_steps for task in whole.tasks if task.name == EGGPLANT] == [120] and whole.standins == ""


def test_a_policy_of_square_pictures_asks_for_them():
    """The Bridge data set in RLDS holds 256 x 256; of the camera's proportions it is none of the adapter's business."""
    spec = suites_of({})[SUITE]
    small = replace(spec.contract, cameras=(replace(spec.contract.cameras[0], height=256, width=256),))
    with pytest.raises(ContractError, match="size"):
        adapt(small, spec.contract)
    sized, make = rendered_at(spec, 256)
    assert make == {"image_size": 256} and not adapt(small, sized.contract).notes


def test_numbers_mean_what_the_robots_file_and_the_bridge_mapping_say():
    path = ROOT / "configs/robots/widowx_bridge.yaml"
    robot, ours = check(RobotConfig, read_yaml(path), path), contract()
    assert ours.embodiment == robot.embodiment_tag
    for mine, theirs in ((ours.state, robot.state), (ours.action, robot.action)):
        assert [(d.name, d.unit) for d in mine] == [(d.name, d.unit) for d in theirs]
    assert (ours.rotation, ours.gripper) == (robot.rotation, robot.gripper)
    mapping = read_yaml(ROOT / "configs/mappings/openx_bridge.yaml")
    for what, dims in (("state", ours.state), ("action", ours.action)):
        assert [name for piece in mapping[what] for name in piece["names"]] == [dim.name for dim in dims]
    assert mapping["fps"] == ours.control_hz
    assert [camera.key for camera in ours.cameras] == [f"observation.images.{key}" for key in mapping["cameras"]]


def test_a_gripper_the_other_way_round_is_turned_and_another_rotation_refused():
    ours = contract()
    turned = adapt(Contract(**{**vars(ours), "gripper": "-1 opens, +1 closes"}), ours)
    chunk = np.zeros((2, 7))
    chunk[:, 6] = -1.0, 1.0
    assert turned.actions(chunk)[:, 6].tolist() == [1.0, 0.0] and turned.notes
    axis_angle = Contract(**{**vars(ours), "rotation": "axis-angle"})
    with pytest.raises(ContractError, match="rotation"):
        adapt(axis_angle, ours)
    names = tuple(Dimension(name, "1") for name in ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"))
    with pytest.raises(ContractError, match=r"action\.dx\.unit"):
        adapt(Contract(**{**vars(ours), "action": names}), ours)


def test_turns_keep_their_meaning_on_the_way_to_the_controller():
    rng = np.random.default_rng(0)
    for rpy in rng.uniform(-1.4, 1.4, (50, 3)):
        turn = matrix_of(rpy)
        assert np.allclose(turn.reshape(-1), convert_rotation(rpy[None], "rpy", "matrix")[0])
        assert np.allclose(rpy_of(turn), rpy)
        a, b, c = controller_angles(rpy)
        x, y, z = matrix_of(np.array([a, 0, 0])), matrix_of(np.array([0, b, 0])), matrix_of(np.array([0, 0, c]))
        assert np.allclose(x @ y @ z, turn)
    assert not np.allclose(controller_angles(np.array([0.3, 0.2, 0.4])), [0.3, 0.2, 0.4], atol=1e-2)


def folder_with(assets: Path, tasks: list[str]) -> Path:
    """Empty files under the names that `tasks` need."""
    for file in NEEDED:
        if file.suffix:
            (assets / file).parent.mkdir(parents=True, exist_ok=True)
            (assets / file).touch()
        else:
            (assets / file).mkdir(parents=True, exist_ok=True)
    for task in tasks:
        while (lacking := missing(assets, task)) is not None:
            (assets / lacking).parent.mkdir(parents=True, exist_ok=True)
            (assets / lacking).touch()
    return assets


def test_a_task_that_lacks_a_file_is_named_with_it(tmp_path: Path):
    assets = folder_with(tmp_path, [task for task in TASKS if task != EGGPLANT])
    assert list(unavailable(assets)) == [EGGPLANT]
    (assets / BRIDGE / "real_inpainting/bridge_real_eval_1.png").unlink()  # no photograph, no visual matching
    assert set(unavailable(assets)) == set(TASKS)
    assert unavailable(assets)["widowx_stack_cube"].endswith("bridge_real_eval_1.png")


def test_what_the_shared_assets_carry():
    assets = shared_folder() / "data" / "simpler_assets"
    if not assets.is_dir():
        pytest.skip("SimplerEnv's assets are not on this machine (PRTS_SHARED)")
    assert list(unavailable(assets)) in ([], [EGGPLANT])


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PRTS_SHARED", str(tmp_path / "shared"))
    monkeypatch.setenv("VK_DRIVER_FILES", "somewhere.json")
    return Installation("simpler")


def test_what_is_not_installed_says_how_to_install_it(home: Installation):
    with pytest.raises(UnavailableError, match="prts sim install simpler"):
        suite("simpler_widowx")


def test_a_machine_without_a_driver_is_told_what_to_install(
    home: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("VK_DRIVER_FILES")
    monkeypatch.setattr(install, "_DRIVER_FOLDERS", (str(tmp_path / "icd.d"),))
    with pytest.raises(UnavailableError, match=r"bookworm-backports mesa-vulkan-drivers"):
        install.install(home)
    assert not (home.path / "venv").exists() and home.installed() is None
    (tmp_path / "icd.d").mkdir()
    (tmp_path / "icd.d" / "lvp_icd.json").touch()
    install.look_for_a_driver()


def test_assets_are_checked_before_anything_is_built(home: Installation, tmp_path: Path):
    with pytest.raises(ConfigError, match="no such folder"):
        install.install(home, str(tmp_path / "nowhere"))
    (tmp_path / "half" / "data").mkdir(parents=True)
    with pytest.raises(DataError, match="MS_ASSET_DIR"):
        install.install(home, str(tmp_path / "half"))
    with pytest.raises(DataError, match=r"info_bridge_custom_v0\.json"):
        install.install(home, str(folder_with(tmp_path / "robot", [])))
    assert not (home.path / "venv").exists() and home.installed() is None


def test_packages_that_cannot_be_had_name_the_index(
    home: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(install, "TORCH", "no-such-torch-of-ours==1.0+cpu")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UnavailableError, match="PRTS_TORCH_INDEX"):
        install.install(home, str(folder_with(tmp_path / "assets", list(TASKS))))
    assert home.installed() is None and not (home.path / "venv" / "finished").exists()


def test_assets_that_cannot_be_fetched_are_an_error_and_not_a_question(
    home: Installation, monkeypatch: pytest.MonkeyPatch
):
    """ManiSkill's downloader, which here has neither a network nor ManiSkill; whoever reads stdin finds its end."""
    monkeypatch.setattr(installer, "packages", lambda home, *args, **options: None)
    (home.path / "venv" / "bin").mkdir(parents=True)
    home.python.symlink_to(sys.executable)
    with pytest.raises(UnavailableError, match="--assets FOLDER"):
        install.install(home)
    assert home.installed() is None


def test_an_interrupted_download_is_not_taken_for_assets(
    home: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A stand-in for ManiSkill's downloader that dies in the middle of unpacking, the first time."""
    package = tmp_path / "site" / "mani_skill" / "utils"
    package.mkdir(parents=True)
    robot, bridge = (str(install.ROBOT), str(install.BRIDGE))
    (package / "download_asset.py").write_text(
        "import os, pathlib, sys\n"
        "root = pathlib.Path(os.environ['MS_ASSET_DIR'])\n"
        f"target = root / ({robot!r} if sys.argv[1] == 'widowx250s' else {bridge!r})\n"
        "target.mkdir(parents=True)\n"
        "(target / 'half').touch()\n"
        f"sys.exit(sys.argv[1] != 'widowx250s' and not pathlib.Path({str(tmp_path / 'again')!r}).exists())\n"
    )
    (home.path / "venv" / "bin").mkdir(parents=True)
    home.python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    home.python.chmod(0o755)
    with locked(home.path / ".lock") as lock:
        with pytest.raises(UnavailableError, match="bridge_v2_real2sim"):
            install._fetch(home, lock)
        assert (home.path / "fetched" / install.ROBOT).is_dir()
        assert not (home.path / "fetched" / install.BRIDGE).exists()
        (tmp_path / "again").touch()
        assert (install._fetch(home, lock) / install.BRIDGE / "half").is_file()


def test_the_record_says_what_is_missing(home: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assets = folder_with(tmp_path / "assets", [task for task in TASKS if task != EGGPLANT])
    (assets / "STANDINS.md").write_text("tables")
    monkeypatch.setattr(installer, "packages", lambda home, *args, **options: None)
    monkeypatch.setattr(install, "check", lambda home: {"repeats_exactly": True})
    record = install.install(home, str(assets))
    assert record == home.installed() == install.install(home)  # the link stays the choice
    assert record["standins"] == f"stand-in assets, without {EGGPLANT}" and EGGPLANT in record["unavailable"]
    assert record["pins"]["mani_skill"] == "3.0.1" and record["pins"]["torch"].endswith("+cpu")
    assert suite("simpler_widowx").standins == record["standins"] and len(suite("simpler_widowx").tasks) == 3
    spec = suites_of({})[SUITE]
    with pytest.raises(UnavailableError, match="not all there"):  # before ManiSkill could ask for it
        SimplerEnvironment(home.path).reset(spec, spec.tasks[-1], 0, 0)
    for settings in ({"camera": 1}, {"placement": "drawn"}, {"image_size": 7}):
        with pytest.raises(ConfigError):
            part("simpler", "environment").build(settings)


def test_a_self_check_that_fails_is_told_with_its_words(home: Installation):
    (home.path / "venv" / "bin").mkdir(parents=True)
    home.python.symlink_to(sys.executable)
    with pytest.raises(SimulatorError, match=r"self-check(.|\n)*Mesa 24\.3"):
        install.check(home)


def test_no_cuda_build_of_torch_can_come_in():
    """Every package is pinned and none resolved; torch is named as the CPU's."""
    assert install.TORCH.endswith("+cpu") and not any(pin.startswith(("torch=", "nvidia")) for pin in install.PINS)
    assert all(pin.count("==") == 1 for pin in (install.TORCH, *install.PINS))


def test_importing_the_family_imports_no_simulator():
    script = (
        "import sys; from prts_core.sim.suites import part; "
        "[part('simpler', name) for name in ('spec', 'environment', 'install', 'expert')]; "
        "sys.exit(bool({'torch', 'mani_skill', 'sapien', 'cv2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=240).returncode == 0
