"""The price of a quantised package: measured on held-out data and in simulation, and a gate that can say no."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from prts_core.cli.main import main
from prts_core.config.load import load_plan
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.delivery import gate
from prts_core.delivery.packaging import write_package
from prts_core.delivery.quantize import REPORT, ActionError, Price, action_errors, quantize_package
from prts_core.delivery.resolve import resolve
from prts_core.delivery.verify import verify_package
from prts_core.io.files import read_json, write_json
from prts_core.io.locks import is_locked
from prts_core.policy.policy import load_policy, policy_digest
from prts_core.sim.suites.metaworld.spec import suites
from prts_core.skills.evaluations import read_evaluations
from prts_core.skills.manifest import read_manifest
from prts_core.value.alarm import read_alarm
from tests.delivery.test_packaging import TERMS, report
from tests.fixtures.smoke_run import RECIPE
from tests.fixtures.tiny_network import MODEL
from tests.fixtures.tiny_policy import write_policy
from tests.value.test_alarm_calibration import episodes as valued


def episodes(successes: int, n: int = 200) -> pl.DataFrame:
    return pl.DataFrame([{"task": "a", "seed": i, "success": i < successes} for i in range(n)])


def test_either_figure_alone_can_say_no():
    alike = gate.decide(episodes(150), episodes(150), -0.05, None)
    worse = gate.decide(episodes(120), episodes(150), -0.05, None)
    near, far = ActionError(0.001, 0.01, 0.01), ActionError(0.1, 0.5, 0.0501)
    price = Price("nf4", {"x": near, "gripper": near}, 64, 1000, 300, alike)
    assert price.against == []
    assert replace(price, verdict=worse).against == [worse.reason]
    (said,) = replace(price, errors={"x": near, "gripper": far}).against
    assert said == "gripper is off by 5.0% of its range on average"
    broken = ActionError(float("nan"), float("nan"), float("nan"))
    assert replace(price, errors={"x": broken}).against, "what is no number is not within the bound"


def benchmarked(successes: int, failures: int) -> pl.DataFrame:
    """The same with values, as a benchmark of the policy alone writes them."""
    made = valued(successes, failures).filter(pl.col("condition") != "expert").with_row_index("seed")
    return made.with_columns(condition=pl.lit("policy"), task=pl.lit("faucet-open"), initial_state=pl.lit(0))


class Held:
    """What action_errors asks of a dataset: held-out episodes of these lengths."""

    def __init__(self, *lengths: int) -> None:
        self.lengths, self.contract = lengths, suites()["metaworld"].contract

    def episodes(self, split: str) -> list[int]:
        return [*range(len(self.lengths))]

    def states(self, episode: int) -> np.ndarray:
        return np.zeros((self.lengths[episode], len(self.contract.state)), np.float32)

    def frames(self, episode: int, key: str, rows: list[int]) -> np.ndarray:
        camera = next(c for c in self.contract.cameras if c.key == key)
        return np.zeros((len(rows), camera.height, camera.width, 3), np.uint8)

    def instruction(self, episode: int) -> str:
        return "push"


@pytest.mark.parametrize("lengths, compared", [((40, 40, 40), 66), ((5, 3), 8)])
def test_as_many_observations_are_told_as_were_compared(policy: Path, lengths: tuple[int, ...], compared: int):
    one = load_policy(policy)
    errors, rows = action_errors(one, one, Held(*lengths))  # type: ignore[arg-type]
    assert rows == compared and all(error.largest == 0 for error in errors.values())


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return write_policy(tmp_path / "policy", MODEL)


@pytest.fixture
def quantize(policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Price]:
    """quantize_package in bf16 of a real package; its dataset and the simulator's episodes are made up."""
    (tmp_path / "package").mkdir()
    write_package(policy, tmp_path / "package", TERMS)
    manifest = SimpleNamespace(folder=lambda outputs: tmp_path)
    monkeypatch.setattr("prts_core.delivery.quantize.viewed", lambda *asked: manifest)
    monkeypatch.setattr(LeRobotDataset, "open", lambda folder: Held(5, 3))

    def run(out: str, measured: Callable[[Path, Path], None], said: list[str]) -> Price:
        def measure(plan, name, policy, outputs, folder, say, dtype):
            folder.mkdir(parents=True, exist_ok=True)
            measured(policy, folder)
            write_json(folder / "report.json", report(policy))

        monkeypatch.setattr("prts_core.delivery.quantize.measure_version", measure)
        found, plan = resolve(str(tmp_path / "package")), load_plan(RECIPE, ["register.margin=-0.6"])
        return quantize_package(plan, found, "bf16", tmp_path / out, tmp_path / "outputs", said.append)

    return run


def test_two_who_quantise_one_package_do_so_one_after_the_other(quantize: Callable[..., Price], tmp_path: Path):
    def measured(policy: Path, folder: Path) -> None:
        (work,) = (tmp_path / "outputs" / "quantize").iterdir()
        assert is_locked(work / ".lock")
        benchmarked(20, 4).write_parquet(folder / "episodes.parquet")

    price = quantize("small", measured, [])
    assert price.rows == 8 == read_json(tmp_path / "small" / REPORT)["rows"]


def test_a_quantised_package_has_an_alarm_of_its_own_values_or_says_that_it_has_none(
    quantize: Callable[..., Price], tmp_path: Path
):
    for out, successes, told in (("with", 150, None), ("without", 20, "no alarm")):
        said: list[str] = []
        quantize(out, lambda _, f, n=successes: benchmarked(n, 40).write_parquet(f / "episodes.parquet"), said)
        found = read_alarm(resolve(str(tmp_path / out)).folder)
        assert (None if found is None else found.episodes) == (100 if told is None else None)
        assert any("no alarm" in text for text in said) == (told is not None)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_package_is_quantised_where_the_figures_allow_it(
    smoke_outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """The real command on the smoke run's package, dataset and simulator; its own measurements go elsewhere."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("COLUMNS", "200")
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    for name in ("store", "runs"):
        (outputs / name).symlink_to(smoke_outputs / name)
    package = outputs / "runs" / "smoke" / "package" / "output"
    words = ["skill", "quantize", str(package), "--as", "nf4", "--config", str(RECIPE), "--outputs", str(outputs)]
    assert main([*words, "--out", str(tmp_path / "refused")]) == 1
    assert "does not exceed the margin" in capsys.readouterr().err and not (tmp_path / "refused").exists()
    assert main([*words, "--out", str(tmp_path / "small"), "--set", "register.margin=-0.6"]) == 0
    assert "MB before" in capsys.readouterr().out
    small = tmp_path / "small"
    assert verify_package(small).budget_ms == 200.0 and main(["skill", "check", str(small)]) == 0
    manifest, policy = read_manifest(small), load_policy(small)
    assert (manifest.quantization.dtype, manifest.quantization.extra["scheme"]) == ("int4", "nf4")
    price = read_json(small / "quantization_report.json")
    assert price["bytes"] < price["full_bytes"] and not price["against"]
    assert {*price["errors"]} == {d.name for d in policy.contract.contract.action}
    assert price["errors"]["hand_dx"]["largest"] > price["errors"]["hand_dx"]["mean"] > 0
    (record,) = read_evaluations(small).values()
    assert record.eval_config["policy_digest"] == policy_digest(small) != policy_digest(package)
    assert record.eval_config["dtype"] == "bf16"
    assert main([*words[:2], str(small), *words[3:], "--out", str(tmp_path / "twice")]) == 1
    assert "quantised already" in capsys.readouterr().err
