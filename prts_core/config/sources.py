"""Describe where a dataset's episodes come from, and image-text data: what the YAML may say as its `source`."""

from __future__ import annotations

import os
import re
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from prts_core.config.checked_yaml import VARIABLE, expand
from prts_core.config.checks import Strict, check_names, check_numbers
from prts_core.config.identity import execution
from prts_core.io.object_storage import is_url

_SEEDS, _WORKERS = "[0, 4294967295]", "[1, 1024]"


@dataclass(frozen=True)
class LeRobotSource(Strict):
    """A LeRobot folder of v2.1, v3.0 or v3.1 recorded by others. `root` may hold environment variables and be a URL of
    object storage (s3://, gs://), whose files are read there, through prts_core.io.object_storage; without it the
    dataset `repo_id` is downloaded from the Hugging Face hub, at `revision` (a commit, tag or branch). `link`: how
    files are taken over; auto copies v2.1, whose tables may be written anew, and leaves v3.0 and v3.1 where they lie,
    with links to them (`copy` for a result that stands alone: another machine, DVC). Of object storage all but `copy`
    and `hardlink` keep the URL.
    select_*: the columns and cameras that become state, action and views, columns one after another (none:
    `observation.state`, or where there is no such column all that begin so; `action`; every camera). Where a folder
    lies is no part of what it is: the listing of its files is. A URL that the result keeps is, and so is whether the
    result holds the files."""

    kind: Literal["lerobot"]
    root: str | None = execution(None, lambda source: None if source.stands_alone else source.url)
    repo_id: str | None = None
    revision: str | None = None
    episodes: tuple[int, ...] | None = None
    heldout_episodes: int = 0
    link: Literal["auto", "copy", "hardlink", "symlink"] = execution(
        "auto", lambda source: "copy" if source.stands_alone else None if source.link == "auto" else source.link
    )
    select_video: tuple[str, ...] | None = None
    select_state: tuple[str, ...] | None = None
    select_action: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.root and not self.repo_id:
            raise ValueError("give root (a folder) or repo_id (a dataset of the Hugging Face hub)")
        if self.revision is not None and (self.root or not re.fullmatch(r"[\w][\w./-]*", self.revision)):
            raise ValueError("revision: a commit, tag or branch of repo_id; a dataset with `root` has none")
        check_numbers(self, {"[0, inf)": "episodes heldout_episodes"})

    @property
    def stands_alone(self) -> bool:
        """Whether the result is told to hold every file itself."""
        return self.link in ("copy", "hardlink")

    @property
    def url(self) -> str | None:
        """The URL of a dataset in object storage; none for what lies on a disk, and while a variable is not set."""
        variables = VARIABLE.findall(self.root or "")
        if self.root is None or not all(name == "PRTS_SHARED" or os.environ.get(name) for name in variables):
            return None
        root = expand(self.root, "the dataset's source.root")
        return root if is_url(root) else None


@dataclass(frozen=True)
class RecordingSource(Strict):
    """A recording made elsewhere, of any kind that `prts convert --source` takes (prts_core.data.convert.source).

    root: its folder or file; may hold environment variables; what it is, the listing of its files says. mapping: what
    its keys mean, by the name of a file of configs/mappings or written out here; lerobot_v30, which says itself what
    its numbers mean, takes none, and is copied into v2.1 (kind `lerobot` reads it where it lies). workers: episodes at
    a time. reencode: of lerobot_v30, encode episodes anew (with `video`) that cannot be cut as they are.
    """

    kind: Literal["robomimic", "aloha", "rollouts", "rlds", "mcap", "lerobot_v30"]
    root: str = execution(MISSING)
    mapping: str | dict[str, Any] | None = None
    workers: int = execution(2)
    reencode: bool = False

    def __post_init__(self) -> None:
        if not self.root:
            raise ValueError("give root, the recording's folder or file")
        if (self.mapping is None) != (self.kind == "lerobot_v30"):
            wanted = "none" if self.kind == "lerobot_v30" else "one: the name of a file of configs/mappings"
            raise ValueError(f"mapping: a source of kind {self.kind!r} takes {wanted}")
        if self.reencode and self.kind != "lerobot_v30":
            raise ValueError("reencode belongs to kind lerobot_v30; other recordings are encoded in any case")
        check_names(self, "mapping")
        check_numbers(self, {_WORKERS: "workers"})


