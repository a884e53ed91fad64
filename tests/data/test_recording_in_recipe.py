"""A dataset's YAML names a recording and its mapping: the chain lists its files, converts it, notices changes."""

from __future__ import annotations

import os
import shlex
import shutil
import typing
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from prts_core.cli.main import main
from prts_core.config.checked_yaml import check
from prts_core.config.load import RunPlan, load_plan, with_mapping
from prts_core.config.schema import DatasetConfig
from prts_core.config.sources import RecordingSource, Source
from prts_core.data.convert.lerobot_v30_export import export
from prts_core.data.convert.source import DATASETS, SOURCES
from prts_core.data.lerobot_v21 import seal
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.data.validation import validate_dataset
from prts_core.io.errors import ConfigError, Skipped, StageError, UnavailableError
from prts_core.io.files import digest_file, read_json
from prts_core.stages import chain
from prts_core.store import listing
from prts_core.store.diff import Results, compare
from prts_core.store.listing import digest_tree, list_files
from prts_core.store.run_stage import untracked
from prts_core.store.status import status
from prts_core.tracking import runs
from tests.data.conftest import Converted
from tests.data.test_convert_robomimic import write_demos

CONFIGS = Path(__file__).parents[2] / "configs"
NAME = "libero_hdf5"


def planned(folder: Path, name: str = NAME) -> RunPlan:
    """A recipe of one dataset, in a copy of our own configs that a test may change."""
    if not folder.is_dir():
        shutil.copytree(CONFIGS, folder)
    recipe = folder / "here.yaml"
    recipe.write_text(yaml.safe_dump({"name": "here", "datasets": [name], "deploy": name, "model": "smoke"}))
    return load_plan(recipe)


@pytest.fixture(autouse=True)
def _without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "stage_run", untracked)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_demos(tmp_path / "raw", count=2)
    monkeypatch.setenv("LIBERO_HDF5_ROOT", str(root))
    return root


def follow(cure: str | None) -> None:
    """Run the command that a cure names, as a person would who copies it."""
    assert cure is not None
    words = shlex.split(cure.split("`")[1])
    assert words[0] == "prts" and main(words[1:]) == 0


def test_the_chain_converts_what_the_command_converts(recorded: Path, tmp_path: Path) -> None:
    plan, outputs = planned(tmp_path / "configs"), tmp_path / "outputs"
    made = {name: chain.run(name, plan, NAME, outputs) for name in ("collect", "convert", "validate", "stats")}
    assert read_json(made["collect"].folder(outputs) / "files.json") == [f.row for f in list_files(recorded)]
    dataset = LeRobotDataset.open(made["convert"].folder(outputs))
    assert made["convert"].metrics["episodes"] == 4 == len(dataset.rows) and made["stats"].metrics["rows"] == 38
    assert dataset.contract.embodiment == "libero_panda" and dataset.contract.action[0].relative

    command = ["convert", "--source", "robomimic", "--mapping", str(CONFIGS / "mappings/libero.yaml")]
    assert main([*command, "--from", str(recorded), "--to", str(tmp_path / NAME)]) == 0
    assert digest_tree(tmp_path / NAME) == digest_tree(dataset.root)

    again = planned(tmp_path / "configs")
    assert {name: chain.run(name, again, NAME, outputs).digest for name in made} == {
        name: manifest.digest for name, manifest in made.items()
    }


