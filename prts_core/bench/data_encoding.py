"""Conversion of recordings with two 256 x 256 cameras beside lerobot's recording path and beside the encoder alone.

lerobot encodes on all cores, one video at a time, and so do our two workers; beside the encoder alone, both are held to
one core. All take turns over groups of episodes. Pictures: g1_bottle's where it is there, else drawn.
"""

from __future__ import annotations

import json
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path

import av
import h5py
import numpy as np
from av.video.reformatter import VideoReformatter
from rich.console import Console

from prts_core.bench.data_loading import NO_LEROBOT, LeRobotPeer, one_core
from prts_core.bench.report import Row
from prts_core.config.places import shared_folder
from prts_core.config.schema import VideoConfig
from prts_core.data.convert.robomimic import native_mapping
from prts_core.data.convert.run import convert
from prts_core.data.images import resize
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.frames import OpenVideo
from prts_core.data.lerobot_v21.reader import LeRobotDataset

GROUPS, EPISODES, ROWS, SIDE, FPS, DIMS = 2, 10, 80, 256, 30, 14
CAMERAS = ("front", "wrist")
LEROBOT = VideoConfig(codec="libsvtav1", crf=30, preset="8")  # lerobot names no preset; the library's own is 8
Pictures = dict[str, np.ndarray]  # camera -> (ROWS, SIDE, SIDE, 3) uint8


def rows(console: Console) -> list[Row]:
    speed: dict[str, float] = {}
    sizes: dict[str, int] = {}
    errors: dict[str, list[float]] = {}
    with LeRobotPeer(nullcontext()) as peer:
        folder = peer.folder
        for group in range(GROUPS):
            made = [_pictures(group * EPISODES + number) for number in range(EPISODES)]
            raw = _write_recording(folder / f"raw{group}", made)
            if not group:  # imports, and the first touch of everything
                _ours(raw, folder / "warm", VideoConfig(), workers=2)
            with one_core():
                found = {
                    "bare": _bare(made, folder / "bare.mp4"),
                    "one core": _ours(raw, folder / f"one core{group}", LEROBOT, workers=1),
                }
            for name, config in (("same", LEROBOT), ("default", VideoConfig())):
                found[name] = _ours(raw, folder / f"{name}{group}", config, workers=2)
            if peer.there:
                root = folder / f"lerobot{group}"
                peer.ask("create", root=str(root), fps=FPS, cameras=_keys(), height=SIDE, width=SIDE, dims=DIMS)
                found["lerobot"] = sum(
                    peer.ask("record", frames=str(folder / f"raw{group}" / f"{number}.npz"))
                    for number in range(EPISODES)
                )
            for name, seconds in found.items():
                speed[name] = speed.get(name, 0.0) + seconds
                if name != "bare":
                    root = folder / f"{name}{group}" / ("" if name == "lerobot" else "output")
                    size, error = _quality(root, made)
                    sizes[name] = sizes.get(name, 0) + size
                    errors.setdefault(name, []).extend(error)
    pairs = GROUPS * EPISODES * ROWS
    rate = {name: pairs / seconds for name, seconds in speed.items()}
    psnr = {name: float(np.mean(found)) for name, found in errors.items()}
    said = ", ".join(f"{name} {psnr[name]:.2f} dB in {sizes[name]} bytes" for name in psnr)
    console.print(f"encoding: {pairs} pairs of frames; mean PSNR {said}")
    note, unit = "" if peer.there else NO_LEROBOT, "pairs/s"
    made_rows = [
        Row(
            "conversion, SVT-AV1 as lerobot / lerobot",
            rate["same"],
            rate.get("lerobot"),
            unit,
            "higher",
            ">= 1.6",
            note,
        ),
        Row(
            "conversion, SVT-AV1 as lerobot / the encoder alone, one core",
            rate["one core"],
            rate["bare"],
            unit,
            "higher",
            ">= 0.9",
        ),
        Row("conversion, our settings / lerobot", rate["default"], rate.get("lerobot"), unit, "higher", ">= 3", note),
        Row("pictures, our settings / lerobot", psnr["default"], psnr.get("lerobot"), "dB", "higher", ">= 1", note),
        Row(
            "video size, our settings / lerobot",
            sizes["default"],
            sizes.get("lerobot"),
            "bytes",
            "lower",
            "<= 1.3",
            note,
        ),
    ]
    return made_rows


