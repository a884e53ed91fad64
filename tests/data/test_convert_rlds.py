"""RLDS without TensorFlow: shards written here byte by byte come out as a dataset; damage and misfits are refused."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prts_core.config.mapping import CameraPart, ColumnPart, DepthPart, Mapping, Part
from prts_core.config.schema import VideoConfig
from prts_core.data.convert.rlds import Source
from prts_core.data.convert.run import convert
from prts_core.data.convert.tfrecord import example_class, masked_crc, records
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import DataError
from prts_core.store.listing import digest_tree

MAPPING = Mapping(
    name="toy_rlds",
    source="rlds",
    state=(Part("observation/state"),),
    action=(Part("action", names=("dx", "dy", "dz")),),
    cameras={"top": CameraPart("observation/image"), "wrist": CameraPart("observation/wrist")},
    depth={"top": DepthPart("observation/depth")},
    columns={"next.reward": ColumnPart("reward"), "next.done": ColumnPart("is_last", dtype="bool")},
    fps=5.0,
)


# ---- a writer of its own: framing, messages and folder as tensorflow_datasets makes them -----------------------------
def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


def example(features: dict[str, Any]) -> bytes:
    message = example_class()()
    for name, values in features.items():
        feature = message.features.feature[name]
        if isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif np.asarray(values).dtype.kind == "f":
            feature.float_list.value.extend(np.ravel(values).tolist())
        else:
            feature.int64_list.value.extend(np.ravel(values).astype(int).tolist())
    return message.SerializeToString(deterministic=True)


def packed(image: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, kind)
    return out.getvalue()


def episode(number: int, rows: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    top = rng.integers(0, 255, (rows, 16, 24, 3), dtype=np.uint8)
    return {
        "steps/action": rng.normal(size=(rows, 3)).astype(np.float32),
        "steps/observation/state": rng.normal(size=(rows, 4)).astype(np.float32),
        "steps/observation/image": [packed(image) for image in top],
        "steps/observation/wrist": [packed(image.repeat(2, 0).repeat(2, 1), "JPEG") for image in top],
        "steps/observation/depth": [packed((image[..., 0] * 9).astype(np.uint16)) for image in top],
        "steps/reward": np.linspace(0, 1, rows, dtype=np.float32),
        "steps/is_last": np.arange(rows) == rows - 1,
        "steps/language_instruction": [f"do number {number % 2}".encode()] * rows,
        "steps/names": [b"left", b"right"],  # of a kind that is not read
        "episode_metadata/file_path": [b"somewhere"],
        "episode_metadata/has_language": [number != 1],
    }


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    sides = {"dimensions": [str(side) for side in shape]} if shape else {}
    return {
        "pythonClassName": "x.tensor_feature.Tensor",
        "tensor": {"shape": sides, "dtype": dtype, "encoding": "none"},
    }


def image(dtype: str, *shape: int) -> dict[str, Any]:
    sides = {"dimensions": [str(side) for side in shape]}
    return {"pythonClassName": "x.image_feature.Image", "image": {"shape": sides, "dtype": dtype}}


def features(**inner: Any) -> dict[str, Any]:
    return {"pythonClassName": "x.features_dict.FeaturesDict", "featuresDict": {"features": inner}}


def write_rlds(
    root: Path, lengths: tuple[int, ...] = (7, 5, 9), broken: dict[int, dict[str, Any]] | None = None
) -> Path:
    """Episodes in two shards of `train` and one more in `val`. broken: episode -> features to replace."""
    root.mkdir(parents=True)
    text = {"pythonClassName": "x.text_feature.Text", "text": {}}
    observation = features(
        image=image("uint8", 16, 24, 3),
        wrist=image("uint8", -1, -1, 3),
        depth=image("uint16", 16, 24, 1),
        state=tensor("float32", 4),
    )
    steps = features(
        action=tensor("float32", 3),
        observation=observation,
        reward=tensor("float32"),
        is_last=tensor("bool"),
        language_instruction=text,
        names=tensor("string", 2),
    )
    step_set = {"pythonClassName": "x.dataset_feature.Dataset", "sequence": {"feature": steps, "length": "-1"}}
    top = features(steps=step_set, episode_metadata=features(file_path=text, has_language=tensor("bool")))
    (root / "features.json").write_text(json.dumps(top))
    made = [framed(example(episode(n, rows) | (broken or {}).get(n, {}))) for n, rows in enumerate([*lengths, 6])]
    shards = {"train": [made[: len(lengths) - 1], made[len(lengths) - 1 : -1]], "val": [made[-1:]]}
    for split, files in shards.items():
        for number, parts in enumerate(files):
            (root / f"toy-{split}.tfrecord-{number:05d}-of-{len(files):05d}").write_bytes(b"".join(parts))
    splits = [{"name": name, "shardLengths": [str(len(part)) for part in parts]} for name, parts in shards.items()]
    (root / "dataset_info.json").write_text(json.dumps({"name": "toy", "fileFormat": "tfrecord", "splits": splits}))
    return root


def converted(root: Path, folder: Path, mapping: Mapping = MAPPING, workers: int = 2) -> LeRobotDataset:
    options = {"mapping": mapping, "dataset": "toy", "robot": None, "video": VideoConfig(crf=1), "workers": workers}
    convert(root, folder / "output", folder / "work", **options)  # type: ignore[arg-type]
    return LeRobotDataset.open(folder / "output")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: copy it to change it."""
    return write_rlds(tmp_path_factory.mktemp("rlds") / "toy/1.0.0").parents[1]


