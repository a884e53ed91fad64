"""Run by tensorflow_datasets' own environment: write a small RLDS dataset, and what TensorFlow reads in it as arrays.

    python write_with_tfds.py FOLDER ARRAYS.npz

Features are those of Open X datasets (bridge, fractal, kuka): JPEG and PNG pictures, depth, tensors plain and packed.
"""

from __future__ import annotations

import sys

import numpy as np
import tensorflow_datasets as tfds

F = tfds.features
LENGTHS = {"train": (5, 7, 3), "val": (4,)}


def numbers(seed: int, rows: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "state": rng.normal(size=(rows, 7)).astype(np.float32),
        "action": rng.normal(size=(rows, 7)).astype(np.float32),
        "vector": rng.normal(size=(rows, 3)).astype(np.float32),
        "joints": rng.normal(size=(rows, 2)),
        "depth": rng.integers(0, 65536, (rows, 16, 24, 1), dtype=np.uint16),
    }


def pictures(seed: int, rows: int) -> np.ndarray:
    y, x, t = np.ogrid[0:32, 0:48, 0:rows]
    red, green, blue = np.broadcast_arrays(5 * x + 9 * t, 5 * y + 40 * seed, 30 * t)
    return (np.stack([red, green, blue], -1) % 200).astype(np.uint8).transpose(2, 0, 1, 3)


STEP = {
    "observation": {
        "image_0": F.Image(shape=(32, 48, 3), dtype=np.uint8, encoding_format="jpeg"),
        "image_1": F.Image(shape=(None, None, 3), dtype=np.uint8, encoding_format="png"),
        "depth": F.Image(shape=(16, 24, 1), dtype=np.uint16, encoding_format="png"),
        "state": F.Tensor(shape=(7,), dtype=np.float32),
        "joints": F.Tensor(shape=(2,), dtype=np.float64),
        "zlib": F.Tensor(shape=(3,), dtype=np.float32, encoding=F.Encoding.ZLIB),
        "bytes": F.Tensor(shape=(3,), dtype=np.float32, encoding=F.Encoding.BYTES),
        "box": F.BBoxFeature(),
        "label": F.ClassLabel(names=["left", "right"]),
    },
    "action": F.Tensor(shape=(7,), dtype=np.float32),
    "open_gripper": np.bool_,
    "reward": F.Scalar(dtype=np.float32),
    "is_first": np.bool_,
    "is_last": F.Scalar(dtype=np.bool_),
    "language_instruction": F.Text(),
    "language_embedding": F.Tensor(shape=(16,), dtype=np.float32),
}


class Toy(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        metadata = {"file_path": F.Text(), "episode_id": np.int32}
        described = F.FeaturesDict({"steps": F.Dataset(F.FeaturesDict(STEP)), "episode_metadata": metadata})
        return tfds.core.DatasetInfo(builder=self, features=described)

    def _split_generators(self, manager):
        return {split: self._generate_examples(split) for split in LENGTHS}

    def _generate_examples(self, split):
        for number, rows in enumerate(LENGTHS[split]):
            seed = number + 10 * (split == "val")
            made, images = numbers(seed, rows), pictures(seed, rows)
            steps = [
                {
                    "observation": {
                        "image_0": images[t],
                        "image_1": images[t],
                        "depth": made["depth"][t],
                        "state": made["state"][t],
                        "joints": made["joints"][t],
                        "zlib": made["vector"][t],
                        "bytes": made["vector"][t],
                        "box": F.BBox(0.0, 0.25, 0.5, 0.75),
                        "label": "right" if t % 2 else "left",
                    },
                    "action": made["action"][t],
                    "open_gripper": bool(t % 2),
                    "reward": t / 2,
                    "is_first": t == 0,
                    "is_last": t == rows - 1,
                    "language_instruction": f"do number {seed}",
                    "language_embedding": np.full(16, seed, np.float32),
                }
                for t in range(rows)
            ]
            yield str(seed), {"steps": steps, "episode_metadata": {"file_path": f"/{seed}", "episode_id": seed}}


def flat(step: dict, prefix: str = "") -> dict:
    made = {}
    for key, value in step.items():
        made |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return made


def main(folder: str, arrays: str) -> None:
    builder = Toy(data_dir=folder)
    builder.download_and_prepare()
    read = {}
    for split in LENGTHS:
        for number, episode in enumerate(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False))):
            steps = [flat(step) for step in episode["steps"]]
            for key in steps[0]:
                read[f"{split}/{number}/{key}"] = np.stack([np.asarray(step[key]) for step in steps])
            read[f"{split}/{number}/language_instruction"] = read[f"{split}/{number}/language_instruction"].astype("S")
    np.savez(arrays, **read)


if __name__ == "__main__":
    main(*sys.argv[1:])
