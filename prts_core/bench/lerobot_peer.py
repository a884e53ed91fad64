"""Run lerobot 0.3.3 as a peer, inside its own environment: answer each JSON line on standard input with one.

torchvision's VideoReader, which lerobot's PyAV backend reads through, left torchvision with 0.26; a stand-in with the
same calls is given to lerobot, whose own code runs otherwise untouched.
"""

import json
import sys
import time

import av
import numpy as np
import torch

# torchvision on CPU torch asks for two operators of its compiled half; nobody calls them here.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402


class VideoReader:
    """As lerobot uses it: open a file, seek to a time, iterate {"data": (3, H, W) uint8, "pts": seconds}."""

    def __init__(self, src, stream="video"):
        self.container = av.open(src)
        self._frames = self.container.decode(video=0)

    def seek(self, time_s, keyframes_only=False):
        stream = self.container.streams.video[0]
        self.container.seek(round(time_s / stream.time_base), stream=stream)
        self._frames = self.container.decode(video=0)

    def __iter__(self):
        for frame in self._frames:
            pixels = torch.as_tensor(frame.to_rgb().to_ndarray()).permute(2, 0, 1)
            yield {"data": pixels, "pts": float(frame.pts * frame.time_base)}


if not hasattr(torchvision.io, "VideoReader"):
    torchvision.io.VideoReader = VideoReader
    torchvision.set_video_backend = lambda backend: None

from lerobot.datasets.lerobot_dataset import LeRobotDataset  # noqa: E402


class LerobotReader:
    def open(self, root, deltas):
        self.data = LeRobotDataset("peer/data", root=root, delta_timestamps=deltas, video_backend="pyav")
        return len(self.data)

    def read(self, indices):
        """Seconds for these items."""
        begin = time.perf_counter()
        for index in indices:
            self.data[index]
        return time.perf_counter() - begin

    def save(self, indices, out):
        """Items as one .npz: <number>/<key>."""
        arrays: dict = {}
        for number, index in enumerate(indices):
            arrays |= {f"{number}/{key}": np.asarray(value) for key, value in self.data[index].items()}
        np.savez(out, **arrays)
        return sorted(arrays)

    def create(self, root, fps, cameras, height, width, dims):
        picture = {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channel"]}
        numbers = {"dtype": "float32", "shape": (dims,), "names": None}
        features = dict.fromkeys(cameras, picture) | {"observation.state": numbers, "action": numbers}
        self.data = LeRobotDataset.create(
            "peer/data", fps=fps, features=features, root=root, image_writer_threads=4 * len(cameras)
        )  # as lerobot's own recording does

    def record(self, frames):
        """Seconds to record one episode of the .npz `frames` {camera: (T, H, W, 3), state, action} as a robot would."""
        with np.load(frames) as file:
            columns = dict(file)
        begin = time.perf_counter()
        for row in range(len(columns["action"])):
            self.data.add_frame({key: column[row] for key, column in columns.items()}, task="move")
        self.data.save_episode()
        return time.perf_counter() - begin


def main() -> None:
    torch.set_num_threads(1)
    peer, answers = LerobotReader(), sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not stand between the answers
    for line in sys.stdin:
        asked = json.loads(line)
        answer = getattr(peer, asked.pop("do"))(**asked)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
