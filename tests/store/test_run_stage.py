"""The one door to every stage: nothing runs twice, an interrupted stage goes on, nothing is half replaced."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prts_core.errors import StageError, UnavailableError
from prts_core.files import read_json, write_text
from prts_core.manifest import Manifest
from prts_core.stages.base import StageContext, StageResult, find_finished, load_manifest, load_provenance
from tests.stages.tiny_chain import Chain, Config

HERE = Path(__file__).parent


def test_a_finished_stage_is_not_run_again(chain: Chain):
    made = chain.run("first")
    assert chain.run("first") == made
    assert chain.runs == ["first"]
    assert made.verify(chain.outputs)
    assert sorted(p.name for p in chain.folder("first").iterdir()) == [
        ".lock",
        "manifest.json",
        "output",
        "provenance.json",
    ]


def test_equal_work_has_equal_manifests_and_times_stay_outside(chain: Chain, tmp_path: Path):
    made = chain.run("first")
    other = Chain(tmp_path / "elsewhere").run("first")
    assert other.digest == made.digest
    provenance = load_provenance(chain.outputs, made)
    assert provenance["seconds"] >= 0
    assert not {"started", "host", "seconds"} & set(read_json(chain.folder("first") / "manifest.json"))


@pytest.mark.parametrize("change", [{"config": Config("other")}, {"seed": 8}])
def test_another_configuration_or_seed_runs_anew_and_so_does_what_follows(chain: Chain, change: dict):
    first, second = chain.run("first"), chain.run("second")
    for name, value in change.items():
        setattr(chain, name, value)
    assert chain.run("first").digest != first.digest
    assert chain.run("second").parents != second.parents
    assert chain.runs == ["first", "second", "first", "second"]


@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_a_damaged_output_is_made_again(chain: Chain, damage: str):
    made = chain.run("first")
    text = chain.folder("first") / "output" / "a" / "text.txt"
    if damage == "change":
        text.write_text("vandal")
    elif damage == "remove":
        text.unlink()
    else:
        text.with_name("extra").write_text("vandal")
    assert find_finished(chain.stage("first"), chain.plan, "d", chain.outputs) is None
    assert chain.run("first") == made
    assert made.verify(chain.outputs)
    assert chain.runs == ["first", "first"]


def test_a_damaged_parent_stops_the_child_and_names_the_cure(chain: Chain):
    chain.run("first")
    (chain.folder("first") / "output" / "a" / "text.txt").write_text("vandal")
    with pytest.raises(StageError) as caught:
        chain.run("second")
    assert "prts first" in str(caught.value)
    assert str(chain.folder("first") / "output") in str(caught.value)
    assert chain.runs == ["first"]


def test_a_hand_edited_manifest_is_refused(chain: Chain):
    chain.run("first")
    path = chain.folder("first") / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(StageError, match="does not match its own digest"):
        Manifest.load(path)


def test_a_missing_parent_names_the_command(chain: Chain):
    with pytest.raises(StageError, match="run `prts first --dataset d` first"):
        chain.run("second")


def test_a_partition_is_refused_where_there_is_none(chain: Chain):
    from dataclasses import replace

    from prts_core.stages.base import run_stage

    whole = replace(chain.stage("first"), partitioned=False)
    with pytest.raises(StageError, match="not split by dataset"):
        run_stage(whole, chain.plan, "d", chain.outputs)


def test_an_interrupted_stage_finds_its_own_work(chain: Chain):
    def stumble(context: StageContext) -> None:
        checkpoint = context.work / "checkpoint.txt"
        if not checkpoint.exists():
            write_text(checkpoint, "step 2")
            raise KeyboardInterrupt
        assert checkpoint.read_text() == "step 2"

    chain.work = stumble
    with pytest.raises(KeyboardInterrupt):
        chain.run("first")
    assert not (chain.folder("first") / "output").exists()
    assert chain.run("first").verify(chain.outputs)
    assert chain.runs == ["first", "first"]
    assert not list(chain.folder("first").glob("work-*"))


def test_another_configuration_drops_the_interrupted_work(chain: Chain):
    def fail(context: StageContext) -> None:
        write_text(context.work / "checkpoint.txt", "of the old configuration")
        raise RuntimeError("a bug")

    chain.work = fail
    with pytest.raises(RuntimeError):
        chain.run("first")
    chain.config = Config("other")
    chain.work = lambda context: pytest.fail("old work") if (context.work / "checkpoint.txt").exists() else None
    chain.run("first")
    assert not list(chain.folder("first").glob("work-*"))


def test_a_failing_stage_leaves_the_earlier_output_in_place(chain: Chain):
    made = chain.run("first")
    chain.config = Config("other")

    def fail(context: StageContext) -> None:
        raise RuntimeError("a bug")

    chain.work = fail
    with pytest.raises(RuntimeError):
        chain.run("first")
    assert load_manifest(chain.outputs, "first", "r", "d") == made
    assert made.verify(chain.outputs)


def test_a_kill_in_every_phase_of_the_swap_is_survived(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_driver.py"), str(tmp_path)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r for r in rows if r["died"]], "nothing was ever killed"
    for row in rows:
        assert row["verified"] and row["text"] == "first: new\n", row
        assert row["left"] == [".lock", "manifest.json", "output", "provenance.json"], row
        # Right after the kill a reader sees the old content, the new content, or none: never a mixture.
        assert row["present"] in (None, "first: new\n", *(["first: old\n"] if row["had_before"] else [])), row
        # Work that was whole when the kill came is not done again.
        if row["died"] and row["was_whole"]:
            assert row["ran_again"] == 0, row
    for had_before in (False, True):
        some = [r for r in rows if r["had_before"] == had_before and r["died"]]
        assert len(some) >= 8
        assert any(r["was_whole"] for r in some) and any(not r["was_whole"] for r in some)


def test_a_killed_process_leaves_no_lock_and_its_seconds_count(tmp_path: Path):
    """A stage in another process is killed with SIGKILL while it works; the next one goes on."""
    script = f"""
