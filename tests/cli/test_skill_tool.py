"""`prts skill`: what it checks, installs, lists, finds and begins, and what it prints for machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from prts_core.cli.main import main
from prts_core.skills.digests import package_digest
from prts_core.skills.evaluations import write_evaluation
from tests.skills.made_packages import NAME, raw_robot, write_package
from tests.skills.test_skill_evaluations import MEASURED


@pytest.fixture(autouse=True)
def _skills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("OPENRAL_ALLOW_NONCOMMERCIAL", raising=False)


@pytest.fixture
def arm(tmp_path: Path) -> str:
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(raw_robot()))
    return str(path)


def test_a_package_is_looked_over(tmp_path: Path, arm: str, capsys: pytest.CaptureFixture[str]):
    package = write_package(tmp_path / "mine")
    assert main(["skill", "check", str(package)]) == 0
    said = capsys.readouterr().out
    assert NAME in said and "licence" in said and said.rstrip().endswith("sound")
    assert main(["skill", "check", str(package / "rskill.yaml"), "--robot", arm]) == 0
    assert capsys.readouterr().out.rstrip().endswith("arm: fits")
    assert main(["skill", "check", str(package), "--robot", arm, "--robot", arm, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and [robot["robot"] for robot in found["robots"]] == ["arm", "arm"]
    assert {check["name"]: check["state"] for check in found["checks"]} == {
        "manifest": "passed",
        "template": "passed",
        "kind": "passed",
        "signature": "passed",
        "licence": "passed",
        "evaluations": "unknown",
        "digests": "unknown",
    }


def test_a_package_that_does_not_fit(tmp_path: Path, arm: str, capsys: pytest.CaptureFixture[str]):
    package = write_package(tmp_path / "mine", embodiment_tags=["g1"], min_vram_gb={"bf16": 80})
    assert main(["skill", "check", str(package), "--robot", arm]) == 1
    said = capsys.readouterr().out
    for told in ("made for g1; the robot is franka_panda", "needs 80 GB of GPU memory in bf16", "arm: does not fit"):
        assert told in said
    assert main(["skill", "check", str(tmp_path / "nothing")]) == 1
    assert "is installed" in capsys.readouterr().err
    assert main(["skill", "check", str(tmp_path)]) == 1 and "No such skill manifest" in capsys.readouterr().err


def test_a_package_for_no_commercial_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    package = str(write_package(tmp_path / "mine", license="permissive_research"))
    assert main(["skill", "check", package]) == 1 and "OPENRAL_ALLOW_NONCOMMERCIAL=1" in capsys.readouterr().out
    assert main(["skill", "check", package, "--non-commercial"]) == 0
    assert "not for commercial use" in capsys.readouterr().out
    assert main(["skill", "install", package]) == 1
    assert main(["skill", "install", package, "--non-commercial"]) == 0


def test_results_of_another_package_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    package = write_package(tmp_path / "mine")
    write_evaluation(package, "libero_10", **MEASURED | {"package_digest": package_digest(package)})
    assert main(["skill", "check", str(package)]) == 0
    (package / "weights" / "model.safetensors").write_bytes(b"others")
    assert main(["skill", "check", str(package)]) == 1
    assert "eval/libero_10.json: A record of an evaluation belongs to another package" in capsys.readouterr().out


def test_installed_skills_are_listed_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["skill", "list"]) == 0 and "no skill is installed" in capsys.readouterr().out
    assert main(["skill", "install", str(write_package(tmp_path / "mine"))]) == 0
    capsys.readouterr()
    assert main(["skill", "list"]) == 0 and NAME in capsys.readouterr().out
    assert main(["skill", "list", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["skills"]
    assert row["name"] == NAME and (Path(row["package"]) / "rskill.yaml").is_file()
    assert main(["skill", "check", "pick-cube"]) == 0 and "files" in capsys.readouterr().out
    assert main(["skill", "remove", NAME]) == 0 and "removed" in capsys.readouterr().out


def test_skills_are_found_by_what_they_do(tmp_path: Path, arm: str, capsys: pytest.CaptureFixture[str]):
    tree = tmp_path / "tree"
    write_package(tree / "pick")
    write_package(tree / "open", name="owner/rskill-open", actions=["open"], embodiment_tags=["g1"])
    write_package(tree / "broken", chunk_size=0)
    main(["skill", "new", str(tree / "new")])
    main(["skill", "install", str(tree / "pick")])
    capsys.readouterr()

    def names(*args: str) -> list[str]:
        assert main(["skill", "search", *args, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found["unread"]) == ("--in" in args)
        return [row["name"] for row in found["skills"]]

    assert names() == names("PICK", "cube") == [NAME]
    assert names("--in", str(tree)) == ["owner/rskill-open", NAME]
    assert names("open", "g1", "--in", str(tree)) == ["owner/rskill-open"]
    assert names("--robot", arm, "--in", str(tree)) == [NAME]
    assert names("nothing") == []
    assert main(["skill", "search", "--in", str(tree)]) == 0 and "is left out: chunk_size" in capsys.readouterr().out
    assert main(["skill", "search", "--in", str(tmp_path / "x")]) == 1 and "no such folder" in capsys.readouterr().err


def test_a_new_package_says_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "new"
    assert main(["skill", "new", str(folder)]) == 0
    command = capsys.readouterr().out.split("`")[1].split()
    assert command[:3] == ["prts", "skill", "check"]
    assert main(command[1:]) == 1 and "is a template" in capsys.readouterr().out
    assert main(["skill", "install", str(folder)]) == 1 and "is a template" in capsys.readouterr().err
    for path in folder.glob("*.*"):
        path.write_text(path.read_text().replace("TEMPLATE_ORG", "owner").replace("TEMPLATE_ID", "mine"))
    assert main(command[1:]) == 0 and capsys.readouterr().out.rstrip().endswith("sound")
