"""Time the conversion of recordings with two 256 x 256 cameras beside lerobot's recording path and the encoder alone.

lerobot encodes on all cores, one video at a time, and so do our two workers; beside the encoder alone, both are held to
one core. All take turns over groups of episodes. Pictures: g1_bottle's where it is there, else drawn.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np
from av.video.reformatter import VideoReformatter
from rich.console import Console

from prts_core.bench.data_loading import NO_LEROBOT, LeRobotPeer, one_core
from prts_core.bench.report import Row, interleave
from prts_core.config.places import shared_folder
from prts_core.config.schema import VideoConfig
from prts_core.data.convert.robomimic import native_mapping
from prts_core.data.convert.run import convert
from prts_core.data.images import resize
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.reader import LeRobotDataset

GROUPS, EPISODES, ROWS, SIDE, FPS, DIMS = 2, 10, 80, 256, 30, 14
CAMERAS = ("front", "wrist")
LEROBOT = VideoConfig(codec="libsvtav1", crf=30, preset="8")  # lerobot names no preset; the library's own is 8


@dataclass(frozen=True)
class EncodedGroup:
    """Episodes converted together: their pictures {camera: (ROWS, SIDE, SIDE, 3) uint8}, and the folder of everything
    made of them."""

    folder: Path
    pictures: list[dict[str, np.ndarray]]


def rows(console: Console) -> list[Row]:
    sizes: dict[str, int] = {}
    errors: dict[str, list[float]] = {}

    def checked(name: str, make: Callable[[EncodedGroup, Path], float]) -> Callable[[EncodedGroup], float]:
        """Seconds of `make`; what it made is measured besides."""

        def call(group: EncodedGroup) -> float:
            root = group.folder / name
            seconds = make(group, root)
            size, error = _quality(root, group.pictures)
            sizes[name] = sizes.get(name, 0) + size
            errors.setdefault(name, []).extend(error)
            return seconds

        return call

    def lerobot(group: EncodedGroup, root: Path) -> float:
        cameras = [f"observation.images.{camera}" for camera in CAMERAS]
        peer.ask(do="create", root=str(root), fps=FPS, cameras=cameras, height=SIDE, width=SIDE, dims=DIMS)
        return float(sum(peer.ask(do="record", frames=str(group.folder / f"{n}.npz")) for n in range(EPISODES)))

    with LeRobotPeer(nullcontext()) as peer:
        calls: dict[str, Callable[[Any], object]] = {
            "bare": _bare,
            "one core": checked("one core", lambda group, root: _ours(group, root, LEROBOT, 1)),
            "same": checked("same", lambda group, root: _ours(group, root, LEROBOT, 2)),
            "default": checked("default", lambda group, root: _ours(group, root, VideoConfig(), 2)),
        }
        if peer.there:
            calls["lerobot"] = checked("lerobot", lerobot)
        speed = {name: sum(times) for name, times in interleave(calls, _groups(peer.folder), warmups=0).items()}
    pairs = GROUPS * EPISODES * ROWS
    rate = {name: pairs / seconds for name, seconds in speed.items()}
    psnr = {name: float(np.mean(found)) for name, found in errors.items()}
    shown = ", ".join(f"{name} {psnr[name]:.2f} dB in {sizes[name]} bytes" for name in psnr)
    console.print(f"encoding: {pairs} pairs of frames; mean PSNR {shown}")
    made = []
    for what, seen, ours, theirs, unit, goal in (
        ("conversion, SVT-AV1 as lerobot / lerobot", rate, "same", "lerobot", "pairs/s", ">= 1.6"),
        ("conversion, SVT-AV1 as lerobot / the encoder alone, one core", rate, "one core", "bare", "pairs/s", ">= 0.9"),
        ("conversion, our settings / lerobot", rate, "default", "lerobot", "pairs/s", ">= 3"),
        ("pictures, our settings / lerobot", psnr, "default", "lerobot", "dB", ">= 1"),
        ("video size, our settings / lerobot", sizes, "default", "lerobot", "bytes", "<= 1.3"),
    ):
        note = NO_LEROBOT if theirs not in seen else ""
        made.append(Row(what, seen[ours], seen.get(theirs), unit, "lower" if "<" in goal else "higher", goal, note))
    return made


def _groups(folder: Path) -> Iterator[EncodedGroup]:
    """Each recorded in robomimic's layout, and the same numbers beside it as .npz for lerobot."""
    for number in range(GROUPS):
        group = EncodedGroup(
            folder / str(number), [_pictures(number * EPISODES + episode) for episode in range(EPISODES)]
        )
        (group.folder / "hdf5").mkdir(parents=True)
        with h5py.File(group.folder / "hdf5" / "demos.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": "move"})
            for episode, pictures in enumerate(group.pictures):
                moved = np.random.default_rng(episode).normal(size=(2, ROWS, DIMS)).cumsum(1).astype(np.float32)
                demo = data.create_group(f"demo_{episode}")
                demo.attrs["num_samples"], demo.attrs["success_row"] = ROWS, ROWS - 1
                demo["obs/proprio"], demo["actions"] = moved
                views = {f"observation.images.{camera}": pictures[camera] for camera in CAMERAS}
                for camera in CAMERAS:
                    demo[f"obs/{camera}_rgb"] = pictures[camera]
                columns = {"observation.state": moved[0], "action": moved[1]} | views
                np.savez(group.folder / f"{episode}.npz", **columns)
        if not number:  # imports, and the first touch of everything
            _ours(group, folder / "warm", VideoConfig(), workers=2)
        yield group


