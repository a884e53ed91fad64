"""Put a manifest together: `Manifest` holds rskill.yaml, `read_manifest` checks one, `write_manifest` writes one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator

from prts_core.config.checked_yaml import check, read_yaml
from prts_core.config.checks import Strict
from prts_core.config.licence import Licence
from prts_core.io.files import write_text
from prts_core.skills.manifest.blocks import Detector, Playbook, Reward, RosIntegration
from prts_core.skills.manifest.contracts import ActionContract, Bindings, StateContract
from prts_core.skills.manifest.envelope import SafetyEnvelope
from prts_core.skills.manifest.identity import (
    CUSTOM,
    TEMPLATE_WORDS,
    Description,
    EmbodimentTag,
    ModelFamily,
    Role,
    SkillId,
    SuiteId,
    Url,
    Verb,
    Version,
)
from prts_core.skills.manifest.interfaces import ActuatorRequirement, EmbodimentExtra, SensorRequirement
from prts_core.skills.manifest.kinds import KindName, faults_of_kind
from prts_core.skills.manifest.processing import ImagePreprocessing, Processors
from prts_core.skills.manifest.resources import LatencyBudget, MemoryByDtype, Quantization, Runtime
from prts_core.skills.manifest.values import Count, NotEmpty
from prts_core.skills.manifest.weights import HubUri, WeightsUri

FILE = "rskill.yaml"
CURE = "correct what is named above; docs/how-to/skills.md says what each field means"
LENIENT = {
    ("latency_budget",): LatencyBudget,
    ("quantization",): Quantization,
    ("envelope",): SafetyEnvelope,
    ("state_contract", "bindings"): Bindings,
}
SPOKEN_OUT = ("schema_version", "license", "role", "runtime", "dtype")  # written even where they are the default


def _rates(rates: dict[SuiteId, float]) -> dict[SuiteId, float]:
    wrong = [f"{suite}: {rate:g} is no success rate in [0, 1]" for suite, rate in rates.items() if not 0 <= rate <= 1]
    if wrong:
        raise ValueError("; ".join(wrong))
    return rates


@dataclass(frozen=True, kw_only=True)
class Manifest(Strict):
    """rskill.yaml. docs/how-to/skills.md says what each field means to whom.

    chunk_size: actions of one inference; n_action_steps: how many of them are executed before the next, none meaning
    all. capabilities_required: flag of the robot -> what it has to be. benchmarks: suite -> success rate in [0, 1].
    evaluated_tasks: task ids or scenes that the checkpoint was made for; empty: not said. starting_pose: rad, in the
    order of the checkpoint's actions.
    """

    schema_version: Literal["0.1"] = "0.1"
    name: SkillId
    version: Version
    kind: KindName
    license: Licence = "unknown"
    role: Role = "s1"
    model_family: ModelFamily | None = None
    description: Description
    actions: Annotated[tuple[Verb, ...], NotEmpty]
    objects: tuple[str, ...] = ()
    scenes: tuple[str, ...] = ()
    embodiment_tags: tuple[EmbodimentTag, ...] = ()
    embodiment_extra: EmbodimentExtra | None = None
    capabilities_required: dict[str, bool | float | int | str] = field(default_factory=dict)
    sensors_required: tuple[SensorRequirement, ...] = ()
    actuators_required: tuple[ActuatorRequirement, ...] = ()
    runtime: Runtime = "pytorch"
    quantization: Quantization = field(default_factory=Quantization)
    min_vram_gb: MemoryByDtype = None
    weights_uri: WeightsUri | None = None
    processors: Processors | None = None
    image_preprocessing: ImagePreprocessing | None = None
    state_contract: StateContract | None = None
    action_contract: ActionContract | None = None
    chunk_size: Count
    n_action_steps: Count | None = None
    starting_pose: tuple[float, ...] | None = None
    latency_budget: LatencyBudget
    envelope: SafetyEnvelope | None = None
    policy_extras: dict[str, Any] = field(default_factory=dict)
    fallback_skill_id: SkillId | None = None
    reward_rskill_name: str | None = None
    goal_params_schema: dict[str, Any] | None = None
    benchmarks: Annotated[dict[SuiteId, float], AfterValidator(_rates)] = field(default_factory=dict)
    evaluated_tasks: tuple[str, ...] = ()
    sim_env_control_mode: str | None = None
    paper_url: Url | None = None
    dataset_uri: HubUri | None = None
    source_repo: HubUri | None = None
    ros_integration: RosIntegration | None = None
    detector: Detector | None = None
    reward: Reward | None = None
    playbook: Playbook | None = None

    def __post_init__(self) -> None:
        faults = [*self._faults_of_identity(), *faults_of_kind(self)]
        if faults:
            raise ValueError("; ".join(faults))

    def _faults_of_identity(self) -> Iterator[str]:
        if not self.embodiment_tags:
            yield "embodiment_tags is empty: name the robots, or [any]"
        custom = CUSTOM in self.embodiment_tags
        if custom != (self.embodiment_extra is not None):
            yield "embodiment_extra belongs to the embodiment tag custom, and the tag needs it"
        if custom and any(a.n_dof is None or a.vla_action_key is None for a in self.actuators_required):
            yield "with the embodiment tag custom every entry of actuators_required says n_dof and vla_action_key"
        if self.fallback_skill_id == self.name:
            yield "fallback_skill_id is the skill itself"

    @property
    def is_template(self) -> bool:
        """Whether it is still the scaffold that `prts skill new` writes: to be installed or published by nobody."""
        said = (self.name, self.weights_uri or "", self.source_repo or "")
        return any(word in text for word in TEMPLATE_WORDS for text in said)

    @property
    def memory_gb(self) -> float | None:
        """GPU memory of the dtype that it is loaded in; none where the manifest does not say."""
        return (self.min_vram_gb or {}).get(self.quantization.dtype)


def manifest_path(package: Path) -> Path:
    """The manifest of a package folder; a file is its own."""
    return package / FILE if package.is_dir() else package


def read_manifest(package: Path) -> Manifest:
    """A package's manifest, given the folder or the file; ConfigError with every fault of the file."""
    path = manifest_path(package)
    return check_manifest(read_yaml(path, "skill manifest"), path)


def check_manifest(raw: dict[str, Any], where: object) -> Manifest:
    """The same of plain data that came from `where`."""
    return check(Manifest, raw, where, what="skill manifest", cure=CURE)


def ignored_keys(raw: dict[str, Any]) -> list[str]:
    """Keys of a file that the schema neither knows nor refuses: nobody reads them, and a slip is easily made there."""
    found = []
    for place, kind in LENIENT.items():
        inner: Any = raw
        for part in place:
            inner = inner.get(part) if isinstance(inner, dict) else None
        known = {f.name for f in fields(kind)}
        found += [".".join((*place, key)) for key in inner or () if key not in known]
    return found


def write_manifest(manifest: Manifest, package: Path) -> Path:
    """Write a manifest into a package folder, or as a file; read back it is equal. What is a default is left out."""
    path = manifest_path(package)
    text = yaml.safe_dump(_plain(manifest), sort_keys=False, width=110, allow_unicode=True)
    write_text(path, text)
    return path


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in fields(value)
            if f.name in SPOKEN_OUT or getattr(value, f.name) != _default(f)
        }
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _default(f: Any) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default
