"""Every law can fail: a sound dataset is injured in one place and the report names that place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prts_core.config.schema import VideoConfig
from prts_core.data.lerobot_v21 import video
from prts_core.data.validation import ValidationFailed, ValidationReport, validate_dataset
from prts_core.data.validation.report import Finding
from prts_core.io.files import read_json, read_jsonl, write_json, write_jsonl
from prts_core.store.listing import digest_tree
from tests.data.conftest import Converted

TABLE = "data/chunk-000/episode_000001.parquet"
VIDEO = "videos/chunk-000/observation.images.wrist/episode_000002.mp4"


@pytest.fixture
def injured(tmp_path: Path, toy: Converted) -> Path:
    """A copy to hurt, not sealed: a sealed one names every change anyway."""
    shutil.copytree(toy.root, tmp_path / "data", ignore=shutil.ignore_patterns("prts_manifest.json"))
    return tmp_path / "data"


def column(root: Path, key: str, change: Callable[[list], object], kind: pa.DataType | None = None) -> None:
    """Rewrite one column of TABLE, its vectors as lists of any width."""
    table = pq.read_table(root / TABLE)
    values = table.column(key).to_pylist()
    change(values)
    kind = kind or (pa.list_(pa.float32()) if isinstance(values[0], list) else table.schema.field(key).type)
    place = table.column_names.index(key)
    pq.write_table(table.set_column(place, pa.field(key, kind), pa.array(values, kind)), root / TABLE)


def lines(root: Path, name: str, change: Callable[[list[dict]], object]) -> None:
    rows = read_jsonl(root / f"meta/{name}.jsonl")
    change(rows)
    write_jsonl(root / f"meta/{name}.jsonl", rows)


def document(root: Path, name: str, change: Callable[[dict], object]) -> None:
    raw = read_json(root / f"meta/{name}.json")
    change(raw)
    write_json(root / f"meta/{name}.json", raw)


def put(values: list, row: int, value: object) -> None:
    values[row] = value


def poke(values: list, row: int, dimension: int, value: object) -> None:
    values[row][dimension] = value


INJURIES: dict[str, tuple[Callable[[Path], object], str, str, int | None, str]] = {
    # name: (injury, check, file, row, words found or expected)
    "narrow action": (lambda r: column(r, "action", lambda v: v[3].pop()), "table values", TABLE, 3, "3 dimensions"),
    "nan": (
        lambda r: column(r, "action", lambda v: poke(v, 4, 2, float("nan"))),
        "table values",
        TABLE,
        4,
        "[2] = nan",
    ),
    "infinity": (
        lambda r: column(r, "observation.state", lambda v: poke(v, 0, 1, float("inf"))),
        "table values",
        TABLE,
        0,
        "inf",
    ),
    "empty cell": (
        lambda r: column(r, "action", lambda v: poke(v, 5, 0, None)),
        "table values",
        TABLE,
        5,
        "[0] = None",
    ),
    "empty row": (
        lambda r: column(r, "timestamp", lambda v: put(v, 2, None)),
        "table values",
        TABLE,
        2,
        "timestamp = None",
    ),
    "wrong type": (
        lambda r: column(r, "next.success", lambda v: v.__setitem__(slice(None), [0] * len(v)), pa.int64()),
        "table types",
        TABLE,
        None,
        "Int64",
    ),
    "shifted time": (lambda r: column(r, "timestamp", lambda v: put(v, 6, 0.31)), "timestamps", TABLE, 6, "0.3 s"),
    "wrong index": (lambda r: column(r, "index", lambda v: put(v, 1, 99)), "row numbering", TABLE, 1, "index = 99"),
    "wrong frame": (
        lambda r: column(r, "frame_index", lambda v: put(v, 0, 5)),
        "row numbering",
        TABLE,
        0,
        "frame_index = 5",
    ),
    "other episode": (
        lambda r: column(r, "episode_index", lambda v: put(v, 0, 7)),
        "row numbering",
        TABLE,
        0,
        "episode_index",
    ),
    "unknown task": (lambda r: column(r, "task_index", lambda v: put(v, 0, 9)), "tasks", TABLE, None, "task_index 9"),
    "no column": (
        lambda r: pq.write_table(pq.read_table(r / TABLE).drop(["index"]), r / TABLE),
        "table columns",
        TABLE,
        None,
        "index",
    ),
    "short table": (
        lambda r: pq.write_table(pq.read_table(r / TABLE).slice(0, 9), r / TABLE),
        "episode length",
        TABLE,
        None,
        "9 rows",
    ),
    "truncated": (
        lambda r: (r / TABLE).write_bytes((r / TABLE).read_bytes()[:500]),
        "tables",
        TABLE,
        None,
        "truncated",
    ),
    "no table": (lambda r: (r / TABLE).unlink(), "tables", TABLE, None, "no such file"),
    "no video": (lambda r: (r / VIDEO).unlink(), "videos", VIDEO, None, "missing"),
    "broken video": (lambda r: (r / VIDEO).write_bytes(b"x" * 99), "videos", VIDEO, None, "cannot be decoded"),
    "short video": (
        lambda r: video.encode(r / VIDEO, np.zeros((5, 32, 32, 3), np.uint8), 20, VideoConfig()),
        "videos",
        VIDEO,
        None,
        "5 frames",
    ),
    "other size": (
        lambda r: video.encode(r / VIDEO, np.zeros((12, 16, 16, 3), np.uint8), 20, VideoConfig()),
        "videos",
        VIDEO,
        None,
        "16x16",
    ),
    "other rate": (
        lambda r: video.encode(r / VIDEO, np.zeros((12, 32, 32, 3), np.uint8), 30, VideoConfig()),
        "videos",
        VIDEO,
        None,
        "30 frames a",
    ),
    "bad line": (
        lambda r: (r / "meta/tasks.jsonl").write_text('{"task_index": 0, '),
        "metadata",
        "meta/tasks.jsonl",
        None,
        "line 1",
    ),
    "no length": (
        lambda r: lines(r, "episodes", lambda rows: rows[2].pop("length")),
        "metadata",
        "meta/episodes.jsonl",
        2,
        "length",
    ),
    "wrong length": (
        lambda r: lines(r, "episodes", lambda rows: rows[1].update(length=40)),
        "episode length",
        TABLE,
        None,
        "40 rows",
    ),
    "gap": (
        lambda r: lines(r, "episodes", lambda rows: rows.pop(3)),
        "numbering",
        "meta/episodes.jsonl",
        3,
        "number 4",
    ),
    "task unknown": (
        lambda r: lines(r, "episodes", lambda rows: rows[0].update(tasks=["fly"])),
        "tasks",
        "meta/episodes.jsonl",
        0,
        "'fly'",
    ),
    "task twice": (
        lambda r: lines(r, "tasks", lambda rows: rows[1].update(task=rows[0]["task"])),
        "numbering",
        "meta/tasks.jsonl",
        1,
        "twice",
    ),
    "no stats": (
        lambda r: lines(r, "episodes_stats", lambda rows: rows.pop(1)),
        "episode statistics",
        "meta/episodes_stats.jsonl",
        None,
        "episode 1",
    ),
    "long subtask": (
        lambda r: lines(r, "episodes", lambda rows: rows[0]["action_config"][1].update(end_frame=99)),
        "subtasks",
        "meta/episodes.jsonl",
        0,
        "6 to 99",
    ),
    "overlapping subtasks": (
        lambda r: lines(r, "episodes", lambda rows: rows[0]["action_config"][1].update(start_frame=2)),
        "subtasks",
        "meta/episodes.jsonl",
        0,
        "at least 6",
    ),
    "late success": (
        lambda r: lines(r, "episodes", lambda rows: rows[0].update(success_row=50)),
        "subtasks",
        "meta/episodes.jsonl",
        0,
        "success_row 50",
    ),
    "totals": (
        lambda r: document(r, "info", lambda i: i.update(total_frames=5)),
        "totals",
        "meta/info.json",
        None,
        "total_frames: 5",
    ),
    "splits meet": (
        lambda r: document(r, "info", lambda i: i["splits"].update(heldout="3:6")),
        "splits",
        "meta/info.json",
        None,
        "shares 1",
    ),
    "split too long": (
        lambda r: document(r, "info", lambda i: i["splits"].update(heldout="4:9")),
        "splits",
        "meta/info.json",
        None,
        "at most 6",
    ),
    "split words": (
        lambda r: document(r, "info", lambda i: i["splits"].update(heldout="all")),
        "metadata",
        "meta/info.json",
        None,
        "first:end",
    ),
    "other fps": (
        lambda r: document(r, "info", lambda i: i.update(fps=10)),
        "contract",
        "meta/contract.json",
        None,
        "control_hz 20",
    ),
    "narrow contract": (
        lambda r: document(r, "contract", lambda c: c["action"].pop()),
        "contract",
        "meta/contract.json",
        None,
        "3 dim",
    ),
    "no contract": (lambda r: (r / "meta/contract.json").unlink(), "metadata", "meta/contract.json", None, "missing"),
}


def test_sound_dataset(toy: Converted) -> None:
    before = digest_tree(toy.root)
    report = validate_dataset(toy.root)
    assert report.ok and not report.findings and report.failures_markdown() == ""
    assert report.checks["videos"] == 12 and report.checks["table values"] == 74
    assert digest_tree(toy.root) == before


@pytest.mark.parametrize("name", INJURIES)
def test_every_law_can_fail(injured: Path, name: str) -> None:
    injury, check, file, row, words = INJURIES[name]
    injury(injured)
    report = validate_dataset(injured)
    assert not report.ok
    hits = [f for f in report.errors if f.check == check and f.file == file and f.row == row]
    assert any(words in f.found + f.expected for f in hits), report.markdown()


def test_stale_episode_statistics_are_a_warning(injured: Path) -> None:
    lines(injured, "episodes_stats", lambda rows: put(rows[1]["stats"]["action"]["max"], 0, 9.0))
    report = validate_dataset(injured)
    assert report.ok and {f.check for f in report.warnings} == {"seal", "episode statistics"}


def test_without_info_nothing_else_is_tried(injured: Path) -> None:
    (injured / "meta/info.json").write_text("{")
    report = validate_dataset(injured)
    assert [f.file for f in report.errors] == ["meta/info.json"]


@pytest.mark.parametrize("name", ["no video", "broken video", "short video", "other size", "other rate"])
def test_first_and_last_frames_find_these_too(injured: Path, name: str) -> None:
    injury, check, file, row, words = INJURIES[name]
    injury(injured)
    found = [f for f in validate_dataset(injured, "ends").errors if (f.check, f.file, f.row) == (check, file, row)]
    assert any(words in f.found for f in found)


def test_a_broken_sensor_does_not_flood_the_report(injured: Path) -> None:
    def blind(values: list) -> None:
        for cell in values:
            cell[1] = float("nan")

    column(injured, "action", blind)
    report = validate_dataset(injured)
    about = [f for f in report.errors if f.check == "table values"]
    assert len(about) == 6 and "more rows like these" in about[-1].found


def test_report_is_readable(tmp_path: Path) -> None:
    report = ValidationReport("toy")
    for row in range(30):
        report.add(Finding("table values", "a.parquet", f"a | b {row}", "c", row=row))
    report.add(Finding("videos", "b.mp4", "x", "y", severity="warning"))
    page = report.failures_markdown(limit=20)
    assert page.count("\n| error") == 20 and "a \\| b 19" in page and "... and 11 more" in page
    assert report.frame().height == 31 and report.frame()["row"].to_list()[:3] == [0, 1, 2]
    report.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["errors"] == 30
    assert ValidationReport.load(tmp_path / "report.json").to_json() == report.to_json()
    assert "30 errors, 1 warnings" in (tmp_path / "report.md").read_text()
    failed = ValidationFailed(report, "report.md")
    assert (
        failed.report is report
        and "29 more errors" in str(failed)
        and "row 0" in str(failed)
        and "report.md" in str(failed)
    )
