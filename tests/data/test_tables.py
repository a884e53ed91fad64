"""Tables: one picture costs one row group, some rows the groups that hold them; a replaced file is read anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.data.lerobot_v21 import tables
from prts_core.data.lerobot_v21.tables import GROUP_BYTES, GROUP_ROWS, read_parquet, read_pictures, write_parquet
from prts_core.io.errors import DataError

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def pictures(rows: int, size: int) -> pa.Table:
    cells = [{"bytes": bytes([row % 256]) * size, "path": None} for row in range(rows)]
    return pa.table({"top": pa.array(cells, PICTURE), "index": pa.array(np.arange(rows))})


class Counted:
    """Counts the row groups that pyarrow is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups, read = 0, pq.ParquetFile.read_row_groups

        def counted(file: pq.ParquetFile, groups: list[int], *args: object, **options: object) -> pa.Table:
            self.groups += len(groups)
            return read(file, groups, *args, **options)

        one = pq.ParquetFile.read_row_group

        def counted_one(file: pq.ParquetFile, group: int, *args: object, **options: object) -> pa.Table:
            self.groups += 1
            return one(file, group, *args, **options)

        monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
        monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted_one)


@pytest.mark.parametrize(("size", "most"), [(100, GROUP_ROWS), (GROUP_BYTES // 4 - 100, 4), (GROUP_BYTES * 2, 1)])
def test_one_picture_costs_one_small_group(
    size: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(pictures(40, size), tmp_path / "t.parquet")
    held = pq.read_metadata(tmp_path / "t.parquet")
    assert {held.row_group(n).num_rows for n in range(held.num_row_groups - 1)} == {most}
    counted = Counted(monkeypatch)
    assert read_pictures(tmp_path / "t.parquet", "top", [33]) == [bytes([33]) * size]
    assert counted.groups == 1
    assert [cell[0] for cell in read_pictures(tmp_path / "t.parquet", "top", [39, 0, 39])] == [39, 0, 39]


def test_tables_of_numbers_keep_one_group(tmp_path: Path) -> None:
    write_parquet(pa.table({"index": np.arange(5000)}), tmp_path / "t.parquet")
    pq.write_table(pa.table({"index": np.arange(5000)}), tmp_path / "plain.parquet")
    assert (tmp_path / "t.parquet").read_bytes() == (tmp_path / "plain.parquet").read_bytes()


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 60), length=st.integers(0, 60), group=st.integers(1, 50))
def test_rows_are_a_slice(first: int, length: int, group: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rows") / "t.parquet"
    pq.write_table(pa.table({"index": np.arange(50), "other": np.ones(50)}), path, row_group_size=group)
    found = read_parquet(path, ["index"], range(first, first + length))
    assert found.column_names == ["index"]
    assert found.column("index").to_pylist() == list(range(50))[first : first + length]


def test_only_the_groups_of_the_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"index": np.arange(100)}), tmp_path / "t.parquet", row_group_size=10)
    counted = Counted(monkeypatch)
    assert read_parquet(tmp_path / "t.parquet", None, range(35, 45)).num_rows == 10 and counted.groups == 2


def test_a_group_of_many_episodes_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"index": np.arange(100)}), tmp_path / "t.parquet")
    counted = Counted(monkeypatch)
    for first in range(0, 100, 10):
        found = read_parquet(tmp_path / "t.parquet", None, range(first, first + 10))
        assert found.column("index").to_pylist() == list(range(first, first + 10))
    assert counted.groups == 1


def test_a_large_group_of_pictures_is_read_once_for_those_that_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As others write them: one picture costs its whole group, at least its neighbours do not cost it again."""
    table = pictures(40, 100).append_column("side", pictures(40, 200)["top"])
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=20)
    counted = Counted(monkeypatch)
    for row in (3, 7, 7, 19):
        for key, size in (("top", 100), ("side", 200)):
            assert read_pictures(tmp_path / "t.parquet", key, [row]) == [bytes([row]) * size]
    assert counted.groups == 2, "one a camera"
    assert read_pictures(tmp_path / "t.parquet", "top", [20]) == [bytes([20]) * 100]
    monkeypatch.setattr(tables, "_MAX_PICTURES", 100 * 20 - 1)
    for row in (3, 4):
        read_pictures(tmp_path / "t.parquet", "top", [row])
    assert counted.groups == 5, "what is too large is not kept"


def test_files_that_stay_open_hold_no_rows(tmp_path: Path) -> None:
    """By default pyarrow keeps each column that was read with the file: gigabytes of a large dataset."""
    table, before = pa.table({"state": np.random.default_rng(0).normal(size=100_000)}), pa.total_allocated_bytes()
    for number in range(9):
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=50_000)
        assert read_parquet(tmp_path / f"{number}.parquet", ["state"], range(100)).num_rows == 100
    assert pa.total_allocated_bytes() - before < 1_000_000, "the group decoded last, of nine that were read"


def test_faults(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(DataError, match="missing"):
        read_pictures(path, "top", [0])
    write_parquet(pictures(3, 10), path)
    with pytest.raises(DataError, match="ends before a row"):
        read_pictures(path, "top", [3])
    with pytest.raises(DataError, match="holds no pictures"):
        read_pictures(path, "index", [0])
    with pytest.raises(DataError, match="lacks a column"):
        read_pictures(path, "side", [0])
    path.write_bytes(path.read_bytes()[:40])  # the one that was open is not what lies there now
    with pytest.raises(DataError, match="truncated or damaged"):
        read_pictures(path, "top", [0])
