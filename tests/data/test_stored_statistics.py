"""Statistics that no longer belong to the data are found, whatever their form; those that do are left in peace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prts_core.cli.main import main
from prts_core.config.schema import DimensionSpec
from prts_core.data import statistics
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.statistics_export import write_forms
from prts_core.data.validation import Finding, validate_dataset
from prts_core.data.validation.repair import repair
from prts_core.io.errors import DataError
from prts_core.io.files import digest_value, read_json, write_json
from tests.data.conftest import ROBOT, Converted, convert_toy

CHUNK = 5
RELATIVE = f"state_relative_ck{CHUNK}_norm_stats.json"
TABLE = "data/chunk-000/episode_{:06d}.parquet"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, toy: Converted) -> Path:
    """A dataset with one relative dimension, unsealed, and beside it `stats`, the folder that stage stats makes."""
    folder = tmp_path_factory.mktemp("stored")
    robot = replace(ROBOT, action=(*ROBOT.action[:3], DimensionSpec("effort", "m", relative=True)))
    root = convert_toy(folder, toy.raw, robot=robot).root
    (root / "meta/prts_manifest.json").unlink()
    made = statistics.compute(root, chunk_length=CHUNK)
    assert made.relative is not None
    write_json(folder / "stats/norm_stats.json", made.stats.to_json())
    write_json(folder / "stats" / RELATIVE, made.relative.to_json())
    features = read_json(root / "meta/info.json")["features"]
    write_forms(folder / "stats/forms", made, features, "lab/toy", "QUANTILE", CHUNK)
    return folder


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    shutil.copytree(source / "output", tmp_path / "data")
    shutil.copytree(source / "stats", tmp_path / "stats")
    return tmp_path


def found(folder: Path) -> list[Finding]:
    report = validate_dataset(folder / "data", "packets", statistics=[folder / "stats"])
    return [f for f in report.findings if f.check == "statistics"]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = read_json(path)
    change(raw)
    write_json(path, raw)


def set_action(root: Path, episode: int, value: float) -> None:
    path = root / TABLE.format(episode)
    table = pq.read_table(path)
    cells = table.column("action").to_pylist()
    cells[0] = [value] * 4
    field = table.schema.field("action")
    pq.write_table(table.set_column(table.column_names.index("action"), field, pa.array(cells, field.type)), path)


def test_statistics_of_this_data_are_left_in_peace(copy: Path) -> None:
    """Of one split, in every form, beside the dataset and in its meta/."""
    assert found(copy) == []
    for name in ("prts/norm_stats.json", f"prts/{RELATIVE}", "prts/statistics.json", "lerobot/stats.json"):
        shutil.copy(copy / "stats/forms" / name, copy / "data/meta")
    report = validate_dataset(copy / "data", "packets", statistics=[copy / "stats"])
    assert [f for f in report.findings if f.check == "statistics"] == [] and report.checks["statistics"] > 20


def test_stale_statistics_are_found_in_every_form(copy: Path) -> None:
    set_action(copy / "data", 1, 9.5)
    findings = found(copy)
    own = [f for f in findings if f.severity == "error"]
    assert [Path(f.file).name for f in own] == ["norm_stats.json", RELATIVE]
    assert all("stale" in f.found and "data sha256" in f.found and "prts stats" in f.cure for f in own)
    others = {Path(f.file).parent.name + "/" + Path(f.file).name for f in findings if f.severity == "warning"}
    forms = {"prts/norm_stats.json", f"prts/{RELATIVE}", "prts/statistics.json", "openpi/norm_stats.json"}
    assert others == {*forms, "lerobot/stats.json"}
    assert validate_dataset(copy / "data", "packets").ok, "in the dataset itself there is nothing stale"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw["made_from"].update(split="heldout"), "the file was edited"),
        (lambda raw: raw.update(split="elsewhere"), "split 'elsewhere'"),
        (lambda raw: raw["norm_stats"]["action"]["q99"].__setitem__(1, 0.1), "action: q99[1] = 0.1"),
        (lambda raw: raw.update(count=7), "count 7"),
    ],
)
def test_an_edited_file_of_ours_is_an_error(copy: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(copy / "stats/norm_stats.json", change)
    (finding, *_) = found(copy)
    assert finding.severity == "error" and words in finding.found and finding.file.endswith("stats/norm_stats.json")


def test_contract_and_chunk_length_belong_to_the_fingerprint(copy: Path) -> None:
    shutil.copy(copy / "stats" / RELATIVE, copy / "stats/state_relative_ck6_norm_stats.json")
    assert [(f.found, f.expected) for f in found(copy)] == [("chunk_length 5", "6, as its name says")]
    (copy / "stats/state_relative_ck6_norm_stats.json").unlink()
    contract = LeRobotDataset.open(copy / "data").contract
    replace(contract, gripper="other").save(copy / "data/meta/contract.json")
    assert ["stale" in f.found and "contract" in f.found for f in found(copy)] == [True, True]


def test_statistics_of_an_older_method_are_stale(copy: Path) -> None:
    def older(raw: dict[str, Any]) -> None:
        raw["made_from"]["method"] = "sample std"
        raw["fingerprint"] = digest_value(raw["made_from"])

    edit(copy / "stats" / RELATIVE, older)
    assert ["stale" in f.found and "method sample std" in f.found for f in found(copy)] == [True]


def averaged(root: Path, share: float, relative: bool) -> list[float]:
    """What others do: the mean of the episodes' own quantiles, of the last action dimension."""
    data, out = LeRobotDataset.open(root), []
    for episode in data.episodes("train"):
        state, action = data.states(episode)[:, 3], data.actions(episode)[:, 3]
        parts = [action[h:] - state[: len(state) - h] for h in range(CHUNK)] if relative else [action]
        out.append(np.quantile(np.concatenate(parts), share))
    return [float(np.mean(out))]