def test_another_mapping_is_another_conversion_of_the_same_files(recorded: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    first = {name: chain.run(name, planned(tmp_path / "configs"), NAME, outputs) for name in ("collect", "convert")}
    path = tmp_path / "configs/mappings/libero.yaml"
    path.write_text(path.read_text().replace("fps: 20", "fps: 10"))
    second = {name: chain.run(name, planned(tmp_path / "configs"), NAME, outputs) for name in first}
    assert second["collect"].digest == first["collect"].digest
    assert second["convert"].key != first["convert"].key
    assert LeRobotDataset.open(second["convert"].folder(outputs)).fps == 10
    assert first["convert"].verify(outputs), "the first lies beside it"


@pytest.mark.parametrize("change", ["touched", "new", "lost"])
def test_other_files_are_another_collection_and_the_cure_works(recorded: Path, tmp_path: Path, change: str) -> None:
    """Defect 1: convert said `run prts collect again`, and collect said that it was finished."""
    plan, outputs = planned(tmp_path / "configs"), tmp_path / "outputs"
    before = {name: chain.run(name, plan, NAME, outputs) for name in ("collect", "convert")}
    path = recorded / "open_drawer_demo.hdf5"
    if change == "touched":
        with path.open("ab") as file:
            file.write(b"x")
        line = "sources: 1 file changed (open_drawer_demo.hdf5)"
    elif change == "new":
        shutil.copy(path, recorded / "one_more_demo.hdf5")
        line = "sources: 1 file added (one_more_demo.hdf5)"
    else:
        path.unlink()
        line = "sources: 1 file removed (open_drawer_demo.hdf5)"
    rows = {row.stage: row for row in status(chain.store(outputs), plan, [(name, NAME) for name in before]).rows}
    assert [row.state for row in rows.values()] == ["stale", "stale"] and rows["collect"].why == (line,)
    assert rows["convert"].why == (line, f"its parent collect [{NAME}] is stale")
    with pytest.raises(StageError, match=r"collect:libero_hdf5' has not run yet under this plan") as caught:
        chain.run("convert", plan, NAME, outputs)
    follow(caught.value.cure)
    after = chain.run("convert", plan, NAME, outputs)
    assert after.sources != before["convert"].sources and after.parents != before["convert"].parents
    results = Results(outputs)
    manifests = [results.manifest(made.key) for made in (before["convert"], after)]
    assert None not in manifests and f"collect [{NAME}]: {line}" in compare(results, *manifests).causes  # type: ignore[arg-type]


def test_training_on_a_changed_recording_is_refused(recorded: Path, tmp_path: Path) -> None:
    """Defects 2 and 12: sft trained on the old conversion without a word."""
    plan, outputs = planned(tmp_path / "configs"), tmp_path / "outputs"
    for name in ("collect", "convert", "validate", "stats"):
        chain.run(name, plan, NAME, outputs)
    (recorded / "open_drawer_demo.hdf5").unlink()
    with pytest.raises(StageError, match="has not run yet under this plan"):
        chain.run("stats", plan, NAME, outputs)


@pytest.mark.parametrize("change", ["added", "changed"])
def test_a_changed_dataset_made_elsewhere_is_noticed(toy: Converted, tmp_path: Path, change: str) -> None:
    planned(tmp_path / "configs")
    root = Path(shutil.copytree(toy.root, tmp_path / "theirs"))
    source = {"kind": "lerobot", "root": str(root)}
    (tmp_path / "configs/datasets/theirs.yaml").write_text(yaml.safe_dump({"name": "theirs", "source": source}))
    plan, outputs = planned(tmp_path / "configs", "theirs"), tmp_path / "outputs"
    before = [chain.run(name, plan, "theirs", outputs) for name in ("collect", "convert")]
    assert [chain.run(name, plan, "theirs", outputs) for name in ("collect", "convert")] == before
    if change == "added":
        (root / "README.md").write_text("another word")
    else:
        tasks = root / "meta" / "tasks.jsonl"
        tasks.write_text(tasks.read_text().replace("open", "close"))
    with pytest.raises(StageError, match="has not run yet under this plan") as caught:
        chain.run("convert", plan, "theirs", outputs)
    follow(caught.value.cure)
    assert chain.run("convert", plan, "theirs", outputs).key != before[1].key


@pytest.mark.parametrize("optional", [True, False])
def test_an_absent_recording_is_skipped_only_where_it_is_optional(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optional: bool
) -> None:
    planned(tmp_path / "configs")
    path = tmp_path / "configs/datasets" / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"optional": optional}))
    monkeypatch.setenv("LIBERO_HDF5_ROOT", str(tmp_path / "nowhere"))
    plan = planned(tmp_path / "configs")
    for name in ("collect", "convert"):
        with pytest.raises(Skipped if optional else UnavailableError, match="not on this machine") as caught:
            chain.run(name, plan, NAME, tmp_path / "outputs")
    assert "`export LIBERO_HDF5_ROOT=" in str(caught.value.cure)
    monkeypatch.setenv("LIBERO_HDF5_ROOT", str(recorded))  # the cure, followed
    chain.run("collect", plan, NAME, tmp_path / "outputs")


