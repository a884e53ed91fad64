"""`prts benchmark` as a tool: what it refuses before anything is loaded; without its options it is the stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.cli.main import asks_for_tool, build_parser, main
from prts_core.io.files import read_json
from prts_core.sim.suites import suite
from tests.fixtures.tiny_policy import write_policy


@pytest.mark.parametrize(
    "given, told",
    [
        (["--suite", "metaworld"], "Field: --policy"),
        (["--policy", "somewhere"], "Field: --suite"),
        (["--episodes", "5"], "give both --policy and --suite"),
        (["--policy", "p", "--suite", "metawold"], "did you mean 'metaworld'"),
        (["--policy", "p", "--suite", "metaworld", "--stop-early", "0.9"], "Expected: 0.75,0.90"),
        (["--policy", "p", "--suite", "metaworld", "--compare", "nowhere"], "no episodes.parquet"),
        (["--policy", "http://robot:8000", "--suite", "metaworld"], "ws://robot:8000"),
        (["--policy", "ws://127.0.0.1:1", "--suite", "metaworld"], "Nobody listens there"),
        (["--policy", "ws://127.0.0.1:1", "--suite", "metaworld", "--dtype", "bf16"], "give it to `prts serve`"),
        (["--policy", "p", "--suite", "metaworld", "--batch", "0"], "--batch"),
        (["--policy", "nowhere", "--suite", "metaworld"], "A policy folder is not complete"),
    ],
)
def test_faults_are_told_with_their_cure(
    given: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *given]) == 1
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_report_says_what_the_policy_computed_in(dtype: str, tmp_path: Path, tiny) -> None:
    name = "tests.fixtures.toy_family:toy_stored"
    policy = write_policy(tmp_path / "policy", tiny, suite(name))
    few = ["--task", "push", "--episodes", "1", "--workers", "1", "--videos", "0", "--output", str(tmp_path / "out")]
    assert main(["benchmark", "--policy", str(policy), "--suite", name, *few, "--dtype", dtype]) == 0
    (report,) = (tmp_path / "out").rglob("report.json")
    assert read_json(report)["dtype"] == dtype


def test_without_its_options_it_is_the_stage() -> None:
    parser = build_parser("benchmark")
    assert not asks_for_tool(parser.parse_args(["benchmark", "--set", "benchmark.episodes=2"]))
    for option in (["--task", "x"], ["--workers", "2"], ["--compare", "run"], ["--stop-early", "0.1,0.9"]):
        assert asks_for_tool(parser.parse_args(["benchmark", *option]))
