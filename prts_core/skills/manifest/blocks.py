"""Describe what only one kind of skill has: a ROS interface, a detector, a reward model, a playbook."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from prts_core.config.checks import Strict
from prts_core.skills.manifest.values import Count, NotEmpty, Positive, Rate

Word = Annotated[str, Field(min_length=1, max_length=200)]
Sentence = Annotated[str, Field(min_length=1, max_length=500)]


def _json_object(text: str) -> str:
    try:
        if isinstance(json.loads(text), dict):
            return text
    except (json.JSONDecodeError, RecursionError) as err:
        raise ValueError(f"no JSON: {err}") from err
    raise ValueError(f"a JSON object is expected, not {text[:40]}")


@dataclass(frozen=True)
class RosIntegration(Strict):
    """An action or service of ROS 2 that does the work. interface_type: in `package`; interface_name: of the running
    server. result_trajectory_field: where the result holds a joint trajectory; none: the server moves the robot itself.
    default_goal_json: the goal, as text. goal_builder: what lowers a goal of plain values."""

    package: Word
    interface_type: Word
    interface_name: Word
    default_goal_json: Annotated[str, Field(min_length=2, max_length=10_000), AfterValidator(_json_object)]
    result_trajectory_field: Annotated[str, Field(max_length=200)] | None = None
    ros_dependencies: tuple[str, ...] = ()
    goal_builder: Literal["joint", "pose", "look_at"] | None = None


def _both_positive(size: tuple[int, int]) -> tuple[int, int]:
    if min(size) <= 0:
        raise ValueError(f"{list(size)} is not [width, height] in pixels, both above 0")
    return size


@dataclass(frozen=True)
class Detector(Strict):
    """labels: by the class index that the model gives. input_size: width, height, pixels. score_threshold: detections
    below are dropped. max_side: pixels."""

    labels: Annotated[tuple[str, ...], NotEmpty]
    input_size: Annotated[tuple[int, int], AfterValidator(_both_positive)] = (640, 640)
    score_threshold: Rate = 0.5
    engine: Literal["rtdetr_onnx", "vlm_sidecar", "zeroshot_hf"] | None = None
    mode: Literal["continuous", "on_demand"] = "continuous"
    max_side: Count | None = None


def _increasing(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"{list(ends)} is not [lowest, highest]")
    return ends


@dataclass(frozen=True)
class Reward(Strict):
    """A model that scores an attempt. frame_window_s, target_fps: the frames it is shown. success_threshold: progress
    from which an attempt counts as done; check_floor: below which it clearly is not."""

    frame_window_s: Positive
    target_fps: Positive
    progress_range: Annotated[tuple[float, float], AfterValidator(_increasing)] = (0.0, 1.0)
    success_threshold: Rate = 0.5
    preference: bool = False
    num_bins: Count = 100
    instruction_required: bool = True
    check_floor: Rate = 0.4
    plateau_window_s: Positive = 3.0
    plateau_tolerance: Annotated[float, Field(ge=0)] = 0.05
    default_patience_s: Positive = 30.0

    def __post_init__(self) -> None:
        if self.check_floor > self.success_threshold:
            raise ValueError(f"check_floor {self.check_floor:g} is above success_threshold {self.success_threshold:g}")


@dataclass(frozen=True)
class Playbook(Strict):
    """A procedure in words that a reasoner follows. trigger: when; body_uri: its text, a file of the package;
    composes_tools: what it calls, at most max_steps times; done_predicate: when it has succeeded."""

    trigger: Sentence
    body_uri: Annotated[str, Field(min_length=1)]
    composes_tools: Annotated[tuple[str, ...], NotEmpty]
    done_predicate: Sentence
    max_steps: Count