def test_one_file_and_a_mapping_written_out(recorded: Path, tmp_path: Path) -> None:
    planned(tmp_path / "configs")
    mapping = yaml.safe_load((CONFIGS / "mappings/libero.yaml").read_text())
    source = {"kind": "robomimic", "root": str(recorded / "open_drawer_demo.hdf5"), "mapping": mapping}
    (tmp_path / "configs/datasets/mine.yaml").write_text(yaml.safe_dump({"name": "mine", "source": source}))
    plan = planned(tmp_path / "configs", "mine")
    chain.run("collect", plan, "mine", tmp_path / "outputs")
    made = chain.run("convert", plan, "mine", tmp_path / "outputs")
    assert made.metrics["episodes"] == 2
    dataset = LeRobotDataset.open(made.folder(tmp_path / "outputs"))
    assert dataset.contract.embodiment == "libero_panda", "the robot that the mapping names"


def test_a_v30_dataset_in_a_recipe(toy: Converted, tmp_path: Path) -> None:
    export(toy.root, tmp_path / "v30", tmp_path / "work")
    planned(tmp_path / "configs")
    source = {"kind": "lerobot_v30", "root": str(tmp_path / "v30")}
    (tmp_path / "configs/datasets/theirs.yaml").write_text(yaml.safe_dump({"name": "theirs", "source": source}))
    plan = planned(tmp_path / "configs", "theirs")
    chain.run("collect", plan, "theirs", tmp_path / "outputs")
    made = chain.run("convert", plan, "theirs", tmp_path / "outputs")
    dataset = LeRobotDataset.open(made.folder(tmp_path / "outputs"))
    assert dataset.contract == toy.contract and len(dataset.rows) == 6


def test_a_v30_dataset_is_read_where_it_lies(toy: Converted, tmp_path: Path) -> None:
    """Its result is links: it costs no space, follows a source that moved, and is made again when one changed."""
    export(toy.root, tmp_path / "v30", tmp_path / "work")
    planned(tmp_path / "configs")

    def plan_of(root: Path, **more: str) -> RunPlan:
        source = {"kind": "lerobot", "root": str(root)} | more
        (tmp_path / "configs/datasets/theirs.yaml").write_text(yaml.safe_dump({"name": "theirs", "source": source}))
        return planned(tmp_path / "configs", "theirs")

    stages, outputs = ("collect", "convert", "validate", "stats"), tmp_path / "outputs"
    plan = plan_of(tmp_path / "v30")
    made = {name: chain.run(name, plan, "theirs", outputs) for name in stages}
    root = made["convert"].folder(outputs)
    linked = [path for path in root.rglob("*") if path.is_symlink()]
    assert {path.suffix for path in linked} == {".parquet", ".mp4"}
    assert LeRobotDataset.open(root).contract == toy.contract
    assert made["stats"].metrics["rows"] == 50 and made["validate"].metrics["videos_checked"] == 12
    assert all(os.access(path.resolve(), os.W_OK) for path in linked), "the source is nobody's to protect"
    alone = plan_of(tmp_path / "v30", link="copy")
    copied = [chain.run(name, alone, "theirs", outputs) for name in ("collect", "convert")][1].folder(outputs)
    assert not any(path.is_symlink() for path in copied.rglob("*")), "a result that stands alone is another one"
    plan_of(tmp_path / "v30")

    (tmp_path / "v30").rename(tmp_path / "elsewhere")  # the same files: the same results, linked anew
    moved = plan_of(tmp_path / "elsewhere")
    assert {name: chain.run(name, moved, "theirs", outputs).digest for name in stages} == {
        name: manifest.digest for name, manifest in made.items()
    }
    assert all(path.resolve().is_relative_to(tmp_path / "elsewhere") for path in linked)

    path = next((tmp_path / "elsewhere/data").rglob("*.parquet"))
    table = pq.read_table(path)
    values = np.stack(table.column("action").to_pylist()) + 1
    position = table.column_names.index("action")
    field = table.schema.field("action")
    pq.write_table(table.set_column(position, field, pa.array(values.tolist(), field.type)), path)
    with pytest.raises(StageError, match="has not run yet under this plan") as caught:
        chain.run("stats", moved, "theirs", outputs)
    (tmp_path / "elsewhere" / "meta/prts_manifest.json").unlink()  # its seal was of the other rows
    for name in ("collect", "convert"):
        after = chain.run(name, moved, "theirs", outputs)
    assert after.key != made["convert"].key and caught.value.cure
    assert LeRobotDataset.open(after.folder(outputs)).actions(0)[0, 0] == values[0, 0]


