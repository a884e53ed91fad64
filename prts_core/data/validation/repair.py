"""A new dataset from a faulty one, put right where no judgement is needed; the faulty one is only read.

Mechanical: totals, numbering of episodes, rows and tasks, rows out of order, lengths on which table and videos agree,
splits, missing or stale episode statistics. Episodes that stay faulty are left out and listed in meta/quarantine.jsonl
with every reason. It does not know how faults are found (`laws`, `tables`, `videos`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from prts_core.contract import Contract
from prts_core.data.ahead import in_order
from prts_core.data.convert.lerobot_v21 import take_file
from prts_core.data.lerobot_v21 import video
from prts_core.data.lerobot_v21.reader import column_array, read_parquet
from prts_core.data.lerobot_v21.schema import EpisodeRow, EpisodeStatsRow, Info, TaskRow, read_info
from prts_core.data.lerobot_v21.seal import SEAL, compare, files_of, read_seal
from prts_core.data.lerobot_v21.writer import episode_stats, remove_strays, write_meta
from prts_core.data.validation import laws
from prts_core.data.validation.episode import EpisodeSummary, facts, numbers
from prts_core.data.validation.metadata import Metadata
from prts_core.data.validation.report import Finding
from prts_core.data.validation.stored_statistics import NAMES, StatisticsProvenance, law_episode_stats
from prts_core.data.validation.tables import check_tables, frame_schema, framed, law_stills
from prts_core.data.validation.videos import Depth, law_video
from prts_core.io.errors import DataError
from prts_core.io.files import atomic_path, digest_file, read_json, write_jsonl
from prts_core.io.progress import track

QUARANTINE = "meta/quarantine.jsonl"
_WRITTEN = {"info.json", "episodes.jsonl", "tasks.jsonl", "episodes_stats.jsonl", "contract.json", "quarantine.jsonl"}


@dataclass
class _Episode:
    """One line of episodes.jsonl and what became of it. table: only where it must be written anew."""

    raw: dict[str, Any]
    row: EpisodeRow
    reasons: list[Finding] = field(default_factory=list)
    reordered: bool = False
    length: int = 0
    facts: EpisodeSummary | None = None


def repair(
    root: Path, output: Path, link: Literal["copy", "hardlink"] = "copy", video: Depth = "every", workers: int = 2
) -> list[str]:
    """Write the dataset `root`, repaired, to the new folder `output`; return what was done, a sentence each.

    Everything is written beside `output` first and renamed at the end; a cut run goes on where it was. Raises DataError
    where nothing can be saved: info.json or episodes.jsonl unreadable, no sound episode, `output` there already.
    """
    if output.exists():
        raise DataError("The repaired dataset's folder exists already", file=output, cure="name a new folder")
    if root.resolve() in (output.resolve(), *output.resolve().parents):
        raise DataError("A dataset is never repaired in place", file=output, cure="name a folder outside the dataset")
    info = read_info(root)
    done: list[str] = []
    tasks, renumbered = _tasks(root, done)
    episodes = _episodes(root, info, done)
    changed = _changed(root, done)
    for job, _ in zip(
        episodes,
        track(
            in_order(lambda episode: _inspect(root, episode, info, tasks, changed, video), episodes, workers, 4),
            total=len(episodes),
            what="inspecting episodes",
        ),
        strict=True,
    ):
        if job.reasons:
            first = job.reasons[0]
            done.append(f"episode {job.row.episode_index} left out: {first.file}: {first.found}")
    kept = [episode for episode in episodes if not episode.reasons]
    if not kept:
        raise DataError(
            "No episode can be saved",
            file=root,
            found=done[-1] if done else "no episodes",
            cure="run `prts validate` on it: a fault that all share, such as a wrong fps in info.json, is for a person",
        )
    partial = output.with_name(f".{output.name}.repairing")
    _write(root, partial, info, episodes, kept, tasks, renumbered, link, workers, done)
    partial.rename(output)
    return done


def _tasks(root: Path, done: list[str]) -> tuple[dict[int, str], dict[int, int]]:
    """Sound lines of tasks.jsonl {index: sentence} and, where they were numbered wrong, {index there: index here}."""
    tasks: dict[int, str] = {}
    for raw in _lines(root / "meta" / "tasks.jsonl", done):
        try:
            row = TaskRow.model_validate(raw)
        except ValidationError:
            done.append(f"meta/tasks.jsonl: a line left out: {raw!r:.80}")
            continue
        tasks.setdefault(row.task_index, row.task)
    sentences = list(dict.fromkeys(tasks[index] for index in sorted(tasks)))
    renumbered = {index: sentences.index(task) for index, task in tasks.items()}
    if any(index != new for index, new in renumbered.items()):
        done.append("meta/tasks.jsonl: numbered anew, each sentence once")
    return tasks, renumbered


def _episodes(root: Path, info: Info, done: list[str]) -> list[_Episode]:
    made: dict[int, _Episode] = {}
    for raw in _lines(root / "meta" / "episodes.jsonl", done):
        try:
            row = EpisodeRow.model_validate(raw)
            _ = row.spans
        except ValidationError:
            done.append(f"meta/episodes.jsonl: a line left out: {raw!r:.80}")
            continue
        if row.episode_index in made:
            done.append(f"meta/episodes.jsonl: episode {row.episode_index} stands twice, the first line is kept")
            continue
        made[row.episode_index] = _Episode(raw, row)
    if not made:
        raise DataError("No line of a dataset's episodes can be read", file=root / "meta" / "episodes.jsonl")
    return [made[index] for index in sorted(made)]


def _lines(path: Path, done: list[str]) -> list[dict[str, Any]]:
    """Objects of a line file; what is none is left out and told."""
    if not path.is_file():
        return []
    out = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            raw = json.loads(line) if line.strip() else None
        except ValueError:  # no JSON, no UTF-8
            raw = str(line[:40])
        if isinstance(raw, dict):
            out.append(raw)
        elif raw is not None:
            done.append(f"meta/{path.name}: line {number} is no JSON object, left out")
    return out


def _changed(root: Path, done: list[str]) -> set[str]:
    """Files of a sealed dataset that are not as they were sealed: what they hold now is nobody's word."""
    try:
        sealed = read_seal(root)
    except DataError as err:
        done.append(f"{SEAL}: {err.problem}; the content is not verified")
        return set()
    changed = {d.path: d for d in compare(root, sealed) if d.fault != "unlisted"} if sealed else {}
    done.extend(f"{path}: not as it was sealed, taken as it reads now" for path in changed if path.startswith("meta/"))
    return set(changed)


