"""Runs inside lerobot's own environment: open a dataset, read every frame, write what was read as one .npz.

usage: python read_with_lerobot.py <dataset> <out.npz> <chunk>. It knows nothing of our code.
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


def decode(path, timestamps, tolerance_s, backend=None):
    """Frames at `timestamps` as (N, 3, H, W) float in 0-1; torchvision's own reader is gone."""
    with av.open(str(path)) as container:
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    times = np.array([time for time, _ in frames])
    chosen = []
    for wanted in timestamps:
        nearest = int(np.abs(times - wanted).argmin())
        assert abs(times[nearest] - wanted) <= tolerance_s, (path, wanted, times[nearest])
        chosen.append(torch.from_numpy(frames[nearest][1]).permute(2, 0, 1) / 255)
    return torch.stack(chosen)


module.decode_video_frames = decode


def main(root: str, out: str, chunk: int) -> None:
    meta = module.LeRobotDatasetMetadata("ours/dataset", root=root)
    steps = [index / meta.fps for index in range(chunk)]
    dataset = module.LeRobotDataset("ours/dataset", root=root, delta_timestamps={"action": steps})
    read: dict[str, list] = {}
    for index in range(len(dataset)):
        for key, value in dataset[index].items():
            value = value.numpy() if isinstance(value, torch.Tensor) else value
            if key.startswith("observation.images."):
                value = np.rint(value.transpose(1, 2, 0) * 255).astype(np.uint8)
            read.setdefault(key, []).append(value)
    arrays = {
        key: np.stack(values) if isinstance(values[0], np.ndarray) else np.array(values) for key, values in read.items()
    }
    pooled = {f"stats/{key}/{name}": value for key, part in meta.stats.items() for name, value in part.items()}
    np.savez(out, fps=meta.fps, episodes=meta.total_episodes, **arrays, **pooled)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