def test_what_is_linked_is_read_once(toy: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its digest: of a dataset of terabytes that is hours."""
    export(toy.root, tmp_path / "v30", tmp_path / "work")
    heavy = {path for path in (tmp_path / "v30").rglob("*") if path.suffix in (".mp4", ".parquet")}
    for path in heavy:
        os.utime(path, (0, 1e9))
    planned(tmp_path / "configs")
    source = {"kind": "lerobot", "root": str(tmp_path / "v30")}
    (tmp_path / "configs/datasets/theirs.yaml").write_text(yaml.safe_dump({"name": "theirs", "source": source}))
    plan, outputs, digested = planned(tmp_path / "configs", "theirs"), tmp_path / "outputs", Counter[Path]()
    for module in (listing, seal):
        monkeypatch.setattr(module, "digest_file", lambda path: digested.update([path.resolve()]) or digest_file(path))
    for name in ("collect", "convert"):
        made = chain.run(name, plan, "theirs", outputs)
    linked = {path.resolve() for path in made.folder(outputs).rglob("*") if path.is_symlink()}
    assert linked and {digested[path] for path in linked} == {1}
    monkeypatch.undo()
    assert validate_dataset(made.folder(outputs)).ok, "the seal is true"


def test_every_converter_may_stand_in_a_recipe() -> None:
    kinds = set(typing.get_args(typing.get_type_hints(RecordingSource)["kind"]))
    assert kinds | {"lerobot_v21"} == set(SOURCES) | set(DATASETS), "lerobot_v21 is the source `lerobot`"


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        ({"kind": "aloha", "root": "x"}, {}, ["'aloha' takes one", "configs/mappings"]),
        ({"kind": "lerobot_v30", "root": "x", "mapping": "libero"}, {}, ["takes none"]),
        ({"kind": "robomimic", "root": "x", "mapping": "liber"}, {}, ["did you mean 'libero'"]),
        ({"kind": "aloha", "root": "x", "mapping": "libero"}, {}, ["source.kind", "robomimic, as the mapping says"]),
        ({"kind": "robomimic", "root": "x", "mapping": "libero"}, {"embodiment_tag": "flexiv"}, ["libero_panda, as"]),
        ({"kind": "robomimic", "root": "x", "maping": "libero"}, {}, ["did you mean 'mapping'"]),
        ({"kind": "robomimic", "root": "x", "mapping": "libero", "reencode": True}, {}, ["lerobot_v30"]),
        ({"kind": "hdf5", "root": "x", "mapping": "libero"}, {}, ["'robomimic'", "'mcap'"]),
        ({"kind": "robomimic", "root": "x", "mapping": {"name": "m"}}, {}, ["state", "here.yaml"]),
    ],
)
def test_what_does_not_fit_is_told(source: dict, more: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        dataset = check(DatasetConfig, {"name": "mine", "source": source} | more, "here.yaml")
        with_mapping(dataset, CONFIGS, Path("here.yaml"))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert typing.get_args(Source), "chosen by `kind`"
