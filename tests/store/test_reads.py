"""Files from outside that are no dataset: checkpoints, image-text data, the installed simulator."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.config.load import RunPlan, load_plan
from prts_core.io.errors import CheckpointError, StageError
from prts_core.io.files import read_json, write_json, write_text
from prts_core.io.hub import local_folder
from prts_core.stages import declarations
from prts_core.store.stage import Read, StageContext
from prts_core.store.status import status
from tests.io.test_hub import COMMITS, cache, put
from tests.store.toy_chain import Chain

__all__ = ["cache"]  # a fixture


@pytest.fixture
def checkpoint(chain: Chain, tmp_path: Path) -> Path:
    """A folder that the chain's second stage reads."""
    folder = tmp_path / "checkpoint"
    for name in ("weights.safetensors", "README.md", "global_step10/optimizer.safetensors"):
        write_text(folder / name, "one")
    chain.reads = {"model": Read(str(folder), ("*.safetensors",))}
    chain.run("first")
    return folder


def test_other_files_are_another_result(chain: Chain, checkpoint: Path):
    made = chain.run("second")
    for name in ("README.md", "global_step10/optimizer.safetensors"):  # nobody reads them
        (checkpoint / name).write_text("two")
    assert chain.run("second") == made
    (checkpoint / "weights.safetensors").write_text("two")
    assert chain.find("second") is None
    row = status(chain.store, chain.plan, [("second", "d")]).rows[0]
    assert row.state == "stale" and "files.model" in row.why[0]
    other = chain.run("second")
    (checkpoint / "weights.safetensors").write_text("one")
    assert chain.run("second") == made and other.key != made.key and chain.runs == ["first", "second", "second"]


def test_a_stage_is_told_what_it_reads(chain: Chain, checkpoint: Path):
    seen: list[dict[str, str]] = []
    chain.work = lambda context: seen.append(context.files)
    made = chain.run("second")
    assert seen == [made.config["files"]] and seen[0]["model"].startswith("sha256:")


@pytest.mark.parametrize("back", [False, True])
def test_files_that_change_while_they_are_read_are_told(chain: Chain, checkpoint: Path, back: bool):
    def change(context: StageContext) -> None:
        time.sleep(0.02)
        (checkpoint / "weights.safetensors").write_text("two")
        if back:
            (checkpoint / "weights.safetensors").write_text("one")

    chain.work = change
    with pytest.raises(StageError, match="changed while stage 'second' read it") as caught:
        chain.run("second")
    assert caught.value.field == (None if back else "model") and "run `prts second" in str(caught.value.cure)
    chain.work = lambda context: None
    assert chain.run("second").verify(chain.outputs), "the cure, followed"