@dataclass(frozen=True)
class ExpertSource(Strict):
    """Demonstrations recorded here by the scripted experts of any suite of `prts sim list`, through its workers.

    tasks: some of the suite's, or none for all. mapping: what the recording's keys mean, as in RecordingSource; none
    where they are named obs/proprio, actions, obs/<camera>_rgb. *_episodes: successes a task. Seeds of train, held-out
    and the suite's own episodes never meet; where a suite stores initial states, these recordings start elsewhere, from
    states that its sampler draws. noise: levels of the pushes that shake the expert while it records for training,
    taken in turn (labels stay clean); task_noise: those of single tasks. image_size: of the pictures, in place of the
    suite's. tail_steps: rows recorded after success. settings: of the suite's workers, where its family has any; the
    benchmark of what is trained on these demonstrations gets them too.
    """

    kind: Literal["expert"]
    suite: str
    tasks: tuple[str, ...] = ()
    mapping: str | dict[str, Any] | None = None
    train_episodes: int = 50
    heldout_episodes: int = 5
    train_seed: int = 100_000
    heldout_seed: int = 150_000
    noise: tuple[float, ...] = (0.0, 0.1, 0.2)
    task_noise: dict[str, tuple[float, ...]] = field(default_factory=dict)
    image_size: int | None = None
    tail_steps: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    workers: int = execution(2)

    def __post_init__(self) -> None:
        check_numbers(
            self,
            {
                "[1, inf)": "train_episodes image_size",
                "[0, inf)": "heldout_episodes tail_steps",
                _SEEDS: "train_seed heldout_seed",
                _WORKERS: "workers",
            },
        )
        check_names(self, "mapping")
        for levels in (self.noise, *self.task_noise.values()):
            if not levels or not all(0 <= level < float("inf") for level in levels):
                raise ValueError(f"noise, task_noise: {list(levels)} are no levels; at least one, none below 0")


@dataclass(frozen=True)
class TaskSpec(Strict):
    """One task of a MetaworldSource: its environment name, the sentence given to the policy and its step limit.

    max_steps: simulator steps, one limit for policy, ablations and blind replay. expert_noise: as ExpertSource.noise.
    """

    name: str
    instruction: str
    max_steps: int
    expert_noise: tuple[float, ...] = (0.0, 0.2, 0.4)

    def __post_init__(self) -> None:
        check_numbers(self, {"[1, inf)": "max_steps", "[0, inf)": "expert_noise"})


@dataclass(frozen=True)
class MetaworldSource(Strict):
    """Short form of an ExpertSource on Meta-World that writes its tasks out; `expert` is what it is read as.

    action_repeat: simulator steps an action is held, so that rows come at 80 / action_repeat Hz. start_jitter: up to so
    many centimetres the hand starts off its place. tail_rows: ExpertSource.tail_steps.
    """

    kind: Literal["metaworld"]
    tasks: tuple[TaskSpec, ...]
    train_episodes: int = 100
    heldout_episodes: int = 8
    train_seed: int = 10_000
    heldout_seed: int = 50_000
    action_repeat: int = 2
    start_jitter: int = 8
    image_size: int = 64
    tail_rows: int = 4
    workers: int = 2

    def __post_init__(self) -> None:
        check_numbers(self, {"[1, inf)": "action_repeat", "[0, inf)": "start_jitter tail_rows"})

    def expert(self) -> ExpertSource:
        return ExpertSource(
            "expert",
            "metaworld",
            train_episodes=self.train_episodes,
            heldout_episodes=self.heldout_episodes,
            train_seed=self.train_seed,
            heldout_seed=self.heldout_seed,
            task_noise={task.name: task.expert_noise for task in self.tasks},
            image_size=self.image_size,
            tail_steps=self.tail_rows,
            settings={
                "tasks": [[task.name, task.instruction, task.max_steps] for task in self.tasks],
                "action_repeat": self.action_repeat,
                "start_jitter": self.start_jitter,
            },
            workers=self.workers,
        )


Source = Annotated[
    Annotated[MetaworldSource, AfterValidator(MetaworldSource.expert)] | ExpertSource | LeRobotSource | RecordingSource,
    Field(discriminator="kind"),
]


@dataclass(frozen=True)
class ImageTextSource(Strict):
    """One LLaVA-style file (json, jsonl) that pre-training mixes in. Paths may hold environment variables.

    vision_base_path: where its images lie (none: the file's own folder). sampling_strategy: all, first:N, end:N,
    random:N or N%. weight: sample count times weight is its share beside the robot datasets. digest: SHA-256 that the
    file must have, where the YAML gives one. Where it lies is no part of what it is: the key of a result has the
    listing of the file and of the images that it names.
    """

    json_path: str = execution(MISSING)
    vision_base_path: str | None = execution(None)
    sampling_strategy: str = "all"
    weight: float = 1.0
    max_tokens: int | None = None
    digest: str | None = execution(None)

    def __post_init__(self) -> None:
        check_numbers(self, {"(0, inf)": "weight", "[1, inf)": "max_tokens"})
