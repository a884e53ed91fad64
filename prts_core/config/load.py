"""Load a recipe: a Plan with every file that it names read and checked, and where the data that it names lies."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prts_core.config.checked_yaml import VARIABLE, check, expand, merge, parse_overrides, read_yaml
from prts_core.config.mapping import Mapping, check_mapping, load_mapping
from prts_core.config.model import ModelConfig
from prts_core.config.places import outputs_folder, recipe_path
from prts_core.config.release_yaml import is_public_release, read_public_release
from prts_core.config.rl import RlSection
from prts_core.config.schema import BenchmarkConfig, DatasetConfig, Recipe, RobotConfig, SftSection
from prts_core.config.sources import ExpertSource, ImageTextSource, LeRobotSource, RecordingSource
from prts_core.config.subtask_mode import SubtaskMode
from prts_core.config.train import TrainConfig
from prts_core.io.errors import ConfigError, Skipped, UnavailableError, lookup, suggest
from prts_core.io.hub import download_dataset, downloaded_dataset
from prts_core.io.object_storage import is_url

TOY_PARAMETERS = 10**8  # of a language model; above, TrainConfig's defaults fit nothing


def source_root(source: LeRobotSource | RecordingSource) -> Path:
    """The folder (of a recording: or file) of an external dataset. Expanded only when read.

    Of a dataset from the hub: where its download lies, or a path that does not exist. Downloads nothing.
    """
    if source.root is not None:
        return Path(expand(source.root, "the dataset's source.root")).expanduser()
    assert isinstance(source, LeRobotSource) and source.repo_id is not None  # it holds one of the two
    return downloaded_dataset(source.repo_id, source.revision) or Path(f"hub:{source.repo_id}")


def source_url(source: LeRobotSource | RecordingSource) -> str | None:
    """The URL of a dataset in object storage; none for what lies on a disk."""
    if not isinstance(source, LeRobotSource):
        return None
    if is_url(source.root):
        expand(str(source.root), "the dataset's source.root")  # tells of a variable that is not set
    return source.url


def present_root(dataset: str, source: LeRobotSource | RecordingSource, optional: bool = False) -> Path:
    """`source_root`, downloaded from the hub where it has to be.

    Where the folder is absent: Skipped for an optional dataset, UnavailableError for any other. What the hub refuses is
    a StageError in any case.
    """
    if isinstance(source, LeRobotSource) and source.root is None:
        assert source.repo_id is not None
        named = (source.repo_id, source.revision)
        return downloaded_dataset(*named) or download_dataset(*named)
    said, variables = str(source.root), VARIABLE.findall(str(source.root))
    unset = [name for name in variables if name != "PRTS_SHARED" and not os.environ.get(name)]
    root = None if unset else source_root(source)
    if root is not None and (root.is_dir() or (isinstance(source, RecordingSource) and root.is_file())):
        return root
    export = "".join(f"`export {name}=/path/to/the/folder`, or " for name in variables)
    raise (Skipped if optional else UnavailableError)(
        f"Dataset {dataset!r} is not on this machine",
        file=root,
        field="source.root",
        found=f"${unset[0]} is not set" if unset else "no such folder" if not root or not root.exists() else "a file",
        expected=f"the dataset's folder, as its YAML says: {said}",
        cure=f"{export}correct `root` in the YAML of dataset {dataset}",
    )


def image_text_paths(source: ImageTextSource) -> tuple[Path, Path]:
    """(json file, folder of the images), environment variables replaced."""
    path = Path(expand(source.json_path, "image_text.json_path")).expanduser()
    root = source.vision_base_path
    return path, path.parent if root is None else Path(expand(root, "image_text.vision_base_path")).expanduser()


def with_mapping(dataset: DatasetConfig, folder: Path, where: Path) -> DatasetConfig:
    """`dataset` with the content of the mapping that its recording names, so that another mapping is another stage, and
    with the robot that the mapping is for. folder: holds mappings/. Other datasets stay as they are."""
    source = dataset.source
    if not isinstance(source, RecordingSource | ExpertSource) or source.mapping is None:
        return dataset
    kind = "robomimic" if isinstance(source, ExpertSource) else source.kind
    mapping: Mapping
    if isinstance(source.mapping, str):
        mapping = load_mapping(folder / "mappings" / f"{source.mapping}.yaml")
    else:
        mapping = check_mapping(source.mapping, where)
    for field, found, expected in (
        ("source.kind", kind, mapping.source),
        ("embodiment_tag", dataset.embodiment_tag, mapping.embodiment_tag),
    ):
        if expected is not None and found not in (None, expected):
            raise ConfigError(
                f"The dataset {dataset.name!r} and its mapping {mapping.name!r} disagree",
                file=where,
                field=field,
                found=found,
                expected=f"{expected}, as the mapping says",
                cure="correct one of them",
            )
    tag = dataset.embodiment_tag or mapping.embodiment_tag
    return replace(dataset, source=replace(source, mapping=asdict(mapping)), embodiment_tag=tag)


def fields_of(section: Any) -> dict[str, Any]:
    """A section's fields, unconverted, to be laid into the stage's `*Config` of the same fields."""
    return {name: getattr(section, name) for name in section.__dataclass_fields__}


@dataclass(frozen=True)
class RunPlan:
    """A recipe with every file it names read and checked. The one thing stages are configured from.

    path: the recipe's YAML; its folder holds datasets/, robots/ and models/. overrides: `--set` texts, which the recipe
    holds already. rated: sections whose learning rate the recipe or its model file says.
    """

    path: Path
    recipe: Recipe
    overrides: tuple[str, ...] = ()
    rated: frozenset[str] = frozenset({"pretrain", "sft", "subtask"})

    @property
    def folder(self) -> Path:
        return self.path.parent

    @cached_property
    def _dataset_files(self) -> tuple[dict[str, DatasetConfig], dict[str, ImageTextSource]]:
        """The recipe's dataset files, each one dataset of ours or a YAML of the public release with several."""

        out: dict[str, DatasetConfig] = {}
        image_text: dict[str, ImageTextSource] = {}
        for name in self.recipe.datasets:
            path = self.folder / "datasets" / f"{name}.yaml"
            raw = read_yaml(path, "dataset file")
            if is_public_release(raw):
                public = read_public_release(raw, path)
                made, more = public.datasets, public.image_text
            else:
                made, more = (check(DatasetConfig, raw, path),), {}
            made = tuple(with_mapping(dataset, self.folder, path) for dataset in made)
            for dataset in made:
                SubtaskMode.parse(dataset.train_subtask, path)
            double = [name for name in (*(d.name for d in made), *more) if name in out or name in image_text]
            if double:
                raise ConfigError("Two dataset files bring one name", file=path, field="name", found=double[0])
            out |= {dataset.name: dataset for dataset in made}
            image_text |= more
        lookup(out, self.recipe.deploy, "deploy dataset")
        return out, image_text

    @property
    def datasets(self) -> dict[str, DatasetConfig]:
        return self._dataset_files[0]

    def dataset(self, name: str | None) -> DatasetConfig:
        """The dataset of this name; none: the one that the recipe deploys."""
        cure = f"add it to `datasets:` of {self.path}, or name the recipe that has it with --config"
        return lookup(self.datasets, name or self.recipe.deploy, "dataset", cure)

    @property
    def mixture(self) -> dict[str, float]:
        """What pre-training draws from: the recipe's mixture, or every dataset with its own weight."""
        return dict(self.recipe.pretrain.mixture) or {name: d.weight for name, d in self.datasets.items()}

    @property
    def image_text(self) -> dict[str, ImageTextSource]:
        """Image-text data of the recipe and of its public dataset files."""
        return self._dataset_files[1] | self.recipe.pretrain.image_text

    @cached_property
    def model(self) -> ModelConfig:
        return read_model(self.folder / "models" / f"{self.recipe.model}.yaml")[0]

    def robot(self, dataset: str) -> RobotConfig | None:
        tag = self.dataset(dataset).embodiment_tag
        if tag is None:
            return None
        path = self.folder / "robots" / f"{tag}.yaml"
        if not path.exists():
            known = sorted(p.stem for p in path.parent.glob("*.yaml"))
            raise ConfigError(
                f"Dataset {dataset!r} names a robot that has no file{suggest(tag, known)}",
                file=path,
                field="embodiment_tag",
                found=tag,
                expected=", ".join(known) or "a file of robots/",
                cure=f"name one of these, write {path}, or leave `embodiment_tag` out: what the numbers mean is then "
                "taken from the names that the dataset itself gives",
            )
        robot = check(RobotConfig, read_yaml(path, "robot file"), path)
        if self.datasets[dataset].state_relative is False:
            absolute = tuple(replace(dimension, relative=False) for dimension in robot.action)
            robot = replace(robot, relative=(), action=absolute)
        return robot

    def sft(self, dataset: str) -> SftSection:
        """The recipe's `sft`, the dataset's own changes over it, and over both what was typed as `--set sft...`.

        The recipe's mixture is of the deployed dataset's policy, not of the others'."""
        own, typed = dict(self.dataset(dataset).sft), parse_overrides(self.overrides).get("sft") or {}
        whole = asdict(self.recipe.sft)
        if dataset != self.recipe.deploy:
            whole |= {"mixture": {}, "image_text": {}}
            typed = {key: value for key, value in typed.items() if key not in ("mixture", "image_text")}
        if not _gives_rate(own):
            self.require_rate("sft")
        path = self.folder / "datasets" / f"{dataset}.yaml"
        section = check(SftSection, merge(merge(whole, own), typed), path)
        for name in section.mixture:
            lookup(self.datasets, name, "dataset of the mixture")
        if section.mixture and dataset not in section.mixture:
            raise ConfigError(
                f"The fine-tuning of {dataset!r} is mixed of other datasets alone",
                file=self.path,
                field="sft.mixture",
                found=", ".join(section.mixture),
                expected=f"{dataset} among them",
                cure=f"add `{dataset}: 1.0`, or deploy one of these",
            )
        return section

    @cached_property
    def rl(self) -> RlSection:
        """The recipe's `rl`, the preset that counts laid over it, and over both what was typed as `--set rl...`.

        It names no presets any more: equal settings are one result, however they were said."""
        section = self.recipe.rl
        if section.preset is None:
            return replace(section, presets={})
        change = lookup(section.presets, section.preset, "preset of rl", f"add it to `rl.presets` of {self.path}")
        typed = parse_overrides(self.overrides).get("rl") or {}
        whole = merge(merge(asdict(section), change), typed) | {"preset": None, "presets": {}}
        return check(RlSection, whole, f"{self.path}, rl.presets.{section.preset}")

    def require_rate(self, section: str) -> None:
        """ConfigError where nobody has said how fast a model of real size learns: TrainConfig's own rate is for a model
        of a few million parameters, and would ruin it."""
        model = self.folder / "models" / f"{self.recipe.model}.yaml"  # one that is missing is told where it is read
        if section not in self.rated and model.is_file() and self.model.text.parameters > TOY_PARAMETERS:
            raise ConfigError(
                "A recipe for a large model does not say how fast it learns",
                file=self.path,
                field=f"{section}.train.learning_rate",
                found="nothing",
                expected="a rate; 1.0e-5 is usual for all weights of a few billion parameters, 1.0e-4 for LoRA",
                cure=f"write it there, or under `train:` of {model}",
            )

    @property
    def benchmark(self) -> BenchmarkConfig:
        """What stage benchmark is told: the recipe's section, and the dataset that its policy was trained on.

        ConfigError where it would meet states that reinforcement learning has used."""
        dataset, section = self.dataset(None), self.recipe.benchmark
        if self.recipe.policy == "rl":
            section = replace(section, skip_states=self._fresh_states())
        return BenchmarkConfig(dataset=dataset.name, source=dataset.source, **fields_of(section))

    def _fresh_states(self) -> int | None:
        rl, skipped = self.rl, self.recipe.benchmark.skip_states
        first, end = rl.train_states or (0, 0)
        chosen = [state for state in range(end + rl.eval_episodes) if not first <= state < end][: rl.eval_episodes]
        used = max(end, chosen[-1] + 1)
        if skipped is None:
            return None if rl.shared_states else used
        if skipped < used and not rl.shared_states:
            raise ConfigError(
                "The benchmark would meet initial states that stage rl has learned on or chosen its policy by",
                file=self.path,
                field="benchmark.skip_states",
                found=skipped,
                expected=f"{used} or more: rl.train_states {rl.train_states}, rl.eval_episodes {rl.eval_episodes}",
                cure=f"benchmark: {{skip_states: {used}}}, or leave it out",
            )
        return skipped

    def read_all(self) -> None:
        """Read and check every file that the recipe names, so that a fault is told before any work."""
        _ = self.model, self.rl, self.benchmark
        for name in self.datasets:
            self.robot(name)
            self.sft(name)
        for name in self.mixture:
            lookup(self.datasets, name, "dataset of the mixture")

    def command(self, stage: str, partition: str | None = None, outputs: Path | None = None) -> str:
        """The shell command that runs `stage` for this very plan. What equals the defaults is left out."""
        words = ["prts", stage]
        if self.path.resolve() != recipe_path().resolve():
            words += ["--config", str(self.path)]
        if partition is not None:
            words += ["--dataset", partition]
        for text in self.overrides:
            words += ["--set", text]
        if outputs is not None and outputs.resolve() != outputs_folder().resolve():
            words += ["--outputs", str(outputs)]
        return shlex.join(words)


