"""LIBERO without its simulator: initial states read as data, the protocol's numbers, an installation's refusals."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.schema import RobotConfig
from prts_core.io.errors import ConfigError, DataError, SimulatorError, UnavailableError
from prts_core.io.files import write_json
from prts_core.sim import installations
from prts_core.sim.installations import Installation
from prts_core.sim.suites.libero import install
from prts_core.sim.suites.libero.init_states import read_init_states
from prts_core.sim.suites.libero.spec import MAX_STEPS, SUITES, contract, suites_of

ROOT = Path(__file__).parents[2]
STATES = np.arange(24, dtype=np.float64).reshape(3, 8) / 7


def archive(path: Path, payload: bytes, name: str = "states/data.pkl") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, payload)
        file.writestr("states/version", "3\n")
    return path


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_stored_array_comes_back_to_the_bit(tmp_path: Path, order: str, protocol: int):
    payload = pickle.dumps(np.array(STATES, order=order), protocol=protocol)  # type: ignore[call-overload]
    if protocol == 4:
        with pytest.raises(DataError, match="nothing in it was executed"):  # LIBERO writes protocol 2
            read_init_states(archive(tmp_path / "s.pruned_init", payload))
        return
    assert np.array_equal(read_init_states(archive(tmp_path / "s.pruned_init", payload)), STATES)


class Evil:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> object:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_runs_something_is_refused_and_runs_nothing(tmp_path: Path, protocol: int):
    ran = tmp_path / "ran"
    attacks = [
        Evil(subprocess.call, (["touch", str(ran)],)),
        Evil(eval, (f"open({str(ran)!r}, 'w')",)),
        (STATES, Evil(subprocess.call, (["touch", str(ran)],))),
        np.array([Evil(subprocess.call, (["touch", str(ran)],))], dtype=object),
    ]
    for number, attack in enumerate(attacks):
        path = archive(tmp_path / f"{number}.pruned_init", pickle.dumps(attack, protocol=protocol))
        with pytest.raises(DataError, match="refused"):
            read_init_states(path)
    assert not ran.exists()
    pickle.loads(pickle.dumps(attacks[0]))  # the attack is a real one
    assert ran.exists()


def test_damaged_files_are_told_apart(tmp_path: Path):
    good = pickle.dumps(STATES, protocol=2)
    cases = {
        "no torch archive": b"text",
        "not a table": pickle.dumps(np.zeros(5), protocol=2),
        "float64": pickle.dumps(np.zeros((2, 2), np.float32), protocol=2),
        "finite": pickle.dumps(np.full((2, 2), np.nan), protocol=2),
        "array": pickle.dumps("states", protocol=2),
    }
    for expected, payload in cases.items():
        path = tmp_path / "s.pruned_init"
        if expected == "no torch archive":
            path.write_bytes(payload)
        else:
            archive(path, payload)
        with pytest.raises(DataError, match=expected):
            read_init_states(path)
    with pytest.raises(DataError, match="missing"):
        read_init_states(tmp_path / "nowhere")
    with pytest.raises(DataError):
        read_init_states(archive(tmp_path / "s.pruned_init", good, "elsewhere.pkl"))


def test_any_changed_byte_is_an_error_or_another_array_never_a_crash(tmp_path: Path):
    good, rng = bytearray(pickle.dumps(STATES, protocol=2)), np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] = rng.integers(256)
        try:
            states = read_init_states(archive(tmp_path / "s.pruned_init", bytes(bad)))
        except DataError:
            refused += 1
        else:
            assert states.dtype == np.float64 and states.ndim == 2 and np.isfinite(states).all()
    assert 0 < refused < 400


def catalogue(tmp_path: Path) -> Path:
    names = {folder: [f"{folder}_b", f"{folder}_a"] for folder in MAX_STEPS}
    tasks = {
        name: {"folder": folder, "instruction": name, "initial_states": 50, "digest": "", "source": ""}
        for folder, both in names.items()
        for name in both
    }
    write_json(tmp_path / "tasks.json", {"order": list(tasks), "tasks": tasks})
    return tmp_path / "tasks.json"


def test_the_protocol_is_the_published_one(tmp_path: Path):
    suites = suites_of(catalogue(tmp_path), "stand-in assets")
    assert tuple(suites) == SUITES and {s.standins for s in suites.values()} == {"stand-in assets"}
    steps = [suites[f"libero_{name}"].tasks[0].max_steps for name in ("spatial", "object", "goal", "10", "90")]
    assert steps == [220, 280, 300, 520, 400]
    assert [task.name for task in suites["libero_goal"].tasks] == ["libero_goal_b", "libero_goal_a"]  # not sorted
    everything = suites["libero_130"].tasks
    assert len(everything) == 10 and {task.max_steps for task in everything} == {220, 280, 300, 520, 400}
    for suite in suites.values():
        assert suite.settle_steps == 10 and suite.settle_action == (0, 0, 0, 0, 0, 0, -1)
        assert suite.image_rotation == 180 and suite.episodes_per_task == 50 and suite.seed == 7
        assert "openpi" in suite.source
    (tmp_path / "tasks.json").write_text('{"order": ["x"], "tasks": {"x": {"folder": "libero_7"}}}')
    with pytest.raises(DataError, match="damaged"):
        suites_of(tmp_path / "tasks.json")


def test_numbers_mean_what_the_robots_file_says():
    path = ROOT / "configs/robots/libero_panda.yaml"
    robot, ours = check(RobotConfig, read_yaml(path), path), contract()
    assert ours.embodiment == robot.embodiment_tag and ours.control_hz == 20
    for mine, theirs in ((ours.state, robot.state), (ours.action, robot.action)):
        assert [(d.name, d.unit) for d in mine] == [(d.name, d.unit) for d in theirs]
    assert (ours.rotation, ours.gripper) == (robot.rotation, robot.gripper)
    mapping = read_yaml(ROOT / "configs/mappings/libero.yaml")
    assert [c.key for c in ours.cameras] == [f"observation.images.{key}" for key in mapping["cameras"]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installation:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PRTS_SHARED", str(tmp_path / "shared"))
    return Installation("libero")


def test_what_is_not_installed_says_how_to_install_it(home: Installation):
    from prts_core.sim.suites import suite

    with pytest.raises(UnavailableError, match="prts sim install libero"):
        suite("libero_object")
    with pytest.raises(UnavailableError, match="prts sim install libero"):
        installations.interpreter("libero")


def test_assets_are_checked_before_anything_is_built(
    home: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match="no such folder"):
        install.install(home, str(tmp_path / "nowhere"))
    (tmp_path / "half" / "scenes").mkdir(parents=True)
    with pytest.raises(DataError, match="articulated_objects"):
        install.install(home, str(tmp_path / "half"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnavailableError, match="--assets FOLDER"):  # neither a folder nor a hub
        install.install(home)
    assert not (home.path / "venv").exists() and home.installed() is None


def test_packages_that_cannot_be_had_leave_nothing_that_looks_installed(
    home: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assets = tmp_path / "assets"
    for name in install.ASSET_FOLDERS:
        (assets / name).mkdir(parents=True)
    monkeypatch.setattr(install, "PINS", ("no-such-package-of-ours==1.0",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UnavailableError, match="packages cannot be installed"):
        install.install(home, str(assets))
    assert home.installed() is None and not (home.path / "venv" / "finished").exists()


def test_a_self_check_that_fails_is_told_with_its_words(home: Installation):
    (home.path / "venv" / "bin").mkdir(parents=True)
    home.python.symlink_to(sys.executable)
    with pytest.raises(SimulatorError, match="self-check"):
        install.check(home)


def test_the_list_of_tasks_is_read_as_data(tmp_path: Path):
    path = tmp_path / "benchmark" / "libero_suite_task_map.py"
    path.parent.mkdir()
    names = ["KITCHEN_SCENE10_close_it", "put_it_down"]
    path.write_text(f"libero_task_map = {dict.fromkeys(MAX_STEPS, names)!r}")
    assert install.task_names(tmp_path)["libero_90"] == names
    path.write_text("libero_task_map = __import__('os').system('true')")
    with pytest.raises(DataError, match="list of tasks"):
        install.task_names(tmp_path)
    assert install.instruction("KITCHEN_SCENE10_close_it") == "close it"
    assert install.instruction("LIVING_ROOM_SCENE2_put_both_away") == "put both away"
    assert install.instruction("pick_up_the_milk") == "pick up the milk"