import sys, time; sys.path.insert(0, {str(HERE.parents[1])!r})
from pathlib import Path
from tests.stages.tiny_chain import Chain, untracked
from prts_core.stages import base
base.stage_run = untracked
def work(context):
    (context.work / "checkpoint.txt").write_text("half")
    print("working", flush=True)
    time.sleep(60)
chain = Chain(Path({str(tmp_path / "outputs")!r}), work=work)
chain.run("first")
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "working\n"
        chain = Chain(tmp_path / "outputs")
        with pytest.raises(StageError, match="Another process is running this stage"):
            chain.run("first")
        clock = chain.folder("first")
        deadline = time.monotonic() + 20
        while not list(clock.glob("work-*/clock.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    found: list[str] = []
    chain.work = lambda context: found.append((context.work / "checkpoint.txt").read_text())
    made = chain.run("first")
    assert found == ["half"]
    assert load_provenance(chain.outputs, made)["seconds"] >= 1.5  # the killed attempt's time is part of it


def test_two_callers_never_run_one_stage_at_once(chain: Chain):
    chain.run("first")
    with (chain.folder("first") / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(StageError, match="Another process"):
            chain.run("first")
    assert chain.run("first").verify(chain.outputs)


def test_absent_reference_data_skips_the_stage_and_what_follows(chain: Chain):
    def unavailable(context: StageContext) -> None:
        raise UnavailableError("The recording is not on this machine", file="data", cure="set PRTS_SHARED")

    chain.work = unavailable
    first, second = chain.run("first"), chain.run("second")
    assert first.skipped and "set PRTS_SHARED" in first.skipped
    assert second.skipped == first.skipped
    assert chain.runs == ["first"]  # the child's function was never called
    assert find_finished(chain.stage("first"), chain.plan, "d", chain.outputs) is None

    chain.work = lambda context: None  # the data is there now
    first, second = chain.run("first"), chain.run("second")
    assert first.skipped is None and second.skipped is None
    assert not (second.folder(chain.outputs) / "skipped.json").exists()


def test_find_finished_runs_nothing(chain: Chain):
    assert find_finished(chain.stage("second"), chain.plan, "d", chain.outputs) is None
    chain.run("first")
    made = chain.run("second")
    assert find_finished(chain.stage("second"), chain.plan, "d", chain.outputs) == made
    chain.seed = 9
    assert find_finished(chain.stage("second"), chain.plan, "d", chain.outputs) is None
    assert chain.runs == ["first", "second"]


def test_metrics_contracts_and_artifacts_are_kept(chain: Chain):
    chain.work = lambda context: StageResult(
        metrics={"rows": 3.0}, contracts={"dataset": "sha256:x"}, artifacts=("a/text.txt",)
    )
    made = chain.run("first")
    assert (made.metrics, made.contracts) == ({"rows": 3.0}, {"dataset": "sha256:x"})
    assert load_provenance(chain.outputs, made)["artifacts"] == ["a/text.txt"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a megabyte of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mount: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_paragraph_and_costs_nothing(small_disk: Path, chain: Chain):
    chain.outputs = small_disk
    made = chain.run("first")
    chain.config = Config("other")
    chain.work = lambda context: write_text(context.output / "big.bin", "x" * 2**20)
    with pytest.raises(StageError) as caught:
        chain.run("first")
    said = str(caught.value)
    assert "disk is full" in said and "MiB free" in said and "Cure:" in said
    assert str(small_disk) in said
    assert load_manifest(small_disk, "first", "r", "d") == made
    assert made.verify(small_disk)
    assert not list(small_disk.rglob("*.partial-*"))


def test_read_only_outputs_are_one_paragraph(small_disk: Path, chain: Chain):
    chain.outputs = small_disk
    made = chain.run("first")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    chain.config = Config("other")
    with pytest.raises(StageError) as caught:
        chain.run("first")
    assert "cannot be written" in str(caught.value)
    assert "Read-only file system" in str(caught.value)
    assert made.verify(small_disk)
