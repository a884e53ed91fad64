"""The benchmark of InfoNCE: what it reports, and that what could not be measured is said and not made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prts_kernels.bench import info_nce


def test_a_job_reports_error_and_times() -> None:
    lines: list[dict] = []
    info_nce.time_task({"device": "cpu", "count": 300, "embed_dim": 8}, lines.append)
    error, times = lines
    assert 0 < error["relative_error"] < 1e-4, "two different computations of one thing"
    assert times["failed"] == {} and all(times["time"][impl]["median_ms"] > 0 for impl in ("auto", "reference"))


def test_the_table_says_what_was_not_measured() -> None:
    times = {"auto": {"median_ms": 2.0}, "reference": {"median_ms": 1.0}}
    rows = [
        {"samples": 64, "time": times, "relative_error": 1e-7, "memory_mb": {"auto": 1.0, "reference": 9.0}},
        {"samples": 512, "time": {}, "relative_error": None, "memory_mb": {}},
    ]
    notes = {"time 512": "stopped: not ready after 300 s"}
    text = info_nce.table({"rows": rows, "embed_dim": 8, "device": {"name": "cpu"}, "notes": notes})
    slower, missing = text.splitlines()[3:5]
    assert slower.split()[3] == "2.00" and slower.endswith("no")
    assert missing.count("not measured") == 7 and "not ready after 300 s" in text


@pytest.mark.slow
def test_in_one_command(tmp_path: Path) -> None:
    assert info_nce.main(["--device", "cpu", "--sizes", "300", "--embed-dim", "8", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    results = json.loads(path.read_text())
    assert path.name.startswith("info_nce-cpu-") and results["notes"] == {}
    assert results["rows"][0]["memory_mb"].keys() == results["rows"][0]["time"].keys() == {"auto", "reference"}