def read_model(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """A model file: the model, and under `train` what a recipe's training sections take where they say nothing."""
    raw = dict(read_yaml(path, "model file"))
    train = raw.pop("train", None) or {}
    check(TrainConfig, train, path)
    return check(ModelConfig, raw, path), train


def with_model_defaults(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """A recipe with its model's training defaults under its own."""
    model = path.parent / "models" / f"{raw.get('model')}.yaml"
    try:
        known = model.is_file()
    except OSError:  # a name that is too long for one
        known = False
    if not known:
        return raw  # told when the plan is read
    train, raw = read_model(model)[1], dict(raw)
    for name in ("pretrain", "sft", *(["subtask"] if "subtask" in raw else [])):  # which has defaults of its own
        section = raw.get(name) or {}
        if isinstance(section, dict) and isinstance(section.get("train") or {}, dict):  # else: told when it is checked
            raw[name] = merge({"train": train}, section)
    return raw


def _gives_rate(section: Any) -> bool:
    train = section.get("train") if isinstance(section, dict) else None
    return isinstance(train, dict) and "learning_rate" in train


def load_plan(path: Path, overrides: Sequence[str] | None = None) -> RunPlan:
    """Read a recipe with its model's training defaults under it and `--set` overrides laid over it; datasets and robots
    are read when first asked for."""
    typed = tuple(overrides or ())
    raw = with_model_defaults(merge(read_yaml(path, "recipe"), parse_overrides(typed)), path)
    rated = frozenset(name for name, section in raw.items() if _gives_rate(section))
    return RunPlan(path=path, recipe=check(Recipe, raw, path), overrides=typed, rated=rated)
