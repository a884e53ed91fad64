"""The stages convert, validate and stats as the chain calls them, on tiny recordings and on the real G1 folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from prts_core.config.load import load_plan
from prts_core.config.places import shared_folder
from prts_core.config.schema import ConvertConfig, StatsConfig, ValidateConfig, VideoConfig
from prts_core.config.sources import ExpertSource
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.normalize import NormStats
from prts_core.data.validation import ValidationFailed
from prts_core.io.errors import Skipped
from prts_core.io.files import read_json
from prts_core.stages import chain
from prts_core.stages.convert import convert
from prts_core.stages.stats import stats
from prts_core.stages.validate import validate
from prts_core.store.listing import digest_tree
from prts_core.store.manifest import Manifest
from prts_core.store.stage import StageContext
from tests.data.conftest import ROBOT, Converted, write_raw

CONFIGS = Path(__file__).parents[2] / "configs"


def context(outputs: Path, stage: str) -> StageContext:
    made = StageContext(
        outputs, outputs / "runs" / stage / "toy" / "work-1", seed=7, recipe="quickstart", partition="toy"
    )
    made.output.mkdir(parents=True)
    return made


def manifest(outputs: Path, kind: str, folder: Path) -> Manifest:
    """A manifest whose content is `folder`."""
    made = Manifest(kind, "0", 1, "toy", {}, {}, {}, None, "", digest_tree(folder))
    made.folder(outputs).parent.mkdir(parents=True, exist_ok=True)
    made.folder(outputs).unlink(missing_ok=True)
    made.folder(outputs).symlink_to(folder)
    return made


def test_convert_validate_stats(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw")
    source = ExpertSource("expert", "metaworld", workers=2)
    made = context(tmp_path, "convert")
    result = convert(
        ConvertConfig("toy", source, ROBOT, VideoConfig()), {"collect": manifest(tmp_path, "collect", raw)}, made
    )
    assert result.metrics == {"episodes": 6, "train_episodes": 4, "frames": 74, "tasks": 2, "cameras": 2}
    dataset = LeRobotDataset.open(made.output)
    assert dataset.contract.control_hz == 20.0 and result.contracts == {"toy": dataset.contract.fingerprint}
    assert not list(made.output.rglob(".*"))

    inputs = {"convert": manifest(tmp_path, "convert", made.output)}
    checked = context(tmp_path, "validate")
    result = validate(ValidateConfig("toy"), inputs, checked)
    assert result.metrics["errors"] == 0 and result.contracts == {"toy": dataset.contract.fingerprint}
    assert read_json(checked.output / "report.json")["ok"] and "sound" in (checked.output / "report.md").read_text()

    described = context(tmp_path, "stats")
    result = stats(StatsConfig("toy"), inputs, described)
    assert result.artifacts[0] == "norm_stats.png" and (described.output / "norm_stats.png").stat().st_size > 5_000
    assert NormStats.load(described.output / "norm_stats.json").count == result.metrics["rows"] == 50
    record = read_json(described.output / "norm_stats.json")
    assert set(record) == {"norm_stats", "count", "split", "fingerprint", "rank_error", "made_from"}
    forms = sorted(p.relative_to(described.output).as_posix() for p in (described.output / "forms").rglob("*.json"))
    assert forms == [
        f"forms/{name}"
        for name in ("lerobot/stats.json", "openpi/norm_stats.json", "prts/norm_stats.json", "prts/statistics.json")
    ]


def test_failed_validation_leaves_its_report(tmp_path: Path, toy: Converted) -> None:
    import shutil

    root = tmp_path / "data"
    shutil.copytree(toy.root, root)
    (root / "videos/chunk-000/observation.images.top/episode_000001.mp4").unlink()
    (root / "data/chunk-000/episode_000003.parquet").write_bytes(b"PAR1")
    before = digest_tree(root)
    made = context(tmp_path, "validate")
    inputs = {"convert": manifest(tmp_path, "convert", root)}
    with pytest.raises(ValidationFailed, match=r"3 more errors.*episode_000003\.parquet.*failed-report\.md") as error:
        validate(ValidateConfig("toy"), inputs, made)
    assert len(error.value.report.errors) == 4 and "\n" not in str(error.value)
    page = made.work.parent / "failed-report.md"
    assert "4 errors" in page.read_text() and read_json(page.with_suffix(".json"))["errors"] == 4
    assert not (made.output / "report.json").exists() and digest_tree(root) == before

    good = {"convert": manifest(tmp_path, "convert", shutil.copytree(toy.root, tmp_path / "good"))}
    validate(ValidateConfig("toy"), good, made)
    assert not page.exists(), "a report of the past must not look like one of today"


def test_g1_through_the_chain(tmp_path: Path) -> None:
    if not (shared_folder() / "data/g1_bottle").is_dir():
        pytest.skip("g1_bottle is not on this machine ($PRTS_SHARED)")
    plan = load_plan(CONFIGS / "quickstart.yaml")
    made = {name: chain.run(name, plan, "g1_bottle", tmp_path) for name in ("collect", "convert", "validate", "stats")}
    assert (
        made["convert"].metrics["frames"]
        == made["validate"].metrics["rows_checked"]
        == made["stats"].metrics["rows"]
        == 1093
    )
    fingerprints = {manifest.contracts.get("g1_bottle") for name, manifest in made.items() if name != "collect"}
    assert len(fingerprints) == 1 and None not in fingerprints
    again = {name: chain.run(name, plan, "g1_bottle", tmp_path).digest for name in made}
    assert again == {name: manifest.digest for name, manifest in made.items()}


def test_absent_g1_is_skipped_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRTS_SHARED", str(tmp_path / "nowhere"))
    plan = load_plan(CONFIGS / "quickstart.yaml")
    for name in ("collect", "convert"):
        with pytest.raises(Skipped, match="not on this machine"):
            chain.run(name, plan, "g1_bottle", tmp_path)