def _inspect(root: Path, episode: _Episode, info: Info, tasks: dict[int, str], changed: set[str], depth: Depth) -> None:
    """Decide whether an episode can be kept, and with which rows."""
    row = episode.row
    files = info.episode_files(row.episode_index)
    for file in files:
        if file in changed:
            episode.reasons.append(Finding("seal", file, "not as it was sealed", "the sealed content"))
    path = root / files[0]
    try:
        table = read_parquet(path)
        table, episode.reordered = _in_order(table)
        table = _numbered(table, row.episode_index, 0)
        frame = framed(table, info, path)
    except DataError as err:
        episode.reasons.append(Finding("tables", files[0], err.problem, "a whole parquet file"))
        return
    episode.length = table.num_rows
    if not episode.length:
        episode.reasons.append(Finding("tables", files[0], "no rows", "a row a frame"))
        return
    episode.row = row = row.model_copy(update={"length": table.num_rows})
    found = [*laws.law_rows(table, row, 0, info, tasks), *law_stills(table, row, info, depth)]
    found += [*check_tables([(files[0], frame)], frame_schema(info))]
    found += [*laws.law_subtasks(Metadata(episodes=[row]))]
    episode.facts = facts(table, row.episode_index, info, path)
    for key in info.video_keys:
        found += law_video(root, row, key, info, depth)
    episode.reasons += [finding for finding in found if finding.severity == "error"]


def _in_order(table: pa.Table) -> tuple[pa.Table, bool]:
    """The rows by frame_index, where that column names every row once; and whether they were not."""
    frames = numbers(table, "frame_index")
    if frames is None or not np.array_equal(np.sort(frames), np.arange(len(frames))):
        return table, False
    order = np.argsort(frames)
    moved = bool((order != np.arange(len(order))).any())
    return (table.take(pa.array(order)) if moved else table), moved


