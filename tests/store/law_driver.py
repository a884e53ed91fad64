"""Throw runs, kills, changes of plan and source, garbage collection and checkouts at one store, and hold the law.

Run as a program by test_law.py: `law_driver.py <folder> <seed> <rounds>`; prints one JSON object. A round forks three
workers, kills some of them with SIGKILL, changes the source under them, and afterwards checks every result:
no wrong lineage, no lost checkpoint, no reader disturbed.
"""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prts_core.io import locks
from prts_core.io.errors import StageError
from prts_core.store.code import code_digest
from prts_core.store.gc import delete_garbage, plan_keys
from prts_core.store.listing import list_files, tree_digest
from prts_core.store.manifest import Manifest
from prts_core.store.views import RUNS, all_views
from tests.store.law_chain import (
    ORDER,
    Journal,
    StubPlan,
    Violation,
    expected,
    stub_plan,
    stub_store,
    write_source,
)

VERSIONS = 3
# What a stage may honestly say when its parents or its source change under it.
HONEST = ("has not run yet under this plan", "changed while stage", "was changed after it was made")
OLD = 100 * 86400


class World:
    """One store, its source and everything that happens to them."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random = root, random.Random(seed)
        self.outputs, self.source = root / "outputs", root / "source"
        self.journal = Journal(root / "journal.txt")
        main = os.getpid()
        self.store = stub_store(
            self.outputs, self.source, self.journal, lambda: os.getpid() != main and random.random() < 0.15
        )
        self.counts: collections.Counter[str] = collections.Counter()
        self.sources = {}
        for version in range(VERSIONS):
            write_source(root / f"v{version}", version)
            for other in range(VERSIONS):  # a copy cut half-way leaves a.txt of one version and b.txt of another
                half = root / "half"
                shutil.copytree(root / f"v{version}", half)
                (half / "b.txt").write_text(f"b.txt {other}")
                texts = [f"a.txt {version}", f"b.txt {other}"]
                self.sources[tree_digest(list_files(half))] = texts
                shutil.rmtree(half)
        write_source(self.source, 0)

    def plan(self, chosen: random.Random) -> StubPlan:
        """A recipe as it stands in this moment; now and then with changed values, as by --set."""
        overrides = (f"{chosen.choice(ORDER)}={chosen.randrange(1, 3)}",) if chosen.random() < 0.25 else ()
        values = dict.fromkeys(ORDER, 0) | {chosen.choice(ORDER): chosen.randrange(2)}
        return stub_plan(self.source, chosen.choice(("one", "two")), values, overrides)

    def work(self, seed: int) -> None:
        """Ask for stages as people and schedulers do: a whole chain, or one stage whose parents may be missing."""
        chosen = random.Random(seed)
        for _ in range(2):
            plan = self.plan(chosen)
            asked = ORDER if chosen.random() < 0.6 else (chosen.choice(ORDER),)
            for name in asked:
                try:
                    self.store.run(name, plan)
                except StageError as err:
                    if not any(words in str(err) for words in HONEST):
                        raise
                    break

    def collect_garbage(self, seed: int) -> None:
        chosen = random.Random(seed)
        keys, _ = plan_keys(self.store, self.plan(chosen), [(name, "d") for name in ORDER])
        found = delete_garbage(self.outputs, keys=keys, registered=set(), keep_days=1.0)
        self.journal.write("collected", "-", len(found.items))

    def fork(self, action, seed: int) -> int:
        child = os.fork()
        if child == 0:
            random.seed(seed)
            try:
                action(seed)
            except BaseException:  # noqa: BLE001 - told by the parent
                with (self.root / "faults.txt").open("a") as handle:
                    traceback.print_exc(file=handle)
                os._exit(1)
            os._exit(0)
        return child

    def round(self) -> None:
        chosen = self.random
        if chosen.random() < 0.5:
            self.age()
        if chosen.random() < 0.4:
            self.check_out()
        running = [self.fork(self.work, chosen.getrandbits(32)) for _ in range(3)]
        if chosen.random() < 0.5:
            running.append(self.fork(self.collect_garbage, chosen.getrandbits(32)))
            self.counts["gc"] += 1
        for _ in range(3):
            time.sleep(chosen.random() * 0.05)
            if chosen.random() < 0.5:
                os.kill(chosen.choice(running), signal.SIGKILL)
                self.counts["kill"] += 1
            if chosen.random() < 0.2:
                write_source(self.source, chosen.randrange(VERSIONS))
                self.counts["source"] += 1
        for child in running:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            self.counts[{0: "ended", -signal.SIGKILL: "killed"}.get(status, "failed")] += 1
        self.check()

    def age(self) -> None:
        """Make some results look as if nobody had asked for them for long."""
        for path in (self.outputs / "store").glob("[a-z]*/*/manifest.json"):
            if self.random.random() < 0.5:
                os.utime(path, (time.time() - OLD,) * 2)

    def check_out(self) -> None:
        """What `dvc checkout` of an earlier commit does to a view: unlink its files, put copies of others there."""
        kept = self.root / "cache"
        views = [folder for folder, raw in all_views(self.outputs) if raw.get("key")]
        if not views:
            return
        view = self.random.choice(views)
        copies = kept / "-".join(view.relative_to(self.outputs).parts)
        shutil.copytree(view, copies / str(time.time_ns()))
        copy = self.random.choice(sorted(copies.iterdir()))
        shutil.rmtree(view)
        shutil.copytree(copy, view)
        if self.random.random() < 0.2:  # it was interrupted
            shutil.rmtree(view / "output")
        self.counts["checkout"] += 1

    def check(self) -> None:
        """The law, on everything that lies there now."""
        if (self.root / "faults.txt").exists():
            raise Violation((self.root / "faults.txt").read_text())
        for path in (self.outputs / "store").glob("[a-z]*/*/manifest.json"):
            manifest = Manifest.load(path)
            if not manifest.verify(self.outputs):
                raise Violation(f"{path.parent} does not have the content that its manifest says")
            self._hold(manifest, path.parent / "output")
            self.counts["results"] += 1
        for view, _ in all_views(self.outputs):
            manifest = Manifest.load(view / "manifest.json")
            if (view / "output").is_dir() and tree_digest(list_files(view / "output")) != manifest.content_digest:
                raise Violation(f"{view} does not have the content that its manifest says")

    def _hold(self, manifest: Manifest, output: Path) -> None:
        made = json.loads((output / "made.json").read_text())
        meant = expected(manifest, self.store, self.sources)
        if made != meant:
            raise Violation(f"wrong lineage of {manifest.name} {manifest.key}: it says {made}, its manifest {meant}")

    def finish(self) -> None:
        """In peace every recipe can be run to its end and shows what it means now, whatever happened before."""
        for recipe in ("one", "two"):
            plan = stub_plan(self.source, recipe, dict.fromkeys(ORDER, 1))
            for name in ORDER:
                made = self.store.run(name, plan)
            view = self.outputs / RUNS / recipe / "package" / "d"
            if Manifest.load(view / "manifest.json") != made:
                raise Violation(f"{view} does not show what was made")
            self._hold(made, view / "output")
        left = list((self.outputs / "store" / ".trash").glob("*"))
        delete_garbage(self.outputs, keys=set(), registered=set(), keep_days=0.0)
        if self.store.find(self.store.resolve("package", plan)) is None:
            raise Violation("garbage collection took what both recipes show")
        self.counts["trash of killed collections"] += len(left)
        for line in self.journal.path.read_text().splitlines():
            what, _, count = line.split(" ")
            self.counts[what] += int(count) if what == "collected" else 1


def main(root: Path, seed: int, rounds: int) -> None:
    locks.POLL_S = 0.002
    code_digest("nothing")  # read once, before forking
    counts: collections.Counter[str] = collections.Counter()
    for number in range(0, rounds, 10):
        place = root / str(number)
        place.mkdir()
        world = World(place, seed + number)
        try:
            for _ in range(min(10, rounds - number)):
                world.round()
            world.finish()
        except Violation as err:
            print(json.dumps({"violation": f"seed {seed + number} in {place}: {err}", "counts": world.counts}))
            return
        counts += world.counts
        shutil.rmtree(place)
    print(json.dumps({"violation": None, "counts": counts}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
