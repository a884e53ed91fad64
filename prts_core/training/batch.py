"""Samples of a mixture as training batches: a pure function of (data, seed, position), so that resume is exact.

A `SampleSource` hands out items, whoever fills it. Imports torch and numpy only.

Shape legend: S samples, T chunk length, A action width.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prts_core.models.tokens import ON_HOST, Tokens, changed
from prts_core.text.collate import collate, packed, patches
from prts_core.text.sequence import TokenSequence
from prts_core.training.counts import count_items
from prts_core.training.packing import pack
from prts_core.training.stream import MixtureSampler, SampleIndex

Cursor = dict[str, int]


@dataclass(frozen=True)
class TrainingSample:
    """One sample, ready to be laid into a batch. images: (H, W, 3) uint8 each. chunk (T, A) normalised float32 and
    is_pad (T,) bool, or none where there is no action to imitate. steps_to_go: rows to the goal; -1: not reached.
    row_s: seconds a row."""

    sequence: TokenSequence
    images: Sequence[np.ndarray]
    chunk: np.ndarray | None = None
    is_pad: np.ndarray | None = None
    steps_to_go: int = 0
    task_id: int = 0
    row_s: float = 0.0


class SampleSource(Protocol):
    """A dataset as training sees it. name: its repo_id, as metrics name it. tasks: task ids of its instructions, which
    the contrastive loss tells apart; empty where there are no actions."""

    name: str

    @property
    def tasks(self) -> frozenset[int]: ...

    def __len__(self) -> int: ...

    def lengths(self, *, response: bool, contrastive: bool) -> np.ndarray:
        """(rows,) integers: at least the tokens of each row's sample."""
        ...

    def items(
        self, rows: Sequence[int], rngs: Sequence[np.random.Generator], *, response: bool, contrastive: bool
    ) -> list[TrainingSample]:
        """Samples of a batch, made together. rngs: of each its own, for augmentation and whatever else is drawn."""
        ...


class OneByOne:
    """A `SampleSource` whose samples are made one at a time, by `item`."""

    def item(self, row: int, rng: np.random.Generator, *, response: bool, contrastive: bool) -> TrainingSample:
        raise NotImplementedError

    def items(
        self, rows: Sequence[int], rngs: Sequence[np.random.Generator], *, response: bool, contrastive: bool
    ) -> list[TrainingSample]:
        return [
            self.item(row, rng, response=response, contrastive=contrastive) for row, rng in zip(rows, rngs, strict=True)
        ]


@dataclass
class Batch:
    """tokens: see Tokens. actions, dof_mask (S, T, Amax) float32; is_pad (S, T) and has_action (S,) bool; steps_to_go
    and task_id (S,) int64; row_s (S,) float32; at (S,) int64: each sample's place in the joint batch of `joint` samples
    over all processes. acting, contrastive: indices (int64) of the samples that have an action, and of those that have
    the contrastive parts. counts: see counts.count_items; it stays on the CPU.

    names: datasets, indexed by tokens.dataset. ids: "dataset:row" of each sample. begin, cursor: the position in the
    data before and after this batch. made_s: seconds that one loader took to make it.
    """

    tokens: Tokens
    actions: Tensor
    dof_mask: Tensor
    is_pad: Tensor
    has_action: Tensor
    steps_to_go: Tensor
    row_s: Tensor
    task_id: Tensor
    at: Tensor
    acting: Tensor
    contrastive: Tensor
    counts: np.ndarray
    joint: int
    names: list[str]
    ids: list[str]
    begin: Cursor
    cursor: Cursor
    made_s: float = 0.0

    @staticmethod
    def counted(tokens: Tokens, has_action: Tensor, task_id: Tensor, names: list[str], **parts: Any) -> Batch:
        """A batch that lies on the CPU, with the fields that follow from the others."""
        contrastive = np.flatnonzero(tokens.state_action_index.numpy() >= 0)
        acting = has_action.numpy()
        counts = count_items(tokens, acting, contrastive, task_id.numpy(), len(names))
        return Batch(
            tokens,
            has_action=has_action,
            task_id=task_id,
            names=names,
            acting=torch.from_numpy(np.flatnonzero(acting)),
            contrastive=torch.from_numpy(contrastive),
            counts=counts,
            **parts,
        )

    def to(self, device: torch.device | str) -> Batch:
        return changed(self, lambda tensor: tensor.to(device, non_blocking=True), ON_HOST)

    def pin_memory(self) -> Batch:
        """In memory from which a GPU copies while the host goes on; torch's DataLoader asks for it."""
        return changed(self, lambda tensor: tensor.pin_memory(), ON_HOST)


