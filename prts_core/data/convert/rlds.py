"""Read RLDS recordings as tensorflow_datasets stores them (Open X-Embodiment and others), without TensorFlow: TFRecord
shards, one episode each record, described by features.json.

Keys are paths below a step (`action`, `observation/image`, `is_terminal`, ...). Records are read twice: once whole
files to know and check every episode before anything is written (0.2 % of the time of a conversion with two 256x256
cameras), then one episode at a time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.config.checks import Strict
from prts_core.config.mapping import Mapping
from prts_core.data.convert import source
from prts_core.data.convert.source import Field, RawEpisode, Recording, refuse_unknown
from prts_core.data.convert.tfds_features import STEPS, decode_rows, picture, read_features, rows_of
from prts_core.data.convert.tfrecord import RecordPosition, parse_example, record_at, records
from prts_core.io.errors import DataError
from prts_core.io.files import read_json
from prts_core.io.progress import track

_SHARD = re.compile(r"(?P<name>.+)-(?P<split>[^-]+)\.tfrecord-(?P<number>\d{5})-of-(?P<count>\d{5})")
# Where Open X datasets keep the instruction; the first that a dataset has is taken.
INSTRUCTIONS = (
    "language_instruction",
    "observation/natural_language_instruction",
    "natural_language_instruction",
    "observation/language_instruction",
    "observation/instruction",
)


@dataclass(frozen=True)
class Options(Strict):
    """instruction: the step's (or episode's) feature that holds the sentence; none: the usual names are tried.

    splits: which of the dataset's splits to take; none: all. only: take only episodes with these values in features of
    the episode, such as {episode_metadata/has_language: true}; the others are left out.
    """

    instruction: str | None = None
    splits: tuple[str, ...] | None = None
    only: dict[str, bool | int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shard:
    """One file of a split, and how many episodes dataset_info.json promises in it (none where it does not say)."""

    path: Path
    split: str
    episodes: int | None


@dataclass(frozen=True)
class Record:
    """One parsed record. values: feature -> its list."""

    shard: Shard
    place: RecordPosition
    values: dict[str, Any]

    def fault(self, name: str, found: str, expected: str) -> DataError:
        return DataError(
            "An episode is not what features.json says",
            file=self.shard.path,
            field=f"record at byte {self.place.offset}, {name}",
            found=found,
            expected=expected,
        )


class Source(source.Source):
    """See prts_core.data.convert.source.Source. `path`: the folder with features.json, or one above it."""

    options_type = Options

    def __init__(self, path: Path, mapping: Mapping) -> None:
        super().__init__(path, mapping)
        self.root = _version_folder(path)
        self.steps, self.episode, self.unread = read_features(self.root)
        self.sizes: dict[str, tuple[int, ...]] = {}

    def scan(self) -> Recording:
        fields = {key: leaf.field for key, leaf in self.steps.items() if leaf.kind != "text"}
        described = self.root / "features.json"
        for key in sorted(self.mapping.keys):
            if key in self.unread:
                raise DataError(
                    "A mapping names a feature that cannot be read without TensorFlow",
                    file=described,
                    field=key,
                    found=self.unread[key],
                    expected="numbers, PNG or JPEG pictures, texts",
                )
            refuse_unknown(key, fields, described, "the mapping's keys")
        for key in sorted(self.options.only):
            refuse_unknown(key, {name: leaf.field for name, leaf in self.episode.items()}, described, "options.only")
        sentence = None if self.mapping.task is not None else self._sentence()
        episodes: list[RawEpisode] = []
        shards = _shards(self.root, self.options.splits)
        for shard in track(shards, total=len(shards), what="reading shards"):
            number = -1
            for number, (place, data) in enumerate(records(shard.path)):
                record = Record(shard, place, parse_example(data, shard.path, place))
                if all(self._value(record, key) == wanted for key, wanted in self.options.only.items()):
                    episodes.append(self._scan_episode(record, number, sentence))
            if shard.episodes not in (None, number + 1):
                raise DataError(
                    "A shard does not hold the episodes that dataset_info.json promises",
                    file=shard.path,
                    found=number + 1,
                    expected=shard.episodes,
                    cure="download the shard again",
                )
        fields |= {key: Field(self.steps[key].dtype, size) for key, size in self.sizes.items()}
        return Recording(tuple(episodes), fields)

    def read(self, episode: RawEpisode, keys: Collection[str]) -> dict[str, np.ndarray]:
        file, offset, size = episode.where
        path, place = self.path / file, RecordPosition(offset, size)
        found = parse_example(record_at(path, place), path, place)
        out = {}
        for key in keys:
            leaf, name = self.steps[key], f"{STEPS}/{key}"
            shape = self.sizes.get(key, leaf.field.shape)
            out[key] = decode_rows(leaf, found[name], shape, (path, f"byte {offset}, {name}"))
        return out

    # ---- one episode ---------------------------------------------------------------------------------------------
    @staticmethod
    def _value(record: Record, key: str) -> Any:
        """An episode's only value of a feature; None where it has none, or several."""
        values = record.values.get(key, ())
        value = values[0] if len(values) == 1 else None
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else value

    def _scan_episode(self, record: Record, number: int, sentence: str | None) -> RawEpisode:
        file = record.shard.path.relative_to(self.path).as_posix()
        rows: dict[str, int | None] = {}
        for key in self.mapping.keys | {key for key, leaf in self.steps.items() if leaf.kind == "number"}:
            name = f"{STEPS}/{key}"
            if name in record.values:
                rows[key] = rows_of(self.steps[key], record.values[name])
            elif key in self.mapping.keys:
                raise record.fault(name, "nothing", "one value a step")
        length = max((count for count in rows.values() if count), default=0)
        for key, count in rows.items():
            if count != length or not length:
                name = f"{STEPS}/{key}"
                shown = f"{len(record.values[name])} values" if count is None else f"{count} steps"
                raise record.fault(name, shown, f"{length or 'at least 1'} steps, as others")
        for key in self.mapping.keys:
            leaf = self.steps[key]
            # The first picture says a camera's size where features.json does not; all others must have it.
            known = self.sizes.get(key) or (leaf.field.shape if -1 not in leaf.shape else None)
            if leaf.kind == "image" and (key not in self.sizes or known is None):
                where = f"byte {record.place.offset}, {STEPS}/{key}"
                first = record.values[f"{STEPS}/{key}"][0]
                self.sizes[key] = picture(first, known, leaf.dtype, record.shard.path, where).shape
        return RawEpisode(
            key=f"{file}:{number}",
            length=length,
            task=self.mapping.task or self._instruction(record, sentence),
            split=record.shard.split,
            extra={"source": {"file": file, "record": number}},
            files=self.files(file),
            where=(file, record.place.offset, record.place.size),
        )

    def _sentence(self) -> str:
        """The record's feature that holds the instruction."""
        texts = {key: f"{STEPS}/{key}" for key, leaf in self.steps.items() if leaf.kind == "text"}
        texts |= {key: key for key, leaf in self.episode.items() if leaf.kind == "text"}
        wanted = self.options.instruction
        usual = [*INSTRUCTIONS, *(f"episode_metadata/{name}" for name in INSTRUCTIONS)]
        key = wanted or next((name for name in usual if name in texts), None)
        if key is None or key not in texts:
            raise DataError(
                "A recording has no instruction where one was looked for",
                file=self.root / "features.json",
                field="options.instruction",
                found=", ".join(texts) or "no texts at all",
                expected=wanted or ", ".join(INSTRUCTIONS),
                cure="name the feature with options.instruction, or give `task` in the mapping",
            )
        return texts[key]

    @staticmethod
    def _instruction(record: Record, name: str | None) -> str:
        """The sentence of an episode; one that changes between steps is refused."""
        assert name is not None
        try:
            found = {data.decode("utf-8").strip() for data in record.values.get(name, []) if isinstance(data, bytes)}
        except UnicodeDecodeError as err:
            raise record.fault(name, str(err), "UTF-8 text") from err
        if len(found) > 1:
            raise record.fault(name, f"{len(found)} sentences: {sorted(found)[:3]}", "one an episode")
        return found.pop() if found else ""


