"""MCAP recordings, written here with the mcap packages, come out as rows at a fixed rate; gaps are refused."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from google.protobuf.message_factory import GetMessageClass
from mcap.writer import Writer as JsonWriter
from mcap_protobuf.writer import Writer as ProtobufWriter
from mcap_ros2.writer import Writer as Ros2Writer
from PIL import Image

from prts_core.config.mapping import CameraPart, DepthPart, Mapping, Part
from prts_core.config.schema import VideoConfig
from prts_core.data.convert.lerobot_v30 import import_dataset
from prts_core.data.convert.lerobot_v30_export import export
from prts_core.data.convert.mcap import Source, choose, rows
from prts_core.data.convert.run import convert
from prts_core.data.convert.tfrecord import example_class
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import ConfigError, DataError
from prts_core.store.listing import digest_tree

SECOND = 1_000_000_000
T0 = 1_700_000_000 * SECOND
HEADER = "std_msgs/Header header\n"
_STD = "=" * 80 + "\nMSG: std_msgs/Header\nbuiltin_interfaces/Time stamp\nstring frame_id\n" + "=" * 80
_STD += "\nMSG: builtin_interfaces/Time\nint32 sec\nuint32 nanosec\n"
DEFINITIONS = {
    "sensor_msgs/msg/JointState": HEADER + "string[] name\nfloat64[] position\nfloat64[] velocity\nfloat64[] effort\n",
    "sensor_msgs/msg/CompressedImage": HEADER + "string format\nuint8[] data\n",
    "sensor_msgs/msg/Image": HEADER
    + "uint32 height\nuint32 width\nstring encoding\nuint8 is_bigendian\nuint32 step\nuint8[] data\n",
    "geometry_msgs/msg/Vector3Stamped": HEADER
    + "geometry_msgs/Vector3 vector\n"
    + "=" * 80
    + "\nMSG: geometry_msgs/Vector3\nfloat64 x\nfloat64 y\nfloat64 z\n",
    "std_msgs/msg/String": "string data\n",
}
JOINTS = ["a", "b", "grip"]
MAPPING = Mapping(
    name="toy_mcap",
    source="mcap",
    state=(Part("/joint_states:position", names=("a", "b", "grip")), Part("/force:vector", names=("fx", "fy", "fz"))),
    action=(Part("/command:position"),),
    cameras={"top": CameraPart("/top/compressed"), "wrist": CameraPart("/wrist/raw")},
    depth={"top": DepthPart("/depth/raw")},
    fps=10.0,
    options={"instruction": "/task"},
)


def stamped(time: int) -> dict[str, Any]:
    return {"stamp": {"sec": time // SECOND, "nanosec": time % SECOND}, "frame_id": ""}


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def camera(row: int) -> np.ndarray:
    return np.full((16, 24, 3), (10 * row % 250, 60, 200), np.uint8)


Message = tuple[str, str, int, dict[str, Any]]  # topic, schema, time, content


def messages(seconds: float = 2.0, rate: int = 50, seed: int = 0) -> list[Message]:
    """Joints at `rate` Hz (every other one in another order), pictures at 10 Hz, a command at 20 Hz, late by 3 ms."""
    rng = np.random.default_rng(seed)
    made: list[Message] = [("/task", "std_msgs/msg/String", T0, {"data": f"lift number {seed}"})]
    for step in range(int(seconds * rate) + 1):
        time = T0 + round(step * SECOND / rate)
        position = [step / rate, step / rate + 1, float(seed)]
        order = [0, 1, 2] if step % 2 == 0 else [2, 0, 1]
        content = {"name": [JOINTS[i] for i in order], "position": [position[i] for i in order]}
        content |= {"header": stamped(time - 1000), "velocity": [], "effort": []}
        made.append(("/joint_states", "sensor_msgs/msg/JointState", time, content))
        vector = dict(zip("xyz", rng.normal(size=3).tolist(), strict=True))
        force = {"header": stamped(time), "vector": vector}
        made.append(("/force", "geometry_msgs/msg/Vector3Stamped", time, force))
    for step in range(int(seconds * 20) + 1):
        time = T0 + step * SECOND // 20 + 3_000_000
        content = {"header": stamped(time), "name": JOINTS, "position": [step / 20] * 3, "velocity": [], "effort": []}
        made.append(("/command", "sensor_msgs/msg/JointState", time, content))
    for step in range(int(seconds * 10) + 1):
        time = T0 + step * SECOND // 10
        top, head = camera(step), {"header": stamped(time)}
        made.append(
            ("/top/compressed", "sensor_msgs/msg/CompressedImage", time, head | {"format": "png", "data": png(top)})
        )
        padded = np.zeros((16, 80), np.uint8)  # rows of 72 bytes, padded to 80
        padded[:, :72] = top[..., ::-1].reshape(16, 72)
        shape = {"height": 16, "width": 24, "is_bigendian": 0}
        raw = head | shape | {"encoding": "bgr8", "step": 80, "data": padded.tobytes()}
        made.append(("/wrist/raw", "sensor_msgs/msg/Image", time, raw))
        deep = np.full((16, 24), 40_000 + step, np.uint16)  # beyond int16
        raw = head | shape | {"encoding": "16UC1", "step": 48, "data": deep.tobytes()}
        made.append(("/depth/raw", "sensor_msgs/msg/Image", time, raw))
    return sorted(made, key=lambda message: message[2])


def write_ros2(path: Path, content: list[Message]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        writer = Ros2Writer(file)
        schemas = {name: writer.register_msgdef(name, text + _STD) for name, text in DEFINITIONS.items()}
        for topic, schema, time, body in content:
            writer.write_message(topic, schemas[schema], body, log_time=time, publish_time=time)
        writer.finish()
    return path


def converted(root: Path, folder: Path, mapping: Mapping = MAPPING, workers: int = 2) -> LeRobotDataset:
    options = {"mapping": mapping, "dataset": "toy", "robot": None, "video": VideoConfig(crf=1), "workers": workers}
    convert(root, folder / "output", folder / "work", **options)  # type: ignore[arg-type]
    return LeRobotDataset.open(folder / "output")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, and a bag of two files that belong together. Read only: copy it to change it."""
    root = tmp_path_factory.mktemp("mcap")
    write_ros2(root / "one.mcap", messages())
    write_ros2(root / "two.mcap", messages(1.0, seed=1))
    content = messages(1.5, seed=2)
    half = len(content) // 2
    write_ros2(root / "bag/bag_0.mcap", content[:half])
    write_ros2(root / "bag/bag_1.mcap", content[half:])
    names = "\n".join(f"    - bag_{number}.mcap" for number in range(2))
    (root / "bag/metadata.yaml").write_text(f"rosbag2_bagfile_information:\n  relative_file_paths:\n{names}\n")
    return root