@pytest.mark.parametrize(
    ("form", "feature", "name", "relative"),
    [
        (f"prts/{RELATIVE}", "action", "q99", True),
        ("lerobot/stats.json", "action", "q90", False),
    ],
)
def test_averaged_quantiles_are_called_so(copy: Path, form: str, feature: str, name: str, relative: bool) -> None:
    path = copy / "stats/forms" / form
    value = averaged(copy / "data", {"q90": 0.9, "q99": 0.99}[name], relative)

    def change(raw: dict[str, Any]) -> None:
        keep = raw[feature][name][:3]
        raw[feature][name] = keep + value

    edit(path, change)
    (finding,) = found(copy)
    assert finding.file == str(path) and f"{name}[3]" in finding.found and finding.severity == "warning"
    assert ("state-relative chunks of 5: q99[3]" in finding.found) == relative
    if relative:  # no other dimension of the claim, which are not averaged
        assert "the mean of the episodes' quantiles" in finding.found


@pytest.mark.parametrize(
    ("form", "way"),
    [
        ("prts/statistics.json", ("datasets", "lab/toy", "stats", "observation.state", "std")),
        ("prts/statistics.json", ("datasets", "lab/toy", "stats", "action", "max")),
        ("openpi/norm_stats.json", ("norm_stats", "actions", "mean")),
        ("openpi/norm_stats.json", ("norm_stats", "state", "q99")),
        ("lerobot/stats.json", ("observation.state", "q50")),
        (f"prts/{RELATIVE}", ("action", "min")),
    ],
)
def test_wrong_numbers_are_found_in_every_form(copy: Path, form: str, way: tuple[str, ...]) -> None:
    def change(raw: dict[str, Any]) -> None:
        for key in way[:-1]:
            raw = raw[key]
        raw[way[-1]] = [2 * number + 1 for number in raw[way[-1]]]

    edit(copy / "stats/forms" / form, change)
    findings = found(copy)
    assert findings and all(f.file.endswith(form) and way[-1] in f.found for f in findings)


def test_damaged_and_absent_files(copy: Path) -> None:
    for text in ("[", "[1]", '{"norm_stats": 3}', '{"action": {"q01": [[], 2]}, "observation.state": 4}'):
        (copy / "stats/norm_stats.json").write_text(text)
        assert all(f.file.endswith("norm_stats.json") for f in found(copy))
    with pytest.raises(DataError, match="to compare are missing"):
        validate_dataset(copy / "data", "packets", statistics=[copy / "nowhere"])


def test_repair_leaves_out_what_would_be_stale(copy: Path) -> None:
    for name in ("norm_stats.json", RELATIVE):
        shutil.copy(copy / "stats" / name, copy / "data/meta" / name)
    assert not any("left out" in line for line in repair(copy / "data", copy / "same", video="packets"))
    assert (copy / "same/meta/norm_stats.json").is_file() and validate_dataset(copy / "same", "packets").ok
    set_action(copy / "data", 2, 0.5)
    done = repair(copy / "data", copy / "other", video="packets")
    assert sum("left out: stale" in line for line in done) == 2 and validate_dataset(copy / "other", "packets").ok
    assert not (copy / "other/meta/norm_stats.json").exists()


def test_the_command_takes_statistics(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["validate", str(copy / "data"), "--video", "packets", "--json", "--statistics", str(copy / "stats")]
    assert main(command) == 0
    set_action(copy / "data", 0, 3.0)
    capsys.readouterr()
    assert main(command) == 1
    assert any("stale" in f["found"] for f in json.loads(capsys.readouterr().out)["findings"])
