"""The example ROS 2 node against a stand-in of rclpy: what it subscribes to, when it publishes, what it says of faults.

ROS itself is not here. The stand-in has the calls that the node makes, with rclpy's names and arguments.
"""

from __future__ import annotations

import importlib
import sys
import types
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from prts_core.io.errors import ServeError
from prts_core.serving.server import PolicyServer, ServerConfig
from tests.fixtures.running_server import running
from tests.serving.fake_policy import FakePolicy, Held

CAMERAS = ["observation.images.top=/top", "observation.images.wrist=/wrist"]


class Node:
    given: dict[str, Any] = {}

    def __init__(self, name: str) -> None:
        self.callbacks: dict[str, Any] = {}
        self.published: list[list[float]] = []
        self.said: list[str] = []
        self.timer_period: float | None = None

    def declare_parameter(self, name: str, default: Any) -> SimpleNamespace:
        return SimpleNamespace(value=self.given.get(name, default))

    def create_publisher(self, kind: type, topic: str, depth: int) -> SimpleNamespace:
        return SimpleNamespace(publish=lambda message: self.published.append(message.data))

    def create_subscription(self, kind: type, topic: str, callback: Any, depth: int) -> None:
        self.callbacks[topic] = callback

    def create_timer(self, period: float, callback: Any) -> SimpleNamespace:
        self.timer_period = period
        return SimpleNamespace(cancel=lambda: self.said.append("timer cancelled"))

    def get_logger(self) -> SimpleNamespace:
        def say(text: str, **more: Any) -> None:
            self.said.append(text)

        return SimpleNamespace(error=say, warning=say, info=say)

    def destroy_node(self) -> None:
        self.said.append("destroyed")


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = {name: types.ModuleType(name) for name in ("rclpy", "rclpy.node", "sensor_msgs.msg", "std_msgs.msg")}
    made["rclpy.node"].Node = Node  # type: ignore[attr-defined]
    for name, kinds in (("sensor_msgs.msg", ("Image", "JointState")), ("std_msgs.msg", ("Float64MultiArray",))):
        for kind in kinds:
            setattr(made[name], kind, SimpleNamespace)
    for name, one in made.items():
        monkeypatch.setitem(sys.modules, name, one)
    monkeypatch.delitem(sys.modules, "prts_core.robot.ros2_node", raising=False)
    yield importlib.import_module("prts_core.robot.ros2_node")
    sys.modules.pop("prts_core.robot.ros2_node", None)


def picture(value: int, encoding: str = "rgb8", padding: int = 0) -> SimpleNamespace:
    rows = np.zeros((8, 24 + padding), np.uint8)
    rows[:, :24] = np.tile([value, value + 1, value + 2], 8)
    return SimpleNamespace(encoding=encoding, height=8, width=8, step=24 + padding, data=rows.tobytes())


JOINTS = SimpleNamespace(name=["gripper", "y", "x", "other"], position=[0.3, 0.2, 0.1, 9.0])


def test_one_command_a_period_once_every_input_is_here_and_fresh(module, monkeypatch):
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as url:
        monkeypatch.setattr(Node, "given", {"url": url, "prompt": "open it", "cameras": CAMERAS})
        node = module.PolicyNode()
        assert node.timer_period == 1 / 20 and set(node.callbacks) == {"/top", "/wrist", "/joint_states"}
        now = [100.0]
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
        node.on_step()
        assert node.published == [] and "missing or stale" in node.said[0]
        node.callbacks["/top"](picture(3))
        node.callbacks["/wrist"](picture(4, "bgr8", padding=8))
        node.callbacks["/joint_states"](JOINTS)
        seen = node.observe()
        assert seen["observation/state"].tolist() == pytest.approx([0.1, 0.2, 0.3])
        assert seen["observation.images.top"][0, 0].tolist() == [3, 4, 5]
        assert seen["observation.images.wrist"][7, 7].tolist() == [6, 5, 4] and seen["prompt"] == "open it"
        node.on_step()  # begins to wait for the first chunk, beside the executor
        node.starting.join(60)
        node.on_step()
        assert len(node.published) == 1 and len(node.published[0]) == 2 and np.isfinite(node.published[0]).all()
        now[0] += 1.0
        node.on_step()
        assert len(node.published) == 1, "an input of a second ago is not acted on"
        node.callbacks["/joint_states"](SimpleNamespace(name=["x"], position=[0.0]))
        assert "not published" in node.said[-2] and "y, gripper" in node.said[-2] and node.said[-1] == "timer cancelled"
        node.destroy_node()
        assert "1 steps" in node.said[-2] and node.said[-1] == "destroyed"


@pytest.mark.parametrize(
    "given, told",
    [
        ({"prompt": ""}, "needs a sentence"),
        ({"cameras": CAMERAS[:1]}, r"one topic for each camera.*observation\.images\.wrist=<topic>"),
    ],
)
def test_settings_that_do_not_fit_are_told(module, monkeypatch, given, told):
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as url:
        monkeypatch.setattr(Node, "given", {"url": url, "prompt": "open it", "cameras": CAMERAS} | given)
        with pytest.raises(ServeError, match=told):
            module.PolicyNode()


def test_encodings_that_are_not_read_are_told(module):
    with pytest.raises(ServeError, match=r"encoding.*mono16.*rgb8 or bgr8"):
        module.pixels(picture(0, "mono16"))


def test_the_first_chunk_that_fails_ends_the_node_with_the_reason(module, monkeypatch):
    with running(PolicyServer(FakePolicy(), ServerConfig(port=0))) as url:
        monkeypatch.setattr(Node, "given", {"url": url, "prompt": "explode", "cameras": CAMERAS})
        node = module.PolicyNode()
        for topic, message in (("/top", picture(3)), ("/wrist", picture(4)), ("/joint_states", JOINTS)):
            node.callbacks[topic](message)
        node.on_step()
        node.starting.join(60)
        node.on_step()
        assert node.published == [] and "refused" in node.said[-2] and node.said[-1] == "timer cancelled"
        node.destroy_node()


def test_a_server_that_hangs_ends_the_commands_with_the_chunk(module, monkeypatch):
    """The fake policy's actions may be displacements: the last one repeated would move the robot on."""
    thinking = Held()
    thinking.go_on.set()
    with running(PolicyServer(thinking, ServerConfig(port=0))) as url:
        monkeypatch.setattr(Node, "given", {"url": url, "prompt": "open it", "cameras": CAMERAS})
        node = module.PolicyNode()
        for topic, message in (("/top", picture(3)), ("/wrist", picture(4)), ("/joint_states", JOINTS)):
            node.callbacks[topic](message)
        node.stale_s = 600.0
        node.on_step()
        node.starting.join(60)
        thinking.go_on.clear()
        for _ in range(6):
            if "timer cancelled" not in node.said:
                node.on_step()
        assert len(node.published) == 4, "a chunk has four rows"
        assert "next one is not here" in node.said[-2] and node.said[-1] == "timer cancelled"
        thinking.go_on.set()
        node.destroy_node()
