"""Read MCAP recordings (Foxglove, ROS 2 bags): topics that tick on their own become rows at the mapping's fps.

Keys are `<topic>:<field>` for numbers (`/joint_states:position`, `/ee:pose.position`) and `<topic>` for pictures. One
file is one episode; the files of a bag that metadata.yaml lists are one together.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from prts_core.config.checked_yaml import read_yaml
from prts_core.config.checks import Strict
from prts_core.config.mapping import Mapping
from prts_core.data.convert import source
from prts_core.data.convert.mcap_messages import EXTRA, PICTURES, VIDEOS, Decoders, VideoStream, image, numbers, stamp
from prts_core.data.convert.source import Field, RawEpisode, Recording
from prts_core.io.errors import ConfigError, DataError, PrtsError, require, suggest
from prts_core.io.progress import track

Hold = Literal["last", "nearest"]
_SECOND = 1_000_000_000


@dataclass(frozen=True)
class Options(Strict):
    """How topics become rows.

    clock: which time counts: when the recorder got the message, when it was sent, or the time inside it. hold: the
    message of a row (see `choose`). tolerance_s: how old it may be (none: two rows). instruction: a topic of
    strings, whose last message is the instruction. joints: for topics with `name` beside the numbers (JointState), the
    order of their columns (none: that of the first message).
    """

    clock: Literal["log", "publish", "header"] = "log"
    hold: Hold = "last"
    tolerance_s: float | None = None
    instruction: str | None = None
    joints: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class _Topic:
    """What one pass over an episode sees of a topic."""

    schema: str
    times: list[int]
    first: Any


class Source(source.Source):
    """See prts_core.data.convert.source.Source. `path`: an .mcap file, a bag's folder, or a folder of either."""

    options_type = Options

    def __init__(self, path: Path, mapping: Mapping) -> None:
        require("mcap.reader", EXTRA)
        super().__init__(path, mapping)
        if mapping.fps is None:
            raise ConfigError(
                "Topics tick at rates of their own, so the mapping must say the rate of the rows",
                file=f"the mapping {mapping.name}",
                field="fps",
                found="nothing",
                expected="rows a second, for instance 30",
            )
        self.fps: float = mapping.fps
        self.tolerance_s = 2 / self.fps if self.options.tolerance_s is None else self.options.tolerance_s
        self.parts = {key: _split(key) for key in sorted(mapping.keys)}
        self.order: dict[str, tuple[str, ...]] = dict(self.options.joints)
        self.fields: dict[str, Field] = {}

    def scan(self) -> Recording:
        found = _episodes(self.path)
        episodes = [self._scan(name, files) for name, files in track(found, total=len(found), what="reading bags")]
        return Recording(tuple(episodes), self.fields, self.fps)

    def read(self, episode: RawEpisode, keys: Collection[str]) -> dict[str, np.ndarray]:
        wanted = {topic: keyed for topic, keyed in self._by_topic(keys).items() if topic in episode.where}
        out = {key: np.empty((episode.length, *self.fields[key].shape), self.fields[key].dtype) for key in keys}
        places = {topic: _rows_of(episode.where[topic]) for topic in wanted}
        seen, videos = dict.fromkeys(wanted, 0), {topic: VideoStream() for topic in wanted}
        for path in map(self.file, episode.files or ("",)):
            for topic, schema, message, decode in _messages(path, set(wanted)):
                rows_at = places[topic].get(seen[topic])
                seen[topic] += 1
                if rows_at is None and schema not in VIDEOS:
                    continue
                content = decode()
                if schema in VIDEOS:  # every message, for pictures are made from one another
                    content = videos[topic].frame(content, (path, f"{topic}, message at {message.log_time} ns"))
                if rows_at is not None:
                    for key in wanted[topic]:
                        out[key][rows_at] = self._value(key, content, schema, path, message)
        return out

    @staticmethod
    def _by_topic(keys: Collection[str]) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {}
        for key in keys:
            out.setdefault(_split(key)[0], []).append(key)
        return out

    # ---- one episode ---------------------------------------------------------------------------------------------
    def _scan(self, name: str, files: list[Path]) -> RawEpisode:
        wanted = {topic for topic, _ in self.parts.values()}
        spoken = self.options.instruction if self.mapping.task is None else None
        topics: dict[str, _Topic] = {}
        task = ""
        for path in files:
            for topic, schema, message, decode in _messages(path, wanted | ({spoken} if spoken else set())):
                if topic == spoken:
                    task = self._sentence(decode(), path, topic)
                if topic not in wanted:
                    continue
                content = decode() if topic not in topics or self.options.clock == "header" else None
                known = topics.setdefault(topic, _Topic(schema, [], content))
                known.times.append(self._time(message, content, path, topic))
        lacking = sorted(wanted - set(topics))
        if lacking:
            known_topics = _topics(files)
            raise DataError(
                f"A recording lacks a topic{suggest(lacking[0], known_topics)}",
                file=files[0],
                field=lacking[0],
                found=", ".join(f"{topic} ({kind})" for topic, kind in sorted(known_topics.items())) or "no topics",
                cure="correct the key in the mapping, or leave the recording out",
            )
        for key in self.parts:
            self._note(key, topics, files[0])
        times = {topic: np.array(known.times, np.int64) for topic, known in topics.items()}
        at = rows(times, self.fps, files[0])
        return RawEpisode(
            key=name,
            length=len(at),
            task=self.mapping.task or task,
            extra={"source": {"file": name} | self._joints()},
            files=self.files(*map(self.name, files)),
            where={
                topic: choose(stamps, at, self.options.hold, self.tolerance_s, topic, files[0])
                for topic, stamps in times.items()
            },
        )

    def _note(self, key: str, topics: dict[str, _Topic], path: Path) -> None:
        """The field of a key, from the first message of its topic; every episode must have the same."""
        topic, part = self.parts[key]
        known = topics[topic]
        if part and known.schema not in PICTURES and topic not in self.order and _names(known.first):
            self.order[topic] = _names(known.first)
        value = self._value(key, known.first, known.schema, path, None)
        found = Field(str(value.dtype), value.shape)
        first = self.fields.setdefault(key, found)
        if found != first:
            raise DataError(
                "Recordings differ in what a topic holds", file=path, field=key, found=str(found), expected=str(first)
            )

    def _value(self, key: str, content: Any, schema: str, path: Path, message: Any) -> np.ndarray:
        topic, part = self.parts[key]
        where = f"{key}" + (f", message at {message.log_time} ns" if message is not None else "")
        wrong = partial(DataError, file=path, field=where)
        size = self.fields[key].shape if key in self.fields else None
        if not part:
            if schema not in PICTURES:
                expected = f"{topic}:<field>, or a topic of pictures ({', '.join(PICTURES)})"
                raise wrong("A key names a topic without saying which of its numbers", found=schema, expected=expected)
            return image(content, schema, size, (path, where))
        try:
            value = numbers(content, part)
        except (KeyError, TypeError) as err:
            found, expected = f"{type(err).__name__}: {err}", f"numbers at {part!r} of {schema}"
            raise wrong("A message has no numbers where the mapping says", found=found, expected=expected) from err
        names, order = _names(content), self.order.get(topic, ())
        if order and value.shape == (len(names),):
            lacking = [name for name in order if name not in names]
            if lacking or (topic not in self.options.joints and len(names) != len(order)):
                found, expected = ", ".join(names), ", ".join(order)
                cure = "list those to take, in order, in options.joints"
                raise wrong("A message has other joints than the first", found=found, expected=expected, cure=cure)
            value = value[[names.index(name) for name in order]]
        if size is not None and value.shape != size:
            raise wrong("Messages of a topic differ in width", found=value.shape, expected=size)
        return value

    def _time(self, message: Any, content: Any, path: Path, topic: str) -> int:
        if self.options.clock != "header":
            return int(message.log_time if self.options.clock == "log" else message.publish_time)
        try:
            return stamp(content)
        except (KeyError, TypeError, ValueError) as err:
            raise DataError(
                "A message holds no time of its own",
                file=path,
                field=topic,
                found=f"{type(err).__name__}: {err}",
                expected="header.stamp or timestamp",
                cure="set options.clock to log or publish",
            ) from err

    def _sentence(self, content: Any, path: Path, topic: str) -> str:
        text = content.get("data") if isinstance(content, dict) else getattr(content, "data", None)
        if not isinstance(text, str):
            raise DataError("An instruction's topic holds no text", file=path, field=topic, expected="a string `data`")
        return text.strip()

    def _joints(self) -> dict[str, Any]:
        """Which joints the columns are, where the mapping does not say: from the first message, so worth keeping."""
        found = {topic: list(names) for topic, names in self.order.items() if topic not in self.options.joints}
        return {"joints": found} if found else {}