def _numbered(table: pa.Table, episode: int, start: int, renumbered: dict[int, int] | None = None) -> pa.Table:
    """The table with true counters; the same object where they are true already."""
    rows = np.arange(table.num_rows, dtype=np.int64)
    wanted = {"frame_index": rows, "episode_index": np.full(len(rows), episode, np.int64), "index": start + rows}
    indices = numbers(table, "task_index")
    if renumbered is not None and indices is not None:
        wanted["task_index"] = np.array([renumbered[int(index)] for index in indices], np.int64)
    for key, values in wanted.items():
        ours = numbers(table, key)
        if key not in table.column_names:
            table = table.append_column(pa.field(key, pa.int64()), pa.array(values))
        elif ours is None or not np.array_equal(ours, values):
            table = table.set_column(table.column_names.index(key), pa.field(key, pa.int64()), pa.array(values))
    return table


def _write(
    root: Path,
    output: Path,
    info: Info,
    episodes: Sequence[_Episode],
    kept: list[_Episode],
    tasks: dict[int, str],
    renumbered: dict[int, int],
    link: Literal["copy", "hardlink"],
    workers: int,
    done: list[str],
) -> None:
    starts = np.cumsum([0] + [episode.length for episode in kept]).tolist()
    stored = _stored_stats(root, done)

    def take(job: tuple[int, _Episode]) -> dict[str, Any]:
        new, episode = job
        old, target = episode.row.episode_index, output / info.data_file(new)
        was = read_parquet(root / info.data_file(old))
        table, _ = _in_order(was)
        table = _numbered(table, new, starts[new], renumbered)
        if table is was:
            take_file(root / info.data_file(old), target, link)
        else:
            with atomic_path(target) as partial:
                pq.write_table(table, partial)
        for key in info.video_keys:
            take_file(root / info.video_file(old, key), output / info.video_file(new, key), link)
        return {"episode_index": new, "stats": _stats(root, episode, table, stored.get(old), info, table is was)}

    jobs = list(enumerate(kept))
    stats = list(track(in_order(take, jobs, workers, 4), total=len(jobs), what="writing episodes"))
    remove_strays(output, [file for new in range(len(kept)) for file in info.episode_files(new)])
    _take_others(root, output, info, len(kept) if len(kept) == len(episodes) else None, link, done)
    left_out = [
        {
            "episode_index": episode.row.episode_index,
            "tasks": episode.row.tasks,
            "length": episode.raw.get("length"),
            "reasons": [{"check": f.check, "file": f.file, "row": f.row, "found": f.found} for f in episode.reasons],
        }
        for episode in episodes
        if episode.reasons
    ]
    (output / QUARANTINE).unlink(missing_ok=True)  # of a cut run
    if left_out:
        write_jsonl(output / QUARANTINE, left_out)
    lines = [e.raw | {"episode_index": new, "length": e.length} for new, e in enumerate(kept)]
    _tell(kept, stored, done)
    sentences = {renumbered[index]: task for index, task in tasks.items()}
    described = _info(root, info, episodes, kept, len(sentences), done)
    write_meta(output, described, lines, sentences, stats, _contract(root, done))


def _tell(kept: list[_Episode], stored: dict[int, EpisodeStatsRow], done: list[str]) -> None:
    for new, episode in enumerate(kept):
        old, said = episode.row.episode_index, []
        said += [f"numbered {new}"] if new != old else []
        said += ["rows put back into order"] if episode.reordered else []
        said += [f"length {episode.length}"] if episode.raw.get("length") != episode.length else []
        said += ["statistics written"] if old not in stored else []
        if said:
            done.append(f"episode {old}: {', '.join(said)}")


def _stored_stats(root: Path, done: list[str]) -> dict[int, EpisodeStatsRow]:
    made = {}
    for raw in _lines(root / "meta" / "episodes_stats.jsonl", done):
        try:
            row = EpisodeStatsRow.model_validate(raw)
        except ValidationError:
            continue  # written anew below, and told as such
        made[row.episode_index] = row
    return made