def test_converts(recorded: Path, tmp_path: Path) -> None:
    made = converted(recorded, tmp_path)
    assert made.fps == 10 and sorted(row.length for row in made.rows) == [10, 15, 20]
    by_task = {row.tasks[0]: row for row in made.rows}
    row = by_task["lift number 0"]
    states, actions = made.states(row.episode_index), made.actions(row.episode_index)
    # the command begins 3 ms late, and so do the rows; each sees the joints of its 100 ms, not of its future
    assert np.allclose(states[:, 0], np.arange(20) / 10) and np.allclose(states[:, 1], states[:, 0] + 1)
    assert np.allclose(states[:, 2], 0) and states.shape == (20, 6)
    assert np.allclose(actions[:, 0], np.arange(20) / 10)
    assert made.info.features["observation.state"].flat_names == [*JOINTS, "fx", "fy", "fz"]
    for name in ("top", "wrist"):
        frames = made.frames(row.episode_index, f"observation.images.{name}").astype(int)
        assert np.abs(frames - np.stack([camera(step) for step in range(20)])).max() <= 6
    cells = made.table(row.episode_index, ["observation.depth.top"]).column(0)
    depth = [np.asarray(Image.open(io.BytesIO(cell.as_py()["bytes"])))[0, 0] for cell in cells]
    assert depth == list(range(40_000, 40_020))
    bag = by_task["lift number 2"]
    assert bag.length == 15 and np.allclose(made.states(bag.episode_index)[:, 0], np.arange(15) / 10)


def test_same_bytes_for_any_workers(recorded: Path, tmp_path: Path) -> None:
    made = [digest_tree(converted(recorded, tmp_path / str(n), workers=n).root) for n in (1, 3)]
    assert made[0] == made[1]