def _split(key: str) -> tuple[str, str]:
    """(topic, field) of a key; no field for pictures."""
    topic, _, part = key.partition(":")
    return topic, part


def _names(content: Any) -> tuple[str, ...]:
    """The `name` list of a JointState, () for other messages."""
    names = content.get("name") if isinstance(content, dict) else getattr(content, "name", None)
    if isinstance(names, str) or names is None or not hasattr(names, "__iter__"):
        return ()
    return tuple(str(name) for name in names)


def _rows_of(chosen: np.ndarray) -> dict[int, list[int]]:
    """Ordinal of a message -> the rows that it stands in."""
    out: dict[int, list[int]] = {}
    for row, ordinal in enumerate(chosen.tolist()):
        out.setdefault(ordinal, []).append(row)
    return out


# ---- streams that tick on their own become rows at one fixed rate --------------------------------------------------
def rows(times: dict[str, np.ndarray], fps: float, where: object) -> np.ndarray:
    """Times (T,) int64 of the rows: from the moment when every stream has begun until the first one ends.

    times: stream -> its messages' times in any order. Raises DataError where the streams never overlap.
    """
    start = max(int(stamps.min()) for stamps in times.values())
    end = min(int(stamps.max()) for stamps in times.values())
    if end < start:
        first = min(times, key=lambda name: times[name].max())
        last = max(times, key=lambda name: times[name].min())
        raise DataError(
            "Two topics of a recording never overlap",
            file=where,
            field=f"{first}, {last}",
            found=f"{first} ends {(start - end) / _SECOND:.3f} s before {last} begins",
            expected="topics recorded at the same time, by one clock",
            cure="record them together, or choose another `clock` in the mapping's options",
        )
    # In whole nanoseconds from the start, so that rows do not drift over a long recording.
    count = int((end - start) * fps / _SECOND + 1e-9) + 1
    return start + np.rint(np.arange(count) * (_SECOND / fps)).astype(np.int64)


