"""Describe recipes, datasets and robots as frozen dataclasses: what every YAML file of the project may say.

`prts_core.config.load` checks YAML against these with pydantic; the rest of the library only ever sees the dataclasses.
A stage's configuration is one of the `*Config` records below; what of it can change a result is part of that result's
key, fields made by `execution` are not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from prts_core.config.checks import Strict, check_names, check_numbers
from prts_core.config.identity import execution
from prts_core.config.licence import Licence
from prts_core.config.model import ModelConfig, PolicyDtype
from prts_core.config.rl import RlSection
from prts_core.config.sources import ImageTextSource, Source
from prts_core.config.train import LossWeights, TrainConfig
from prts_core.contract import Normalization, checked_limits

MixBy = Literal["rows", "samples"]
PolicyStage = Literal["sft", "subtask", "rl"]  # stages whose output is a policy, in the chain's order
_SEEDS, _WORKERS = "[0, 4294967295]", "[1, 1024]"


# ---- robots ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DimensionSpec(Strict):
    name: str
    unit: str = "unknown"
    relative: bool = False
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        checked_limits(self.name, self.limits)


@dataclass(frozen=True)
class RobotConfig(Strict):
    """`configs/robots/<embodiment_tag>.yaml`: what the numbers of one embodiment mean.

    `cameras` maps dataset keys to the words of the prompt. An empty `state` or `action` list takes the names that the
    dataset's own `info.json` gives, with unknown units. relative: which action dimensions are trained relative to the
    state, where no `action` list says it for each. truncate: `relative` may be longer than the data's actions are wide.
    """

    embodiment_tag: str
    state: tuple[DimensionSpec, ...] = ()
    action: tuple[DimensionSpec, ...] = ()
    relative: tuple[bool, ...] = ()
    truncate: bool = False
    cameras: dict[str, str] = field(default_factory=dict)
    rotation: str = "none"
    gripper: str = "unknown"

    def __post_init__(self) -> None:
        check_names(self, "embodiment_tag")
        if self.relative and self.action:
            raise ValueError("say `relative` for each entry of `action`, or give the list `relative` alone, not both")
        if self.truncate and not self.relative:
            raise ValueError("`truncate` cuts the list `relative`, which is empty")


# ---- datasets ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class VideoConfig(Strict):
    """How converted images are encoded. `crf` and `gop` are the codec's own constant rate factor and keyframe
    distance. tune: libx264 spends its bits on the pixels that a network sees ("psnr"), or on what pleases the eye
    ("none")."""

    # Presets of libsvtav1 are numbers.
    __pydantic_config__ = Strict.__pydantic_config__ | {"coerce_numbers_to_str": True}
    codec: Literal["libx264", "libsvtav1"] = "libx264"
    crf: int = 20
    gop: int = 2
    preset: str = "veryfast"
    pixel_format: str = "yuv420p"
    tune: Literal["psnr", "none"] = "psnr"

    def __post_init__(self) -> None:
        check_numbers(self, {"[0, 63]": "crf", "[1, inf)": "gop"})


@dataclass(frozen=True)
class DatasetConfig(Strict):
    """`configs/datasets/<name>.yaml`: where one dataset comes from and which robot it shows.

    embodiment_tag none: the mapping's, else the contract is inferred from the dataset's own names. sft: changes to the
    recipe's `sft`. train_subtask: false, true, "mixture:W" or "cumulate" (prts_core.data.subtasks). weight: share in a
    mixture that the recipe does not spell out. state_relative: false trains absolute actions whatever the robot's YAML
    says. optional: its absence is no fault: what needs it says "skipped".
    """

    name: str
    source: Source
    embodiment_tag: str | None = None
    video: VideoConfig = field(default_factory=VideoConfig)
    sft: dict[str, object] = field(default_factory=dict)
    train_subtask: bool | str = False
    weight: float = 1.0
    state_relative: bool | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        check_names(self, "name embodiment_tag")
        check_numbers(self, {"(0, inf)": "weight"})


# ---- sections of a recipe and what each stage gets -----------------------------------------------------------------
# A `*Section` is what a recipe may say; the `*Config` below it adds what the stage takes from dataset and model files.
@dataclass(frozen=True)
class CollectConfig(Strict):
    dataset: str
    source: Source


@dataclass(frozen=True)
class ConvertConfig(Strict):
    dataset: str
    source: Source
    robot: RobotConfig | None
    video: VideoConfig


@dataclass(frozen=True)
class ValidateConfig(Strict):
    dataset: str
    decode_video: bool = True


@dataclass(frozen=True)
class StatsConfig(Strict):
    """chunk_length: of the policies to be trained, where the robot has state-relative actions; else none.
    normalization: how their actions are scaled, which the public release's statistics.json tells."""

    dataset: str
    split: str = "train"
    chunk_length: int | None = None
    normalization: Normalization = "QUANTILE"

    def __post_init__(self) -> None:
        check_numbers(self, {"[1, inf)": "chunk_length"})