def _keys() -> list[str]:
    return [f"observation.images.{camera}" for camera in CAMERAS]


def _pictures(episode: int) -> Pictures:
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
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(40, 200, (9, 9, 3)).astype(np.float32)
    at = np.linspace(0, 7.99, SIDE)
    low, part = at.astype(int), (at % 1)[:, None].astype(np.float32)
    tall = coarse[low] * (1 - part[..., None]) + coarse[low + 1] * part[..., None]
    scene = tall[:, low] * (1 - part) + tall[:, low + 1] * part
    scene += 12 * rng.standard_normal((SIDE // 2, SIDE // 2, 1)).astype(np.float32).repeat(2, 0).repeat(2, 1)
    boxes = [
        (rng.integers(20, 200, 2), rng.uniform(-2, 2, 2), rng.integers(20, 60), rng.uniform(0, 255, 3))
        for _ in range(5)
    ]
    frames = np.empty((ROWS, SIDE, SIDE, 3), np.uint8)
    for row in range(ROWS):
        image = np.roll(scene, row // 4, axis=1).copy()
        for corner, speed, side, colour in boxes:
            top, left = (int(v) for v in np.clip(corner + row * speed, 0, SIDE - side))
            image[top : top + side, left : left + side] = colour
        frames[row] = np.clip(image + rng.normal(0, 2, image.shape), 0, 255)
    return frames


def _write_recording(folder: Path, made: list[Pictures]) -> Path:
    """robomimic's layout, and beside it the same numbers as .npz for lerobot."""
    (folder / "hdf5").mkdir(parents=True)
    with h5py.File(folder / "hdf5" / "demos.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": "move"})
        for number, pictures in enumerate(made):
            moved = np.random.default_rng(number).normal(size=(2, ROWS, DIMS)).cumsum(1).astype(np.float32)
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"], demo.attrs["success_row"] = ROWS, ROWS - 1
            demo["obs/proprio"], demo["actions"] = moved
            for camera in CAMERAS:
                demo[f"obs/{camera}_rgb"] = pictures[camera]
            views = {"observation.state": moved[0], "action": moved[1]}
            views |= {f"observation.images.{camera}": pictures[camera] for camera in CAMERAS}
            np.savez(folder / f"{number}.npz", **views)
    return folder / "hdf5"


def _bare(made: list[Pictures], path: Path) -> float:
    """Seconds of the encoder that lerobot uses, fed from memory: nothing is read, counted or kept."""
    begin = time.perf_counter()
    for pictures in made:
        for camera in CAMERAS:
            with av.open(str(path), "w") as container:
                options = {"crf": "30", "g": "2", "preset": LEROBOT.preset, "svtav1-params": "lp=1"}
                stream = container.add_stream("libsvtav1", rate=FPS, options=options)
                stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
                stream.codec_context.thread_count = 1
                shape = VideoReformatter()
                for image in pictures[camera]:
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    container.mux(stream.encode(shape.reformat(frame, format="yuv420p", threads=1)))
                container.mux(stream.encode(None))
    return time.perf_counter() - begin


def _ours(raw: Path, folder: Path, config: VideoConfig, workers: int) -> float:
    """Seconds of a whole conversion: reading the recording, videos, tables, statistics, metadata, seal."""
    begin = time.perf_counter()
    mapping = replace(native_mapping(raw, "bench", FPS), task="move")
    convert(
        raw,
        folder / "output",
        folder / "episodes",
        mapping=mapping,
        dataset="bench",
        robot=None,
        video=config,
        workers=workers,
    )
    return time.perf_counter() - begin


def _quality(root: Path, made: list[Pictures]) -> tuple[int, list[float]]:
    """Bytes of all videos, and each video's PSNR in dB."""
    info, size, errors = LeRobotDataset.open(root).info, 0, []
    for episode, pictures in enumerate(made):
        for camera in CAMERAS:
            path = root / info.video_file(episode, f"observation.images.{camera}")
            size += path.stat().st_size
            with closing(OpenVideo(path)) as opened:
                assert opened.frames == ROWS
            wrong = video.decode(path).astype(np.float32) - pictures[camera]
            errors.append(float(10 * np.log10(255**2 / np.square(wrong).mean())))
    return size, errors