def _pictures(episode: int) -> dict[str, np.ndarray]:
    """A view of the whole scene and one of a part of it; another stretch of the recording for every episode."""
    root = shared_folder() / "data/g1_bottle"
    if root.is_dir():
        dataset = LeRobotDataset.open(root)
        first = 17 * episode % (min(dataset.length(e) for e in dataset.episodes()) - ROWS)
        seen = dataset.frames(episode % len(dataset.rows), dataset.camera_keys[0], range(first, first + ROWS))
        whole = resize(np.ascontiguousarray(seen[:, :, 80:560]), SIDE, SIDE)
        return {"front": whole, "wrist": np.ascontiguousarray(seen[:, 112:368, 192:448])}
    return {camera: _drawn(2 * episode + number) for number, camera in enumerate(CAMERAS)}


def _drawn(seed: int) -> np.ndarray:
    """Soft surfaces under a light with the noise of a sensor; boxes that move and a background that drifts."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(40, 200, (9, 9, 3), np.uint8))
    scene = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float64)
    scene = scene + 12 * rng.standard_normal((SIDE // 2, SIDE // 2, 1)).repeat(2, 0).repeat(2, 1)
    boxes = [
        (rng.integers(20, 200, 2), rng.uniform(-2, 2, 2), rng.integers(20, 60), rng.uniform(0, 255, 3))
        for _ in range(5)
    ]
    frames = np.empty((ROWS, SIDE, SIDE, 3), np.uint8)
    for row in range(ROWS):
        image = np.roll(scene, row // 4, axis=1)
        for corner, speed, side, colour in boxes:
            top, left = (int(v) for v in np.clip(corner + row * speed, 0, SIDE - side))
            image[top : top + side, left : left + side] = colour
        frames[row] = np.clip(image + rng.normal(0, 2, image.shape), 0, 255)
    return frames


def _bare(group: EncodedGroup) -> float:
    """Seconds of the encoder that lerobot uses, fed from memory on one core: nothing is read, counted or kept."""
    options = {"crf": "30", "g": "2", "preset": LEROBOT.preset, "svtav1-params": "lp=1"}
    begin = time.perf_counter()
    with one_core():
        for images in (pictures[camera] for pictures in group.pictures for camera in CAMERAS):
            with av.open(str(group.folder / "bare.mp4"), "w") as container:
                stream = container.add_stream("libsvtav1", rate=FPS, options=options)
                stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
                stream.codec_context.thread_count = 1
                shape = VideoReformatter()
                for image in images:
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    container.mux(stream.encode(shape.reformat(frame, format="yuv420p", threads=1)))
                container.mux(stream.encode(None))
    return time.perf_counter() - begin


def _ours(group: EncodedGroup, root: Path, config: VideoConfig, workers: int) -> float:
    """Seconds of a whole conversion: reading the recording, videos, tables, statistics, metadata, seal."""
    raw, work = group.folder / "hdf5", root.with_name(f"{root.name} records")
    with one_core() if workers == 1 else nullcontext():
        begin = time.perf_counter()
        mapping = replace(native_mapping(raw, "bench", FPS), task="move")
        convert(raw, root, work, mapping=mapping, dataset="bench", robot=None, video=config, workers=workers)
        return time.perf_counter() - begin


def _quality(root: Path, made: list[dict[str, np.ndarray]]) -> tuple[int, list[float]]:
    """Bytes of all videos, and each video's PSNR in dB; every frame must be there."""
    info, size, errors = LeRobotDataset.open(root).info, 0, []
    for episode, pictures in enumerate(made):
        for camera in CAMERAS:
            path = root / info.video_file(episode, f"observation.images.{camera}")
            size += path.stat().st_size
            wrong = np.subtract(video.decode(path), pictures[camera], dtype=np.float32)
            errors.append(float(10 * np.log10(255**2 / np.square(wrong).mean())))
    return size, errors
