"""Run a served policy as a ROS 2 node: cameras and joints in, one joint command a control period out. An example.

    source /opt/ros/jazzy/setup.bash
    python -m prts_client.robot.ros2_node --ros-args -p url:=ws://gpu:8000 -p prompt:="open the faucet" \\
        -p cameras:="['observation.images.top=/top/image_raw']" -p joint_states:=/joint_states \\
        -p commands:=/forward_position_controller/commands

It subscribes to sensor_msgs/Image (rgb8 or bgr8, of the size that the contract says) and sensor_msgs/JointState, whose
joints have the names of the contract's state, and publishes std_msgs/Float64MultiArray, the action in the contract's
order and units. Nothing is published before every input has come, nor while one is older than `stale_s`, and nothing
more once a chunk has ended and the next one is not here (`when_starved`): the controller must stop the robot where no
commands come. `-p when_starved:=hold` repeats the last action, which is right for positions alone. It was checked
against a stand-in of rclpy, and not with ROS itself: copy it, and try it with the robot's power off.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np
import rclpy
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray

from ..contract import PolicyContract
from ..io.errors import PrtsError, ServeError
from .action_queue import ActionQueue
from .openpi import OpenpiPolicy

PARAMETERS = {
    "url": "ws://127.0.0.1:8000",
    "prompt": "",
    "cameras": [""],  # "<camera key of the contract>=<topic>", one each
    "joint_states": "/joint_states",
    "commands": "/commands",
    "when_starved": "stop",  # "hold" goes on sending the last action: for positions only, displacements move on by it
    "stale_s": 0.5,
    "patience_s": 10.0,
}
STATE = "observation/state"


def pixels(message: Any) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a sensor_msgs/Image. ServeError for another encoding than rgb8 and bgr8."""
    if message.encoding not in ("rgb8", "bgr8"):
        raise ServeError("An image has an encoding that is not read", found=message.encoding, expected="rgb8 or bgr8")
    rows = np.frombuffer(message.data, np.uint8).reshape(message.height, message.step)
    image = rows[:, : 3 * message.width].reshape(message.height, message.width, 3)
    return np.ascontiguousarray(image if message.encoding == "rgb8" else image[..., ::-1])


def joints(message: Any, names: list[str]) -> np.ndarray:
    """(D,) float32: the positions of a sensor_msgs/JointState in the order of `names`. ServeError where one lacks."""
    found = dict(zip(message.name, message.position))  # noqa: B905 - a driver may send no position for some
    if absent := [name for name in names if name not in found]:
        raise ServeError(
            "A joint of the policy's state is not published",
            field=", ".join(absent),
            found=", ".join(message.name) or "no joints",
            cure="rename the joints, or publish the state under the contract's names",
        )
    return np.array([found[name] for name in names], np.float32)


class PolicyNode(Node):
    """One robot, one sentence. It ends its timer at the first fault, and says it."""

    def __init__(self) -> None:
        super().__init__("prts_policy")
        given = {name: self.declare_parameter(name, default).value for name, default in PARAMETERS.items()}
        policy = OpenpiPolicy(
            given["url"], api_key=os.environ.get("PRTS_API_KEY") or None, patience_s=given["patience_s"]
        )
        if policy.contract is None:
            raise ServeError("The server does not say what its numbers mean", found=given["url"])
        if not given["prompt"].strip():
            raise ServeError("The robot needs a sentence", field="prompt", expected='-p prompt:="open the faucet"')
        self.contract: PolicyContract = policy.contract
        self.prompt, self.stale_s = given["prompt"], given["stale_s"]
        self.queue = ActionQueue(policy, self.contract.contract.control_hz, when_starved=given["when_starved"])
        self.seen: dict[str, np.ndarray] = {}
        self.came: dict[str, float] = {}
        self.starting: threading.Thread | None = None
        self.fault: PrtsError | None = None
        self.commands = self.create_publisher(Float64MultiArray, given["commands"], 1)
        self._subscribe(given)
        self.timer = self.create_timer(1 / self.contract.contract.control_hz, self.on_step)

    def _subscribe(self, given: dict[str, Any]) -> None:
        names = [dimension.name for dimension in self.contract.contract.state]
        topics = dict(pair.partition("=")[::2] for pair in given["cameras"] if pair)
        wanted = [camera.key for camera in self.contract.contract.cameras]
        if sorted(topics) != sorted(wanted):
            raise ServeError(
                "There is not one topic for each camera of the policy",
                field="cameras",
                found=", ".join(topics) or "none",
                expected=", ".join(f"{key}=<topic>" for key in wanted),
            )
        for key, topic in topics.items():
            self.create_subscription(Image, topic, lambda message, key=key: self.on_input(key, pixels, message), 1)
        self.create_subscription(
            JointState, given["joint_states"], lambda message: self.on_input(STATE, joints, message, names), 1
        )

    def on_input(self, key: str, read: Any, *message: Any) -> None:
        try:
            self.seen[key], self.came[key] = read(*message), time.monotonic()
        except PrtsError as err:
            self.end(err)

    def observe(self) -> dict[str, Any]:
        return {**self.seen, "prompt": self.prompt}

    def fresh(self) -> bool:
        """Whether every input is here and young enough."""
        wanted = 1 + len(self.contract.contract.cameras)
        return len(self.came) == wanted and time.monotonic() - min(self.came.values()) <= self.stale_s

    def on_step(self) -> None:
        """A control period has passed: publish one action. The first chunk is waited for beside the executor."""
        if self.fault is not None:
            return self.end(self.fault)
        if not self.fresh():
            return self.get_logger().warning("an input is missing or stale: nothing is sent", throttle_duration_sec=1.0)
        if self.starting is None:
            self.starting = threading.Thread(target=self._start, daemon=True)
            self.starting.start()
        if self.starting.is_alive():
            return None
        try:
            action = self.queue.next(self.observe)
        except PrtsError as err:
            return self.end(err)
        self.commands.publish(Float64MultiArray(data=[float(number) for number in action]))
        return None

    def _start(self) -> None:
        try:
            self.queue.start(self.observe())
        except PrtsError as err:
            self.fault = err

    def end(self, err: PrtsError) -> None:
        self.get_logger().error(str(err))
        self.timer.cancel()

    def destroy_node(self) -> None:
        self.get_logger().info(str(self.queue.cadence))
        self.queue.close()
        super().destroy_node()


def main() -> None:
    rclpy.init()
    node = None
    try:
        node = PolicyNode()
        rclpy.spin(node)
    except PrtsError as err:
        print(f"error: {err}")
    except KeyboardInterrupt:
        pass
    finally:
        if node is not None:
            node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main()