def test_recorded_files_find_a_result_and_never_make_one(
    chain: Chain, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    made = chain.run("second")
    shutil.rmtree(checkpoint)
    assert chain.find("second") is None
    monkeypatch.setenv("PRTS_SOURCES", "recorded")
    assert chain.run("second") == made
    chain.damage("second")
    with pytest.raises(StageError, match="not what was recorded") as caught:
        chain.run("second")
    assert caught.value.cure == "unset PRTS_SOURCES"


def test_a_hub_id_stands_for_the_commit_that_is_downloaded(chain: Chain, cache: Path):
    chain.reads = {"model": Read("owner/name", ("*.json",))}
    chain.run("first")
    with pytest.raises(CheckpointError, match=r"neither a folder here nor can it be fetched.*owner/name"):
        chain.run("second")
    assert chain.runs == ["first"], "told before any work"
    put(cache, COMMITS[0])
    first = chain.run("second")
    assert first.config["files"] == {"model": f"owner/name@{COMMITS[0]}"}
    put(cache, COMMITS[1])
    assert chain.run("second").key != first.key
    chain.reads = {"model": Read(f"owner/name@{COMMITS[0]}", ("*.json",))}
    assert chain.run("second") == first


def test_a_hub_id_that_moves_while_a_stage_runs_is_read_at_the_commit_of_the_key(
    chain: Chain, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CHECKPOINT", "owner/name")
    chain.reads = {"model": Read("owner/name", ("*.json",))}
    chain.run("first")
    put(cache, COMMITS[0])
    read: list[dict[str, str]] = []

    def work(context: StageContext) -> None:
        put(cache, COMMITS[1])  # somebody downloads it anew
        source = context.pinned("model", "owner/name")
        assert source is not None and context.pinned("other", "owner/name") == "owner/name"
        assert context.pinned("model", "${CHECKPOINT}") == source and context.pinned("model", None) is None
        read.append(read_json(local_folder(source, ["*.json"]) / "config.json"))

    chain.work = work
    assert chain.run("second").config["files"] == {"model": f"owner/name@{COMMITS[0]}"}
    assert read == [{"commit": COMMITS[0]}]


# ---- what the real stages read ---------------------------------------------------------------------------------------
RECIPE = """\
name: r
datasets: [d]
deploy: d
model: smoke
pretrain: {image_text: {words: {json_path: '${WORDS}/a.jsonl', vision_base_path: '${WORDS}/images'}}}
benchmark: {suite: %s}
"""


def plan_of(folder: Path, suite: str = "null", source: str = "{kind: lerobot, root: /nowhere}") -> RunPlan:
    write_text(folder / "datasets/d.yaml", f"name: d\nsource: {source}\n")
    write_text(folder / "models/smoke.yaml", Path("configs/models/smoke.yaml").read_text())
    write_text(folder / "r.yaml", RECIPE % suite)
    return load_plan(folder / "r.yaml")


@pytest.fixture
def look(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """What a stage's key says of files from outside."""
    from prts_core.store.sources import files_read

    return lambda stage, plan: files_read(declarations.STAGES[stage], plan, None, tmp_path / "outputs")


def test_pictures_of_image_text_data_are_in_the_key(tmp_path: Path, look, monkeypatch: pytest.MonkeyPatch):
    plan = plan_of(tmp_path)
    assert look("pretrain", plan) == {}, "not set: the stage tells of it"
    monkeypatch.setenv("WORDS", str(tmp_path / "words"))
    write_text(tmp_path / "words/a.jsonl", '{"image": "1.png"}\n{"image": ["gone.png"]}\n{}\n')
    write_text(tmp_path / "words/images/1.png", "a")
    first = look("pretrain", plan)
    assert first.keys() == {"image_text.words", "image_text.words.images"}
    (tmp_path / "words/images/somebody_elses.png").write_text("x")
    assert look("pretrain", plan) == first, "what the file does not name does not count"
    (tmp_path / "words/images/1.png").write_text("b")
    second = look("pretrain", plan)
    assert {name for name in first if first[name] != second[name]} == {"image_text.words.images"}
    shutil.copytree(tmp_path / "words", tmp_path / "elsewhere")
    monkeypatch.setenv("WORDS", str(tmp_path / "elsewhere"))
    assert look("pretrain", plan) == second, "where they lie is no part of what they are"


def install(cache: Path, family: str, **record: object) -> None:
    write_json(cache / "prts/sims" / family / "installed.json", {"standins": "", "self_check": {"seconds": 1}} | record)


def test_the_installed_simulator_is_in_the_key_of_who_uses_it(tmp_path: Path, look, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    home, pins = tmp_path / "cache/prts/sims/libero", {"mujoco": "3.3.0"}
    expert = "{kind: expert, suite: libero_object}"
    users = [
        ("benchmark", plan_of(tmp_path / "a", "libero_pro_task")),
        ("collect", plan_of(tmp_path / "b", source=expert)),
    ]

    def both() -> list[dict[str, str]]:
        return [look(stage, plan) for stage, plan in users]

    seen = [both()]
    install(tmp_path / "cache", "libero", pins=pins)
    install(tmp_path / "cache", "libero_pro", over="libero")
    write_text(home / "assets/a.xml", "one")
    write_text(home / "tasks.json", "{}")
    seen.append(both())
    assert all(found.keys() == {"simulator", "simulator/assets", "simulator/tasks.json"} for found in seen[-1])
    install(tmp_path / "cache", "libero", pins=pins, self_check={"seconds": 2}, installed="later")
    assert both() == seen[-1]
    for change in (
        lambda: (home / "assets/a.xml").write_text("two"),
        lambda: (home / "tasks.json").write_text("[]"),
        lambda: install(tmp_path / "cache", "libero", pins={"mujoco": "3.4.0"}),
        lambda: install(tmp_path / "cache", "libero", pins={"mujoco": "3.4.0"}, standins="stand-in assets"),
    ):
        change()
        seen.append(both())
    for column in zip(*seen, strict=True):
        assert len({str(found) for found in column}) == len(seen)
    assert look("benchmark", plan_of(tmp_path / "c", "metaworld")) == {}, "it lives in the main environment"
    assert read_json(home / "installed.json")["standins"] == "stand-in assets"


def test_copies_of_the_same_bytes_cost_no_checkpoints(chain: Chain, checkpoint: Path):
    def stumble(context: StageContext) -> None:
        write_text(context.work / "checkpoint.txt", "step 100")
        raise KeyboardInterrupt

    chain.work = stumble
    with pytest.raises(KeyboardInterrupt):
        chain.run("second")
    shutil.copytree(checkpoint, checkpoint.with_name("anew"))
    shutil.rmtree(checkpoint)
    checkpoint.with_name("anew").rename(checkpoint)
    seen: list[str] = []
    chain.work = lambda context: seen.append((context.work / "checkpoint.txt").read_text())
    chain.run("second")
    assert seen == ["step 100"]


def test_two_sets_of_pictures_in_one_folder_are_each_read_once(tmp_path: Path, look, monkeypatch: pytest.MonkeyPatch):
    from prts_core.store import listing

    monkeypatch.setenv("WORDS", str(tmp_path / "words"))
    plan = plan_of(tmp_path)
    more = plan.recipe.pretrain.image_text | {
        "other": replace(plan.recipe.pretrain.image_text["words"], json_path="${WORDS}/b.jsonl")
    }
    plan = replace(plan, recipe=replace(plan.recipe, pretrain=replace(plan.recipe.pretrain, image_text=more)))
    for name in "ab":
        write_text(tmp_path / f"words/{name}.jsonl", f'{{"image": "{name}.png"}}\n')
        write_text(tmp_path / f"words/images/{name}.png", name)
    time.sleep(0.1)  # a file hashed within a clock tick of its last change is read once more
    first, read, digest = look("pretrain", plan), list[Path](), listing.digest_file
    monkeypatch.setattr(listing, "digest_file", lambda path: read.append(path) or digest(path))
    assert look("pretrain", plan) == first and len(first) == 4 and read == []
