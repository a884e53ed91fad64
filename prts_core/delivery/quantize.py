"""Quantise a policy and let figures decide whether it may be packaged: what it costs in actions and in simulation.

The error of actions is measured by dimension on held-out observations of the recipe's dataset, with the same noise; the
success rate on the recipe's own benchmark, on the same episodes as the policy in full precision.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from prts_core.config.schema import OWN_BENCHMARK
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.delivery import gate
from prts_core.delivery.gate import Verdict
from prts_core.delivery.packaging import write_package
from prts_core.delivery.regression import measure_version
from prts_core.delivery.resolve import ResolvedModel
from prts_core.delivery.skill_manifest import Terms
from prts_core.delivery.suite_results import digest_of
from prts_core.io.errors import CheckpointError, ConfigError, DataError
from prts_core.io.files import new_folder, read_json, write_json
from prts_core.io.locks import locked
from prts_core.io.tensors import load_sharded
from prts_core.models.prts import PrtsModel
from prts_core.policy.observation import STATE
from prts_core.policy.policy import Policy, load_policy, policy_digest, read_model_config, save_policy
from prts_core.policy.processor import Processor
from prts_core.policy.quantized import BACKBONE, FILE, Scheme, held_bytes, matrices, pack, read_scheme
from prts_core.skills.manifest import read_manifest
from prts_core.store.views import viewed
from prts_core.text import prompt
from prts_core.value.alarm import FILE as ALARM
from prts_core.value.alarm_calibration import alarm_of

if TYPE_CHECKING:
    from prts_core.config.load import RunPlan

ROWS, AT_ONCE = 64, 8  # held-out observations that are compared, and how many at once
WORST_SHARE = 0.05  # of a dimension's 1 to 99 % range: the largest mean error of actions that passes
REPORT = "quantization_report.json"


@dataclass(frozen=True)
class ActionError:
    """Of one dimension, in its unit: mean and largest difference. share: the mean, of the training data's 1 to 99 %
    range of what the network says."""

    mean: float
    largest: float
    share: float


@dataclass(frozen=True)
class Price:
    """What quantisation costs and saves. errors: by the name of the action's dimension, over `rows` observations.
    full_bytes, bytes: of all weights as they are held in memory. verdict: the gate's on the recipe's benchmark."""

    scheme: Scheme
    errors: dict[str, ActionError]
    rows: int
    full_bytes: int
    bytes: int
    verdict: Verdict

    @property
    def against(self) -> list[str]:
        """What speaks against it, a sentence each."""
        said = [
            f"{name} is off by {error.share:.1%} of its range on average"
            for name, error in self.errors.items()
            if not error.share <= WORST_SHARE
        ]
        return said + ([] if self.verdict.promote else [self.verdict.reason])

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict.to_json(), "against": self.against}


def quantize_policy(folder: Path, out: Path, scheme: Scheme) -> None:
    """Write the policy of `folder` into the new folder `out` with its backbone held so."""
    if (there := read_scheme(folder)) is not None:
        raise CheckpointError(
            "This policy is quantised already", file=folder, found=there, cure="quantise the package it was made of"
        )
    config = read_model_config(folder)
    processor = Processor.load(folder, config)
    with torch.device("meta"):
        model = PrtsModel(config, len(processor.tokenizer), processor.tokenizer.id(prompt.IMAGE_PAD), processor.compat)
    save_policy(out, pack(load_sharded(folder), [*matrices(model)], scheme), config, processor)
    write_json(out / FILE, {"scheme": scheme, "backbone": list(BACKBONE), "head": "bf16"})


def action_errors(
    full: Policy, small: Policy, dataset: LeRobotDataset, rows: int = ROWS
) -> tuple[dict[str, ActionError], int]:
    """(differences of the chunks that both give for about `rows` observations, spread over the held-out episodes; how
    many were compared: episodes need not divide `rows`, nor be long enough)."""
    contract, episodes = full.contract.contract, dataset.episodes("heldout")
    if not episodes:
        raise DataError("The dataset holds no episode out", file=dataset.root, cure="set source.heldout_episodes")
    each, found, compared = -(-rows // len(episodes)), [], 0
    for episode in episodes[:rows]:
        length = len(dataset.states(episode))
        places = np.unique(np.linspace(0, length - 1, min(each, length)).round().astype(int))
        compared += len(places)
        for start in range(0, len(places), AT_ONCE):
            part = places[start : start + AT_ONCE]
            seen = {c.key: dataset.frames(episode, c.key, part.tolist()) for c in contract.cameras}
            seen[STATE] = dataset.states(episode)[part]
            asked = (seen, [dataset.instruction(episode)] * len(part), [episode * 10_000 + int(row) for row in part])
            found.append(np.abs(full.act(*asked) - small.act(*asked)).reshape(-1, len(contract.action)))
    errors, statistics = np.concatenate(found), full.processor.statistics.action
    width = np.maximum(statistics.q99 - statistics.q01, 1e-6)
    by_dimension = {
        dimension.name: ActionError(
            *(round(float(x), 6) for x in (errors[:, i].mean(), errors[:, i].max(), errors[:, i].mean() / width[i]))
        )
        for i, dimension in enumerate(contract.action)
    }
    return by_dimension, compared


def quantize_package(
    plan: RunPlan,
    package: ResolvedModel,
    scheme: Scheme,
    out: Path,
    outputs: Path,
    say: Callable[[str], None] = lambda text: None,
) -> Price:
    """Quantise a verified package of the recipe's robot into the new package `out`, where the figures allow it.

    What was measured stays in `<outputs>/quantize/<package>/<scheme>`, price.json among it, and a run that was cut
    short goes on. Raises ConfigError where the price is too high: `out` is then not made.
    """
    convert = viewed(outputs, plan.recipe.name, "convert", plan.recipe.deploy)
    if convert is None:
        raise ConfigError(
            "The recipe's dataset is not here, and actions are compared on its held-out episodes",
            field="deploy",
            found=plan.recipe.deploy,
            cure=f"run `prts convert --config {plan.path}`",
        )
    work = outputs / "quantize" / policy_digest(package.policy)[7:19]
    waiting = "this package is being quantised by somebody else: waiting until that is done"
    with locked(work / ".lock", on_wait=lambda: say(waiting)):
        return _quantize(plan, package, scheme, out, outputs, LeRobotDataset.open(convert.folder(outputs)), work, say)


def _quantize(
    plan: RunPlan,
    package: ResolvedModel,
    scheme: Scheme,
    out: Path,
    outputs: Path,
    dataset: LeRobotDataset,
    work: Path,
    say: Callable[[str], None],
) -> Price:
    small = work / scheme / "policy"
    shutil.rmtree(small, ignore_errors=True)
    quantize_policy(package.policy, small, scheme)
    full_policy, small_policy = load_policy(package.policy), load_policy(small)
    errors, rows = action_errors(full_policy, small_policy, dataset)
    sizes = held_bytes(full_policy.model), held_bytes(small_policy.model)
    dtype = full_policy.dtype
    del full_policy, small_policy  # before simulators want the memory
    say("the policy in full precision, on the recipe's benchmark")
    measure_version(plan, OWN_BENCHMARK, package.policy, outputs, work / dtype, say, dtype)
    say(f"the same episodes in {scheme}")
    result_folder = work / scheme / "benchmark"
    measure_version(plan, OWN_BENCHMARK, small, outputs, result_folder, say, "bf16")
    theirs, ours = (gate.policy_episodes(f / "episodes.parquet") for f in (work / dtype, result_folder))
    verdict = gate.decide(ours, theirs, plan.recipe.register.margin, None)
    price = Price(scheme, errors, rows, *sizes, verdict)
    write_json(work / scheme / "price.json", price.to_json())
    if price.against:
        raise ConfigError(
            f"The price of {scheme} is too high",
            file=work / scheme / "price.json",
            found="; ".join(price.against),
            expected=f"mean errors within {WORST_SHARE:.0%} of each range, no worse success by {-verdict.margin:g}",
            cure="take int8 or bf16, or more episodes where the interval is what is too wide (benchmark.episodes)",
        )
    manifest, report = read_manifest(package.folder), read_json(result_folder / "report.json")
    terms = Terms(
        name=f"{manifest.name}-{scheme}",
        licence=manifest.license,
        description=manifest.description,
        per_chunk_ms=manifest.latency_budget.per_chunk_ms,
        tasks=manifest.evaluated_tasks,
        sentences=tuple(row["instruction"] for row in report["tasks"].values()),
    )
    # The alarm of full precision is no alarm of this package: it holds for values like those it was calibrated on.
    alarm, _ = alarm_of(pl.read_parquet(result_folder / "episodes.parquet"))
    if alarm is None:
        say("the package has no alarm: too few of its episodes with values succeeded to calibrate one")
    with new_folder(out) as partial:
        write_package(
            small,
            partial,
            terms,
            benchmark=report,
            episodes_digest=digest_of(ours),
            reports={REPORT: price.to_json()} | ({} if alarm is None else {ALARM: alarm.to_json()}),
        )
    return price
