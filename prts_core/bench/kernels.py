"""Run a benchmark of the kernels, a script beside their package, and take its rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from prts_core.bench.report import Row
from prts_core.io.errors import StageError, UnavailableError
from prts_core.io.files import read_json

SCRIPTS = Path(__file__).resolve().parents[2] / "kernels" / "bench"


def kernel_rows(name: str) -> list[Row]:
    """Rows of kernels/bench/<name>.py; its own tables go to stdout as they come.

    UnavailableError: there is no checkout. StageError: it has no rows to give.
    """
    script = SCRIPTS / f"{name}.py"
    if not script.is_file():
        raise UnavailableError(
            "The kernels' benchmarks are no part of an installed package",
            file=script,
            found="no such file",
            cure="run `prts bench` from a checkout of the project (pip install -e .)",
        )
    with TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, str(script), "--out", folder], check=False)
        rows = [row for path in Path(folder).glob("*.json") for row in read_json(path)["rows"]]
    if done.returncode or not rows:
        raise StageError(
            f"The benchmark {name} of the kernels compared nothing",
            file=script,
            found=f"exit status {done.returncode}, {len(rows)} rows",
            cure="what was left out, and why, stands above",
        )
    return [Row(r["what"], r["ours"], r["peer"], r["unit"], r["better"], r["goal"]) for r in rows]
