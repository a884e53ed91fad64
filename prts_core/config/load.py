"""The border where YAML comes in: pydantic checks it against the frozen dataclasses of `schema.py`, once.

It does not know what a recipe is for. Unknown keys, wrong types and unset environment variables are one ConfigError.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from prts_core.config.schema import (
    DatasetConfig,
    ExpertSource,
    ImageTextSource,
    LeRobotSource,
    Recipe,
    RecordingSource,
    RobotConfig,
    SftSection,
)
from prts_core.errors import ConfigError, UnavailableError, lookup, require, suggest
from prts_core.files import digest_file
from prts_core.models.config import ModelConfig

T = TypeVar("T")
DEFAULT_SHARED = "../shared"


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice (plain PyYAML silently keeps the last)."""


def _no_duplicate_keys(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen: set = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicate_keys)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, or a ConfigError that names file and line."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except FileNotFoundError as err:
        near = sorted(p.stem for p in path.parent.glob("*.yaml"))
        raise ConfigError(
            "No such configuration file" + suggest(path.stem, near),
            file=path,
            expected=", ".join(near) or "a YAML file",
        ) from err
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(
            "A configuration file is not valid YAML", file=path, found=" ".join(str(err).split())
        ) from err
    if not isinstance(raw, dict):
        raise ConfigError("A configuration file must be a mapping", file=path, found=type(raw).__name__)
    return raw


def check(kind: type[T], raw: Any, where: object) -> T:
    """Validate plain data against a frozen dataclass; every fault of the file in one error."""
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as err:
        faults, fields_ = [], []
        for fault in err.errors()[:8]:
            loc = ".".join(str(part) for part in fault["loc"])
            fields_.append(loc)
            if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
                hint = suggest(str(fault["loc"][-1]), _allowed(kind, fault["loc"][:-1]))
                faults.append(f"{loc}: unknown key{hint}")
            else:
                faults.append(f"{loc}: {fault['msg']} (found {fault.get('input')!r:.80})")
        raise ConfigError(
            "A configuration does not fit",
            file=where,
            field=", ".join(fields_),
            found="; ".join(faults),
            expected=f"the fields of {kind.__name__}: {', '.join(sorted(_allowed(kind, ())))}",
            cure="correct the keys named above; `prts config show` prints a recipe with every default",
        ) from err


def _allowed(kind: Any, loc: tuple) -> set[str]:
    """Names that may stand at `loc` inside dataclass `kind` (best effort: used for suggestions only)."""
    import typing

    tagged: dict[Any, list] = {}  # after a field whose class is chosen by `kind`, pydantic names the kind in the path
    for part in loc:
        if not is_dataclass(kind):
            break
        hint = typing.get_type_hints(kind).get(str(part))
        options = [o for o in (hint, *typing.get_args(hint)) if is_dataclass(o)] or tagged.get(part, [])
        if not options:
            return set()
        kind, tagged = options[0], {tag: [o] for o in options for tag in _tags(o)}
    return {f.name for f in fields(kind)} if is_dataclass(kind) else set()


def _tags(option: Any) -> tuple:
    """The values of its field `kind` that choose `option` among others."""
    import typing

    own = getattr(option, "kind", None)
    return (own,) if own is not None else typing.get_args(typing.get_type_hints(option).get("kind"))


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` laid over `base`, mappings merged key by key."""
    out = dict(base)
    for key, value in change.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` -> {"a": {"b": 1}, "c": "x"}; values are YAML."""
    out: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise ConfigError(
                "--set takes key=value", field="--set", found=pair, expected="for example sft.train.steps=200"
            )
        nested: Any = yaml.load(value, Loader=_StrictLoader)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        out = merge(out, nested)
    return out


def expand(text: str, where: object) -> str:
    """Replace ${NAME} by the environment; PRTS_SHARED falls back to the folder `shared` beside the project."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in os.environ:
            return os.environ[name]
        if name == "PRTS_SHARED":
            return DEFAULT_SHARED
        raise ConfigError("An environment variable is not set", file=where, field=name, cure=f"export {name}=...")

    return re.sub(r"\$\{(\w+)\}", value, text)


def source_root(source: LeRobotSource | RecordingSource) -> Path:
    """The folder (of a recording: or file) of an external dataset. Expanded only when read: configuration digests hold
    no machine's paths.

    Of a dataset from the hub: where its download lies, or a path that does not exist. Downloads nothing.
    """
    if source.root is not None:
        return Path(expand(source.root, "the dataset's source.root")).expanduser()
    assert isinstance(source, LeRobotSource) and source.repo_id is not None  # it holds one of the two
    return _hub_snapshot(source.repo_id, download=False) or Path(f"hub:{source.repo_id}")


def present_root(dataset: str, source: LeRobotSource | RecordingSource) -> Path:
    """`source_root`, downloaded from the hub where it has to be, or an UnavailableError that says what is missing."""
    root = source_root(source)
    if isinstance(source, LeRobotSource) and not root.is_dir() and source.root is None and source.repo_id is not None:
        root = _hub_snapshot(source.repo_id, download=True) or root
    if not (root.is_dir() or (isinstance(source, RecordingSource) and root.is_file())):
        raise UnavailableError(
            f"Dataset {dataset!r} is not on this machine",
            file=source.root or str(root),
            field="source.root",
            cure="point source.root (or PRTS_SHARED) at the folder; everything else runs without it",
        )
    return root


