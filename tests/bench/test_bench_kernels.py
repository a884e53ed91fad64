"""`prts bench attention` and `info_nce`: the rows of a script of the checkout, or one clear error without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from prts_core.bench import attention, info_nce, kernels
from prts_core.io.errors import StageError, UnavailableError

ROW = (
    '{"what": "w", "ours": 2.0, "peer": 1.0, "unit": "ms", "ratio": 2.0, "better": "lower", "goal": "<= 1.0", "met": 0}'
)
SCRIPT = f"""
import pathlib, sys
pathlib.Path(sys.argv[2], "results.json").write_text('{{"rows": [{ROW}]}}')
"""


def test_both_scripts_are_there() -> None:
    assert {"role_attention.py", "info_nce.py"} <= {path.name for path in kernels.SCRIPTS.iterdir()}


def test_the_rows_are_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SCRIPTS", tmp_path)
    with pytest.raises(UnavailableError, match="no part of an installed package"):
        attention.run(Console())
    (tmp_path / "role_attention.py").write_text(SCRIPT)
    (row,) = attention.run(Console())
    assert (row.what, row.ratio, row.met) == ("w", 2.0, False)
    (tmp_path / "info_nce.py").write_text("raise SystemExit(1)")
    with pytest.raises(StageError, match="exit status 1, 0 rows"):
        info_nce.run(Console())
