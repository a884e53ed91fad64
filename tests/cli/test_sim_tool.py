"""`prts sim`: what it lists, checks and removes, and what a check notices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prts_core.cli.main import main
from prts_core.io.errors import SimulatorError
from prts_core.io.files import write_json
from prts_core.policy.observation import STATE
from prts_core.sim.installations import Installation, code_folder
from prts_core.sim.self_check import check_observation, check_suites
from prts_core.sim.suites import suite

TOY = "tests.fixtures.toy_family"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "prts"


def test_the_list_says_what_is_installed(cache: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("metaworld", reason="pip install -e '.[sim]'")
    assert main(["sim", "list"]) == 0
    shown = capsys.readouterr().out
    assert "main environment" in shown and "prts sim install libero" in shown


def test_a_suite_states_its_protocol(cache: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sim", "show", "metaworld"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for told in ("6, 50 episodes each", "at 40 Hz", "90000", "-1 opens, +1 closes", "64 x 64", "hand_x (m)"):
        assert told in shown
    assert main(["sim", "show", "libero_objects"]) == 1 and "did you mean" in capsys.readouterr().err
    assert main(["sim", "show", "libero_object"]) == 1 and "prts sim install libero" in capsys.readouterr().err


def test_a_family_that_is_not_there(cache: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["sim", "check", "metaword"]) == 1
    assert "did you mean 'metaworld'" in capsys.readouterr().err
    assert main(["sim", "check", "metaworld", "--suite", "libero_10"]) == 1
    assert "Expected: metaworld" in capsys.readouterr().err


def test_removing(cache: Path, capsys: pytest.CaptureFixture[str]):
    home = Installation("libero")
    assert home.path == cache / "sims" / "libero"
    assert main(["sim", "remove", "libero"]) == 0 and "not installed" in capsys.readouterr().out
    write_json(home.record, {"pins": {}})
    assets = cache / "mine"
    assets.mkdir()
    (assets / "mesh").touch()
    (home.path / "assets").symlink_to(assets)
    assert home.installed() is not None
    assert main(["sim", "remove", "libero"]) == 0
    assert home.installed() is None and not home.path.exists() and (assets / "mesh").exists()
    assert main(["sim", "remove", "metaworld"]) == 1 and "main environment" in capsys.readouterr().err


def test_another_python_sees_prts_core_and_nothing_beside_it(cache: Path):
    folder = code_folder(Path("other") / "bin" / "python")
    assert [path.name for path in folder.iterdir()] == ["prts_core"] and (
        folder / "prts_core" / "sim" / "worker.py"
    ).is_file()
    assert code_folder(Path("other") / "bin" / "python") == folder


def test_a_check_looks_at_every_suite():
    rows = check_suites((f"{TOY}:toy", f"{TOY}:toy_stored"))
    assert [(row["suite"], row["task"], row["tasks"]) for row in rows] == [
        ("toy", "push", 3),
        ("toy_stored", "push", 2),
    ]


def test_a_check_notices_an_episode_that_does_not_repeat():
    with pytest.raises(SimulatorError, match="An episode does not repeat"):
        check_suites((f"{TOY}:toy",), settings={"forgets": 0.25})


def test_a_check_notices_pictures_of_nothing():
    spec = suite(f"{TOY}:toy")
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:4] = 200
    seen = {STATE: np.zeros(2, np.float32), "observation.images.eye": picture}
    check_observation(spec, seen)
    for told, change in {
        "one colour": {"observation.images.eye": picture * 0},
        "not finite": {STATE: np.array([0.0, np.nan], np.float32)},
        "not what the suite's contract says": {STATE: np.zeros(3, np.float32)},
    }.items():
        with pytest.raises(SimulatorError, match=told):
            check_observation(spec, seen | change)


@pytest.mark.slow
def test_metaworld_passes_its_check(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("metaworld", reason="pip install -e '.[sim]'")
    assert main(["sim", "check", "metaworld"]) == 0
    assert "step_ms" in capsys.readouterr().out