def choose(times: np.ndarray, at: np.ndarray, hold: Hold, tolerance_s: float, topic: str, where: object) -> np.ndarray:
    """Ordinals (T,) of the messages that stand at the row times `at`.

    last: the newest that is not younger than the row, so that no row sees its future; nearest: the closest in time, the
    earlier of two. Raises DataError where it is further than `tolerance_s` away.
    """
    order = np.argsort(times, kind="stable")
    stamps = times[order]
    before = np.clip(np.searchsorted(stamps, at, side="right") - 1, 0, len(stamps) - 1)
    if hold == "nearest":
        after = np.minimum(before + 1, len(stamps) - 1)
        before = np.where(np.abs(stamps[after] - at) < np.abs(at - stamps[before]), after, before)
    off = np.abs(stamps[before] - at) / _SECOND
    if (off > tolerance_s).any():
        row = int(np.flatnonzero(off > tolerance_s)[0])
        raise DataError(
            "A topic has a gap",
            file=where,
            field=f"{topic}, row {row}, {(int(at[row]) - int(at[0])) / _SECOND:.3f} s after the first",
            found=f"the {hold} message is {off[row]:.3f} s away ({int((off > tolerance_s).sum())} such rows)",
            expected=f"at most {tolerance_s:.3f} s",
            cure="leave the recording out, or allow more with options.tolerance_s",
        )
    return order[before].astype(np.int64)