@dataclass(frozen=True)
class PretrainSection(Strict):
    """`mixture`: dataset name -> weight. Empty: all datasets of the recipe with their own weights. image_text: name ->
    LLaVA-style data beside them. mix_by: what weights say. "rows": how often a row is drawn, so that row counts times
    weight give the shares (all 1: the public release's concatenation); "samples": the shares of samples themselves.

    fast: the published FAST processor, a folder or hub id; none: one is fitted on the mixture, with `fast_vocab_size`
    tokens. vocab_size: of the text tokenizer that is trained here; a model with `pretrained` keeps its own."""

    mixture: dict[str, float] = field(default_factory=dict)
    mix_by: MixBy = "rows"
    image_text: dict[str, ImageTextSource] = field(default_factory=dict)
    vocab_size: int = 1536
    fast_vocab_size: int = 256
    fast: str | None = None
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_numbers(self, {"(0, inf)": "mixture", "[1, inf)": "vocab_size fast_vocab_size"})


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(PretrainSection):
    """train_subtask: dataset -> mode, for those datasets of the mixture where it is on."""

    model: ModelConfig
    train_subtask: dict[str, bool | str] = field(default_factory=dict)


@dataclass(frozen=True)
class SftSection(Strict):
    """Starts from stage pretrain's output; `from_pretrained` false: with its processor, but from random weights.

    checkpoint: start from this folder or hub id instead, of the public release's layout or a policy folder of ours;
    stage pretrain is not needed then. fast: the published FAST processor, folder or hub id, that a checkpoint of the
    public release was trained with. Both may hold environment variables.

    mixture: dataset name -> weight, where the deployed dataset is not trained on alone: others of the very same
    Contract, its own name among them; the policy is normalised by their pooled statistics. image_text and mix_by: as in
    `pretrain`. Both are of the policy that the recipe deploys; for that of another dataset its own `sft` may say them.
    """

    mixture: dict[str, float] = field(default_factory=dict)
    mix_by: MixBy = "rows"
    image_text: dict[str, ImageTextSource] = field(default_factory=dict)
    from_pretrained: bool = True
    checkpoint: str | None = None
    fast: str | None = None
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_numbers(self, {"(0, inf)": "mixture"})
        if self.checkpoint is not None and not self.from_pretrained:
            raise ValueError("`checkpoint` names weights to start from, and `from_pretrained: false` wants random ones")
        if self.fast is not None and self.checkpoint is None:
            raise ValueError("`fast` belongs to a `checkpoint` of the public release; pretrain has a `fast` of its own")


@dataclass(frozen=True, kw_only=True)
class SftConfig(SftSection):
    """model: what the recipe says of it, where a checkpoint is given. train_subtask: dataset -> mode where it is on."""

    dataset: str
    train_subtask: dict[str, bool | str] = field(default_factory=dict)
    model: ModelConfig | None = None


PUBLIC_SUBTASK = TrainConfig(
    steps=100,
    batch_size=8,
    learning_rate=5e-5,
    min_learning_rate=5e-6,
    warmup_steps=10,
    ema_decay=0.999,
    flow_samples=1,
    weights=LossWeights(fast=0.0, text=1.0, flow=1.0, contrastive=0.0),
    insulate=True,
)


