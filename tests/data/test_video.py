"""Video in and out: same input, same bytes; frames by index; damage is one DataError."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prts_core.config.places import shared_folder
from prts_core.config.schema import VideoConfig
from prts_core.data.images import letterbox
from prts_core.data.lerobot_v21 import video
from prts_core.io.errors import ConfigError, DataError

AV1 = VideoConfig(codec="libsvtav1", crf=25, preset="10")


def moving_square(frames: int = 40, height: int = 48, width: int = 64) -> np.ndarray:
    images = np.full((frames, height, width, 3), 60, np.uint8)
    for index in range(frames):
        images[index, 10:26, index : index + 16] = (220, 40, 40)
        images[index, 40:48, : index + 1] = 2 * index  # tells every frame from its neighbours
    return images


@pytest.mark.parametrize("config", [VideoConfig(), AV1], ids=["h264", "av1"])
def test_round_trip_is_close_and_repeatable(tmp_path: Path, config: VideoConfig) -> None:
    frames = moving_square()
    video.encode(tmp_path / "a.mp4", frames, 20, config)
    video.encode(tmp_path / "b.mp4", frames, 20, config)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    decoded = video.decode(tmp_path / "a.mp4")
    assert decoded.shape == frames.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - frames).mean() < 6
    facts = video.probe(tmp_path / "a.mp4")
    assert (facts.height, facts.width, facts.fps, facts.frames) == (48, 64, 20.0, 40)
    assert facts.codec == video.CODEC_NAMES[config.codec] and facts.pixel_format == "yuv420p"


@pytest.mark.parametrize("gop", [2, 30])
def test_chosen_frames_are_those_of_the_whole_video(tmp_path: Path, gop: int) -> None:
    path = tmp_path / "v.mp4"
    video.encode(path, moving_square(120, 48, 160), 30, VideoConfig(gop=gop))
    whole = video.decode(path)
    wanted = [119, 0, 3, 3, 70, 1]
    assert (video.decode(path, wanted) == whole[wanted]).all()
    assert video.decode(path, []).shape == (0, 48, 160, 3)
    small = video.decode(path, [5], size=32)
    assert small.shape == (1, 32, 32, 3) and (small == letterbox(whole[[5]], 32)).all()


def test_letterbox_keeps_proportions_and_averages() -> None:
    images = np.zeros((2, 48, 64, 3), np.uint8)
    images[:, :, 32:] = 200
    small = letterbox(images, 32)
    assert small.shape == (2, 32, 32, 3)
    assert (small[:, :4] == 0).all() and (small[:, -4:] == 0).all()  # bars: 24 rows of picture in 32
    assert (small[:, 4:28, :15] == 0).all() and (small[:, 4:28, 18:] == 200).all()
    assert letterbox(small, 32) is small
    grown = letterbox(np.full((1, 4, 4, 3), 9, np.uint8), 8)
    assert (grown == 9).all()
    with pytest.raises(DataError, match="uint8"):
        letterbox(images.astype(np.float32), 32)


@pytest.mark.parametrize("damage", ["missing", "truncated", "text", "empty"])
def test_damaged_video_names_the_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "episode_000000.mp4"
    if damage == "truncated":
        video.encode(path, moving_square(), 20, VideoConfig())
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "text":
        path.write_text("no video")
    elif damage == "empty":
        path.touch()
    with pytest.raises(DataError, match=r"episode_000000\.mp4") as error:
        video.decode(path)
    assert error.value.cure


def test_frame_beyond_the_end_is_refused(tmp_path: Path) -> None:
    video.encode(tmp_path / "v.mp4", moving_square(8), 20, VideoConfig())
    with pytest.raises(DataError, match="8 frames"):
        video.decode(tmp_path / "v.mp4", [8])
    with pytest.raises(DataError, match="start at 0"):
        video.decode(tmp_path / "v.mp4", [-1])


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with pytest.raises(DataError, match="even sides"):
        video.encode(path, moving_square(3, 47, 64), 20, VideoConfig())
    with pytest.raises(ConfigError, match="numbers its presets"):
        video.encode(path, moving_square(3), 20, VideoConfig(codec="libsvtav1"))
    with pytest.raises(DataError, match="wrong form"):
        video.encode(path, moving_square(3).astype(np.float32), 20, VideoConfig())
    assert not list(tmp_path.iterdir())


def test_real_av1_recording_seeks_exactly() -> None:
    path = shared_folder() / "data/g1_bottle/videos/chunk-000/observation.images.cam_high/episode_000001.mp4"
    if not path.exists():
        pytest.skip("g1_bottle is not on this machine ($PRTS_SHARED)")
    assert video.probe(path).codec == "av1"
    first = video.decode(path, range(3), size=64)
    far = video.decode(path, [300, 2], size=64)
    assert (far[1] == first[2]).all() and far.shape == (2, 64, 64, 3)
