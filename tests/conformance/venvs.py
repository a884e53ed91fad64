"""Environments of conformance partners, whose pins cannot share ours: one venv each under the user's cache, built once.

It does not know what is tested with them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from prts_core.io.locks import locked


def ensure_venv(name: str, requirements: list[list[str]]) -> Path:
    """The Python of environment `name`, holding what `pip install` makes of each list in turn.

    It lies in $XDG_CACHE_HOME/prts/venvs (by default ~/.cache). One that was not finished, or was made from other
    requirements, is built anew; two callers do not build at once.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prts" / "venvs"
    home, marker = root / name, root / name / "finished"
    with locked(root / f".{name}.lock"):
        if not marker.is_file() or marker.read_text() != repr(requirements):
            shutil.rmtree(home, ignore_errors=True)
            venv.create(home, with_pip=False)  # our own pip installs into it: a second one costs ten seconds
            pip = [sys.executable, "-m", "pip", "--python", home / "bin" / "python", "--disable-pip-version-check"]
            for packages in requirements:
                subprocess.run([*pip, "install", "-q", *packages], check=True)
            marker.write_text(repr(requirements))
    return home / "bin" / "python"
