"""Write the DVC file of a recipe: its stages, what each watches and what it leaves.

The quickstart's is `dvc.yaml`, another recipe's `configs/dvc/<recipe>/dvc.yaml`, each with a `dvc.lock` beside it.
A stage watches its parents' manifests (they hold key and content), its behaviour version and the YAML that its
configuration is read from: the keys that stand there, and the whole file where a key may be added that only this
stage reads. What is added for an earlier stage is told by the one that trains: that stage has not run under this plan.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from prts_core.config.checked_yaml import read_yaml
from prts_core.config.load import RunPlan
from prts_core.config.places import DEFAULT_OUTPUTS, DEFAULT_RECIPE
from prts_core.config.release_yaml import is_public_release, read_public_release
from prts_core.io.errors import ConfigError, StageError
from prts_core.io.files import write_text
from prts_core.stages.declarations import STAGES, steps
from prts_core.store.manifest import MANIFEST, OUTPUT
from prts_core.store.sources import external_source
from prts_core.store.views import METRICS, view_folder

VERSIONS_FILE = "prts_core/stages/versions.py"
FOLDER = "configs/dvc"
# Keys of the recipe that a stage's own configuration is made of.
RECIPE_KEYS = {
    "pretrain": ("model", "pretrain"),
    "sft": ("sft",),
    "subtask": ("deploy", "subtask"),
    "rl": ("deploy", "rl"),
    "benchmark": ("deploy", "benchmark"),
    "value": ("deploy", "value"),
    "package": ("deploy", "package"),
}
# Of the dataset's file; of the stages that train all of it (a mixture: of each of its datasets).
DATASET_KEYS = {
    "collect": ("source",),
    "convert": ("source", "embodiment_tag", "video", "state_relative"),
    "stats": ("sft",),
    "sft": (),
    "rl": ("source",),
    "benchmark": ("source",),
}
NORMALIZATION = "sft.train.normalization"


def stage_name(stage: str, partition: str | None) -> str:
    """What DVC calls a stage: `pretrain`, `sft-metaworld`. It keeps `@` for stages of a loop."""
    return stage + (f"-{partition}" if partition else "")


class DvcFile:
    """The DVC file of a plan, for an outputs folder. root: the project's folder, which holds `.dvc`."""

    def __init__(self, plan: RunPlan, outputs: Path, root: Path = Path()) -> None:
        self.plan, self.root = plan, root.resolve()
        if not (self.root / VERSIONS_FILE).is_file():
            raise StageError(
                "DVC files are written in the project's folder",
                file=self.root,
                expected=VERSIONS_FILE,
                cure="run the command in the folder of the project's checkout",
            )
        self.recipe = self._inside(plan.path, "the recipe", "copy it into configs/")
        self.outputs = self._inside(
            outputs, "the outputs folder", f"unset PRTS_OUTPUTS; {DEFAULT_OUTPUTS} may be a mount point"
        )
        own = self.recipe != DEFAULT_RECIPE
        self.path = self.root / (f"{FOLDER}/{plan.recipe.name}/dvc.yaml" if own else "dvc.yaml")
        self.up = "../" * (len(self.path.relative_to(self.root).parts) - 1)

    def target(self, stage: str, partition: str | None) -> str:
        """How DVC's commands name a stage of this file, seen from the root."""
        name = stage_name(stage, partition)
        return f"{self.path.relative_to(self.root).as_posix()}:{name}" if self.up else name

    def is_current(self) -> bool:
        """Whether the file on disk says what the recipe says now."""
        return self.path.is_file() and self.path.read_text(encoding="utf-8") == self.text

    def write(self) -> None:
        write_text(self.path, self.text)

    def require_current(self) -> None:
        """StageError with the first difference and the cure, unless the file says what the recipe says now."""
        if self.is_current():
            return
        there = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        here = self.text.splitlines()
        row = next((i for i, pair in enumerate(zip(there, here, strict=False)) if pair[0] != pair[1]), len(there))
        raise StageError(
            "The DVC file is not what the recipe says now" if there else "The recipe has no DVC file yet",
            file=self.path.relative_to(self.root),
            field=f"line {row + 1}" if there else None,
            found=there[row].strip() if row < len(there) else "no more lines" if there else "no file",
            expected=here[row].strip() if there and row < len(here) else None,
            cure=f"run `{self.command}`",
        )

    @property
    def command(self) -> str:
        """The command that writes this file."""
        words = ["--outputs", self.outputs] if self.outputs != DEFAULT_OUTPUTS else []
        return shlex.join(["prts", "dvc", "--config", self.recipe, *words])

    # ---- the text --------------------------------------------------------------------------------------------------
    @cached_property
    def text(self) -> str:
        order = steps(self.plan)
        repro = f"dvc repro {self.path.relative_to(self.root).as_posix()}" if self.up else "dvc repro"
        lines = [
            f"# The chain of {self.recipe} for data versions: `{repro}`.",
            f"# Written by `{self.command}`: run that again after a change of the recipe's parts, not of its values.",
            "# dvc.lock beside it says which results belong together: commit it to git, and `dvc push` the results.",
            "stages:",
        ]
        for stage, partition in order:
            lines += self._stage(stage, partition)
        return "\n".join([*lines, "", *self._plots(order)]) + "\n"

    def _stage(self, stage: str, partition: str | None) -> list[str]:
        command = ["prts", stage, "--config", self.recipe, *(["--dataset", partition] if partition else [])]
        lines = [
            f"  {_scalar(stage_name(stage, partition))}:",
            f"    cmd: {_scalar(shlex.join([*command, '--outputs', self.outputs, '--allow-skip']))}",
        ]
        if self.up:
            lines.append(f"    wdir: {self.up.rstrip('/')}")
        if self._looks_outside(stage, partition):
            lines.append(
                "    always_changed: true  # it looks at files outside; where they are the same, nothing follows"
            )
        parents = STAGES[stage].parents(self.plan, partition)
        lines += _list("deps", dict.fromkeys(f"{self._view(p.stage, p.partition)}/{MANIFEST}" for p in parents))
        lines += _list("params", self._params(stage, partition), plain=True)
        # persist: a view that `dvc pull` filled is still there for the store when its stage is called. It also keeps
        # DVC from putting an older run's outputs there by itself.
        view, end = self._view(stage, partition), ": {persist: true}"
        lines += _list("outs", [f"{view}/{OUTPUT}", f"{view}/{MANIFEST}"], end)
        if STAGES[stage].headline:  # `dvc metrics show`
            lines += _list("metrics", [f"{view}/{METRICS}"], end)
        return lines

    def _plots(self, order: Iterable[tuple[str, str | None]]) -> list[str]:
        lines = ["plots:"]
        for partition in [partition for stage, partition in order if stage == "sft"]:
            folder = f"{self.up}{self._view('sft', partition)}/{OUTPUT}"
            lines += [
                f"  - {_scalar(f'{folder}/training.csv')}:",
                "      x: step",
                "      y: loss",
                f"      title: {_scalar(f'fine-tuning on {partition}')}",
                f"  - {_scalar(f'{folder}/loss.png')}",
            ]
        return lines

    def _view(self, stage: str, partition: str | None) -> str:
        return view_folder(Path(self.outputs), self.plan.recipe.name, stage, partition).as_posix()

    # ---- what a stage watches --------------------------------------------------------------------------------------
    def _params(self, stage: str, partition: str | None) -> list[str]:
        """`file: [keys]`, or `file:` where all of it counts."""
        lines = [f"{VERSIONS_FILE}: [VERSIONS.{stage}]"]
        keys = [*(["seed"] if STAGES[stage].seeded else []), *RECIPE_KEYS.get(stage, ())]
        if stage == "pretrain" and not self.plan.recipe.pretrain.mixture:
            keys.append("datasets")  # all of them are the mixture
        if stage == "sft" and self.plan.sft(str(partition)).checkpoint is not None:
            keys.append("model")
        if stage == "sft" and (self.plan.recipe.sft.mixture or self.plan.recipe.sft.image_text):
            keys.append("deploy")  # whose policy is mixed
        if stage == "stats" and _has(self._raw_recipe, NORMALIZATION):
            keys.append(NORMALIZATION)  # where it is added later, sft says that stats has not run
        if keys:
            lines.append(_watch(self.recipe, self._raw_recipe, keys))
        if stage == "pretrain":
            lines += [self._watch_file("models", self.plan.recipe.model)]
            lines += [line for name in self.plan.mixture for line in self._watch_dataset(name, ())]
        elif stage in DATASET_KEYS:
            name = partition or self.plan.recipe.deploy
            others = self.plan.sft(name).mixture if stage == "sft" else {}
            for each in dict.fromkeys((name, *others)):
                lines += self._watch_dataset(each, DATASET_KEYS[stage])
        if stage == "convert":
            lines += self._robot_and_mapping(str(partition))
        if stage == "sft" and "model" in keys:
            lines.append(self._watch_file("models", self.plan.recipe.model))
        if stage == "stats" and STAGES[stage].config(self.plan, partition).chunk_length is not None:
            lines.append(self._watch_file("models", self.plan.recipe.model, ("chunk_length",)))
        return list(dict.fromkeys(lines))

    def _robot_and_mapping(self, dataset: str) -> list[str]:
        robot = self.plan.robot(dataset)
        lines = [] if robot is None else [self._watch_file("robots", robot.embodiment_tag)]
        file, entry = self._dataset_files[dataset]
        mapping = None if entry else (read_yaml(self.plan.folder / file).get("source") or {}).get("mapping")
        return lines + ([self._watch_file("mappings", mapping)] if isinstance(mapping, str) else [])

    def _watch_dataset(self, dataset: str, keys: Sequence[str]) -> list[str]:
        file, entry = self._dataset_files[dataset]
        if entry:  # one of several in a file of the public release
            return [f"{_scalar(self._config(file))}: [{entry}]"]
        raw = read_yaml(self.plan.folder / file)
        there = [key for key in keys if _has(raw, key)]
        return [_watch(self._config(file), raw, there)] if there or not keys else []

    def _watch_file(self, folder: str, name: str, keys: Sequence[str] = ()) -> str:
        file = f"{folder}/{name}.yaml"
        return _watch(self._config(file), read_yaml(self.plan.folder / file), keys)

    def _config(self, file: str) -> str:
        return (Path(self.recipe).parent / file).as_posix()

    @cached_property
    def _raw_recipe(self) -> dict[str, Any]:
        return read_yaml(self.plan.path)

    @cached_property
    def _dataset_files(self) -> dict[str, tuple[str, str]]:
        """Dataset -> (file below the recipe's folder, key of its entry in a file of the public release, or "")."""
        found: dict[str, tuple[str, str]] = {}
        for name in self.plan.recipe.datasets:
            file = f"datasets/{name}.yaml"
            raw = read_yaml(self.plan.folder / file)
            if not is_public_release(raw):
                found[str(raw["name"])] = file, ""
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its notes were given when the plan was read
                public = read_public_release(raw, self.plan.folder / file)
            found |= {d.name: (file, f"lerobot_datasets.{row}") for row, d in enumerate(public.datasets)}
        return found

    def _looks_outside(self, stage: str, partition: str | None) -> bool:
        """Whether the stage reads files that are no DVC output and in no YAML: DVC cannot know when they change."""
        listed = stage == "collect" and external_source(self.plan, str(partition)) is not None
        return listed or bool(STAGES[stage].reads(self.plan, partition))

    def _inside(self, path: Path, what: str, cure: str) -> str:
        relative = os.path.relpath(path.resolve(), self.root)
        if relative.startswith(".."):
            raise ConfigError(
                f"DVC keeps only what lies inside the project, and {what} does not",
                file=path,
                expected=f"a place below {self.root}",
                cure=cure,
            )
        return Path(relative).as_posix()


def _watch(file: str, raw: dict[str, Any], keys: Sequence[str]) -> str:
    whole = not keys or not all(_has(raw, key) for key in keys)
    return f"{_scalar(file)}:" + ("" if whole else f" [{', '.join(keys)}]")


def _has(raw: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(raw, dict) or part not in raw:
            return False
        raw = raw[part]
    return True


def _list(title: str, items: Iterable[str], end: str = "", plain: bool = False) -> list[str]:
    lines = [f"      - {item if plain else _scalar(item)}{end}" for item in items]
    return [f"    {title}:", *lines] if lines else []


def _scalar(text: str) -> str:
    """`text` as one YAML scalar; quoted only where it must be."""
    plain = re.fullmatch(r"[A-Za-z_./][\w ./=@+-]*", text) and yaml.safe_load(text) == text
    return text if plain else json.dumps(text, ensure_ascii=False)