def test_header_clock_and_joints_of_the_mapping(recorded: Path, tmp_path: Path) -> None:
    options = {"clock": "header", "joints": {"/joint_states": ["grip", "a"]}}
    mapping = replace(MAPPING, state=(Part("/joint_states:position"),), options=options, task="lift")
    states = converted(recorded / "two.mcap", tmp_path, mapping).states(0)
    assert states.shape == (10, 2) and np.allclose(states[:, 0], 1) and np.allclose(states[:, 1], np.arange(10) / 10)


def write_foxglove(path: Path, schema: str, picture: Callable[[int], dict[str, Any]], steps: int = 5) -> Path:
    """JSON messages at 5 Hz: /pose, /cmd and the pictures /top. Data is base64, as JSON has it."""
    with path.open("wb") as file:
        writer = JsonWriter(file)
        writer.start()
        channels = {}
        for topic, name in {"/pose": "Pose", "/top": schema, "/cmd": "Command"}.items():
            channels[topic] = writer.register_channel(topic, "json", writer.register_schema(name, "jsonschema", b"{}"))
        for step in range(steps):
            body = picture(step)
            top = body | {"data": base64.b64encode(body["data"]).decode()}
            bodies = {"/pose": {"pose": {"position": {"x": step, "y": 0.5, "z": 1}}}, "/top": top}
            for topic, content in (bodies | {"/cmd": {"data": [step, -step]}}).items():
                time = T0 + step * SECOND // 5
                writer.add_message(channels[topic], time, json.dumps(content).encode(), time)
        writer.finish()
    return path


FOX = Mapping(
    name="fox",
    source="mcap",
    state=(Part("/pose:pose.position"),),
    action=(Part("/cmd:data"),),
    cameras={"top": CameraPart("/top", store="image")},
    fps=5.0,
    task="go",
)


def raw_image(step: int) -> dict[str, Any]:
    return {"width": 24, "height": 16, "encoding": "bgr8", "step": 72, "data": camera(step)[..., ::-1].tobytes()}


def test_foxglove_json(tmp_path: Path) -> None:
    path = write_foxglove(
        tmp_path / "one.mcap", "foxglove.CompressedImage", lambda step: {"format": "png", "data": png(camera(step))}
    )
    made = converted(path, tmp_path, FOX)
    assert made.states(0).tolist() == [[step, 0.5, 1] for step in range(5)]
    assert made.actions(0).tolist() == [[step, -step] for step in range(5)]
    assert np.array_equal(made.frames(0, "observation.images.top")[4], camera(4))


def test_foxglove_raw_image(tmp_path: Path) -> None:
    path = write_foxglove(tmp_path / "one.mcap", "foxglove.RawImage", raw_image)
    frames = converted(path, tmp_path, FOX).frames(0, "observation.images.top")
    assert np.array_equal(frames, np.stack([camera(step) for step in range(5)]))


def video_messages(codec: str, steps: int) -> list[bytes]:
    """A picture a message with headers in keyframes, every fifth of them; no picture is reordered."""
    encoder = av.CodecContext.create(codec, "w")
    encoder.width, encoder.height, encoder.pix_fmt = 48, 32, "yuv420p"  # type: ignore[attr-defined]
    encoder.time_base = Fraction(1, 5)
    encoder.options = {"g": "5", "bf": "0", "tune": "zerolatency", "crf": "5", "sc_threshold": "0"}
    if codec == "libx265":
        encoder.options |= {"x265-params": "bframes=0:scenecut=0:repeat-headers=1:log-level=none"}
    frames = [av.VideoFrame.from_ndarray(camera(step).repeat(2, 0).repeat(2, 1), "rgb24") for step in range(steps)]
    made = [packet for frame in [*frames, None] for packet in encoder.encode(frame)]  # type: ignore[attr-defined]
    assert [packet.is_keyframe for packet in made] == [step % 5 == 0 for step in range(steps)]
    return [bytes(packet) for packet in made]