@dataclass(frozen=True)
class SubtaskSection(Strict):
    """Subtask reasoning on top of a fine-tuned policy: it says the next subtask, then acts (pi0.5, arXiv:2504.16054).

    episodes: how many of the training split, spread evenly over it; none: all. export: the averaged weights or those of
    the last step. score_every: every n-th row of the held-out episodes is asked for its subtask. The defaults are the
    public 100-step recipe, but for its warm-up, which is longer than the run.
    """

    episodes: int | None = 30
    export: Literal["average", "last"] = "average"
    score_every: int = 4
    train: TrainConfig = field(default_factory=lambda: PUBLIC_SUBTASK)

    def __post_init__(self) -> None:
        check_numbers(self, {"[1, inf)": "episodes score_every"})


@dataclass(frozen=True, kw_only=True)
class SubtaskConfig(SubtaskSection):
    dataset: str


CONTROLS = ("expert", "blind_replay", "untrained", "black_images", "swapped")


@dataclass(frozen=True)
class BenchmarkSection(Strict):
    """Closed loop in simulation, the policy beside its controls.

    suite: of `prts sim list`; none: where the dataset was recorded, under the settings that it was recorded with.
    tasks: some of the suite's, or none for all. episodes: a task; none: as many as the suite's protocol says. seed:
    none for the suite's. perturbation: laid over every task's own. image_size: pixels that the simulator renders, none
    for the suite's (or those of the dataset). execute_steps: rows of a chunk executed before the policy looks again.
    skip_states: initial states of each task, from the first on, that are left out; none: those that a policy of stage
    rl learned on or was chosen by. controls: which are run beside the policy. swap_pair: two tasks whose sentences are
    exchanged for `swapped`.

    workers: simulators at once; none: one a core, at most 8. batch: samples the policy is asked at once, no more
    than workers. failures_wanted: in all, for the value's AUROC; action_noise: standard deviations added to actions to
    make failures where the policy itself makes too few. record: conditions (policy, expert, noisy, ...) whose episodes
    are kept whole under rollouts/, for `prts convert --source rollouts`. dtype: what policies compute in; auto: bf16 on
    a GPU, fp32 on a CPU.
    """

    suite: str | None = None
    tasks: tuple[str, ...] = ()
    episodes: int | None = 20
    seed: int | None = None
    perturbation: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    execute_steps: int = 2
    skip_states: int | None = execution(None, lambda config: config.skip_states or None)  # 0 leaves no trace
    controls: tuple[str, ...] = CONTROLS
    swap_pair: tuple[str, str] | None = None
    videos_per_task: int = 1
    workers: int | None = execution(None)
    batch: int = 1
    failures_wanted: int = 30
    action_noise: tuple[float, ...] = (0.5, 1.0)
    dtype: PolicyDtype = "auto"
    record: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(
            self,
            {
                "[1, inf)": "episodes image_size execute_steps batch",
                _SEEDS: "seed",
                _WORKERS: "workers",
                "[0, inf)": "skip_states videos_per_task failures_wanted action_noise",
            },
        )


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(BenchmarkSection):
    dataset: str
    source: Source


@dataclass(frozen=True)
class ValueSection(Strict):
    """episodes: held-out expert episodes that are scored, spread over the tasks. curve_rows: rows of each at which the
    value is asked for, at most. rank_episodes: training episodes that are ranked beside the held-out ones."""

    episodes: int = 48
    curve_rows: int = 20
    plot_episodes: int = 6
    rank_episodes: int = 96
    dtype: PolicyDtype = "auto"

    def __post_init__(self) -> None:
        check_numbers(
            self, {"[1, inf)": "episodes", "[2, inf)": "curve_rows", "[0, inf)": "plot_episodes rank_episodes"}
        )


@dataclass(frozen=True, kw_only=True)
class ValueConfig(ValueSection):
    dataset: str


@dataclass(frozen=True)
class PackageSection(Strict):
    """owner, name: the package's id, owner/name; `local` is nobody's place on a hub. latency_budget_ms: of a chunk."""

    owner: str = "local"
    name: str = "prts-quickstart"
    licence: Licence = "apache-2.0"
    latency_budget_ms: float = 200.0

    def __post_init__(self) -> None:
        check_names(self, "owner name")
        check_numbers(self, {"(0, inf)": "latency_budget_ms"})


