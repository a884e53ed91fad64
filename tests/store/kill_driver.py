"""Kill a stage with SIGKILL before its n-th step on disk, for every n, and take it up again each time.

Run as a program by test_run_stage.py: prints one JSON object a kill. Steps are the renames, links, changes of mode and
removals of the store itself, so that every phase of the move and of the view's swap is cut once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prts_core.store.code import code_digest
from tests.store.toy_chain import Chain, Config

STEPS = (
    (shutil, "rmtree"),
    (os, "link"),
    (os, "utime"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "mkdir"),
    (Path, "chmod"),
    (Path, "unlink"),
)


def cut_before(step: int, action) -> bool:
    """Run `action` in a child that dies at its `step`-th step on disk; True when it died there."""
    child = os.fork()
    if child == 0:
        seen = 0

        def counting(function):
            def call(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for place, name in STEPS:
            setattr(place, name, counting(getattr(place, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main(root: Path) -> None:
    code_digest("nothing")  # read once, before forking
    for before in ("nothing", "other setting", "damaged"):
        for step in range(1, 200):
            outputs = root / f"{before}-{step}"
            old, new = Chain(outputs, Config("old")), Chain(outputs, Config("new"))
            if before == "other setting":
                old.run("first")
            if before == "damaged":
                new.run("first")
                new.damage("first")
                new.runs.clear()
            died = cut_before(step, lambda: new.run("first"))  # noqa: B023 - called at once
            entry = new.folder("first")
            whole = (entry / "manifest.json").exists() or (entry / "work" / "manifest.json").exists()
            shown = new.view("first") / "output" / "a" / "text.txt"
            seen = shown.read_text() if shown.exists() else None  # what a reader of the view sees right after the kill
            found = new.find("first")
            manifest = new.run("first")
            again = new.run("first")
            row = {
                "before": before,
                "step": step,
                "died": died,
                "whole": whole,
                "seen": seen,
                "found": found is not None,
                "ran_again": len(new.runs),
                "verified": manifest.verify(outputs) and again == manifest,
                "text": new.text("first"),
                "shown": shown.read_text(),
                "left": sorted(p.name for p in entry.iterdir()),
                "beside": sorted(p.name for p in new.view("first").parent.iterdir()),
                "other": old.text("first") if before == "other setting" else None,
            }
            print(json.dumps(row))
            shutil.rmtree(outputs)
            if not died:
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]))