# ---- files -----------------------------------------------------------------------------------------------------------
def _episodes(path: Path) -> list[tuple[str, list[Path]]]:
    """(key, files) of every episode in the order of their names."""
    if path.is_file():
        return [(path.name, [path])]
    found: dict[Path, list[Path]] = {}
    for file in sorted(path.rglob("*.mcap")):
        found.setdefault(file.parent, []).append(file)
    if not found:
        problem = "There are no recordings to convert"
        raise DataError(problem, file=path, expected="*.mcap files", cure="correct the path")
    episodes = []
    for folder in sorted(found):
        bag, name = _listed(folder), folder.relative_to(path).as_posix()
        if bag is not None:
            episodes.append((name if name != "." else folder.name, bag))
        else:
            episodes += [(file.relative_to(path).as_posix(), [file]) for file in found[folder]]
    return episodes


def _listed(folder: Path) -> list[Path] | None:
    """The files of a ROS 2 bag in the order of its metadata.yaml; none where it is no bag."""
    path = folder / "metadata.yaml"
    if not path.is_file():
        return None
    try:
        names = read_yaml(path)["rosbag2_bagfile_information"]["relative_file_paths"]
        files = [folder / Path(str(name)).name for name in names]
    except (KeyError, TypeError) as err:
        raise DataError(
            "A bag's metadata.yaml does not list its files",
            file=path,
            field="rosbag2_bagfile_information.relative_file_paths",
            found=f"{type(err).__name__}: {err}",
        ) from err
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise DataError("A bag lacks a file", file=missing[0] if missing else path, cure="copy the whole bag again")
    return files


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turn the readers' errors on damaged files into one DataError."""
    from mcap.exceptions import McapError
    from zstandard import ZstdError

    try:
        yield
    except PrtsError:
        raise
    except (McapError, ZstdError, struct.error, ValueError, IndexError, KeyError, RuntimeError, EOFError) as err:
        raise DataError(
            "An MCAP file cannot be read: it is truncated or damaged",
            file=path,
            found=f"{type(err).__name__}: {' '.join(str(err).split())[:160]}",
            expected="a whole file with its footer",
            cure="`mcap recover` (Foxglove's command line tool) keeps what is whole; or record it again",
        ) from err


def _messages(path: Path, topics: set[str]) -> Iterator[tuple[str, str, Any, Callable[[], Any]]]:
    """(topic, schema's name, message, decode) in the file's own order, a chunk at a time, checksums checked."""
    from mcap.reader import make_reader

    decoders = Decoders(path)
    with _faults(path), path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True)
        for schema, channel, message in reader.iter_messages(topics=sorted(topics), log_time_order=False):
            decode = decoders.of(channel, schema)
            yield channel.topic, schema.name if schema else "", message, partial(_decoded, decode, message, path)


def _decoded(decode: Callable[[bytes], Any], message: Any, path: Path) -> Any:
    with _faults(path):
        return decode(message.data)


def _topics(files: list[Path]) -> dict[str, str]:
    """Topic -> schema's name, of everything recorded."""
    from mcap.reader import make_reader

    out: dict[str, str] = {}
    for path in files:
        with _faults(path), path.open("rb") as file:
            summary = make_reader(file).get_summary()
            for channel in summary.channels.values() if summary else ():
                schema = summary.schemas.get(channel.schema_id) if summary else None
                out[channel.topic] = schema.name if schema else channel.message_encoding
    return out
