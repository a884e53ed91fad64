"""The price of a quantised package: measured on held-out data and in simulation, and a gate that can say no."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from prts_core.cli.main import main
from prts_core.delivery import gate
from prts_core.delivery.quantize import ActionError, Price
from prts_core.delivery.verify import verify_package
from prts_core.io.files import read_json
from prts_core.policy.policy import load_policy, policy_digest
from prts_core.skills.evaluations import read_evaluations
from prts_core.skills.manifest import read_manifest
from tests.fixtures.smoke_run import RECIPE


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
