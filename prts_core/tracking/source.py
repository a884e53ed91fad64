"""Name the code and data versions that a run is made with, as git and DVC call them.

Reads only, through the two tools' own files and commands; where there is no checkout it says so.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

CODE = Path(__file__).resolve().parents[2]


def _git(*args: str, where: Path) -> str | None:
    """Output of one git command, or none where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(where), *args],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def source_tags(where: Path = CODE) -> dict[str, str]:
    """`git.sha`, `git.dirty` ("true" / "false"), `dvc.rev`; under DVC also `dvc.stage` and the experiment's `dvc.exp`.

    dvc.rev: the commit that holds the present `dvc.lock` (`dvc get --rev` takes it); "uncommitted:<md5 of dvc.lock>"
    while the lock differs from every commit; "none" without one.
    """
    sha = _git("rev-parse", "HEAD", where=where)
    tags = {"git.sha": sha or "none"}
    if sha is not None:
        tags["git.dirty"] = "true" if _git("status", "--porcelain", "--untracked-files=no", where=where) else "false"
    top = _git("rev-parse", "--show-toplevel", where=where)
    lock = (Path(top) if top else where) / "dvc.lock"
    if not lock.is_file():
        tags["dvc.rev"] = "none"
    else:
        commit = _git("log", "-1", "--format=%H", "--", "dvc.lock", where=lock.parent)
        clean = bool(commit) and _git("status", "--porcelain", "--", "dvc.lock", where=lock.parent) == ""
        md5 = hashlib.md5(lock.read_bytes(), usedforsecurity=False).hexdigest()
        tags["dvc.rev"] = str(commit) if clean else f"uncommitted:{md5}"
    for name, variable in (("dvc.stage", "DVC_STAGE"), ("dvc.exp", "DVC_EXP_NAME")):  # set by `dvc repro`, `dvc exp`
        if os.environ.get(variable):
            tags[name] = os.environ[variable]
    return tags
