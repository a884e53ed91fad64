"""Runs inside lerobot 0.4's own environment: open a v3.0 dataset and write what was read as .npz; or write one.

usage: python read_with_lerobot_v30.py read <dataset> <out.npz> <chunk> [<first row> <row after the last>]
       python read_with_lerobot_v30.py write <dataset> <arrays.npz>
It knows nothing of our code.
"""

import sys

import numpy as np
import torch

# torchvision on CPU torch asks for two operators of its compiled half; nobody calls them here.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import av  # noqa: E402
import lerobot.datasets.lerobot_dataset as module  # noqa: E402

_decoded: dict[str, tuple[np.ndarray, list]] = {}


def decode(path, timestamps, tolerance_s, backend=None):
    """Frames at `timestamps` as (N, 3, H, W) float in 0-1; torchvision's own reader is gone. Files are decoded once."""
    if str(path) not in _decoded:
        with av.open(str(path)) as container:
            frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        _decoded[str(path)] = np.array([time for time, _ in frames]), [image for _, image in frames]
    times, images = _decoded[str(path)]
    chosen = []
    for wanted in timestamps:
        nearest = int(np.abs(times - wanted).argmin())
        assert abs(times[nearest] - wanted) <= tolerance_s, (path, wanted, times[nearest])
        chosen.append(torch.from_numpy(images[nearest]).permute(2, 0, 1) / 255)
    return torch.stack(chosen)


module.decode_video_frames = decode


def read(root: str, out: str, chunk: int, first: int = 0, end: int | None = None) -> None:
    meta = module.LeRobotDatasetMetadata("ours/dataset", root=root)
    ahead, back = [index / meta.fps for index in range(chunk)], [-1 / meta.fps, 0.0]
    windows = {"action": ahead, "observation.state": back} | dict.fromkeys(meta.video_keys, back)
    dataset = module.LeRobotDataset("ours/dataset", root=root, delta_timestamps=windows)
    found: dict[str, list] = {}
    for index in range(first, len(dataset) if end is None else end):
        for key, value in dataset[index].items():
            value = value.numpy() if isinstance(value, torch.Tensor) else value
            if key in meta.camera_keys:
                value = np.rint(np.moveaxis(value, -3, -1) * 255).astype(np.uint8)
            found.setdefault(key, []).append(value)
    arrays = {
        key: np.stack(values) if isinstance(values[0], np.ndarray) else np.array(values)
        for key, values in found.items()
    }
    pooled = {f"stats/{key}/{name}": value for key, part in meta.stats.items() for name, value in part.items()}
    np.savez(out, fps=meta.fps, episodes=meta.total_episodes, **arrays, **pooled)  # type: ignore[arg-type]


def write(root: str, arrays: str) -> None:
    """A dataset of lerobot's own: state, action and pictures of each episode e from <e>/state, <e>/action, <e>/top."""
    with np.load(arrays) as given:
        data = dict(given)
    height, width = data["0/top"].shape[1:3]
    vector = {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]}
    names = ["height", "width", "channels"]
    features = {
        "observation.state": vector,
        "action": vector,
        "observation.images.top": {"dtype": "video", "shape": (height, width, 3), "names": names},
    }
    dataset = module.LeRobotDataset.create("theirs/dataset", 20, features, root=root, robot_type="toy")
    for episode in range(sum(key.endswith("/state") for key in data)):
        parts = [data[f"{episode}/{name}"] for name in ("state", "action", "top")]
        for state, action, top in zip(*parts, strict=True):
            frame = {"observation.state": state, "action": action, "observation.images.top": top}
            dataset.add_frame(frame | {"task": f"task {episode % 2}"})
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    if sys.argv[1] == "read":
        read(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
    else:
        write(sys.argv[2], sys.argv[3])
