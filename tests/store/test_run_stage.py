"""The one door to every stage: nothing runs twice, nothing wrong is taken, interrupted work goes on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from prts_core.config.identity import identity
from prts_core.io.errors import ConfigError, Skipped, StageError, UnavailableError
from prts_core.io.files import read_json, write_json, write_text
from prts_core.io.locks import locked
from prts_core.store import listing
from prts_core.store.gc import delete_garbage
from prts_core.store.manifest import Manifest
from prts_core.store.run_stage import load_provenance
from prts_core.store.stage import Parent, StageContext, StageResult
from prts_core.store.status import status
from prts_core.store.views import show_skipped
from tests.store.toy_chain import Chain, Config

HERE = Path(__file__).parent
ENTRY = [".lock", "files.tsv", "manifest.json", "output", "provenance.json"]


def in_another_process(body: str, outputs: Path) -> subprocess.Popen[str]:
    """Python that has `chain`, the toy chain at `outputs`; what it prints is read line by line."""
    script = (
        f"import sys, time; sys.path.insert(0, {str(HERE.parents[1])!r})\n"
        "from pathlib import Path\n"
        "from tests.store.toy_chain import Chain, Config\n"
        f"chain = Chain(Path({str(outputs)!r}))\n{body}"
    )
    return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def go_on(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def waits(capfd: pytest.CaptureFixture[str]) -> str:
    """What was said up to and with the news that a run waits."""
    said, until = "", time.monotonic() + 60
    while "waiting:" not in said or not said.endswith("\n"):
        assert time.monotonic() < until, said
        time.sleep(0.01)
        said += capfd.readouterr().err
    return said


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")
    return folder


# ---- finished is finished ------------------------------------------------------------
def test_a_finished_stage_is_not_run_again(chain: Chain):
    made = chain.run("first")
    assert chain.run("first") == made
    assert chain.runs == ["first"]
    assert made.verify(chain.outputs)
    assert sorted(p.name for p in chain.folder("first").iterdir()) == ENTRY


def test_equal_work_has_equal_manifests_and_times_stay_outside(chain: Chain, tmp_path: Path):
    made = chain.run("first")
    other = Chain(tmp_path / "elsewhere", recipe="another").run("first")
    assert other.digest == made.digest
    provenance = load_provenance(chain.outputs, made)
    assert provenance["seconds"] >= 0 and provenance["recipe"] == "r"
    assert not {"started", "host", "seconds", "recipe", "path"} & set(
        read_json(chain.folder("first") / "manifest.json")
    )


def test_finding_runs_nothing(chain: Chain):
    assert chain.find("second") is None
    chain.run("first")
    made = chain.run("second")
    assert chain.find("second") == made
    chain.seed = 9
    assert chain.find("second") is None
    assert chain.runs == ["first", "second"]


def test_metrics_contracts_and_artifacts_are_kept(chain: Chain):
    chain.work = lambda context: StageResult(
        metrics={"rows": 3.0}, contracts={"dataset": "sha256:x"}, artifacts=("a/text.txt",)
    )
    made = chain.run("first")
    assert (made.metrics, made.contracts) == ({"rows": 3.0}, {"dataset": "sha256:x"})
    assert load_provenance(chain.outputs, made)["artifacts"] == ["a/text.txt"]


def test_files_of_a_result_are_read_only(chain: Chain):
    chain.run("first")
    assert (chain.folder("first") / "output" / "a" / "text.txt").stat().st_mode & 0o222 == 0


def test_bytes_are_read_once(chain: Chain, monkeypatch: pytest.MonkeyPatch):
    read: list[Path] = []
    digest = listing.digest_file
    monkeypatch.setattr(listing, "digest_file", lambda path: read.append(path) or digest(path))
    chain.run("first")
    path = chain.folder("first") / "output" / "a" / "text.txt"
    assert len(read) == 1
    time.sleep(0.1)  # a file hashed within a clock tick of its last change is read once more
    chain.run("first")
    assert read[1:] in ([], [path])
    chain.run("second")
    time.sleep(0.1)
    chain.run("second")
    settled = len(read)
    for _ in range(3):
        chain.run("first")
        chain.run("second")
    assert len(read) == settled and read.count(path) <= 1


def test_a_moved_outputs_folder_is_the_same_store(chain: Chain, tmp_path: Path):
    made = chain.run("first")
    chain.outputs = chain.outputs.rename(tmp_path / "moved")
    assert chain.run("first") == made and chain.runs == ["first"]


# ---- what a key is made of ------------------------------------------------------------
@pytest.mark.parametrize("change", [{"config": Config("other")}, {"seed": 8}, {"version": 2}])
def test_another_configuration_seed_or_behaviour_version_is_another_result(chain: Chain, change: dict):
    first, second = chain.run("first"), chain.run("second")
    for name, value in change.items():
        setattr(chain, name, value)
    assert chain.run("first").key != first.key
    assert chain.run("second").parents != second.parents
    assert chain.runs == ["first", "second", "first", "second"]


def test_how_work_is_done_is_no_part_of_a_key(chain: Chain):
    made = chain.run("first")
    chain.config = replace(chain.config, workers=16)
    assert chain.run("first") == made and chain.runs == ["first"]
    assert "workers" not in made.config


def test_a_stale_parent_cannot_be_taken(chain: Chain):
    """Defect 2: after a change of the parent's configuration the child trained on the old parent without a word."""
    chain.run("first")
    chain.run("second")
    chain.config = Config("changed")
    with pytest.raises(
        StageError, match=r"has not run yet under this plan.*run `prts first --config r.yaml --dataset d"
    ):
        chain.run("second")
    chain.run("first")
    chain.run("second")
    assert chain.text("second") == "first: changed\nsecond: hello\n"


