"""Say what happens to observations and actions around a checkpoint: processor files, and what pictures go through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from prts_core.config.checks import Strict
from prts_core.skills.manifest.weights import HubFileUri


@dataclass(frozen=True)
class Processors(Strict):
    """The two processor files of a LeRobot checkpoint: what normalises observations, and what brings actions back."""

    preprocessor_uri: HubFileUri
    postprocessor_uri: HubFileUri

    def __post_init__(self) -> None:
        if self.preprocessor_uri == self.postprocessor_uri:
            raise ValueError("preprocessor_uri and postprocessor_uri are one file; the two undo each other")


@dataclass(frozen=True)
class ImagePreprocessing(Strict):
    """flip_180 turns a picture, flip_vertical mirrors it before that. aliases: the robot's camera -> the checkpoint's.
    input_template: a camera's key in the batch. norm_tag: which of a checkpoint's statistics. image_max_crops: tiles a
    picture."""

    flip_180: bool = False
    flip_vertical: bool = False
    input_template: str = "observation.images.{cam}"
    aliases: dict[str, str] = field(default_factory=dict)
    norm_tag: str | None = None
    image_max_crops: Annotated[int, Field(ge=1)] | None = None
