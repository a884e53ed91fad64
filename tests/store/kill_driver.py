"""Kill a stage with SIGKILL before its n-th step on disk, for every n, and take it up again each time.

Run as a program by test_base.py: prints one JSON object a kill. Steps are the renames, copies and removals of the
stage runner itself, so that every phase of the swap is cut once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prts_core.stages import base
from tests.stages.tiny_chain import Chain, Config, untracked

base.stage_run = untracked


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

        for place, name in (
            (shutil, "rmtree"),
            (shutil, "copyfile"),
            (Path, "rename"),
            (Path, "replace"),
            (Path, "mkdir"),
        ):
            setattr(place, name, counting(getattr(place, name)))
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def main(root: Path) -> None:
    for had_before in (False, True):
        for step in range(1, 200):
            outputs = root / f"{had_before}-{step}"
            old, new = Chain(outputs, Config("old")), Chain(outputs, Config("new"))
            if had_before:
                old.run("first")
            died = cut_before(step, lambda: new.run("first"))  # noqa: B023 - called at once
            whole = new.folder("first") / "output" / "a" / "text.txt"
            present = whole.read_text() if whole.exists() else None  # what a reader sees right after the kill
            done_before = any(new.folder("first").glob("work-*/manifest.json")) if died else True
            manifest = new.run("first")
            again = new.run("first")
            print(
                json.dumps(
                    {
                        "had_before": had_before,
                        "step": step,
                        "died": died,
                        "present": present,
                        "ran_again": len(new.runs),
                        "was_whole": done_before,
                        "verified": manifest.verify(outputs) and again == manifest,
                        "text": whole.read_text(),
                        "left": sorted(p.name for p in new.folder("first").iterdir()),
                    }
                )
            )
            if not died:
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]))
