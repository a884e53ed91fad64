"""Runs inside lerobot's own environment: read a stats.json as lerobot does and normalise with it, beside the statistics
that lerobot pools from the dataset itself.

usage: python normalize_with_lerobot.py <folder with meta/stats.json> <dataset> <out.npz>. It knows nothing of our code.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

# torchvision on CPU torch asks for two operators of its compiled half; nobody calls them here.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import lerobot  # noqa: E402
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature  # noqa: E402
from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata  # noqa: E402
from lerobot.datasets.utils import load_stats  # noqa: E402

# lerobot.policies imports every policy and with them a command-line library; the normaliser is one file of it.
_file = Path(lerobot.__file__).parent / "policies" / "normalize.py"
_spec = importlib.util.spec_from_file_location("normalize", _file)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)


def main(folder: str, root: str, out: str) -> None:
    stats = load_stats(Path(folder))
    meta = LeRobotDatasetMetadata("ours/dataset", root=root)
    kinds = {"observation.state": FeatureType.STATE, "action": FeatureType.ACTION}
    kinds |= dict.fromkeys(meta.camera_keys, FeatureType.VISUAL)
    features = {}
    for key, kind in kinds.items():
        shape = tuple(meta.features[key]["shape"])
        features[key] = PolicyFeature(kind, (shape[2], *shape[:2]) if kind is FeatureType.VISUAL else shape)
    batch = {key: torch.full((2, *feature.shape), 0.25) for key, feature in features.items()}
    made = {}
    for name in ("MEAN_STD", "MIN_MAX"):
        modes = dict.fromkeys(set(kinds.values()), NormalizationMode[name])
        for key, value in _module.Normalize(features, modes, stats)(batch).items():
            made[f"{name}/{key}"] = value.numpy()
    pooled = {f"pooled/{key}/{name}": value for key in kinds for name, value in meta.stats[key].items()}
    np.savez(out, **made, **pooled)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