def test_two_settings_live_side_by_side(chain: Chain):
    one = chain.run("first")
    chain.config = Config("other")
    two = chain.run("first")
    assert one.verify(chain.outputs) and two.verify(chain.outputs)
    chain.config = Config()
    assert chain.run("first") == one and chain.runs == ["first", "first"]


def test_two_recipes_share_equal_work(chain: Chain):
    made = chain.run("first")
    other = Chain(chain.outputs, recipe="other")
    assert other.run("first") == made and other.runs == []
    ours, theirs = (c.view("first") / "output" / "a" / "text.txt" for c in (chain, other))
    assert ours.samefile(theirs) and ours.samefile(chain.folder("first") / "output" / "a" / "text.txt")


def test_a_partition_is_refused_where_there_is_none(chain: Chain):
    store = chain.store
    store.stages["first"] = replace(store.stages["first"], partitioned=False)
    with pytest.raises(StageError, match="not split by dataset"):
        store.run("first", chain.plan, "d")


def test_a_recipe_cannot_be_named_out_of_its_folder():
    with pytest.raises((ConfigError, ValueError), match="is no name"):
        _ = Chain(Path("outputs"), recipe="../../../x").plan


# ---- views ------------------------------------------------------------
def test_a_view_shows_what_the_plan_means_now(chain: Chain):
    one = chain.run("first")
    chain.config = Config("other")
    two = chain.run("first")
    assert Manifest.load(chain.view("first") / "manifest.json") == two
    chain.config = Config()
    chain.run("first")
    assert Manifest.load(chain.view("first") / "manifest.json") == one
    assert (chain.view("first") / "output" / "a" / "text.txt").read_text() == "first: hello\n"
    assert read_json(chain.view("first") / "metrics.json") == {"n": 1.0}


def test_a_run_with_changed_values_leaves_the_view(chain: Chain):
    """Defect 11: `seed=8` launched from a page replaced the recipe's own result."""
    made = chain.run("first")
    typed = Chain(chain.outputs, seed=8, overrides=("seed=8",))
    assert typed.run("first").key != made.key
    assert Manifest.load(chain.view("first") / "manifest.json") == made
    assert load_provenance(chain.outputs, typed.run("first"))["overrides"] == ["seed=8"]