def test_checksums_are_those_of_the_format() -> None:
    # crc32c("123456789") = e3069283 (RFC 3720, B.4); rotated right by 15, plus a282ead8
    assert masked_crc(b"123456789") == (((0xE3069283 >> 15) | (0xE3069283 << 17)) + 0xA282EAD8) % 2**32
    # the first record of a file that holds the payload "abc", as TensorFlow writes it: length 3 and its checksum
    assert framed(b"abc")[:8] == bytes([3, 0, 0, 0, 0, 0, 0, 0])


def test_a_message_is_what_protobuf_says() -> None:
    """Bytes put together by hand from the wire format: field 1 (features) > map entry > key, value > int64 [1, 300]."""
    entry = b"\x0a\x01k" + b"\x12\x07" + b"\x1a\x05" + b"\x0a\x03" + b"\x01\xac\x02"
    message = example_class()()
    message.ParseFromString(b"\x0a" + bytes([len(entry) + 2]) + b"\x0a" + bytes([len(entry)]) + entry)
    assert list(message.features.feature["k"].int64_list.value) == [1, 300]


def test_converts(recorded: Path, tmp_path: Path) -> None:
    made = converted(recorded, tmp_path)
    assert [row.length for row in made.rows] == [7, 5, 9, 6] and made.fps == 5
    assert made.info.splits == {"train": "0:3", "val": "3:4"}
    for number, row in enumerate(made.rows):
        raw = episode(number, row.length)
        assert np.array_equal(made.actions(number), raw["steps/action"])
        assert np.array_equal(made.states(number), raw["steps/observation/state"])
        assert row.tasks == [f"do number {number % 2}"]
        columns = made.columns(number, ["next.reward", "next.done"])
        assert np.array_equal(columns["next.reward"], raw["steps/reward"])
        assert columns["next.done"].tolist() == [False] * (row.length - 1) + [True]
        top = made.frames(number, "observation.images.top").astype(int)
        want = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in raw["steps/observation/image"]])
        assert np.abs(top.mean((1, 2)) - want.mean((1, 2))).max() < 3
        assert made.frames(number, "observation.images.wrist").shape[1:] == (32, 48, 3)
    stored = made.table(0, ["observation.depth.top"]).column(0)[3].as_py()["bytes"]
    want = np.asarray(Image.open(io.BytesIO(episode(0, 7)["steps/observation/depth"][3])))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), want)


def test_same_bytes_for_any_workers(recorded: Path, tmp_path: Path) -> None:
    made = [digest_tree(converted(recorded, tmp_path / str(n), workers=n).root) for n in (1, 3)]
    assert made[0] == made[1]


def test_one_split_and_a_task_from_the_mapping(recorded: Path, tmp_path: Path) -> None:
    mapping = replace(MAPPING, options={"splits": ["val"]}, task="do it")
    recording = Source(recorded, mapping).scan()
    assert [(episode.length, episode.split, episode.task) for episode in recording.episodes] == [(6, "val", "do it")]