@pytest.mark.parametrize(("codec", "name"), [("libx264", "h264"), ("libx265", "h265")])
def test_foxglove_compressed_video(tmp_path: Path, codec: str, name: str) -> None:
    packets = video_messages(codec, 12)
    body = lambda step: {"format": name, "data": packets[step]}  # noqa: E731
    path = write_foxglove(tmp_path / "one.mcap", "foxglove.CompressedVideo", body, 12)
    half = replace(FOX, fps=2.5)  # every other picture is only there to decode the next
    frames = converted(path, tmp_path, half).frames(0, "observation.images.top").astype(int)
    wanted = np.stack([camera(step).repeat(2, 0).repeat(2, 1) for step in range(0, 12, 2)])
    assert frames.shape == wanted.shape and np.abs(frames - wanted).max() < 12


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda packets: packets[1:], "keyframe|video|picture"),
        (lambda packets: [*packets[:3], b"no video", *packets[4:]], "picture"),
        (lambda packets: [*packets[:3], b"", *packets[4:]], "picture"),
    ],
)
def test_refuses_video_with_a_hole(tmp_path: Path, change: Callable[[list[bytes]], list[bytes]], word: str) -> None:
    packets = change(video_messages("libx264", 10))
    body = lambda step: {"format": "h264", "data": packets[step]}  # noqa: E731
    path = write_foxglove(tmp_path / "one.mcap", "foxglove.CompressedVideo", body, len(packets))
    with pytest.raises(DataError, match=f"picture's message cannot be read.*/top.*({word})"):
        converted(path, tmp_path, FOX)


def test_ros1_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with (tmp_path / "one.mcap").open("wb") as file:
        writer = JsonWriter(file)
        writer.start()
        schema = writer.register_schema("sensor_msgs/JointState", "ros1msg", b"float64[] position")
        for topic in ("/joint_states", "/command"):
            channel = writer.register_channel(topic, "ros1", schema)
            writer.add_message(channel, T0, bytes(16), T0)
        writer.finish()
    part = {"state": (Part("/joint_states:position"),), "action": (Part("/command:position"),)}
    with pytest.raises(DataError, match=r"ros1, schema ros1msg.*rosbags-convert"):
        converted(tmp_path / "one.mcap", tmp_path, Mapping("m", "mcap", **part, fps=5.0, task="go"))


