"""Write a new dataset from a faulty one, put right where no judgement is needed; the faulty one is only read.

Mechanical: totals, numbering of episodes, rows and tasks, rows out of order, lengths on which table and videos agree,
splits, missing or stale episode statistics. Episodes that stay faulty are left out and listed in meta/quarantine.jsonl
with every reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from prts_core.contract import Contract
from prts_core.data.ahead import in_order
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.schema import TABLES, EpisodeRow, EpisodeStatsRow, Table, read_info, totals
from prts_core.data.lerobot_v21.seal import SEAL, compare, files_of, read_seal
from prts_core.data.lerobot_v21.tables import column_array, read_parquet
from prts_core.data.lerobot_v21.v30 import is_v30
from prts_core.data.lerobot_v21.writer import (
    counters,
    episode_stats,
    numbered,
    remove_strays,
    take_file,
    take_table,
    write_meta,
)
from prts_core.data.validation import check_episode
from prts_core.data.validation.episode import EpisodeSummary, numbers, summarize
from prts_core.data.validation.laws import law_subtasks
from prts_core.data.validation.metadata import Metadata
from prts_core.data.validation.report import Finding
from prts_core.data.validation.stored_statistics import NAMES, StatisticsProvenance, law_episode_stats
from prts_core.data.validation.tables import check_tables, frame_schema
from prts_core.data.validation.videos import Depth, law_video
from prts_core.io.errors import DataError
from prts_core.io.files import digest_file, read_json, write_jsonl
from prts_core.io.progress import track

QUARANTINE = "meta/quarantine.jsonl"
_WRITTEN = {"info.json", "episodes.jsonl", "tasks.jsonl", "episodes_stats.jsonl", "contract.json", "quarantine.jsonl"}
Link = Literal["copy", "hardlink"]


@dataclass
class _EpisodeRepair:
    """One line of episodes.jsonl and what became of it."""

    raw: dict[str, Any]
    row: EpisodeRow
    reasons: list[Finding] = field(default_factory=list)
    reordered: bool = False
    length: int = 0
    summary: EpisodeSummary | None = None


def repair(root: Path, output: Path, link: Link = "copy", video: Depth = "every", workers: int = 2) -> list[str]:
    """Write the dataset `root`, repaired, to the new folder `output`; return what was done, a sentence each.

    Everything is written beside `output` first and renamed at the end; a cut run goes on where it was. Raises DataError
    where nothing can be saved: info.json or episodes.jsonl unreadable, no sound episode, `output` there already.
    """
    if output.exists():
        raise DataError("The repaired dataset's folder exists already", file=output, cure="name a new folder")
    if root.is_dir() and is_v30(root):
        cure = f"copy it first: `prts convert --source lerobot_v30 --from {root} --to {root.name}_v21`"
        raise DataError("Only datasets of LeRobot v2.1 are repaired", file=root, cure=cure)
    if root.resolve() in (output.resolve(), *output.resolve().parents):
        raise DataError("A dataset is never repaired in place", file=output, cure="name a folder outside the dataset")
    return _Repair(root, output.with_name(f".{output.name}.repairing"), link, video, workers).run(output)


class _Repair:
    """One repair. done: what was done, a sentence each."""

    def __init__(self, root: Path, partial: Path, link: Link, depth: Depth, workers: int) -> None:
        self.root, self.output, self.link, self.depth, self.workers = root, partial, link, depth, workers
        self.done: list[str] = []
        self.info = read_info(root)
        # {index: sentence}, and {index there: index here}
        self.tasks: dict[int, str] = {}
        for _, row in self._lines("tasks", tell=True):
            self.tasks.setdefault(row.task_index, row.task)
        self.renumbered = renumbered(self.tasks)
        if any(index != new for index, new in self.renumbered.items()):
            self.done.append("meta/tasks.jsonl: numbered anew, each sentence once")
        found: dict[int, _EpisodeRepair] = {}
        for raw, row in self._lines("episodes", tell=True):
            if row.episode_index in found:
                number = row.episode_index
                self.done.append(f"meta/episodes.jsonl: episode {number} stands twice, the first line is kept")
            else:
                found[row.episode_index] = _EpisodeRepair(raw, row)
        if not found:
            raise DataError("No line of a dataset's episodes can be read", file=root / "meta" / "episodes.jsonl")
        self.episodes = [found[index] for index in sorted(found)]
        self.changed = self._changed()

    def run(self, output: Path) -> list[str]:
        inspected = in_order(self._inspect, self.episodes, self.workers, 4)
        for episode in track(inspected, total=len(self.episodes), what="inspecting episodes"):
            if episode.reasons:
                first = episode.reasons[0]
                self.done.append(f"episode {episode.row.episode_index} left out: {first.file}: {first.found}")
        self.kept = [episode for episode in self.episodes if not episode.reasons]
        if not self.kept:
            raise DataError(
                "No episode can be saved",
                file=self.root,
                found=self.done[-1] if self.done else "no episodes",
                cure="run `prts validate` on it: a fault that all share, such as a wrong fps in info.json, is for a "
                "person",
            )
        self._write()
        self.output.rename(output)
        return self.done

    # ---- reading ---------------------------------------------------------------------------------------------------
    def _lines(self, table: Table, tell: bool) -> list[tuple[dict[str, Any], Any]]:
        """(object, model) of the sound lines of meta/<table>.jsonl; what is none is left out. tell: of malformed
        objects, too."""
        name, out = f"{table}.jsonl", []
        path = self.root / "meta" / name
        for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
            try:
                raw = json.loads(line) if line.strip() else None
            except ValueError:  # no JSON, no UTF-8
                raw = str(line[:40])
            if isinstance(raw, dict):
                try:
                    row: Any = TABLES[table].model_validate(raw)
                    _ = row.spans if isinstance(row, EpisodeRow) else None
                    out.append((raw, row))
                except ValidationError:
                    if tell:
                        self.done.append(f"meta/{name}: a line left out: {raw!r:.80}")
            elif raw is not None:
                self.done.append(f"meta/{name}: line {number} is no JSON object, left out")
        return out

    def _changed(self) -> set[str]:
        """Files of a sealed dataset that are not as they were sealed: what they hold now is nobody's word."""
        try:
            sealed = read_seal(self.root)
        except DataError as err:
            self.done.append(f"{SEAL}: {err.problem}; the content is not verified")
            return set()
        changed = {d.path for d in compare(self.root, sealed) if d.fault != "unlisted"} if sealed else set()
        meta = sorted(path for path in changed if path.startswith("meta/"))
        self.done.extend(f"{path}: not as it was sealed, taken as it reads now" for path in meta)
        return changed

    def _inspect(self, episode: _EpisodeRepair) -> _EpisodeRepair:
        """Decide whether an episode can be kept, and with which rows."""
        info, index = self.info, episode.row.episode_index
        files = info.episode_files(index)
        found = [Finding("seal", f, "not as it was sealed", "the sealed content") for f in files if f in self.changed]
        try:
            table, episode.reordered = _in_order(read_parquet(self.root / files[0]))
            episode.length = table.num_rows
            table = numbered(table, _counters(index, 0, table.num_rows))
            if episode.length:
                episode.row = row = episode.row.model_copy(update={"length": table.num_rows})
                of_table, frame = check_episode(self.root, table, row, 0, info, self.tasks, self.depth)
                found += [*of_table, *check_tables([(files[0], frame)], frame_schema(info))]
                found += law_subtasks(Metadata(episodes=[row]), info)
                episode.summary = summarize(table, index, info, self.root / files[0])
                for key in info.video_keys:
                    found += law_video(self.root / info.video_file(row.episode_index, key), row, key, info, self.depth)
            else:
                found.append(Finding("tables", files[0], "no rows", "a row a frame"))
        except DataError as err:
            found.append(Finding("tables", files[0], err.problem, "a whole parquet file"))
        episode.reasons = [finding for finding in found if finding.severity == "error"]
        return episode

    # ---- writing ---------------------------------------------------------------------------------------------------
    def _write(self) -> None:
        info, kept = self.info, self.kept
        starts = np.cumsum([0] + [episode.length for episode in kept]).tolist()
        stored: dict[int, EpisodeStatsRow] = {r.episode_index: r for _, r in self._lines("episodes_stats", tell=False)}

        def take(job: tuple[int, _EpisodeRepair]) -> dict[str, Any]:
            new, episode = job
            old = episode.row.episode_index
            path = self.root / info.data_file(old)
            was = read_parquet(path)
            table, _ = _in_order(was)
            counted, indices = _counters(new, starts[new], table.num_rows), numbers(table, "task_index")
            if indices is not None:
                counted["task_index"] = np.array([self.renumbered[int(index)] for index in indices], np.int64)
            table = numbered(table, counted)
            take_table(path, self.output / info.data_file(new), was, table, self.link)
            for key in info.video_keys:
                take_file(self.root / info.video_file(old, key), self.output / info.video_file(new, key), self.link)
            return {"episode_index": new, "stats": self._stats(episode, table, stored.get(old), table is was)}

        jobs = list(enumerate(kept))
        stats = list(track(in_order(take, jobs, self.workers, 4), total=len(jobs), what="writing episodes"))
        remove_strays(self.output, [file for new in range(len(kept)) for file in info.episode_files(new)])
        self._take_others()
        left_out = [
            {
                "episode_index": episode.row.episode_index,
                "tasks": episode.row.tasks,
                "length": episode.raw.get("length"),
                "reasons": [{n: getattr(f, n) for n in ("check", "file", "row", "found")} for f in episode.reasons],
            }
            for episode in self.episodes
            if episode.reasons
        ]
        (self.output / QUARANTINE).unlink(missing_ok=True)  # of a cut run
        if left_out:
            write_jsonl(self.output / QUARANTINE, left_out)
        for new, episode in enumerate(kept):
            old = episode.row.episode_index
            changes = {
                f"numbered {new}": new != old,
                "rows put back into order": episode.reordered,
                f"length {episode.length}": episode.raw.get("length") != episode.length,
                "statistics written": old not in stored,
            }
            if any(changes.values()):
                self.done.append(f"episode {old}: {', '.join(what for what, true in changes.items() if true)}")
        lines = [e.raw | {"episode_index": new, "length": e.length} for new, e in enumerate(kept)]
        sentences = {self.renumbered[index]: task for index, task in self.tasks.items()}
        write_meta(self.output, self._info(len(sentences)), lines, sentences, stats, self._contract())

    def _stats(
        self, episode: _EpisodeRepair, table: pa.Table, stored: EpisodeStatsRow | None, untouched: bool
    ) -> dict[str, Any]:
        """One episode's statistics: the stored ones where they are true and the table is untouched; numbers are
        computed again otherwise, pictures are decoded only where their statistics are missing."""
        assert episode.summary is not None, "kept episodes were inspected"
        info, index = self.info, episode.row.episode_index
        old = {} if stored is None else {key: summary.model_dump() for key, summary in stored.stats.items()}
        if (
            untouched
            and set(info.features) <= set(old)
            and not any(law_episode_stats(episode.row, stored, episode.summary))
        ):
            return old
        out: dict[str, Any] = {}
        for key, feature in info.features.items():
            described = {key: feature.model_dump()}
            if feature.is_image or feature.dtype == "string":
                if key in old:
                    out[key] = old[key]
                elif feature.is_video:
                    out |= episode_stats({key: video.decode(self.root / info.video_file(index, key))}, described)
            else:
                values = column_array(table.column(key), self.root / info.data_file(index), key)
                out |= episode_stats({key: values}, described)
        return out

    def _take_others(self) -> None:
        """Licences, cards and the like; statistics of the whole only where the whole stayed."""
        for name in files_of(self.root):
            top, _, rest = name.partition("/")
            if top in ("data", "videos") or (top == "meta" and rest in _WRITTEN):
                continue
            reason = self._stale(name) if top == "meta" and NAMES.fullmatch(rest) else ""
            if reason:
                self.done.append(f"{name} left out: {reason}; run `prts stats`")
            else:
                take_file(self.root / name, self.output / name, self.link)

    def _stale(self, name: str) -> str:
        """Why statistics are not of the repaired tables; "" where they are, or have no fingerprint."""
        if len(self.kept) != len(self.episodes):
            return "episodes are missing, so it is of other data"
        try:
            raw, contract = read_json(self.root / name), Contract.load(self.root / "meta" / "contract.json")
        except DataError:
            return ""  # a finding of the copy, for a person
        provenance = StatisticsProvenance.of(raw, name)
        if provenance is None:
            return ""
        digests = {new: digest_file(self.output / self.info.data_file(new)) for new in range(len(self.kept))}
        return next((finding.found for finding in provenance.findings(self.info.split_ranges, digests, contract)), "")

    def _info(self, tasks: int) -> dict[str, Any]:
        raw: dict[str, Any] = read_json(self.root / "meta" / "info.json")
        places = [episode.row.episode_index for episode in self.kept]
        splits: dict[str, str] = {}
        before = 0
        for name, part in sorted(self.info.split_ranges.items(), key=lambda item: item[1].start):
            first, end = (int(np.searchsorted(places, edge)) for edge in (part.start, part.stop))
            if first < before:
                splits = {}
                break
            splits[name], before = f"{first}:{end}", end
        if "train" not in splits or splits["train"].split(":")[0] == splits["train"].split(":")[1]:
            splits = {"train": f"0:{len(self.kept)}"}
        lengths, cameras = [episode.length for episode in self.kept], len(self.info.video_keys)
        counted = {**totals(lengths, tasks, cameras, self.info.chunks_size), "splits": splits}
        for name, value in counted.items():
            if raw.get(name) != value:
                self.done.append(f"meta/info.json: {name} {raw.get(name)} becomes {value}")
        return raw | counted

    def _contract(self) -> Contract | None:
        path = self.root / "meta" / "contract.json"
        try:
            return Contract.load(path)
        except DataError as err:
            if path.exists():
                found = err.found or err.problem
                self.done.append(f"meta/contract.json left out: {found}; `prts convert` makes it")
            return None


def renumbered(tasks: dict[int, str]) -> dict[int, int]:
    """{task index there: index here}: 0, 1, 2, ... in the order of the old indices, each sentence once."""
    places: dict[str, int] = {}
    return {index: places.setdefault(tasks[index], len(places)) for index in sorted(tasks)}


def _in_order(table: pa.Table) -> tuple[pa.Table, bool]:
    """The rows by frame_index, where that column names every row once; and whether they were not."""
    frames = numbers(table, "frame_index")
    if frames is None or not np.array_equal(np.sort(frames), np.arange(len(frames))):
        return table, False
    order = np.argsort(frames)
    moved = bool((order != np.arange(len(order))).any())
    return (table.take(pa.array(order)) if moved else table), moved


def _counters(episode: int, start: int, rows: int) -> dict[str, np.ndarray]:
    return {"frame_index": np.arange(rows, dtype=np.int64), **counters(episode, start, rows)}
