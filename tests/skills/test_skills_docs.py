"""What docs/how-to/skills.md says of skill packages is so: commands, fields, kinds, checks, licences, the example."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import get_args

import pytest

from prts_core.cli.main import build_parser
from prts_core.config.licence import Licence
from prts_core.skills.compatibility import CHECKS
from prts_core.skills.evaluations import read_evaluations
from prts_core.skills.licence import ALLOW, FREE, OLD_ALLOW, UNTOLD
from prts_core.skills.manifest import Manifest
from prts_core.skills.manifest.document import LENIENT
from prts_core.skills.manifest.kinds import KINDS
from prts_core.skills.robot import Robot
from tests.skills.made_packages import write_package
from tests.test_structure import ROOT

PAGE = (ROOT / "docs" / "how-to" / "skills.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def table(head: str) -> list[list[str]]:
    """The cells of the table whose head begins so, row by row."""
    lines = PAGE.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {head} |")) + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_commands_are_commands():
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    commands = [line.partition("#")[0] for text in blocks for line in text.splitlines()]
    assert len(blocks) == 3 and len(commands) > 8
    for command in commands:
        first, *args = shlex.split(command)
        assert first == "prts" and build_parser("skill").parse_args(args).action


def test_every_field_is_explained_and_no_other():
    named = [name for row in table("field") for name in words(row[0])]
    assert sorted(named) == sorted(Manifest.__dataclass_fields__)
    for place in LENIENT:
        assert f"`{'.'.join(place)}`" in PAGE


def test_every_kind_is_there_with_fields_that_it_needs():
    rows = {name: row for row in table("kind") for name in words(row[0])}
    assert rows.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        told = rows[name][1]
        assert all(f"`{field}`" in told or (field == name and "its own block" in told) for field in kind.needs)
        assert (kind.actuators == "some") == ("an actuator" in told)
        assert kind.resolvable or "cannot be installed" in rows[name][2]


def test_every_check_is_there_in_order():
    assert [name for row in table("check") for name in words(row[0])] == list(CHECKS)


def test_every_licence_is_in_its_row():
    free, research, untold = (set(words(row[0])) for row in table("`license`"))
    assert (free, untold) == (FREE, UNTOLD) and free | research | untold == set(get_args(Licence))
    assert f"{ALLOW}=1" in PAGE and OLD_ALLOW in PAGE


def test_the_parts_of_a_robot_are_its_fields():
    named = words(PAGE.split("public schema `0.2`: ")[1].partition("; other keys")[0])
    assert len(named) > 5 and set(named) <= set(Robot.__dataclass_fields__)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = write_package(tmp_path / "my-skill")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example.py").write_text(block("python"))
    runpy.run_path("example.py")
    assert [*read_evaluations(package)] == ["libero_10"]
