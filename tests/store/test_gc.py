"""`prts gc`: only what nothing refers to, only when told, never what is shown, registered, running or young."""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.cli import gc as command
from prts_core.io.errors import StageError
from prts_core.io.files import read_json, write_json, write_text
from prts_core.io.locks import locked
from prts_core.store import gc
from prts_core.store.gc import Garbage, delete_garbage, find_garbage, plan_keys
from prts_core.store.listing import list_files
from prts_core.store.stage import StageContext
from tests.store.toy_chain import Chain, Config

DAY_S = 86400.0


def look(chain: Chain, keys: set[str] | None = None, registered: set[str] | None = None, days: float = 14) -> Garbage:
    return find_garbage(chain.outputs, keys=keys or set(), registered=registered or set(), keep_days=days)


def stages(found: Garbage) -> list[str]:
    return [f"{item.what} {item.stage}" for item in found.items]


def age(folder: Path, days: float) -> None:
    """Make a folder and all in it look `days` old."""
    then = time.time() - days * DAY_S
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))


@pytest.fixture
def old(chain: Chain) -> Chain:
    """A finished chain that no recipe shows any more: the recipe means another configuration now. 100 days old."""
    before = replace(chain, runs=[])
    for name in ("first", "second"):
        before.run(name)
    chain.config = Config("now")
    for name in ("first", "second"):
        chain.run(name)
    for name in ("first", "second"):
        age(before.folder(name), 100)
        age(chain.folder(name), 100)
    return before


def test_a_collection_that_is_killed_leaves_no_result_without_its_parents(
    chain: Chain, old: Chain, monkeypatch: pytest.MonkeyPatch
):
    move, moved = gc._move_away, list[str]()

    def once(item: gc.Removable, trash: Path) -> bool:
        if moved:
            raise KeyboardInterrupt
        moved.append(item.stage)
        return move(item, trash)

    monkeypatch.setattr(gc, "_move_away", once)
    with pytest.raises(KeyboardInterrupt):
        delete_garbage(chain.outputs, keys=set(), registered=set(), keep_days=14)
    assert moved == ["second"] and old.find("first") is not None and not old.folder("second").exists()


def test_what_no_recipe_shows_goes_and_what_one_shows_stays(chain: Chain, old: Chain):
    found = look(chain)
    assert stages(found) == ["result first", "result second"]
    assert {item.key for item in found.items} == {old.find(n).key for n in ("first", "second")}
    assert found.kept["recipes show"] == 2
    deleted = delete_garbage(chain.outputs, keys=set(), registered=set(), keep_days=14)
    assert deleted.deleted and stages(deleted) == stages(found) and deleted.bytes > 0
    assert old.find("first") is None and chain.find("first") is not None
    assert stages(look(chain)) == [] and not list((chain.outputs / "store" / ".trash").iterdir())
    old.runs.clear()
    old.run("first")
    assert old.runs == ["first"], "what was removed can be made again"


def test_looking_changes_nothing(chain: Chain, old: Chain):
    before = sorted(str(p) for p in chain.outputs.rglob("*"))
    look(chain)
    assert sorted(str(p) for p in chain.outputs.rglob("*")) == before


def test_hard_links_are_counted_once_and_what_a_view_holds_is_not_freed(chain: Chain, old: Chain):
    entry = old.folder("second") / "output"
    write_text(entry / "one.bin", "x" * 1000)
    os.link(entry / "one.bin", entry / "two.bin")
    item = next(item for item in look(chain).items if item.stage == "second")
    small = sum(p.stat().st_size for p in old.folder("second").rglob("*") if p.is_file() and p.stat().st_size < 1000)
    large = sum(p.stat().st_size for p in old.folder("second").glob("*.json") if p.stat().st_size >= 1000)
    assert item.bytes == small + large + 1000
    os.link(entry / "one.bin", chain.outputs / "elsewhere")
    assert next(item for item in look(chain).items if item.stage == "second").bytes == small + large


def test_young_results_of_changed_values_stay_with_their_parents(chain: Chain, old: Chain):
    os.utime(old.folder("second") / "manifest.json")
    assert stages(look(chain)) == []
    assert stages(look(chain, days=0)) == ["result first", "result second"]


def test_being_asked_for_makes_a_result_young(chain: Chain, old: Chain):
    old.overrides = ("typed",)
    old.run("second")
    assert stages(look(chain)) == []


def test_a_plan_that_is_given_keeps_its_results(chain: Chain, old: Chain):
    keys, notes = plan_keys(old.store, old.plan, [("first", "d"), ("second", "d")])
    assert stages(look(chain, keys=keys)) == [] and notes == []


def test_a_plan_whose_source_is_away_is_told(chain: Chain, tmp_path: Path):
    chain.source = tmp_path / "away"
    keys, notes = plan_keys(chain.store, chain.plan, [("first", "d"), ("second", "d")])
    assert keys == set() and len(notes) == 1 and "Dataset 'd' is not on this machine" in notes[0]


@pytest.mark.parametrize("by", ["key", "digest"])
def test_what_is_registered_stays_with_all_it_was_made_from(chain: Chain, old: Chain, by: str):
    registered = {getattr(old.find("second"), by)}
    assert stages(look(chain, registered=registered, days=0)) == []
    assert look(chain, registered=registered).kept["registered"] == 2


def interrupt(chain: Chain) -> None:
    def stumble(context: StageContext) -> None:
        write_text(context.work / "checkpoints" / "checkpoint-3" / "x", "days of work")
        raise KeyboardInterrupt

    chain.work = stumble
    with pytest.raises(KeyboardInterrupt):
        chain.run("second")
    chain.work = lambda context: None