@dataclass(frozen=True)
class BatchPlan:
    """Which samples a batch is made of: rows of draws (one draw a row when unpacked), those of all processes."""

    rows: list[list[SampleIndex]]
    contrastive: bool
    begin: Cursor
    cursor: Cursor


class BatchSource:
    """Batches of a mixture over `world` processes; this one gets every `world`-th row from `rank` on.

    batch_size: rows of a joint batch: samples, or packed rows of `pack_length` tokens. response: FAST tokens stand in
    the answer. contrastive: the contrastive parts stand in every n-th batch; 0: in none. pack_window: samples that are
    packed at a time; the order within a window changes, nothing else.
    """

    def __init__(
        self,
        sources: Sequence[SampleSource],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        *,
        chunk_length: int,
        max_action_dim: int,
        patch: int,
        merge: int,
        response: bool,
        contrastive: int,
        pack_length: int = 0,
        pack_window: int = 2048,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sources, self.batch_size, self.seed, self.rank, self.world = sources, batch_size, seed, rank, world
        self.chunk_length, self.max_action_dim, self.patch, self.merge = chunk_length, max_action_dim, patch, merge
        self.response, self.contrastive = response, contrastive
        self.pack_length, self.pack_window = pack_length, pack_window
        self.stream = MixtureSampler([len(s) for s in sources], weights, seed)
        if pack_length and contrastive > 1:
            raise ValueError(
                f"packed rows hold the contrastive parts always or never; found every {contrastive}th batch"
            )
        self._lengths = (
            [s.lengths(response=response, contrastive=contrastive > 0) for s in sources] if pack_length else []
        )

    def start(self) -> Cursor:
        return {"window": 0, "row": 0} if self.pack_length else {"sample": 0}

    def plans(self, cursor: Cursor) -> Iterator[BatchPlan]:
        """What batches from `cursor` on are made of, without end."""
        return self._packed_plans(cursor) if self.pack_length else self._plans(cursor)

    def _plans(self, cursor: Cursor) -> Iterator[BatchPlan]:
        number = cursor["sample"]
        while True:
            rows = [[self.stream.draw(number + i)] for i in range(self.batch_size)]
            contrastive = self.contrastive > 0 and number // self.batch_size % self.contrastive == 0
            yield BatchPlan(rows, contrastive, {"sample": number}, {"sample": number + self.batch_size})
            number += self.batch_size

    def _packed_plans(self, cursor: Cursor) -> Iterator[BatchPlan]:
        window, row = cursor["window"], cursor["row"]
        rows = self.window(window)
        while True:
            begin = {"window": window, "row": row}
            chosen: list[list[SampleIndex]] = []
            while len(chosen) < self.batch_size:
                if row == len(rows):
                    window, row = window + 1, 0
                    rows = self.window(window)
                chosen.append(rows[row])
                row += 1
            yield BatchPlan(chosen, self.contrastive > 0, begin, {"window": window, "row": row})

    def window(self, index: int) -> list[list[SampleIndex]]:
        """The packed rows of window `index`."""
        draws = [self.stream.draw(index * self.pack_window + i) for i in range(self.pack_window)]
        lengths = [int(self._lengths[d.source][d.row]) for d in draws]
        return [[draws[i] for i in row] for row in pack(lengths, self.pack_length)]

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """This process's part of a planned batch."""
        began = time.monotonic()
        rows = plan.rows[self.rank :: self.world]
        draws = [d for row in rows for d in row]
        items = self._items(draws, plan.contrastive)
        sequences = [item.sequence for item in items]
        place = None
        if self.pack_length:
            sizes = iter(len(s) for s in sequences)
            place = packed([[next(sizes) for _ in row] for row in rows], self.pack_length)
        pixels, grid = patches([image for item in items for image in item.images], self.patch, self.merge)
        tokens = collate(sequences, pixels, grid, place=place, dataset=np.array([d.source for d in draws]))
        actions, dof_mask = np.zeros((2, len(items), self.chunk_length, self.max_action_dim), np.float32)
        is_pad = np.zeros((len(items), self.chunk_length), bool)
        for i, item in enumerate(items):
            if item.chunk is not None and item.is_pad is not None:
                width = item.chunk.shape[1]
                if width > self.max_action_dim or len(item.chunk) != self.chunk_length:
                    raise ValueError(
                        f"{self.sources[draws[i].source].name} has chunks of {item.chunk.shape}, the model takes "
                        f"{self.chunk_length} steps of at most {self.max_action_dim}: raise max_action_dim"
                    )
                (actions[i], dof_mask[i]), is_pad[i] = pad_chunk(item.chunk, self.max_action_dim), item.is_pad
        counts = np.cumsum([0, *(len(row) for row in plan.rows)])
        at = [
            int(counts[r]) + i for r in range(self.rank, len(plan.rows), self.world) for i in range(len(plan.rows[r]))
        ]
        names = [s.name for s in self.sources]
        return Batch.counted(
            tokens,
            torch.tensor([item.chunk is not None for item in items]),
            torch.tensor([item.task_id for item in items]),
            names,
            actions=torch.from_numpy(actions),
            dof_mask=torch.from_numpy(dof_mask),
            is_pad=torch.from_numpy(is_pad),
            steps_to_go=torch.tensor([item.steps_to_go for item in items]),
            row_s=torch.tensor([item.row_s for item in items]),
            at=torch.tensor(at),
            joint=int(counts[-1]),
            ids=[f"{names[d.source]}:{d.row}" for d in draws],
            begin=plan.begin,
            cursor=plan.cursor,
            made_s=time.monotonic() - began,
        )

    def _items(self, draws: Sequence[SampleIndex], contrastive: bool) -> list[TrainingSample]:
        """The samples that are drawn, each source's together."""
        made: dict[int, TrainingSample] = {}
        for number, source in enumerate(self.sources):
            own = [i for i, d in enumerate(draws) if d.source == number]
            rngs = [np.random.default_rng([self.seed, 3, draws[i].number]) for i in own]
            rows = [draws[i].row for i in own]
            if own:
                found = source.items(rows, rngs, response=self.response, contrastive=contrastive)
                made.update(zip(own, found, strict=True))
        return [made[i] for i in range(len(draws))]

    def batches(self, cursor: Cursor, workers: int = 0) -> Iterator[Batch]:
        """Batches from `cursor` on, made ahead: by one thread, or by that many loader processes; the same either
        way."""
        if workers:
            loader: Any = torch.utils.data.DataLoader(
                self,  # type: ignore[arg-type]
                sampler=_Plans(self, cursor),
                batch_size=None,
                num_workers=workers,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # a seed drawn from torch's own would shift dropout after a resume
                worker_init_fn=_outlive_stop_signals,
            )
            yield from loader
        # The thread gets no OpenMP team of its own: two teams spin against each other and cost a third of a step.
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as ahead:
            plans = self.plans(cursor)
            waiting: Future[Batch] = ahead.submit(self.__getitem__, next(plans))
            while True:
                batch = waiting.result()
                waiting = ahead.submit(self.__getitem__, next(plans))
                yield batch


def _outlive_stop_signals(worker: int) -> None:
    """A stop signal to the whole process group must leave the trainer its data until the checkpoint is written."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _Plans:
    """The plans from a cursor on, as the sampler a DataLoader wants."""

    def __init__(self, source: BatchSource, cursor: Cursor) -> None:
        self.source, self.cursor = source, cursor

    def __iter__(self) -> Iterator[Any]:
        return self.source.plans(self.cursor)


def pad_chunk(chunk: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(T, A) -> zero-padded (T, width) and the mask of real dimensions, 1 or 0, both float32."""
    padded, mask = np.zeros((2, len(chunk), width), np.float32)
    padded[:, : chunk.shape[1]], mask[:, : chunk.shape[1]] = chunk, 1.0
    return padded, mask


def chunk_windows(actions: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """One episode (T_ep, A) -> windows (T_ep, length, A), clamped to the last row, and the flags of clamped steps."""
    index = np.arange(len(actions))[:, None] + np.arange(length)[None]
    return actions[index.clip(max=len(actions) - 1)], index >= len(actions)
