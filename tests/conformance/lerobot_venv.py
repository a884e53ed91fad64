"""Build the environment of the conformance partner lerobot 0.3.3: `python tests/conformance/lerobot_venv.py`.

lerobot's pins can never share an environment with ours, so it lives in a venv of its own under the user's cache. This
script does not know what is tested with it; it prints the path of the venv's interpreter.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

LEROBOT = "0.3.3"
# torchvision and lerobot come without dependencies: their pins contradict the torch that is known to install here.
STEPS = (
    ("torch==2.13.0", "numpy==2.2.6", "datasets==3.6.0", "huggingface-hub==0.36.*", "av==15.1.0", "jsonlines",
     "packaging", "einops", "pillow"),
    ("--no-deps", f"lerobot=={LEROBOT}", "torchvision==0.28.0"),
)  # fmt: skip


def cache_folder() -> Path:
    """Where environments of conformance partners live: $XDG_CACHE_HOME/prts/venvs, by default ~/.cache/prts/venvs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prts" / "venvs"


def interpreter() -> Path:
    return cache_folder() / f"lerobot-{LEROBOT}" / "bin" / "python"


def ready() -> bool:
    """True when the environment was built to its end, with these very pins."""
    marker = interpreter().parents[1] / "finished"
    return marker.is_file() and marker.read_text() == repr(STEPS)


def build() -> Path:
    """Build the environment unless it is ready (about a minute, 1.4 GB); an unfinished one is begun anew."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with (cache_folder() / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready():
            home = interpreter().parents[1]
            shutil.rmtree(home, ignore_errors=True)
            venv.create(home, with_pip=True)
            for packages in STEPS:
                subprocess.run([interpreter(), "-m", "pip", "install", "-q", *packages], check=True)
            (home / "finished").write_text(repr(STEPS))
    return interpreter()


if __name__ == "__main__":
    print(build(), file=sys.stdout)