def _hub_snapshot(repo_id: str, download: bool) -> Path | None:
    """The local copy of a hub dataset, fetched if `download`; none where there is none and it cannot be fetched."""
    hub = require("huggingface_hub", "train")
    errors = require("huggingface_hub.errors", "train")
    try:
        return Path(hub.snapshot_download(repo_id, repo_type="dataset", local_files_only=not download))
    except errors.HFValidationError as err:
        raise ConfigError(
            "This is no dataset of the hub", field="repo_id", found=repo_id, expected="owner/name"
        ) from err
    except errors.LocalEntryNotFoundError:
        return None
    except (errors.HfHubHTTPError, OSError) as err:
        raise UnavailableError(
            f"Dataset {repo_id!r} cannot be downloaded from the hub", field="repo_id",
            found=f"{type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}",
            cure="check the name and the network, or set source.root to a folder that holds it",
        ) from err  # fmt: skip


def with_digest(name: str, source: ImageTextSource) -> ImageTextSource:
    """`source` with its file's digest, so that another file is another stage. A digest that stands is checked.

    A file that is not on this machine leaves the digest as it is: the stage that opens it says so.
    """
    path = image_text_paths(source)[0]
    if not path.is_file():
        return source
    digest = digest_file(path)
    if source.digest not in (None, digest):
        raise ConfigError(
            f"The file of image-text data {name!r} is not the one that is meant", file=path, field="digest",
            found=digest, expected=source.digest, cure="restore the file, or correct the digest",
        )  # fmt: skip
    return replace(source, digest=digest)


def image_text_paths(source: ImageTextSource) -> tuple[Path, Path | None]:
    """(json file, folder of the images or none), environment variables replaced."""
    where = "image-text data"
    root = source.vision_base_path
    return (
        Path(expand(source.json_path, where)).expanduser(),
        None if root is None else Path(expand(root, where)).expanduser(),
    )


def with_mapping(dataset: DatasetConfig, folder: Path, where: Path) -> DatasetConfig:
    """`dataset` with the content of the mapping that its recording names, so that another mapping is another stage, and
    with the robot that the mapping is for. folder: holds mappings/. Other datasets stay as they are."""
    from prts_core.data.convert.mapping import Mapping, check_mapping, load_mapping

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
                f"The dataset {dataset.name!r} and its mapping {mapping.name!r} disagree", file=where, field=field,
                found=found, expected=f"{expected}, as the mapping says", cure="correct one of them",
            )  # fmt: skip
    tag = dataset.embodiment_tag or mapping.embodiment_tag
    return replace(dataset, source=replace(source, mapping=asdict(mapping)), embodiment_tag=tag)


def shared_folder() -> Path:
    """Where reference data lies: $PRTS_SHARED, by default the folder `shared` beside the project."""
    return Path(os.environ.get("PRTS_SHARED", DEFAULT_SHARED))


@dataclass(frozen=True)
class Plan:
    """A recipe with every file it names read and checked. The one thing stages are configured from.

    path: the recipe's YAML; its folder holds datasets/, robots/ and models/.
    """

    path: Path
    recipe: Recipe

    @property
    def folder(self) -> Path:
        return self.path.parent

    @cached_property
    def _dataset_files(self) -> tuple[dict[str, DatasetConfig], dict[str, ImageTextSource]]:
        """The recipe's dataset files, each one dataset of ours or a YAML of the public release with several."""
        from prts_core.config.public_release import is_public_release, read_public_release
        from prts_core.data.subtasks import SubtaskMode

        out: dict[str, DatasetConfig] = {}
        image_text: dict[str, ImageTextSource] = {}
        for name in self.recipe.datasets:
            path = self.folder / "datasets" / f"{name}.yaml"
            raw = read_yaml(path)
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

    @property
    def mixture(self) -> dict[str, float]:
        """What pre-training draws from: the recipe's mixture, or every dataset with its own weight."""
        return dict(self.recipe.pretrain.mixture) or {name: d.weight for name, d in self.datasets.items()}

    @cached_property
    def image_text(self) -> dict[str, ImageTextSource]:
        """Image-text data of the recipe and of its public dataset files, with the digests of the files."""
        named = self._dataset_files[1] | self.recipe.pretrain.image_text
        return {name: with_digest(name, source) for name, source in named.items()}

    @cached_property
    def model(self) -> ModelConfig:
        path = self.folder / "models" / f"{self.recipe.model}.yaml"
        return check(ModelConfig, read_yaml(path), path)

    def robot(self, dataset: str) -> RobotConfig | None:
        tag = lookup(self.datasets, dataset, "dataset").embodiment_tag
        if tag is None:
            return None
        path = self.folder / "robots" / f"{tag}.yaml"
        robot = check(RobotConfig, read_yaml(path), path)
        if self.datasets[dataset].state_relative is False:
            absolute = tuple(replace(dimension, relative=False) for dimension in robot.action)
            robot = replace(robot, relative=(), action=absolute)
        return robot

    def sft(self, dataset: str) -> SftSection:
        """The recipe's `sft` with the dataset's own changes laid over it."""
        changed = merge(asdict(self.recipe.sft), dict(lookup(self.datasets, dataset, "dataset").sft))
        return check(SftSection, changed, self.folder / "datasets" / f"{dataset}.yaml")


def load_plan(path: Path, overrides: list[str] | None = None) -> Plan:
    """Read a recipe with `--set` overrides laid over it; datasets, robots and models are read when first asked for."""
    raw = merge(read_yaml(path), parse_overrides(overrides or []))
    return Plan(path=path, recipe=check(Recipe, raw, path))
