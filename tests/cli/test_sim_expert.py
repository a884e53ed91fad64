"""`prts sim expert` and `prts sim demonstrate` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prts_core.cli.main import main

SUITE = "tests.fixtures.toy_family:toy_stored"


def test_an_expert_is_measured_and_what_was_measured_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sim", "expert", "--suite", SUITE, "--output", str(tmp_path)]
    assert main([*command, "--episodes", "2", "--task", "push"]) == 0
    assert "2/2" in capsys.readouterr().out
    assert main([*command, "--episodes", "3"]) == 0
    report = json.loads((tmp_path / "experts.json").read_text())
    assert [(row["task"], row["successes"], row["attempts"]) for row in report["tasks"]] == [
        ("push", 3, 3),
        ("shove", 3, 3),
    ]
    assert report["tasks"][0]["lower"] == pytest.approx(0.4385, abs=1e-3)  # Wilson, 3 of 3
    assert len((tmp_path / "attempts.jsonl").read_text().splitlines()) == 1 + 6
    assert main([*command[:-1], str(tmp_path / "rest"), "--episodes", "1", "--first", "2", "--task", "push"]) == 0
    (row,) = [json.loads(line)["episode"] for line in (tmp_path / "rest/attempts.jsonl").read_text().splitlines()[1:]]
    assert row["initial_state"] == 2


@pytest.mark.parametrize(
    "wrong", [["--noise", "much"], ["--noise", "2"], ["--episodes", "0"], ["--task", "fly"], ["--suite", "toys"]]
)
def test_what_cannot_be_is_refused_before_a_worker_starts(
    tmp_path: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["sim", "demonstrate", "--suite", SUITE, "--output", str(folder), *wrong]) != 0
    said = capsys.readouterr()
    assert wrong[1] in said.err + said.out and not folder.exists()