def test_interrupted_work_stays_while_it_is_young_and_so_do_its_parents(chain: Chain, old: Chain):
    old.second, old.overrides = Config("typed"), ("typed",)
    interrupt(old)
    work = old.folder("second")
    age(work, 13)
    assert stages(look(chain)) == ["result second"], "that of the earlier setting; `first` is the parent of the work"
    age(work, 15)
    assert sorted(stages(look(chain))) == ["result first", "result second", "work second"]
    os.utime(work / "work" / "checkpoints" / "checkpoint-3" / "x")  # it has left another checkpoint
    assert stages(look(chain)) == ["result second"]
    delete_garbage(chain.outputs, keys=set(), registered=set(), keep_days=14)
    found: list[str] = []
    old.work = lambda context: found.append((context.work / "checkpoints/checkpoint-3/x").read_text())
    old.run("second")
    assert found == ["days of work"]


def test_running_work_stays_at_any_age(chain: Chain, old: Chain):
    old.second, old.overrides = Config("typed"), ("typed",)
    interrupt(old)
    age(old.folder("second"), 100)
    with locked(old.folder("second") / ".lock"):
        assert stages(look(chain, days=0)) == ["result second"]
        deleted = delete_garbage(chain.outputs, keys=set(), registered=set(), keep_days=0)
        assert stages(deleted) == ["result second"]
    assert (old.folder("second") / "work" / "checkpoints").is_dir()


def test_what_kills_and_other_parents_left_goes_when_it_is_old(chain: Chain, old: Chain):
    entry = chain.folder("first")
    for name in (".done", "work", "work-0123abcd"):
        write_text(entry / name / "x", "left")
    write_text(chain.outputs / "store" / "first" / "0badcafe" / ".lock", "")
    names = {item.path.name for item in look(chain, days=0).items if item.what == "leftover"}
    assert names == {".done", "work", "work-0123abcd", "0badcafe"}
    names = {item.path.name for item in look(chain).items if item.what == "leftover"}
    assert "work-0123abcd" not in names
    delete_garbage(chain.outputs, keys=set(), registered=set(), keep_days=0)
    assert sorted(p.name for p in entry.iterdir()) == [
        ".lock",
        "files.tsv",
        "manifest.json",
        "output",
        "provenance.json",
    ]
    assert chain.find("first") is not None


def test_digests_of_a_source_that_is_gone_go_when_they_are_old(chain: Chain, tmp_path: Path):
    here, gone = tmp_path / "here", tmp_path / "gone"
    caches = chain.outputs / "store" / ".sources"
    for root in (here, gone):
        write_text(root / "a", "a")
        list_files(root, caches / f"{root.name}.tsv")
    (gone / "a").unlink()
    gone.rmdir()
    assert stages(look(chain)) == []
    age(caches, 20)
    assert [item.path.name for item in look(chain).items] == ["gone.tsv"]
    delete_garbage(chain.outputs, keys=set(), registered=set(), keep_days=14)
    assert [path.name for path in caches.iterdir()] == ["here.tsv"]


def run(chain: Chain, *words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(["--outputs", str(chain.outputs), *words]))


@pytest.fixture
def no_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PRTS_RECIPE", str(tmp_path / "none.yaml"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_command_lists_then_removes(chain: Chain, old: Chain, no_recipe: None, capsys: pytest.CaptureFixture[str]):
    assert run(chain) == 0
    text = capsys.readouterr().out
    assert "2 could go" in text and "`prts gc --delete` removes them" in text and "2 by recipes show" in text
    assert old.find("first") is not None
    assert run(chain, "--delete", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["deleted"] and [item["stage"] for item in said["items"]] == ["first", "second"]
    assert old.find("first") is None


def test_a_registry_that_does_not_answer_stops_deletion(
    chain: Chain, old: Chain, no_recipe: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(StageError, match=r"Nothing was removed.*--ignore-registry"):
        run(chain, "--delete")
    assert old.find("first") is not None
    assert run(chain) == 0 and "Registered models are not left out" in capsys.readouterr().err
    assert run(chain, "--delete", "--ignore-registry") == 0
    assert old.find("first") is None


def test_registered_versions_are_read_from_mlflow(chain: Chain, old: Chain, no_recipe: None):
    from prts_core.tracking.store import client

    store = client(chain.outputs)
    store.create_registered_model("m")
    key = read_json(old.folder("second") / "manifest.json")["key"]
    store.create_model_version("m", "file:///nowhere", tags={"prts.key": key, "prts.manifest_digest": "sha256:x"})
    assert command.registered_results(chain.outputs) == {key, "sha256:x"}
    assert run(chain, "--delete", "--keep-days", "0") == 0
    assert old.find("second") is not None


def test_two_collections_at_once_take_everything_once(chain: Chain, old: Chain):
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(delete_garbage, chain.outputs, keys=set(), registered=set(), keep_days=14) for _ in range(4)
        ]
        taken = [item.path for job in jobs for item in job.result().items]
    assert len(taken) == 2 == len(set(taken)) and chain.find("second") is not None


def test_a_model_registered_elsewhere_stops_deletion(chain: Chain, no_recipe: None, monkeypatch: pytest.MonkeyPatch):
    chain.run("first")
    write_json(chain.outputs / "registrations" / "r.json", {"tracking_uri": "http://mlflow.team.example"})
    with pytest.raises(
        StageError, match=r"Nothing was removed.*Expected: http://mlflow\.team\.example.*MLFLOW_TRACKING"
    ):
        run(chain, "--delete")
    assert chain.folder("first").exists()