def test_writing_into_a_view_as_dvc_does_leaves_the_store(chain: Chain):
    made = chain.run("first")
    path = chain.view("first") / "output" / "a" / "text.txt"
    path.unlink()
    path.write_text("of another commit")
    assert made.verify(chain.outputs)
    chain.run("first")
    assert path.read_text() == "first: hello\n", "and the next run shows the plan's result again"


def test_a_view_filled_by_dvc_pull_is_taken_into_the_store(chain: Chain, tmp_path: Path):
    made, second = chain.run("first"), chain.run("second")
    clone = Chain(tmp_path / "clone" / "outputs")
    for name in ("first", "second"):
        shutil.copytree(chain.view(name), clone.view(name))
    assert clone.run("first") == made and clone.run("second") == second
    assert clone.runs == [] and made.verify(clone.outputs)
    assert sorted(p.name for p in clone.folder("first").iterdir() if p.name != "files.tsv") == [
        name for name in ENTRY if name != "files.tsv"
    ]


def test_a_source_that_a_view_shares_by_hard_link_stays_writable(chain: Chain, tmp_path: Path):
    theirs = tmp_path / "recording"
    theirs.write_text("theirs")
    chain.work = lambda context: os.link(theirs, context.output / "linked")
    chain.run("first")
    shutil.rmtree(chain.outputs / "store")
    assert chain.find("first") is not None and chain.runs == ["first"], "taken from the view"
    assert theirs.stat().st_mode & 0o200 and theirs.samefile(chain.folder("first") / "output/linked")
    assert not (chain.folder("first") / "output/a/text.txt").stat().st_mode & 0o222


@pytest.mark.parametrize("fault", ["cut short", "other content", "another key", "skipped", "other parent"])
def test_a_view_that_does_not_fit_is_not_taken(chain: Chain, tmp_path: Path, fault: str):
    chain.run("first")
    chain.run("second")
    clone = Chain(tmp_path / "clone" / "outputs")
    for name in ("first", "second"):
        shutil.copytree(chain.view(name), clone.view(name))
    text = clone.view("first") / "output" / "a" / "text.txt"
    if fault == "cut short":
        text.unlink()
    elif fault == "other content":
        text.chmod(0o644)
        text.write_text("first: hullo\n")
    elif fault == "another key":
        clone.config = Config("another")
    elif fault == "skipped":
        show_skipped(clone.view("first"), "not here", clone.outputs)
    else:  # the parent was made here, and came out different
        shutil.rmtree(clone.view("first"))
        clone.work = lambda context: StageResult({"n": 2.0})
    clone.run("first")
    assert clone.runs == ["first"]
    if fault == "other parent":
        clone.run("second")
        assert clone.runs == ["first", "second"]
        assert clone.find("second").parent_digests["first"] == clone.find("first").digest


# ---- damage ------------------------------------------------------------
@pytest.mark.parametrize("damage", ["change", "remove", "add"])
def test_a_damaged_result_is_made_again(chain: Chain, damage: str):
    made = chain.run("first")
    text = chain.folder("first") / "output" / "a" / "text.txt"
    if damage == "change":
        chain.damage("first")
    elif damage == "remove":
        text.unlink()
    else:
        text.with_name("extra").write_text("vandal")
    assert chain.find("first") is None
    assert chain.run("first") == made
    assert made.verify(chain.outputs)
    assert chain.runs == ["first", "first"]


