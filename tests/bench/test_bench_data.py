"""The benchmark's own peers: bare PyAV shows the frames that ours shows; an absent lerobot is said, not hidden."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from prts_core.bench import data_encoding, data_loading, data_start
from prts_core.bench.report import Row, show
from prts_core.config.places import shared_folder
from prts_core.config.schema import VideoConfig
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.reader import LeRobotDataset


def test_bare_pyav_shows_the_same_frames(tmp_path: Path) -> None:
    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for number, path in enumerate(paths):
        video.encode(path, data_encoding._drawn(number)[:20, :64, :64], 30, VideoConfig())
    bare = data_loading.BarePyAV(dict(enumerate(paths)))
    whole = np.concatenate([video.decode(path) for path in paths])
    for episode, row in ((1, 3), (0, 19), (0, 0), (1, 8)):
        assert np.array_equal(bare.frame(episode, row), whole[20 * episode + row])


def test_without_lerobot_a_row_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with data_loading.LeRobotPeer(data_loading.one_core()) as peer:
        assert not peer.there
    rows = [
        Row("ours / lerobot", 2.0, None, "items/s", "higher", ">= 2", data_loading.NO_LEROBOT),
        Row("ours / bare", 2.0, 1.0, "items/s", "higher", ">= 0.95"),
    ]
    console = Console(record=True, width=200)
    path = show("data", rows, tmp_path, console)
    assert "make conformance" in console.export_text()
    first, second = json.loads(path.read_text())["rows"]
    assert (first["peer"], first["ratio"], first["met"]) == (None, None, None) and second["met"] is True


def test_training_starts_on_metadata_and_an_index_alone(tmp_path: Path) -> None:
    index = data_start.write(tmp_path / "data", 200, tasks=20, texts=10)
    source = data_start.start(tmp_path / "data", tmp_path)
    assert len(source.sources[0]) == 198 * data_start.LENGTH and index.bytes < 16 * 200 * data_start.LENGTH
    plan = next(source.plans(source.start()))
    assert len({(draw.source, draw.row) for row in plan.rows for draw in row}) == 256


@pytest.mark.conformance
@pytest.mark.timeout(600)
def test_items_are_lerobots_own() -> None:
    from tests.conformance.test_lerobot import LEROBOT
    from tests.conformance.venvs import ensure_venv

    root = shared_folder() / "data/g1_bottle"
    if not root.is_dir():
        pytest.skip("g1_bottle is not on this machine ($PRTS_SHARED)")
    ensure_venv("lerobot-0.3.3", LEROBOT)
    dataset = LeRobotDataset.open(root)
    deltas = {"action": [n / dataset.fps for n in range(data_loading.CHUNK)]}
    with data_loading.LeRobotPeer(data_loading.one_core()) as peer:
        peer.ask(do="open", root=str(root), deltas=deltas)
        data = data_loading.training_set(dataset, peer.folder)
        assert data_loading.compare(peer, data) <= 2 / 255
        data.reader.close()
