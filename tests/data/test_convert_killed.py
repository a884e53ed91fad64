"""Every converter killed (SIGKILL) in the middle: nothing that was finished is written again, and the result is that of
an uninterrupted run, whatever the number of workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from prts_core.config.mapping import load_mapping
from prts_core.config.schema import VideoConfig
from prts_core.data.convert import lerobot_v30, lerobot_v30_export, resume
from prts_core.data.convert import run as convert_run
from prts_core.data.convert.run import convert
from prts_core.store.listing import digest_tree
from tests.data.conftest import convert_toy, write_raw
from tests.data.test_convert_aloha import ALOHA, write_all
from tests.data.test_convert_lerobot_v30 import SMALL
from tests.data.test_convert_mcap import MAPPING as MCAP
from tests.data.test_convert_mcap import messages, write_ros2
from tests.data.test_convert_rlds import MAPPING as RLDS
from tests.data.test_convert_rlds import write_rlds

Record = Callable[[Path], object]
Run = Callable[[Path, Path, int], object]  # recording, folder to write into, workers


def mapped(mapping: object, root: Path, folder: Path, workers: int) -> None:
    convert(
        root,
        folder / "output",
        folder / "work",
        mapping=mapping,  # type: ignore[arg-type]
        dataset="toy",
        robot=None,
        video=VideoConfig(),
        workers=workers,
    )


def to_v30(root: Path, folder: Path, workers: int) -> None:
    lerobot_v30_export.export(root, folder / "output", folder / "work", workers=workers, **SMALL)


def from_v30(root: Path, folder: Path, workers: int) -> None:
    lerobot_v30.import_dataset(root, folder / "output", folder / "work", dataset="toy", robot=None, workers=workers)


def record_v21(root: Path) -> None:
    convert_toy(root.parent / "made", write_raw(root.parent / "hdf5"))
    (root.parent / "made/output").rename(root)


def record_v30(root: Path) -> None:
    record_v21(root.parent / "v21")
    lerobot_v30_export.export(root.parent / "v21", root, root.parent / "v30_work", **SMALL)


def record_mcap(root: Path) -> None:
    for number in range(5):
        write_ros2(root / f"{number}.mcap", messages(0.5, seed=number))


KINDS: dict[str, tuple[Record, Run]] = {
    "aloha": (partial(write_all, count=5, form="padded"), partial(mapped, load_mapping(ALOHA))),
    "rlds": (partial(write_rlds, lengths=(7, 5, 9, 6)), partial(mapped, RLDS)),
    "mcap": (record_mcap, partial(mapped, MCAP)),
    "v2.1 to v3.0": (record_v21, to_v30),
    "v3.0 to v2.1": (record_v30, from_v30),
}
KILLED = """
import os, pathlib, signal, sys
kind, root, folder, after = sys.argv[1:]
replace, done = pathlib.Path.replace, []
def until(path, target):
    if len(done) == int(after):
        os.kill(os.getpid(), signal.SIGKILL)  # the file is written and not yet renamed
    done.append(target)
    return replace(path, target)
from tests.data.test_convert_killed import KINDS
pathlib.Path.replace = until
KINDS[kind][1](pathlib.Path(root), pathlib.Path(folder), 2)
"""


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Path -> inode and time of change, which writing a file anew would change."""
    found = [path for path in root.rglob("*") if path.is_file() and ".partial-" not in path.name]
    return {path.relative_to(root).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_in_the_middle_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    record, run = KINDS[kind]
    root = tmp_path / "recording"
    record(root)
    units: dict[str, list[str]] = {}  # name -> what it writes

    def noted(todo: list[resume.Unit], records: Path, **how: object) -> list[object]:
        output = records.parent / "output"
        units.update({unit.name: [path.relative_to(output).as_posix() for path in unit.outputs] for unit in todo})
        return resume.run_units(todo, records, **how)  # type: ignore[arg-type]

    for module in (convert_run, lerobot_v30, lerobot_v30_export):
        monkeypatch.setattr(module, "run_units", noted)
    for workers in (1, 2):
        run(root, tmp_path / f"by-{workers}", workers)
    whole = digest_tree(tmp_path / "by-1/output")
    assert digest_tree(tmp_path / "by-2/output") == whole, "one worker or two: the same bytes"

    files = len(stamps(tmp_path / "by-1/output")) + len(list((tmp_path / "by-1/work").glob("*.json")))
    cut = tmp_path / "cut"
    command = [sys.executable, "-c", KILLED, kind, str(root), str(cut), str(files // 2)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    died = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    assert not (cut / "output/meta/info.json").exists() and list(cut.rglob(".*.partial-*")), "killed while it wrote"
    records = list((cut / "work").glob("*.json"))
    finished = {path for record in records for path in units[record.stem]}
    before = stamps(cut / "output")
    assert 2 <= len(records) < len(list((tmp_path / "by-1/work").glob("*.json"))) and finished <= set(before)

    run(root, cut, 2)
    assert digest_tree(cut / "output") == whole
    after = stamps(cut / "output")
    assert {path: after[path] for path in finished} == {path: before[path] for path in finished}, "encoded again"
    assert after.keys() - before.keys(), "something was left to do"
