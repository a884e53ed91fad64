"""Checkpoints of a training run: folders `<root>/checkpoint-<step>/`, written whole or not at all, while training
goes on.

    00000-of-00002.safetensors   what process 0 of 2 holds: runs of elements of tensors laid flat, "<kind>/<parameter>";
                                 the file's header says at which element of its tensor each run begins
    state.json                   step, data position, seed, configuration, and the size of every file

Kinds: model, ema, exp_avg, exp_avg_sq, step. Frozen weights are those that the run began with, and are not here. Every
engine holds its state in such runs (whole tensors, rows of them, or ZeRO's stretches), so that any engine over any
number of processes goes on from what another one left. A folder appears under its name by one rename, after every byte
is on the disk; a kill leaves at most a `.partial` one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prts_core.config.identity import identity
from prts_core.config.train import TrainConfig
from prts_core.io.errors import CheckpointError, DataError
from prts_core.io.files import digest_value, explain_os_errors, read_json, write_json
from prts_core.io.tensors import save_tensors
from prts_core.training.parallel import ParallelContext

log = logging.getLogger(__name__)
FORMAT = 2
NAME = re.compile(r"checkpoint-(\d+)")
STARTS = "starts"  # in a file's header: JSON, tensor -> the first element that stands here


@dataclass(frozen=True)
class State:
    """What a checkpoint says beside tensors. step: finished optimiser steps. cursor: position in the data (and so the
    mixture's state) of the next batch; one run's plain JSON. config: the TrainConfig's identity
    (prts_core.config.identity), which a resumed run must share."""

    step: int
    cursor: dict[str, Any]
    seed: int = 0
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FlatShard:
    """A run of one tensor's elements, as this process holds it: elements start .. start + n - 1 of `size`, in order.

    values: (n,), a view of the engine's own memory. owner: whether it is this process that writes the run, of those
    that hold it."""

    values: Tensor
    start: int
    size: int
    owner: bool = True


class ShardFiles:
    """The tensors of a folder, by any run of their elements. Only the headers are read when it is made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: dict[str, list[tuple[int, int, Path]]] = {}  # tensor -> (first element, one past the last, file)
        for path in sorted(folder.glob("*.safetensors")):
            with _opened(path) as file:
                starts = json.loads((file.metadata() or {}).get(STARTS, "{}"))
                for name in file.keys():  # noqa: SIM118
                    length, begin = file.get_slice(name).get_shape()[0], int(starts.get(name, 0))
                    self.runs.setdefault(name, []).append((begin, begin + length, path))

    def fill(self, shards: Mapping[str, FlatShard]) -> None:
        """Copy into every shard what the files have of it; CheckpointError where they lack any of it."""
        wanted: dict[Path, list[tuple[str, FlatShard, int, int, int]]] = {}
        for name, shard in shards.items():
            end, covered = shard.start + len(shard.values), 0
            for first, last, path in self.runs.get(name, []):
                low, high = max(first, shard.start), min(last, end)
                if low < high:
                    wanted.setdefault(path, []).append((name, shard, first, low, high))
                    covered += high - low
            if covered != len(shard.values):
                raise CheckpointError(
                    "A checkpoint lacks what trains",
                    file=self.folder,
                    field=name,
                    found=f"{covered} of {len(shard.values)} elements",
                    expected="all of them",
                    cure="train the same groups as before (train.freeze, train.lora), or start anew from the weights",
                )
        with torch.no_grad():
            for path, jobs in wanted.items():
                with _opened(path) as file:
                    for name, shard, first, low, high in jobs:
                        part = file.get_slice(name)[low - first : high - first]
                        shard.values[low - shard.start : high - shard.start].copy_(part)

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor, on the CPU."""
        size, dtype = int(np.prod(shape, dtype=np.int64)), torch.float32
        if self.runs.get(name):
            with _opened(self.runs[name][0][2]) as file:
                dtype = file.get_slice(name)[:0].dtype
        values = torch.empty(size, dtype=dtype)
        self.fill({name: FlatShard(values, 0, size)})
        return values.reshape(shape)


class Saver:
    """Writes checkpoints beside the training loop, which waits only where it would change what is being copied.

    The loop calls `start`, and `staged` before it changes anything; `wait` before it needs the files. On a GPU the copy
    to the host runs beside the next step's arithmetic. Every process must call every method.
    """

    def __init__(self, root: Path, parallel: ParallelContext, keep: int = 2) -> None:
        self.root, self.parallel, self.keep = root, parallel, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[None] | None = None
        self._copied = threading.Event()
        self._buffers: dict[str, Tensor] = {}  # on the host, kept from one checkpoint to the next

    def start(self, state: State, shards: Mapping[str, FlatShard]) -> None:
        """Begin `checkpoint-<state.step>`, after an earlier one is on the disk."""
        self.wait()
        self._copied.clear()
        mine = {name: shard for name, shard in shards.items() if shard.owner}
        ready = torch.cuda.Event() if self.parallel.device.type == "cuda" else None
        if ready is not None:
            ready.record()
        self._work = self._thread.submit(self._save, state, mine, ready)

    def staged(self) -> None:
        """Until the copy is made: then the weights may change. Raises what has kept a checkpoint from the disk."""
        if self._work is not None:
            self._copied.wait()
            if self._work.done():
                self.wait()

    def wait(self) -> None:
        """Until the checkpoint is on the disk; raises what kept it from getting there."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def close(self) -> None:
        """Wait, and end the thread. What kept a checkpoint from the disk is logged: something else is being raised."""
        self._thread.shutdown(wait=True)
        error = None if self._work is None else self._work.exception()
        if error is not None:
            log.warning("a checkpoint did not reach the disk: %s", error)

    def _save(self, state: State, shards: Mapping[str, FlatShard], ready: Any) -> None:
        values: dict[str, Tensor] = {}
        try:
            _together(lambda: values.update(self._copy(shards, ready)), self.parallel, self.root)
        finally:
            self._copied.set()
        starts = {name: shard.start for name, shard in shards.items()}
        write_folder(self.root, f"checkpoint-{state.step}", values, starts, self.parallel, asdict(state))
        if self.parallel.rank == 0:
            for old in _found(self.root)[max(1, self.keep) :]:
                shutil.rmtree(old)

    def _copy(self, shards: Mapping[str, FlatShard], ready: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            if ready is None:
                for name, shard in shards.items():
                    self._buffer(name, shard.values).copy_(shard.values)
            else:
                stream = torch.cuda.Stream(self.parallel.device)
                stream.wait_event(ready)
                with torch.cuda.stream(stream):
                    for name, shard in shards.items():
                        self._buffer(name, shard.values).copy_(shard.values, non_blocking=True)
                stream.synchronize()
        return {name: self._buffers[name] for name in shards}

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        made = self._buffers.get(name)
        if made is None or made.shape != like.shape or made.dtype != like.dtype:
            made = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[name] = made
        return made


def write_folder(
    root: Path,
    name: str,
    values: Mapping[str, Tensor],
    starts: Mapping[str, int],
    parallel: ParallelContext,
    about: Mapping[str, Any],
) -> Path:
    """Write `<root>/<name>` from what each process holds (flat tensors, and where each begins); every process must
    call, from one thread at a time. An error in one process is an error in all of them."""
    final, partial = root / name, root / f".{name}.partial"
    own = f"{parallel.rank:05d}-of-{parallel.world:05d}.safetensors"

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f".{NAME.sub('checkpoint-*', name)}.partial"):  # of a kill
            shutil.rmtree(left)
        partial.mkdir()

    def write() -> None:
        save_tensors(partial / own, values, {STARTS: json.dumps({k: starts[k] for k in values})})

    def finish() -> None:
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        digest = {"config_digest": digest_value(about["config"])} if "config" in about else {}
        write_json(partial / "state.json", {"format": FORMAT, **about, **digest, "files": files})
        _sync(partial)
        if final.exists():  # a torn one that was ignored
            shutil.rmtree(final)
        partial.rename(final)
        _sync(root)

    with explain_os_errors(root):
        for work, everybody in ((begin, False), (write, True), (finish, False)):
            _together(work if everybody or parallel.rank == 0 else lambda: None, parallel, root)
    return final


def _together(work: Callable[[], None], parallel: ParallelContext, root: Path) -> None:
    """Do this process's part and wait for the others'."""
    error: Exception | None = None
    try:
        work()
    except Exception as err:  # noqa: BLE001 - raised below, after the others know
        error = err
    failed = parallel.gather(np.array([int(error is not None)]), parallel.disk)[:, 0]
    if error is not None:
        raise error
    if failed.any():
        raise CheckpointError(
            "Another process could not write its part of a checkpoint",
            file=root,
            found=f"process {int(failed.argmax())} of {parallel.world}",
            cure="its own message says why",
        )


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
    return State(about["step"], about["cursor"], about["seed"], about["config"])


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


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as err:
        raise CheckpointError(
            "A checkpoint's file cannot be read", file=path, found=str(err), cure="resume from another one"
        ) from err


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
