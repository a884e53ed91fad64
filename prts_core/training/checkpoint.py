"""Checkpoints of a training run: folders `<root>/checkpoint-<step>/`, written whole or not at all.

In each folder model*.safetensors weights average*.safetensors averaged weights of what trains optimizer*.safetensors
"<parameter>.<state>" rng.safetensors torch's generators (dropout; noise needs none) state.json step, data position,
mixture state, configuration, and the size of every file A folder appears under its name by one rename, after every byte
is on the disk; a kill leaves at most a `.partial` one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prts_core.config.identity import identity
from prts_core.config.train import TrainConfig
from prts_core.io.errors import CheckpointError, DataError
from prts_core.io.files import digest_value, explain_os_errors, read_json, write_json
from prts_core.io.tensors import load_sharded, load_weights, save_sharded

log = logging.getLogger(__name__)
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")
PARTS = ("model", "average", "optimizer", "rng")


@dataclass(frozen=True)
class State:
    """What a checkpoint says beside tensors. step: finished optimiser steps. cursor: position in the data (and so the
    mixture's state) of the next batch; one run's plain JSON. config: the TrainConfig's identity
    (prts_core.config.identity), which a resumed run must share."""

    step: int
    cursor: dict[str, Any]
    seed: int = 0
    world: int = 1
    config: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    root: Path,
    state: State,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    keep: int = 2,
    shard_mb: int = 5000,
) -> Path:
    """Write `checkpoint-<state.step>` from named tensors a part (PARTS), then remove the oldest beyond `keep`."""
    final = root / f"checkpoint-{state.step}"
    partial = root / f".{final.name}.partial"
    with explain_os_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(".checkpoint-*.partial"):  # of a kill
            shutil.rmtree(left)
        for name, tensors in parts.items():
            if tensors:
                save_sharded(partial, tensors, name, shard_mb * 1_000_000)
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        about = {"format": FORMAT, **asdict(state), "config_digest": digest_value(state.config), "files": files}
        write_json(partial / "state.json", about)
        _sync(partial)
        if final.exists():  # a torn one that was ignored
            shutil.rmtree(final)
        partial.rename(final)
        _sync(root)
        for old in _found(root)[max(1, keep) :]:
            shutil.rmtree(old)
    return final


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`, or none. Torn ones are ignored with a note in the log."""
    for folder in _found(root):
        fault = _fault(folder)
        if fault is None:
            return folder
        log.warning("checkpoint %s is ignored: %s", folder, fault)
    return None


def read_state(folder: Path) -> State:
    """The state of a whole checkpoint; CheckpointError for one that is not."""
    fault = _fault(folder)
    if fault is not None:
        raise CheckpointError(
            "A checkpoint is not whole", file=folder, found=fault, cure="resume from another one, or start anew"
        )
    about = read_json(folder / "state.json")
    return State(about["step"], about["cursor"], about["seed"], about["world"], about["config"])


def check_same_run(state: State, config: TrainConfig, seed: int, where: Path) -> None:
    """CheckpointError, field by field, if the checkpoint is of another recipe: going on would be neither run."""
    own = identity(config)
    differ = {
        k: (state.config.get(k), own.get(k))
        for k in sorted(own.keys() | state.config.keys())
        if state.config.get(k) != own.get(k)
    }
    if seed != state.seed:
        differ["seed"] = (state.seed, seed)
    if differ:
        raise CheckpointError(
            "A checkpoint is of another training configuration",
            file=where,
            field=", ".join(differ),
            found="; ".join(f"{k}: {then!r} then, {now!r} now" for k, (then, now) in differ.items()),
            expected="the same recipe",
            cure="restore these values, or train in another folder (start from its weights instead)",
        )


def load_part(folder: Path, name: str) -> dict[str, Tensor]:
    """All tensors of one part; empty where the part was empty."""
    if not any((folder / f"{name}.safetensors{end}").exists() for end in ("", ".index.json")):
        return {}
    return dict(load_sharded(folder, name))


def generators() -> dict[str, Tensor]:
    """States of torch's global generators, which dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_generators(states: Mapping[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """An optimiser's states as "<parameter>.<state>"."""
    return {
        f"{names[p]}.{key}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state[p].items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor], where: Path
) -> None:
    """Restore in place. CheckpointError if the checkpoint was of an optimiser over other parameters."""
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, state = key.rpartition(".")
        states.setdefault(name, {})[state] = value
    extra = sorted(states.keys() - set(order))  # none missing counts: what got no gradient yet has no state
    if extra:
        raise CheckpointError(
            "The optimiser's states do not fit what trains",
            file=where,
            found=f"extra {len(extra)}: {extra[:20]}",
            cure="train the same groups as before (train.freeze, train.lora), or start anew from the weights",
        )
    kept = optimizer.state_dict()
    moments = {index: states[name] for index, name in enumerate(order) if name in states}
    optimizer.load_state_dict({"state": moments, "param_groups": kept["param_groups"]})


def load_training(
    folder: Path,
    model: nn.Module,
    ema: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
) -> State:
    """Restore weights, averaged weights, optimiser and generators in place; returns what else the checkpoint says."""
    state = read_state(folder)
    load_weights(model, load_part(folder, "model"), folder)
    for key, value in load_part(folder, "average").items():
        ema[key].copy_(value)
    load_optimizer(optimizer, names, load_part(folder, "optimizer"), folder)
    restore_generators(load_part(folder, "rng"))
    return state


def _found(root: Path) -> list[Path]:
    """Checkpoint folders, newest first, whole or not."""
    if not root.is_dir():
        return []
    numbered = [(int(m.group(1)), p) for p in root.iterdir() if (m := NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def _fault(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or none."""
    try:
        about = read_json(folder / "state.json")
    except DataError as err:
        return str(err)
    checks: dict[str, Callable[[Any], bool]] = {
        "format": lambda v: v == FORMAT,
        "step": lambda v: isinstance(v, int),
        "cursor": lambda v: isinstance(v, dict),
        "seed": lambda v: isinstance(v, int),
        "world": lambda v: isinstance(v, int),
        "config": lambda v: isinstance(v, dict),
        "files": lambda v: isinstance(v, dict) and len(v) > 0,
    }
    if not isinstance(about, dict):
        return "state.json is no mapping"
    for key, good in checks.items():
        if not good(about.get(key)):
            return f"state.json: {key} is {about.get(key)!r}"
    if digest_value(about["config"]) != about.get("config_digest"):
        return "state.json: the configuration does not fit its digest"
    for name, size in about["files"].items():
        path = folder / Path(name).name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or not {size} bytes long"
    return None


def _sync(folder: Path) -> None:
    """Flush a folder's entries (its files were flushed when they were written)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