def _stats(
    root: Path, episode: _Episode, table: pa.Table, stored: EpisodeStatsRow | None, info: Info, untouched: bool
) -> dict[str, Any]:
    """One episode's statistics: the stored ones where they are true and the table is untouched; numbers are computed
    again otherwise, pictures are decoded only where their statistics are missing."""
    assert episode.facts is not None, "kept episodes were inspected"
    lacking = stored is None or set(info.features) - set(stored.stats)
    stale = lacking or any(law_episode_stats(episode.row, stored, episode.facts))
    old = {} if stored is None else {key: summary.model_dump() for key, summary in stored.stats.items()}
    if untouched and not stale:
        return old
    path = root / info.data_file(episode.row.episode_index)
    out: dict[str, Any] = {}
    for key, feature in info.features.items():
        described = {key: feature.model_dump()}
        if feature.is_video and key in old:
            out[key] = old[key]
        elif feature.is_video:
            pictures = video.decode(root / info.video_file(episode.row.episode_index, key))
            out |= episode_stats({key: pictures}, described)
        elif feature.is_image or feature.dtype == "string":
            if key in old:
                out[key] = old[key]
        else:
            out |= episode_stats({key: column_array(table.column(key), path, key)}, described)
    return out


def _take_others(
    root: Path, output: Path, info: Info, episodes: int | None, link: Literal["copy", "hardlink"], done: list[str]
) -> None:
    """Licences, cards and the like; statistics of the whole only where the whole stayed, `episodes` in number."""
    for name in files_of(root):
        top, _, rest = name.partition("/")
        if top in ("data", "videos") or (top == "meta" and rest in _WRITTEN):
            continue
        if top == "meta" and NAMES.fullmatch(rest):
            why = "episodes are missing, so it is of other data"
            why = why if episodes is None else _stale(root, output, info, name, episodes)
            if why:
                done.append(f"{name} left out: {why}; run `prts stats`")
                continue
        take_file(root / name, output / name, link)


def _stale(root: Path, output: Path, info: Info, name: str, episodes: int) -> str:
    """Why statistics with a fingerprint are not of the repaired tables; "" where they are, or have none."""
    try:
        raw, contract = read_json(root / name), Contract.load(root / "meta" / "contract.json")
    except DataError:
        return ""  # a finding of the copy, for a person
    made = StatisticsProvenance.of(raw, name)
    if made is None:
        return ""
    digests = {episode: digest_file(output / info.data_file(episode)) for episode in range(episodes)}
    return next((finding.found for finding in made.findings(info.split_ranges, digests, contract)), "")


def _info(
    root: Path, info: Info, episodes: Sequence[_Episode], kept: list[_Episode], tasks: int, done: list[str]
) -> dict[str, Any]:
    raw: dict[str, Any] = read_json(root / "meta" / "info.json")
    places = [episode.row.episode_index for episode in kept]
    splits: dict[str, str] = {}
    before = 0
    for name, part in sorted(info.split_ranges.items(), key=lambda item: item[1].start):
        first = sum(1 for place in places if place < part.start)
        end = sum(1 for place in places if place < part.stop)
        if first < before:
            splits = {}
            break
        splits[name], before = f"{first}:{end}", end
    if "train" not in splits or splits["train"].split(":")[0] == splits["train"].split(":")[1]:
        splits = {"train": f"0:{len(kept)}"}
    counted = {
        "total_episodes": len(kept),
        "total_frames": sum(episode.length for episode in kept),
        "total_tasks": tasks,
        "total_videos": len(kept) * len(info.video_keys),
        "total_chunks": -(-len(kept) // info.chunks_size),
        "splits": splits,
    }
    for name, value in counted.items():
        if raw.get(name) != value:
            done.append(f"meta/info.json: {name} {raw.get(name)} becomes {value}")
    return raw | counted


def _contract(root: Path, done: list[str]) -> Contract | None:
    try:
        return Contract.load(root / "meta" / "contract.json")
    except DataError as err:
        if (root / "meta" / "contract.json").exists():
            done.append(f"meta/contract.json left out: {err.found or err.problem}; `prts convert` makes it")
        return None
