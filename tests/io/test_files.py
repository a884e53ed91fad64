"""Files: which place an operating system's error is about, and lines that are lines."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from prts_core.io import tensors
from prts_core.io.errors import ConfigError, StageError
from prts_core.io.files import atomic_path, explain_os_errors, new_folder, read_jsonl, write_jsonl


def told(folder: Path, fault: Exception) -> StageError:
    with pytest.raises(StageError) as caught, explain_os_errors(folder):
        raise fault
    return caught.value


def test_an_input_that_may_not_be_read_is_not_told_as_the_output(tmp_path: Path):
    source, outputs = tmp_path / "theirs" / "a.parquet", tmp_path / "outputs"
    said = told(outputs, PermissionError(errno.EACCES, "Permission denied", str(source)))
    assert said.problem.startswith("A file cannot be read") and said.file == str(source)
    assert "--outputs" not in str(said) and said.cure


@pytest.mark.parametrize("place", ["outputs", "outputs/store/x/work", "."], ids=["itself", "inside", "above"])
def test_an_output_that_may_not_be_written_is_told_as_such(tmp_path: Path, place: str):
    said = told(tmp_path / "outputs", PermissionError(errno.EACCES, "Permission denied", str(tmp_path / place)))
    assert "The output cannot be written" in said.problem and "--outputs" in str(said.cure)


def test_the_second_name_of_a_rename_counts(tmp_path: Path):
    fault = OSError(errno.EROFS, "Read-only", "/elsewhere/x", None, str(tmp_path / "outputs" / "y"))
    assert "The output cannot be written" in told(tmp_path / "outputs", fault).problem


def test_relative_names_and_links_are_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    for name in ("outputs/x", str(tmp_path / "disk" / "x")):
        fault = PermissionError(errno.EACCES, "Permission denied", name)
        assert "The output cannot be written" in told(Path("outputs"), fault).problem


def test_a_full_disk_is_told_with_its_place(tmp_path: Path):
    outputs = tmp_path / "outputs"
    for fault in (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Quota"),
        OSError(errno.ENOSPC, "No space", str(outputs / "x")),
        OSError("Can't write data (errno = 28, error message = 'No space left on device')"),
    ):
        said = told(outputs, fault)
        assert "The disk is full" in said.problem and said.file == str(outputs) and "prts gc" in str(said.cure)
    said = told(outputs, OSError(errno.ENOSPC, "No space", "/somewhere/else/x"))
    assert "The disk is full" in said.problem and said.file == "/somewhere/else/x"


def test_other_errors_stay_what_they_are(tmp_path: Path):
    for fault in (FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError("odd"), KeyError("x")):
        with pytest.raises(type(fault)), explain_os_errors(tmp_path):
            raise fault


def test_a_place_that_cannot_be_written_atomically_is_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(StageError, match="The output cannot be written"), atomic_path(tmp_path / "x.json") as partial:
        partial.write_bytes(b"x")


@pytest.mark.parametrize("words", ["I/O error: No space left on device (os error 28)", "Quota exceeded (os error 122)"])
def test_tensors_on_a_full_disk_are_the_same_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: {words}")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(StageError, match="The disk is full") as caught:
        tensors.save_tensors(tmp_path / "model.safetensors", {"a": torch.ones(1)})
    assert caught.value.file == str(tmp_path) and not list(tmp_path.iterdir())


def test_other_faults_of_tensors_stay(tmp_path: Path):
    shared = torch.ones(4)
    with pytest.raises(RuntimeError, match="share memory"):
        tensors.save_tensors(tmp_path / "model.safetensors", {"a": shared, "b": shared})


@pytest.mark.parametrize("text", ["one\u2028two", "one\u0085two", "a\x0bb\x0c\x1cc", "plain"])
def test_a_line_ends_where_json_lines_end(tmp_path: Path, text: str):
    rows = [{"task": text}, {"task": "next"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "x.jsonl") == rows
    (tmp_path / "windows.jsonl").write_bytes((tmp_path / "x.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    assert read_jsonl(tmp_path / "windows.jsonl") == rows


def test_a_new_folder_is_whole_or_absent(tmp_path: Path):
    place = tmp_path / "above" / "made"
    with pytest.raises(ZeroDivisionError), new_folder(place) as partial:
        (partial / "half").write_text("")
        raise ZeroDivisionError
    assert list(place.parent.iterdir()) == []
    (place.parent / ".made.partial").mkdir()  # of a kill
    (place.parent / ".made.partial" / "half").write_text("")
    with new_folder(place) as partial:
        (partial / "whole").write_text("")
        assert not place.exists()
    assert list(place.parent.rglob("*")) == [place, place / "whole"]
    with pytest.raises(ConfigError, match="something at this place"), new_folder(place):
        raise AssertionError
    assert (place / "whole").exists()