@dataclass(frozen=True, kw_only=True)
class PackageConfig(PackageSection):
    dataset: str


@dataclass(frozen=True)
class RegisterConfig(Strict):
    """Who may become champion. model_name: of the registered model; empty: prts-<recipe>. margin: the lower bound of
    (challenger - champion) must exceed it on every suite, and the lower bound of the challenger's own success rate
    `floor`, with a champion and without; the bounds share 95 % among the suites. approval: a person must have said
    yes too (`prts promote --approve`)."""

    model_name: str = ""
    margin: float = -0.05
    floor: float = 0.7
    approval: bool = False

    def __post_init__(self) -> None:
        if self.model_name:
            check_names(self, "model_name")
        check_numbers(self, {"[-1, 1]": "margin", "[0, 1]": "floor"})


OWN_BENCHMARK = "benchmark"  # the recipe's own benchmark, where suites are listed


@dataclass(frozen=True)
class SuiteRun(Strict):
    """One suite on which every version of the model is measured (rollout.episode_plan.Settings says what decides its
    rows).

    name: what its results are called, where one suite stands here twice; none: the suite's. episodes: none: as many as
    the suite's protocol says. workers: simulators at once; batch: samples the policy is asked at once. margin, floor:
    of a promotion, on this suite; none: those of section `register`.
    """

    suite: str
    name: str = ""
    episodes: int | None = None
    tasks: tuple[str, ...] = ()
    seed: int | None = None
    execute: int | None = None
    perturbation: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    workers: int | None = execution(None)
    batch: int = 1
    dtype: PolicyDtype = "auto"
    margin: float | None = None
    floor: float | None = None

    def __post_init__(self) -> None:
        check_numbers(
            self,
            {
                "[1, inf)": "episodes execute image_size batch",
                _SEEDS: "seed",
                _WORKERS: "workers",
                "[-1, 1]": "margin",
                "[0, 1]": "floor",
            },
        )

    @property
    def label(self) -> str:
        return self.name or self.suite


@dataclass(frozen=True)
class RegressionSection(Strict):
    """The suites on which every version is measured besides the recipe's own benchmark: each speaks for or against a
    promotion as that one does."""

    suites: tuple[SuiteRun, ...] = ()

    def __post_init__(self) -> None:
        labels = [OWN_BENCHMARK, *(run.label for run in self.suites)]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two suites are called {twice[0]!r}: give one of them another `name`")
        odd = [label for label in labels if not re.fullmatch(r"[A-Za-z0-9_.:-]+", label)]
        if odd:
            raise ValueError(f"{odd[0]!r}: a name has letters, digits and _ . : - only")


# ---- whole runs --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe(Strict):
    """A whole run: `configs/<name>.yaml`. `deploy` names the dataset whose policy is benchmarked, packaged,
    registered; `policy` the stage whose it is: `sft` of that dataset, or `subtask` or `rl`, which go on from it."""

    name: str
    datasets: tuple[str, ...]
    deploy: str
    model: str
    policy: PolicyStage = "sft"
    seed: int = 7
    pretrain: PretrainSection = field(default_factory=PretrainSection)
    sft: SftSection = field(default_factory=SftSection)
    subtask: SubtaskSection = field(default_factory=SubtaskSection)
    rl: RlSection = field(default_factory=RlSection)
    benchmark: BenchmarkSection = field(default_factory=BenchmarkSection)
    value: ValueSection = field(default_factory=ValueSection)
    package: PackageSection = field(default_factory=PackageSection)
    register: RegisterConfig = field(default_factory=RegisterConfig)
    regression: RegressionSection = field(default_factory=RegressionSection)

    def __post_init__(self) -> None:
        check_names(self, "name datasets deploy model")
        check_numbers(self, {_SEEDS: "seed"})
        if not self.register.model_name:
            object.__setattr__(self, "register", replace(self.register, model_name=f"prts-{self.name}"))