def test_damage_that_keeps_size_and_time_but_not_the_file_is_seen(chain: Chain):
    chain.run("first")
    time.sleep(0.1)
    chain.find("first")
    path = chain.folder("first") / "output" / "a" / "text.txt"
    before = path.stat()
    path.unlink()
    path.write_text("vandal: hell\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert chain.find("first") is None


def test_the_cure_of_a_damaged_parent_works_when_followed(chain: Chain):
    made = chain.run("first")
    chain.damage("first")
    with pytest.raises(StageError, match="was changed after it was made") as caught:
        chain.run("second")
    assert str(chain.folder("first") / "output") in str(caught.value)
    words = shlex.split(str(caught.value.cure).split("`")[1])
    assert words[:2] == ["prts", "first"] and words[-4:-2] == ["--dataset", "d"]
    assert chain.run(words[1]) == made
    chain.run("second")
    assert chain.runs == ["first", "first", "second"] and chain.text("second").startswith("first: hello")


def test_a_hand_edited_manifest_is_refused(chain: Chain):
    chain.run("first")
    path = chain.folder("first") / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(StageError, match="does not match its own digest"):
        chain.run("first")


def test_a_child_follows_a_parent_that_came_out_different(chain: Chain):
    """A stage that draws its result anew each time: the child of the first drawing is not the child of the second."""
    chain.work = lambda context: StageResult({"drawn": float(time.monotonic_ns())})
    chain.run("first")
    chain.run("second")
    chain.damage("first")
    chain.run("first")
    assert chain.find("second") is None
    made = chain.run("second")
    assert made.parent_digests["first"] == chain.find("first").digest
    assert chain.runs == ["first", "second", "first", "second"]


def test_so_does_a_grandchild(chain: Chain):
    chain.work = lambda context: StageResult({"drawn": float(time.monotonic_ns())})
    store = chain.store
    third = replace(store.stages["second"], name="third", parents=lambda plan, _: [Parent("second", "second", "d")])
    store.stages["third"] = third
    for name in store.stages:
        store.run(name, chain.plan)
    chain.damage("first")
    store.run("first", chain.plan)
    assert store.find(store.resolve("third", chain.plan)) is None
    states = [row.state for row in status(store, chain.plan, [(name, "d") for name in store.stages]).rows]
    assert states == ["finished", "stale", "stale"]
    with pytest.raises(StageError, match="prts second"):
        store.run("third", chain.plan)
    for name in ("second", "third"):
        store.run(name, chain.plan)
    assert store.find(store.resolve("third", chain.plan)) is not None


def test_a_parent_that_changes_under_its_reader_is_told(chain: Chain):
    """Defect 3, the part that a store cannot forbid: somebody writes over a file that is being read."""
    chain.run("first")

    def vandal(context: StageContext) -> None:
        time.sleep(0.1)
        chain.damage("first")

    chain.work = vandal
    with pytest.raises(StageError, match="'first:d' changed while stage 'second:d' read it"):
        chain.run("second")
    assert chain.find("second") is None


def test_a_parent_planned_and_made_anew_does_not_disturb_a_running_child(chain: Chain):
    """Defect 3: two processes; the child reads one version only and its manifest names that one."""
    first = chain.run("first")
    child = in_another_process(
        "def work(context):\n"
        "    path = chain.folder('first') / 'output/a/text.txt'\n"
        "    before = path.read_text(); print('reading', flush=True); input()\n"
        "    assert path.read_text() == before\n"
        "chain.work = work\n"
        "print(chain.run('second').parent_digests['first'], flush=True)\n",
        chain.outputs,
    )
    assert said(child) == "reading"
    chain.config = Config("planned anew")
    chain.run("first")  # takes the view, not the files that are being read
    go_on(child)
    assert said(child) == first.digest
    assert child.wait() == 0
    chain.config = Config()
    assert chain.text("second") == "first: hello\nsecond: hello\n"


def test_a_damaged_parent_is_made_again_only_when_nobody_reads_it(chain: Chain, capfd: pytest.CaptureFixture[str]):
    chain.run("first")
    child = in_another_process(
        "def work(context):\n    print('reading', flush=True); input()\nchain.work = work\n"
        "try: chain.run('second')\nexcept Exception as err: print(str(err)[:60], flush=True)\n",
        chain.outputs,
    )
    assert said(child) == "reading"
    chain.damage("first")
    again = threading.Thread(target=chain.run, args=("first",))
    again.start()
    told = waits(capfd)
    assert chain.runs == ["first"], "it waits"
    go_on(child)
    assert "changed while" in said(child)
    again.join()
    assert chain.runs == ["first", "first"] and child.wait() == 0
    assert "waiting: process" in told


# ---- interrupted work ------------------------------------------------------------
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
    assert not (chain.folder("first") / "work").exists()


@pytest.mark.parametrize(
    "meanwhile",
    [
        {"config": Config("other")},
        {"config": Config(workers=9)},
        {"seed": 8},
        {"overrides": ("x=1",), "seed": 9},
        {"recipe": "other"},
    ],
)
def test_work_of_another_setting_takes_nobodys_checkpoints(chain: Chain, meanwhile: dict):
    """Defect 4: `log_every`, `workers` or a quick `--set sft.train.steps=10` erased days of training."""

    def stumble(context: StageContext) -> None:
        write_text(context.work / "checkpoints" / "checkpoint-5" / "x", "days of work")
        raise KeyboardInterrupt

    chain.work = stumble
    with pytest.raises(KeyboardInterrupt):
        chain.run("first")
    other = Chain(chain.outputs, **meanwhile)
    other.run("first")
    found: list[str] = []
    if other.folder("first") != chain.folder("first"):
        chain.work = lambda context: found.append((context.work / "checkpoints" / "checkpoint-5" / "x").read_text())
        chain.run("first")
        assert found == ["days of work"]
    else:
        assert "workers" in str(meanwhile) or "recipe" in meanwhile, "it is the same work: it went on with it"


def test_work_on_other_parents_is_put_aside_not_mixed(chain: Chain):
    chain.work = lambda context: StageResult({"drawn": float(time.monotonic_ns())})
    chain.run("first")

    def stumble(context: StageContext) -> None:
        write_text(context.work / "checkpoint.txt", "of the first drawing")
        raise KeyboardInterrupt

    drawing, chain.work = chain.work, stumble
    with pytest.raises(KeyboardInterrupt):
        chain.run("second")
    chain.damage("first")
    chain.work = drawing
    chain.run("first")
    chain.work = lambda context: pytest.fail("mixed") if (context.work / "checkpoint.txt").exists() else None
    chain.run("second")
    aside = list(chain.folder("second").glob("work-*/checkpoint.txt"))
    assert [path.read_text() for path in aside] == ["of the first drawing"], "but nothing is lost"


def test_a_failing_stage_leaves_other_results_in_place(chain: Chain):
    made = chain.run("first")
    chain.config = Config("other")

    def fail(context: StageContext) -> None:
        raise RuntimeError("a bug")

    chain.work = fail
    with pytest.raises(RuntimeError):
        chain.run("first")
    assert Manifest.load(chain.view("first") / "manifest.json") == made
    assert made.verify(chain.outputs)


def test_a_kill_in_every_phase_of_the_move_is_survived(memory: Path):
    done = subprocess.run(
        [sys.executable, str(HERE / "kill_driver.py"), str(memory)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        assert row["verified"] and row["text"] == row["shown"] == "first: new\n", row
        # Nothing is left but what the next garbage collection or swap removes.
        assert set(row["left"]) - {"work", ".done"} - {n for n in row["left"] if ".partial-" in n} == set(ENTRY), row
        # Right after the kill a reader sees the old content, the new content, or none: never a mixture.
        before = {"nothing": [], "other setting": ["first: old\n"], "damaged": ["vandal"]}[row["before"]]
        assert row["seen"] in (None, "first: new\n", *before), row
        assert row["other"] in (None, "first: old\n"), row
        if row["found"]:
            assert row["ran_again"] == 0, row
        if row["died"] and row["whole"] and row["before"] != "damaged":
            assert row["ran_again"] == 0, row  # work that was whole when the kill came is not done again
    for before in ("nothing", "other setting", "damaged"):
        some = [r for r in rows if r["before"] == before and r["died"]]
        assert len(some) >= 20
        assert any(r["ran_again"] for r in some) and any(not r["ran_again"] for r in some)


def test_a_killed_process_leaves_no_lock_and_its_seconds_count(chain: Chain):
    """A stage in another process is killed with SIGKILL while it works; the next one goes on."""
    child = in_another_process(
        "def work(context):\n"
        '    (context.work / "checkpoint.txt").write_text("half")\n'
        '    print("working", flush=True)\n    time.sleep(60)\n'
        'chain.work = work\nchain.run("first")\n',
        chain.outputs,
    )
    try:
        assert said(child) == "working"
        clock = chain.folder("first") / "work" / "clock.json"
        deadline = time.monotonic() + 60
        while not clock.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    found: list[str] = []
    chain.work = lambda context: found.append((context.work / "checkpoint.txt").read_text())
    made = chain.run("first")
    assert found == ["half"]
    assert load_provenance(chain.outputs, made)["seconds"] >= 1.5  # the killed attempt's time is part of it


# ---- several at once ------------------------------------------------------------
def test_a_second_caller_waits_and_finds_the_work_done(chain: Chain, capfd: pytest.CaptureFixture[str]):
    child = in_another_process(
        "def work(context): print('working', flush=True); input()\nchain.work = work\nchain.run('first')\n",
        chain.outputs,
    )
    assert said(child) == "working"
    made: list[Manifest] = []
    waiting = threading.Thread(target=lambda: made.append(chain.run("first")))
    waiting.start()
    said_so = waits(capfd)
    time.sleep(0.3)
    assert not made
    go_on(child)
    waiting.join()
    assert child.wait() == 0
    assert chain.runs == [] and made[0].verify(chain.outputs)
    told = [line for line in (said_so + capfd.readouterr().err).splitlines() if line.startswith("waiting:")]
    assert len(told) == 1 and f"process {child.pid} on" in told[0]


def test_garbage_collection_waits_while_parents_are_being_found(chain: Chain):
    """Between finding its parents and naming them in plan.json nothing else says that a run needs them."""
    first = chain.run("first")
    chain.config, chain.seed = Config("now"), 8
    chain.run("first")  # nothing refers to the first result now
    old = Chain(chain.outputs, overrides=("typed",))
    entered, collected = threading.Event(), threading.Event()
    store = old.store
    inputs = store.inputs

    def slowly(resolved, plan):
        found = inputs(resolved, plan)
        entered.set()
        assert not collected.wait(0.5), "collected under a run that was looking"
        return found

    def work(context: StageContext) -> None:
        assert collected.wait(120), "it goes on when the run has named its parents"

    store.inputs, old.work = slowly, work
    run = threading.Thread(target=lambda: store.run("second", old.plan))
    run.start()
    assert entered.wait(60)
    found = delete_garbage(chain.outputs, keys=set(), registered=set(), keep_days=0.0)
    collected.set()
    run.join()
    assert [item.stage for item in found.items] == [] and first.verify(chain.outputs)
    assert old.runs == ["second"] and old.find("second") is not None


def test_a_lock_file_that_was_removed_while_one_waited_is_made_anew(tmp_path: Path):
    path, held = tmp_path / "entry" / ".lock", []

    def wait() -> None:
        with locked(path):
            held.append(path.stat().st_ino)

    with locked(path):
        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.3)
        shutil.rmtree(path.parent)
    waiter.join(60)
    assert held == [path.stat().st_ino]


# ---- external sources ------------------------------------------------------------
@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_a_changed_external_dataset_is_another_result(chain: Chain, source: Path, change: str):
    """Defect 1: it was never noticed."""
    chain.source = source
    made = chain.run("first")
    assert made.sources and chain.run("first") == made and chain.runs == ["first"]
    if change == "changed":
        (source / "a.txt").write_text("One")
    elif change == "added":
        (source / "c.txt").write_text("three")
    else:
        (source / "a.txt").unlink()
    assert chain.find("first") is None
    with pytest.raises(StageError, match="has not run yet under this plan"):
        chain.run("second")
    assert chain.run("first").sources != made.sources


def test_where_a_dataset_lies_is_no_part_of_what_it_is(chain: Chain, source: Path, tmp_path: Path):
    chain.source = source
    made = chain.run("first")
    chain.source = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    assert chain.run("first") == made and chain.runs == ["first"]


@pytest.mark.parametrize("back", [False, True])
def test_a_source_that_changes_while_it_is_read_is_told(chain: Chain, source: Path, back: bool):
    chain.source = source

    def change(context: StageContext) -> None:
        time.sleep(0.02)
        (source / "a.txt").write_text("One")
        if back:
            (source / "a.txt").write_text("one")

    chain.work = change
    with pytest.raises(StageError, match="source of dataset 'd' changed while stage 'first' read it") as caught:
        chain.run("first")
    assert "run `prts first" in str(caught.value.cure)
    chain.work = lambda context: None
    assert chain.run("first").verify(chain.outputs), "the cure, followed"


def test_work_is_not_resumed_on_files_that_were_changed_and_restored(chain: Chain, source: Path):
    chain.source = source

    def stumble(context: StageContext) -> None:
        (source / "a.txt").write_text("other")
        write_text(context.work / "episode.txt", (source / "a.txt").read_text())
        raise KeyboardInterrupt

    chain.work = stumble
    with pytest.raises(KeyboardInterrupt):
        chain.run("first")
    time.sleep(0.02)
    (source / "a.txt").write_text("one")
    chain.work = lambda context: pytest.fail("mixed") if (context.work / "episode.txt").exists() else None
    chain.run("first")
    assert chain.runs == ["first", "first"]


def test_recorded_listings_stand_for_a_source_that_is_not_here(
    chain: Chain, source: Path, monkeypatch: pytest.MonkeyPatch
):
    chain.source = source
    made, plan = chain.run("first"), chain.plan
    # A result of stage collect records what it listed; the toy stage plays it.
    collect = chain.outputs / "store" / "collect" / made.key
    shutil.copytree(chain.folder("first"), collect)
    raw = read_json(collect / "manifest.json")
    raw["config"]["source"] = identity(plan.datasets["d"].source)
    write_json(collect / "manifest.json", raw)
    shutil.rmtree(source)
    with pytest.raises(UnavailableError, match="is not on this machine"):
        chain.run("first")
    monkeypatch.setenv("PRTS_SOURCES", "recorded")
    assert chain.run("first") == made and chain.runs == ["first"]
    shutil.rmtree(collect)
    with pytest.raises(UnavailableError, match=r"No listing of dataset 'd' was recorded.*dvc pull"):
        chain.run("first")
    monkeypatch.setenv("PRTS_SOURCES", "record")
    with pytest.raises(ConfigError, match="look or recorded"):
        chain.run("first")


@pytest.mark.parametrize("optional", [True, False])
def test_an_absent_dataset_is_skipped_only_where_it_is_optional(chain: Chain, tmp_path: Path, optional: bool):
    """Defect 7: everything that was absent counted as success."""
    chain.source, chain.optional = tmp_path / "nowhere", optional
    for name in ("first", "second"):
        with pytest.raises(Skipped if optional else UnavailableError, match="Dataset 'd' is not on this machine"):
            chain.run(name)
    assert chain.runs == [] and not (chain.outputs / "store").exists()
    chain.source.mkdir()
    (chain.source / "a.txt").write_text("there now")
    chain.run("first")
    chain.run("second")
    assert chain.runs == ["first", "second"]


# ---- disks ------------------------------------------------------------
def test_a_full_disk_is_one_paragraph_and_costs_nothing(small_disk: Path, chain: Chain):
    chain.outputs = small_disk
    made = chain.run("first")
    chain.config = Config("other")
    chain.work = lambda context: write_text(context.output / "big.bin", "x" * 2**20)
    with pytest.raises(StageError) as caught:
        chain.run("first")
    told = str(caught.value)
    assert "disk is full" in told and "MiB free" in told and "Cure:" in told
    assert str(small_disk) in told
    assert Manifest.load(chain.view("first") / "manifest.json") == made
    assert made.verify(small_disk)
    assert not list(small_disk.rglob("*.partial-*"))


def test_read_only_outputs_are_one_paragraph(small_disk: Path, chain: Chain):
    chain.outputs = small_disk
    made = chain.run("first")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert chain.find("first") == made, "reading goes on"
    chain.config = Config("other")
    with pytest.raises(StageError) as caught:
        chain.run("first")
    assert "cannot be written" in str(caught.value)
    assert "Read-only file system" in str(caught.value)
    assert made.verify(small_disk)