def test_protobuf(tmp_path: Path) -> None:
    """A message of numbers, described in the file itself (tf.train's FloatList serves as well as any)."""
    kind = example_class().DESCRIPTOR.file.message_types_by_name["FloatList"]  # type: ignore[attr-defined]
    with (tmp_path / "one.mcap").open("wb") as file:
        writer = ProtobufWriter(file)
        for step in range(4):
            message = GetMessageClass(kind)(value=[step, step + 0.5])
            for topic in ("/state", "/command"):
                writer.write_message(topic, message, T0 + step * SECOND // 4, T0 + step * SECOND // 4)
        writer.finish()
    parts = {"state": (Part("/state:value"),), "action": (Part("/command:value"),)}
    made = converted(tmp_path / "one.mcap", tmp_path, Mapping(name="p", source="mcap", fps=4.0, task="go", **parts))
    assert made.states(0).tolist() == made.actions(0).tolist() == [[step, step + 0.5] for step in range(4)]


def test_depth_survives_v30_and_back(recorded: Path, tmp_path: Path) -> None:
    made = converted(recorded / "two.mcap", tmp_path)
    export(made.root, tmp_path / "v30", tmp_path / "to")
    import_dataset(tmp_path / "v30", tmp_path / "back", tmp_path / "fro", dataset="toy", robot=None, workers=1)
    assert LeRobotDataset.open(tmp_path / "back").table(0).equals(made.table(0), check_metadata=True)


# ---- alignment -----------------------------------------------------------------------------------------------------
def test_rows_begin_and_end_where_all_streams_run() -> None:
    times = {"a": np.arange(0, 10) * SECOND, "b": np.arange(3, 8) * SECOND}
    assert (rows(times, 2.0, "x") / SECOND).tolist() == [3, 3.5, 4, 4.5, 5, 5.5, 6, 6.5, 7]
    with pytest.raises(DataError, match="never overlap"):
        rows({"a": times["a"], "late": times["a"] + 20 * SECOND}, 2.0, "x")


def test_rows_do_not_drift() -> None:
    at = rows({"a": np.array([T0, T0 + 3600 * SECOND])}, 30.0, "x")
    assert len(at) == 108_001 and at[-1] == T0 + 3600 * SECOND


def test_last_never_sees_the_future_and_nearest_may() -> None:
    times = np.array([0, 100, 190, 310]) * 1_000_000
    at = np.array([0, 99, 150, 189, 310]) * 1_000_000
    assert choose(times, at, "last", 1, "t", "x").tolist() == [0, 0, 1, 1, 3]
    assert choose(times, at, "nearest", 1, "t", "x").tolist() == [0, 1, 2, 2, 3]
    shuffled = np.array([2, 0, 3, 1])
    assert shuffled[choose(times[shuffled], at, "last", 1, "t", "x")].tolist() == [0, 0, 1, 1, 3]
    with pytest.raises(DataError, match=r"gap.*row 1.*0\.099"):
        choose(times, at, "last", 0.09, "t", "x")


# ---- refusals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"action": (Part("/comand:position"),)}, "did you mean '/command'"),
        ({"action": (Part("/command"),)}, "which of its numbers"),
        ({"action": (Part("/command:velocity"),)}, "no numbers"),
        ({"action": (Part("/command:header"),)}, "no numbers"),
        ({"action": (Part("/command:__class__"),)}, "no numbers"),
        ({"options": {"joints": {"/joint_states": ["elbow"]}}, "task": "go"}, "joints"),
        ({"options": {"tolerance_s": 0.001}, "task": "go"}, "gap"),
    ],
)
def test_refuses_mappings(recorded: Path, tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(DataError, match=word):
        converted(recorded, tmp_path, replace(MAPPING, **change))


def test_needs_a_rate(recorded: Path) -> None:
    with pytest.raises(ConfigError, match="fps"):
        Source(recorded, replace(MAPPING, fps=None))


def gap(content: list[Message]) -> list[Message]:
    return [m for m in content if m[0] != "/wrist/raw" or not 0.5 < (m[2] - T0) / SECOND < 1.2]


def edited(topic: str, after: int, **changes: Any) -> Callable[[list[Message]], list[Message]]:
    """The message number `after` of `topic` with other content."""

    def edit(content: list[Message]) -> list[Message]:
        places = [place for place, message in enumerate(content) if message[0] == topic]
        name, schema, time, body = content[places[after]]
        return [*content[: places[after]], (name, schema, time, body | changes), *content[places[after] + 1 :]]

    return edit


BAD: dict[str, tuple[Callable[[list[Message]], list[Message]], str]] = {
    "gap": (gap, "/wrist/raw.*row"),
    "no topic": (lambda content: [m for m in content if m[0] != "/command"], "lacks a topic"),
    "encoding": (edited("/wrist/raw", 4, encoding="yuv422"), "yuv422"),
    "short": (edited("/wrist/raw", 4, data=b"12"), "bytes"),
    "picture": (edited("/top/compressed", 4, data=b"no picture"), "decoded"),
    "size": (edited("/top/compressed", 4, data=png(np.zeros((4, 4, 3), np.uint8))), "size"),
    "joints": (edited("/joint_states", 10, name=["a", "b", "c"]), "other joints"),
    "width": (edited("/command", 4, position=[1.0], name=["a"]), r"other joints|width"),
}


@pytest.mark.parametrize("fault", BAD)
def test_refuses_recordings(tmp_path: Path, fault: str) -> None:
    change, word = BAD[fault]
    write_ros2(tmp_path / "raw/one.mcap", change(messages()))
    with pytest.raises(DataError, match=word):
        converted(tmp_path / "raw", tmp_path)


def test_refuses_damage(recorded: Path, tmp_path: Path) -> None:
    whole = (recorded / "one.mcap").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for number, data in enumerate((whole[:-40], whole[: len(whole) // 2], bytes(flipped), b"no mcap", b"")):
        path = tmp_path / f"{number}/one.mcap"
        path.parent.mkdir()
        path.write_bytes(data)
        with pytest.raises(DataError, match="truncated or damaged"):
            converted(path, tmp_path / f"out{number}")
    bag = shutil.copytree(recorded / "bag", tmp_path / "bag")
    (bag / "bag_1.mcap").unlink()
    with pytest.raises(DataError, match="lacks a file"):
        converted(bag, tmp_path)
