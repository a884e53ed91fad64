"""Read image-text data in the LLaVA form (json or jsonl): checked once when opened, images read when asked for.

A sample is turns of text, in which each `<image>` stands where an image goes, and those images.
Samples with `<video>` or `<action>` are left out and counted in `skipped`: what a video becomes here (frames, rate,
budget) and what `<action>` stands for is not public, and a guess would train on something else without a word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from prts_core.config.sampling import choose
from prts_core.data.images import opened_picture
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import digest_file, digest_value, iterate_jsonl, read_json
from prts_core.text.prompt import CONTROL_TOKENS, PRTS_TOKENS

T = TypeVar("T")
IMAGE = "<image>"
_NOT_TAKEN = {"<video>": "video", "<action>": "action"}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_FORBIDDEN = (*CONTROL_TOKENS, *PRTS_TOKENS, "<|action_token_")


@dataclass(frozen=True)
class LlavaSample:
    """turns: (role, text) with role system, user or assistant. images: (H, W, 3) uint8, one for each `<image>`."""

    turns: tuple[tuple[str, str], ...]
    images: list[np.ndarray]


@dataclass(frozen=True)
class _Record:
    """One checked entry: where it stands in its file, its turns, and its images relative to the root."""

    place: str
    turns: tuple[tuple[str, str], ...]
    images: tuple[str, ...]


class LlavaDataset:
    """`LlavaDataset.open(...)`; `len(data)`; `data[i]` -> LlavaSample. Same file, strategy and seed, same samples.

    skipped: reason ("video", "action", "num_tokens") -> entries left out. digest: of the file's content, the choice
    and the sizes of its images (their bytes are not read).
    """

    def __init__(self, path: Path, root: Path, records: list[_Record], skipped: dict[str, int], digest: str) -> None:
        self.path, self.root, self.records, self.skipped, self.digest = path, root, records, skipped, digest

    @classmethod
    def open(
        cls,
        json_path: Path,
        root: Path | None = None,
        strategy: str = "all",
        seed: int = 0,
        max_tokens: int | None = None,
    ) -> LlavaDataset:
        """Read and check `json_path`; images lie under `root` (none: the file's own folder).

        strategy: "all", "first:N", "end:N" or "random:N", N a count or "N%"; it chooses among the entries that are
        not left out, and keeps their order. max_tokens: entries that say a larger `num_tokens` are left out.
        Raises DataError, naming file and entry, for malformed turns, tags that do not match the images, paths that
        leave the root and images that are missing; ConfigError for an unknown strategy.
        """
        root = json_path.parent if root is None else root
        if not root.is_dir():
            raise DataError("The folder of the images is missing", file=root, field="vision_base_path")
        skipped: Counter[str] = Counter()
        records = []
        for place, raw in _entries(json_path):
            reason = _left_out(raw, max_tokens, json_path, place)
            if reason:
                skipped[reason] += 1
                continue
            records.append(_record(raw, json_path, place))
        kept = [records[index] for index in choose(len(records), strategy, seed)]
        if not kept:
            raise DataError(
                "An image-text file has no sample that can be used",
                file=json_path,
                found=", ".join(f"{count} left out: {why}" for why, count in sorted(skipped.items())) or "no entries",
            )
        sizes = _sizes(kept, root, json_path)
        digest = digest_value(
            {"file": digest_file(json_path), "strategy": strategy, "seed": seed, "max": max_tokens, "images": sizes}
        )
        return cls(json_path, root, kept, dict(sorted(skipped.items())), digest)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> LlavaSample:
        record = self.records[index]
        return LlavaSample(
            record.turns,
            [self._read(record, name, lambda image: np.asarray(image.convert("RGB"))) for name in record.images],
        )

    def image_sizes(self, index: int) -> list[tuple[int, int]]:
        """(height, width) of a sample's images, from the files' headers alone."""
        record = self.records[index]
        return [self._read(record, name, lambda image: (image.height, image.width)) for name in record.images]

    def _read(self, record: _Record, name: str, take: Callable[[Any], T]) -> T:
        problem, cure = "An image of an image-text sample cannot be read", "restore the image from its source"
        where = f"{self.path.name}, {record.place}"
        with opened_picture(self.root / name, problem, file=self.root / name, field=where, cure=cure) as image:
            return take(image)


def image_names(path: Path) -> list[str]:
    """The pictures that a file's entries name, sorted, each once; those that would leave the root are left out."""
    found: set[str] = set()
    for _, raw in _entries(path):
        images = raw.get("image") if isinstance(raw, dict) else None
        found.update(name for name in ([images] if isinstance(images, str) else images or []) if isinstance(name, str))
    return sorted(
        name for name in found if not PurePosixPath(name).is_absolute() and ".." not in name and "\0" not in name
    )


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, entry) of a .jsonl, line by line, or of a .json that holds one list."""
    if path.suffix not in (".json", ".jsonl"):
        raise ConfigError("Image-text data is json or jsonl", file=path, field="json_path", found=path.suffix)
    if path.suffix == ".json":
        raw = read_json(path)
        if not isinstance(raw, list):
            raise DataError("An image-text file must hold one list", file=path, found=type(raw).__name__)
        yield from ((f"entry {index}", entry) for index, entry in enumerate(raw))
        return
    yield from iterate_jsonl(path)


def _left_out(raw: Any, max_tokens: int | None, path: Path, place: str) -> str | None:
    """Why an entry is not for us, or none. What it says about itself is checked only as far as needed here."""
    if not isinstance(raw, dict) or not isinstance(raw.get("conversations"), list):
        raise _malformed(path, place, "conversations", f"{raw!r:.100}", "an object with a list `conversations`")
    tokens = raw.get("num_tokens")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
        raise _malformed(path, place, "num_tokens", repr(tokens), "a whole number")
    if max_tokens is not None and tokens is not None and tokens > max_tokens:
        return "num_tokens"
    if raw.get("video"):
        return "video"
    text = " ".join(str(turn.get("value", "")) for turn in raw["conversations"] if isinstance(turn, dict))
    return next((reason for tag, reason in _NOT_TAKEN.items() if tag in text), None)


def _record(raw: dict[str, Any], path: Path, place: str) -> _Record:
    images = raw.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise _malformed(path, place, "image", f"{images!r:.100}", "a path or a list of paths")
    for name in images:
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or "\0" in name:
            raise _malformed(path, place, "image", name, "a path inside vision_base_path")
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(raw["conversations"]):
        field = f"conversations[{number}]"
        role = _ROLES.get(str(turn.get("from", turn.get("role")))) if isinstance(turn, dict) else None
        value = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        expected = "assistant" if turns and turns[-1][0] == "user" else "user"
        if role is None or not isinstance(value, str) or not value.strip():
            raise _malformed(path, place, field, f"{turn!r:.100}", f"from: {', '.join(_ROLES)}; value: some text")
        if role != expected and not (role == "system" and number == 0):
            raise _malformed(path, place, field, f"from {role}", f"from {expected}: turns alternate, a human first")
        token = next((t for t in _FORBIDDEN if t in value), None)
        if token:
            raise _malformed(path, place, field, token, "plain text: a model's control tokens may not stand in it")
        turns.append((role, value))
    if not turns or turns[-1][0] != "assistant":
        raise _malformed(path, place, "conversations", f"{len(turns)} turns", "an answer of the assistant at the end")
    tags = sum(text.count(IMAGE) for _, text in turns)
    if tags != len(images):
        raise _malformed(path, place, "image", f"{tags} tags {IMAGE}, {len(images)} images", "one tag an image")
    return _Record(place, tuple(turns), tuple(images))


def _sizes(records: list[_Record], root: Path, path: Path) -> list[list[tuple[str, int]]]:
    """(name, bytes) of every image; DataError for those that are missing or lead out of the root by a link."""
    inside = root.resolve()
    sizes, missing = [], []
    for record in records:
        row = []
        for name in record.images:
            real = (root / name).resolve()
            if not real.is_relative_to(inside):
                raise _malformed(path, record.place, "image", name, "a file inside vision_base_path, links included")
            if real.is_file():
                row.append((name, real.stat().st_size))
            else:
                missing.append((record.place, name))
        sizes.append(row)
    if missing:
        place, name = missing[0]
        raise DataError(
            f"{len(missing)} images of an image-text file are missing",
            file=path,
            field=f"{place}, image",
            found=f"no file {root / name}",
            cure="correct vision_base_path, or restore the images",
        )
    return sizes


def _malformed(path: Path, place: str, field: str, found: str, expected: str) -> DataError:
    return DataError(
        "An image-text sample is malformed",
        file=path,
        field=f"{place}, {field}",
        found=found,
        expected=expected,
        cure="correct the entry, or leave it out of the file",
    )