def test_episodes_that_the_metadata_excludes_are_left_out(recorded: Path, tmp_path: Path) -> None:
    """Bridge has episodes without an instruction, which alone would be refused."""
    mapping = replace(MAPPING, options={"only": {"episode_metadata/has_language": True}})
    made = converted(recorded, tmp_path, mapping)
    assert [row.length for row in made.rows] == [7, 9, 6] and np.array_equal(
        made.actions(1), episode(2, 9)["steps/action"]
    )
    assert [row.source["record"] for row in made.rows if row.source] == [0, 0, 0], "counted in their own shard"
    with pytest.raises(DataError, match="did you mean 'episode_metadata/has_language'"):
        converted(recorded, tmp_path, replace(MAPPING, options={"only": {"episode_metadata/has_languag": True}}))


# ---- refusals ------------------------------------------------------------------------------------------------------
def shard(root: Path, number: int = 0) -> Path:
    return sorted(root.rglob("*train.tfrecord*"))[number]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def edit(root: Path, name: str, old: str, new: str) -> None:
    path = next(root.rglob(name))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "length": (lambda root: flip(shard(root), 0), "length whose checksum"),
    "payload": (lambda root: flip(shard(root), 500), "record whose checksum"),
    "cut": (lambda root: shard(root).write_bytes(shard(root).read_bytes()[:-9]), "of which"),
    "cut in a head": (lambda root: shard(root).write_bytes(shard(root).read_bytes()[:7]), "head"),
    "no shard": (lambda root: shard(root, 1).unlink(), "incomplete"),
    "fewer episodes": (lambda root: shard(root).write_bytes(b""), "promises"),
    "no message": (lambda root: shard(root, 1).write_bytes(framed(b"\xff\xff")), "tf.train.Example"),
    "other format": (lambda root: edit(root, "dataset_info.json", '"tfrecord"', '"array_record"'), "fileFormat"),
    "no steps": (lambda root: edit(root, "features.json", '"steps"', '"rows"'), "steps"),
    "wider": (lambda root: edit(root, "features.json", '["3"]', '["2"]'), "steps/action"),
    "larger picture": (lambda root: edit(root, "features.json", '["16", "24", "3"]', '["16", "20", "3"]'), "size"),
    "no features": (lambda root: next(root.rglob("features.json")).unlink(), "features.json"),
}


@pytest.mark.parametrize("fault", DAMAGE)
def test_refuses_damage(recorded: Path, tmp_path: Path, fault: str) -> None:
    copy = shutil.copytree(recorded, tmp_path / "copy")
    damage, word = DAMAGE[fault]
    damage(copy)
    before = digest_tree(copy)
    with pytest.raises(DataError, match=word):
        converted(copy, tmp_path)
    assert digest_tree(copy) == before


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "two sentences": ({"steps/language_instruction": [b"one", b"two"]}, "sentences"),
    "not text": ({"steps/language_instruction": [b"\xff"]}, "UTF-8"),
    "ragged": ({"steps/reward": np.zeros(3, np.float32)}, "steps/reward"),
    "a picture of another size": ({"steps/observation/image": [packed(np.zeros((4, 4, 3), np.uint8))] * 5}, "size"),
    "no picture": ({"steps/observation/image": [b"GIF89a"] * 5}, "decoded"),
    "no rows": ({"steps/action": [b""]}, "steps/action"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_refuses_episodes(tmp_path: Path, fault: str) -> None:
    changed, word = BROKEN[fault]
    root = write_rlds(tmp_path / "toy", broken={1: changed})
    with pytest.raises(DataError, match=word):
        converted(root, tmp_path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"state": (Part("observation/stat"),)}, "observation/state"),
        ({"state": (Part("names"),)}, "without TensorFlow"),
        ({"options": {"instruction": "nowhere"}}, "options.instruction"),
        ({"options": {"splits": ["test"]}}, "incomplete"),
    ],
)
def test_refuses_mappings(recorded: Path, tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError, match=word):
        converted(recorded, tmp_path, replace(MAPPING, **change))


def test_records_are_streamed(recorded: Path) -> None:
    """Taking the first record reads no more of the file than its own bytes (and what Python buffers)."""
    path = shard(recorded)
    stream = records(path)
    place, data = next(stream)
    assert place.offset == 0 and len(data) == place.size < path.stat().st_size
    stream.close()