# ---- folders ---------------------------------------------------------------------------------------------------------
def _version_folder(path: Path) -> Path:
    """The folder of features.json: `path`, or the only one below it (<name>/<version>/)."""
    found = [path] if (path / "features.json").is_file() else sorted(p.parent for p in path.glob("*/features.json"))
    found = found or sorted(p.parent for p in path.glob("*/*/features.json"))
    if len(found) != 1:
        raise DataError(
            "A folder does not hold one dataset of tensorflow_datasets",
            file=path,
            found=", ".join(folder.relative_to(path).as_posix() for folder in found) or "no features.json",
            expected="features.json, dataset_info.json and *.tfrecord-00000-of-000NN",
            cure="name the folder of one version, such as bridge_dataset/1.0.0",
        )
    return found[0]


def _shards(root: Path, splits: Sequence[str] | None) -> list[Shard]:
    """Every shard of every split in order; a shard that is missing is named."""
    promised = _promised(root)
    found: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in sorted(root.iterdir()):
        match = _SHARD.fullmatch(path.name)
        if match:
            found.setdefault(match["split"], {})[int(match["number"])] = path
            counts[match["split"]] = int(match["count"])
    wanted = list(splits) if splits is not None else list(promised or found)
    made = []
    for split in sorted(wanted, key=lambda name: (name != "train", name)):
        files, lengths = found.get(split, {}), promised.get(split)
        count = len(lengths) if lengths else counts.get(split, 0)
        missing = sorted(set(range(count)) - set(files))
        if missing or not count or counts.get(split) != count:
            raise DataError(
                f"The split {split!r} is incomplete",
                file=root,
                found=f"{len(files)} shards" + (f", not number {missing[0]}" if missing else ""),
                expected=f"{count or 'some'} shards",
                cure="download the missing files, or choose others with options.splits",
            )
        made += [Shard(files[number], split, lengths[number] if lengths else None) for number in range(count)]
    return made


def _promised(root: Path) -> dict[str, list[int]]:
    """Episodes of each shard of each split, as dataset_info.json says; {} where it says none."""
    path = root / "dataset_info.json"
    info = read_json(path)
    try:
        kind = str(info.get("fileFormat", "tfrecord"))
        splits = {str(split["name"]): [int(n) for n in split.get("shardLengths", ())] for split in info["splits"]}
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        raise DataError(
            "dataset_info.json does not list its splits",
            file=path,
            field="splits",
            found=f"{type(err).__name__}: {err}",
        ) from err
    if kind != "tfrecord":
        raise DataError("Only TFRecord shards are read", file=path, field="fileFormat", found=kind, expected="tfrecord")
    return {name: lengths for name, lengths in splits.items() if lengths}
