"""Describe a reinforcement-learning run: its algorithm, how the policy explores, what is rewarded, how it learns.

Names follow RLinf's where it has one for the same thing (facts and formulas: docs/reference on reinforcement learning).
A *decision* is one look of the policy and the chunk of actions that it gives.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from prts_core.config.checks import Strict, check_numbers
from prts_core.config.identity import execution
from prts_core.config.rl_placement import PlacementConfig

Level = Literal["token", "action", "chunk"]


@dataclass(frozen=True)
class AlgorithmConfig(Strict):
    """name: a module of prts_core/rl/algorithms. An algorithm reads what it needs of the rest.

    group_size: episodes of one initial state, which group-relative advantages compare. gamma, gae_lambda: a step
    (reward_level "action") or a decision ("chunk", whose reward is the sum over its actions). bootstrap: an episode
    that was cut at its limit is worth what the critic says of its last observation; false: nothing. log_prob_level:
    what one probability ratio stands for: one number of an action ("token"), an action, or a chunk. filter_returns:
    groups whose mean return lies outside carry no information and are left out.

    clip_low, clip_high: of the ratio, 1 - low to 1 + high. dual_clip: at most this many times a negative advantage;
    none: off. value_clip, huber_delta, value_weight: of the critic. critic_warmup: iterations in which the critic alone
    learns. weigh: in the policy's loss decisions weigh alike, as the expected return's gradient has it, or episodes
    do, so that a short one's decisions count more. entropy_bonus: weight of the entropy. kl_weight: of the divergence
    from the policy that the run started from. normalize_advantages: to mean 0 and deviation 1 over all that counts.
    replay: iterations before the present one whose episodes are learned from again, by algorithms that imitate, by
    self_imitation and by learner.critic_epochs. self_imitation: weight of the supervised loss on episodes that were
    solved, each decision by how little the critic expected that (arXiv:1806.05635); it is added to the policy's loss.

    max_staleness: of asynchronous rollouts, policy versions that a sample may lie behind; older ones are dropped.
    weight_limit: of a decoupled loss: samples whose proximal-to-behaviour weight exceeds it are left out.

    positive_share: recap: the share of decisions, best advantage first, that are called good. drop: how often the word
    is left out in training. expert_share, expert_decay: dagger: the chance that the expert acts in an episode, and by
    what it is multiplied from iteration to iteration.
    """

    name: str = "ppo"
    group_size: int = 1
    gamma: float = 0.99
    gae_lambda: float = 0.95
    bootstrap: bool = True
    reward_level: Literal["action", "chunk"] = "chunk"
    log_prob_level: Level = "chunk"
    normalize_advantages: bool = True
    weigh: Literal["decisions", "episodes"] = "decisions"
    replay: int = 0
    self_imitation: float = execution(0.0, lambda algorithm: algorithm.self_imitation or None)
    filter_returns: tuple[float, float] | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float = 0.2
    huber_delta: float = 10.0
    value_weight: float = 1.0
    critic_warmup: int = 0
    entropy_bonus: float = 0.0
    kl_weight: float = 0.0
    max_staleness: int = 0
    weight_limit: float | None = None
    positive_share: float = 0.3
    drop: float = 0.1
    expert_share: float = 1.0
    expert_decay: float = 0.5

    def __post_init__(self) -> None:
        check_numbers(
            self,
            {
                "[1, inf)": "group_size",
                "[0, 1]": "gamma gae_lambda positive_share drop expert_share expert_decay",
                "[0, inf)": "replay self_imitation clip_high value_weight critic_warmup entropy_bonus kl_weight "
                "max_staleness",
                "[0, 1)": "clip_low",
                "(0, inf)": "value_clip huber_delta weight_limit",
                "(1, inf)": "dual_clip",
            },
        )


@dataclass(frozen=True)
class ExplorationConfig(Strict):
    """How actions are drawn while the policy learns.

    Of a flow policy. method: "flow_sde" (a stochastic differential equation with the flow's marginals), "flow_cps"
    (coefficients that keep the noise level), "flow_noise" (the flow's own step and a learned deviation); pi_RL, arXiv:
    2510.25889. level: a of the first two; deviations of the last lie between noise_range's ends. joint: every step of
    the chain is random; else one of them, `step` counted from the first (-1: the last), or drawn for each decision
    where that is none. start_noise: deviation of the noise that the chain starts from; none: the policy's own
    noise_scale. correlation: of the noise of neighbouring actions of a chunk, so that a push lasts.

    Of a token policy. temperature, top_k: of the draw among action tokens; 0: all of them.
    """

    method: Literal["flow_sde", "flow_cps", "flow_noise"] = "flow_sde"
    level: float = 0.5
    joint: bool = False
    step: int | None = None
    noise_range: tuple[float, float] = (0.08, 0.16)
    start_noise: float | None = None
    correlation: float = 0.0
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        check_numbers(
            self,
            {
                "(0, inf)": "level noise_range temperature",
                "[0, inf)": "start_noise top_k",
                "[0, 1)": "correlation",
                "[-1, inf)": "step",
            },
        )
        if self.noise_range[0] > self.noise_range[1]:
            raise ValueError(f"noise_range: {self.noise_range} is no range: the smaller end comes first")


@dataclass(frozen=True)
class RewardConfig(Strict):
    """success: of a step after which the task is solved. relative: its change is the reward, so that staying solved
    earns nothing more. step_penalty: taken off at every step. shaping: weight of goal reachability as a potential,
    gamma Phi(s') - Phi(s) (Ng et al. 1999): it moves credit to where it was earned and never changes the optimum."""

    success: float = 1.0
    relative: bool = True
    step_penalty: float = 0.0
    shaping: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, {"(0, inf)": "success", "[0, inf)": "step_penalty shaping"})


@dataclass(frozen=True)
class LearnerConfig(Strict):
    """trains: the action head alone, the action head and the language model, or all. epochs: passes over the decisions
    of an iteration. critic_epochs: more passes of the critic alone, over the features of replayed iterations too, which
    cost no look at a picture. batch_size: decisions an update; micro_batch: of them at once. target_kl: the rates are
    steered so that an iteration moves the policy by about that much; none: they stay. warmup: updates over which the
    rates rise.
    """

    trains: Literal["action", "language", "all"] = "all"
    epochs: int = 1
    critic_epochs: int = 0
    batch_size: int = 512
    micro_batch: int = execution(128)
    learning_rate: float = 1e-5
    value_lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    min_learning_rate: float = 0.0
    warmup: int = 0
    target_kl: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    threads: int = execution(2)

    def __post_init__(self) -> None:
        check_numbers(
            self,
            {
                "[1, inf)": "epochs batch_size micro_batch",
                "(0, inf)": "learning_rate value_lr target_kl adam_eps clip_norm",
                "[0, inf)": "critic_epochs min_learning_rate warmup weight_decay",
                "[0, 1)": "betas",
                "[1, 1024]": "threads",
            },
        )


ONE_PROCESS = PlacementConfig()


@dataclass(frozen=True)
class RlSection(Strict):
    """Reinforcement learning in a simulator, from the policy of stage `start` or from `checkpoint`: a policy folder, a
    package or models:/name@alias.

    suite, tasks, perturbation, image_size: as in `benchmark`. iterations: of rollouts and updates. episodes: an
    iteration, a multiple of algorithm.group_size. execute_steps: rows of a chunk executed before the policy looks
    again; none: the whole chunk. train_seed: initial states that a simulator draws from a seed are drawn from this one
    on, of evaluation from the suite's. train_states: [first, one past the last] of the initial states that a task
    ships, to learn from; the others are evaluated on. shared_states: evaluation may meet states that were trained on.

    eval_every: iterations between two evaluations without noise, before the first and after the last too; 0: those two.
    eval_episodes: a task. keep_best: the weights of the best evaluation are the result, not the last ones.
    presets: name -> changes to all of this; preset: the one that counts.

    placement: which processes the simulators and the acting policy are, on which machines.
    workers: simulators, in `stages` equal parts that take turns, so that some work while the policy thinks; a part's
    decisions are made together. tensorboard: what MLflow gets also as events under outputs/tensorboard/.
    """

    start: Literal["sft", "subtask"] = "sft"
    checkpoint: str | None = None
    suite: str | None = None
    tasks: tuple[str, ...] = ()
    perturbation: dict[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    iterations: int = 100
    episodes: int = 192
    execute_steps: int | None = None
    train_seed: int = 1_000_000
    train_states: tuple[int, int] | None = None
    shared_states: bool = False
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval_every: int = 10
    eval_episodes: int = 20
    keep_best: bool = True
    preset: str | None = None
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    workers: int = 12
    stages: int = 2
    checkpoint_every: int = execution(1)
    placement: PlacementConfig = execution(ONE_PROCESS)  # noqa: RUF009 - a frozen record
    tensorboard: bool = execution(False)

    def __post_init__(self) -> None:
        check_numbers(
            self,
            {
                "[1, inf)": "iterations episodes execute_steps eval_episodes image_size stages checkpoint_every",
                "[0, inf)": "eval_every",
                "[0, 4294967295]": "train_seed train_states",
                "[1, 1024]": "workers",
            },
        )
        if self.workers % self.stages:
            raise ValueError(f"workers: {self.workers} do not fall into {self.stages} stages of equal size")
        if self.algorithm.name == "grpo" and self.algorithm.group_size < 2:
            raise ValueError("algorithm.group_size: grpo compares episodes of one initial state; say how many, as 8")
        if self.algorithm.name == "grpo" and self.algorithm.critic_warmup:
            raise ValueError("algorithm.critic_warmup: grpo has no critic, and would wait for nothing; leave it out")
        if self.algorithm.max_staleness > 1:
            raise ValueError("algorithm.max_staleness: rollouts are made one version ahead, 0 or 1")
        if self.episodes % self.algorithm.group_size:
            raise ValueError(
                f"episodes: {self.episodes} do not fall into groups of algorithm.group_size {self.algorithm.group_size}"
            )


@dataclass(frozen=True, kw_only=True)
class RlConfig(RlSection):
    dataset: str
    source: Any = None

    def replaced(self, **changes: Any) -> RlConfig:
        return replace(self, **changes)
