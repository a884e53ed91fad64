"""A journal survives whatever a dying process leaves behind, and never mixes two runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import DataError, StageError
from prts_core.io.journal import Journal

HEADER = {"suite": {"name": "toy", "seed": 7}, "policy": {"digest": "sha256:a"}}
KEY = ("task", "initial_state")


def row(task: str, initial_state: int, success: bool = True) -> dict:
    return {"task": task, "initial_state": initial_state, "success": success, "values": [0.1, -2.5]}


def opened(path: Path, header: dict | None = None) -> Journal:
    return Journal(path, header or HEADER, KEY)


def test_rows_come_back_and_are_counted_once(tmp_path):
    with opened(tmp_path / "j") as journal:
        assert journal.add(row("open", 0)) and journal.add(row("open", 1, False))
        assert not journal.add(row("open", 0, False))
        journal.note({"kind": "worker lost"})
    with opened(tmp_path / "j") as journal:
        assert journal.rows == {("open", 0): row("open", 0), ("open", 1): row("open", 1, False)}
        assert journal.events == [{"kind": "worker lost"}]
        assert not journal.add(row("open", 1))


@given(st.data())
@settings(max_examples=25)
def test_cut_anywhere_only_the_line_being_written_is_lost(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "j"
    with opened(path) as journal:
        for index in range(4):
            journal.add(row("wave", index))
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = max(0, whole[:cut].count(b"\n") - 1)
    with opened(path) as journal:
        assert list(journal.rows) == [("wave", index) for index in range(kept)]
        for index in range(4):
            assert journal.add(row("wave", index)) == (index >= kept)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "header, told",
    [
        ({**HEADER, "policy": {"digest": "sha256:b"}}, "policy.digest is 'sha256:a', now 'sha256:b'"),
        ({**HEADER, "suite": {"name": "toy", "seed": 8}}, "suite.seed is 7, now 8"),
        ({"suite": HEADER["suite"]}, "policy is"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path, header, told):
    opened(tmp_path / "j").__exit__()
    with pytest.raises(StageError, match="another benchmark") as error:
        opened(tmp_path / "j", header)
    assert told in str(error.value)


def test_two_processes_never_write_one_journal(tmp_path):
    with opened(tmp_path / "j"), pytest.raises(StageError, match="Another process"):
        opened(tmp_path / "j")


@pytest.mark.parametrize("line", [b"{nonsense\n", b"[1]\n", b'{"episode": {"task": "x"}}\n', b'{"other": 1}\n'])
def test_a_damaged_line_is_named(tmp_path, line):
    with opened(tmp_path / "j") as journal:
        journal.add(row("wave", 0))
    with (tmp_path / "j").open("ab") as file:
        file.write(line)
    with pytest.raises(DataError, match="line 3"):
        opened(tmp_path / "j")
    (tmp_path / "j").write_bytes(b'{"episode": {}}\n')
    with pytest.raises(DataError, match="begin with its header"):
        opened(tmp_path / "j")
