"""Register a package as a version of an MLflow registered model; the gate decides who is champion.

The same package is registered once: a second call, or one after a kill at any moment, finds what stands and goes on
from there.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.config.load import Plan
from prts_core.config.schema import OWN_BENCHMARK, RegisterConfig
from prts_core.contract import PolicyContract
from prts_core.delivery import promotion, registry
from prts_core.delivery.gate import decide, policy_episodes
from prts_core.delivery.suite_results import SuiteResult, write_result
from prts_core.io.errors import DataError, StageError
from prts_core.io.files import digest_value, link_or_copy, read_json, write_json
from prts_core.io.locks import locked
from prts_core.store.manifest import Manifest
from prts_core.store.run_stage import load_provenance
from prts_core.tracking.source import source_tags
from prts_core.tracking.store import (
    client,
    experiment_id,
    is_server,
    mlflow_module,
    patient,
    recorded_uri,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

logger = logging.getLogger("prts.register")
MODEL_CODE = Path(__file__).with_name("pyfunc_model.py")
# What loading the model needs of others: MLflow, and pyproject.toml's dependencies with the extra `inference`, each in
# the version of the machine that registered it. No package index has this project, so a machine also needs a checkout
# (the version's tag git.sha says which) and `pip install -e '.[inference]'` there.
REQUIREMENTS = (
    "mlflow", "numpy", "pydantic", "pyyaml", "rich", "torch", "transformers", "tokenizers", "safetensors", "pillow",
)  # fmt: skip


@dataclass(frozen=True)
class Context:
    """Where a registration reads results and works. suites: results on these are needed, and may not be significantly
    worse than the champion's, before promotion. caller: tags that lead back to it."""

    outputs: Path
    recipe: str
    work: Path
    suites: tuple[str, ...]
    caller: dict[str, str]


def register_package(
    plan: Plan, package: Manifest, benchmark: Manifest, outputs: Path, caller: dict[str, str] | None = None
) -> dict[str, Any]:
    """Register a package as a version of the recipe's model: @challenger always, @champion through the gate.

    Always looks at the registry; a second call with the same package finds its version and changes nothing. Returns
    {model_uri, version, aliases, verdict, package_digest, ...} and writes it to
    `<outputs>/registrations/<recipe>.json`. Raises StageError when the registry refuses.
    """
    folder = outputs / "registrations"
    suites = tuple(run.label for run in plan.recipe.regression.suites)
    context = Context(outputs, plan.recipe.name, folder / f".work-{plan.recipe.name}", suites, caller or {})
    config = plan.recipe.register
    mlflow = mlflow_module()
    with locked(folder / ".lock"):
        try:
            made = _register(config, package, benchmark, context)
        except mlflow.exceptions.MlflowException as err:
            raise StageError(
                "The MLflow registry refused",
                file=tracking_uri(outputs),
                field="register.model_name",
                found=f"{config.model_name!r}: " + " ".join(str(err).split())[:300],
                expected="a working registry and a name without / : .",
                cure=f"correct the name or the server, then run `{plan.command('register', None, outputs)}` again",
            ) from err
        write_json(folder / f"{plan.recipe.name}.json", made)
    return made


def _register(config: RegisterConfig, package: Manifest, benchmark: Manifest, context: Context) -> dict[str, Any]:
    folder = package.folder(context.outputs)
    episodes = benchmark.folder(context.outputs) / "episodes.parquet"
    contract = PolicyContract.load(folder / "policy_contract.json")
    report = read_json(benchmark.folder(context.outputs) / "report.json")
    success_rate, standins = float(report["success_rate"]), "; ".join(report.get("labels", []))
    store, name = client(context.outputs), config.model_name
    tags = {
        "prts.package_digest": package.content_digest,
        "prts.manifest_digest": package.digest,
        "prts.key": package.key,
        "prts.benchmark_digest": benchmark.digest,
        "prts.parents": json.dumps(package.parents, sort_keys=True),
        "prts.success_rate": f"{success_rate:.4f}",
        "prts.contract_fingerprint": contract.fingerprint,
        "prts.embodiment_tag": contract.embodiment_tag,
        "prts.recipe": context.recipe,
        "git.sha": source_tags()["git.sha"],
        **{key: str(value) for key, value in context.caller.items()},
    }

    version = registry.find_version(store, name, package.content_digest)
    if version is None:
        model_id, location = _logged_model(store, context, package, folder, episodes, contract, success_rate)
        _ensure_registered_model(store, name)
        run_id = _run_id(context, package)
        on_server = is_server(tracking_uri(context.outputs))
        version = store.create_model_version(
            name,
            # A database store on this machine looks a models:/ source up in MLflow's global store, not in this one.
            source=f"models:/{model_id}" if on_server else location,
            run_id=run_id,
            tags=tags | {"prts.model_id": model_id},
            model_id=model_id if on_server or run_id else None,
            description=f"Success rate {success_rate:.3f} on held-out episodes; package {package.content_digest}."
            + (f" {standins}." if standins else ""),
        )
    else:
        for key, value in tags.items():
            if version.tags.get(key) != value:
                store.set_model_version_tag(name, version.version, key, value)
    store.set_registered_model_alias(name, registry.CHALLENGER, version.version)

    verdict = _judge(config, context, store, version, episodes, benchmark, standins)
    version = store.get_model_version(name, version.version)
    return {
        "tracking_uri": recorded_uri(context.outputs),
        "model_name": name,
        "model_uri": f"models:/{name}/{version.version}",
        "version": str(version.version),
        "aliases": sorted(version.aliases or []),  # as the registry has them, not as the verdict would
        "verdict": verdict,
        "package_digest": package.content_digest,
        "contract_fingerprint": contract.fingerprint,
        "success_rate": success_rate,
    }


def _ensure_registered_model(store: MlflowClient, name: str) -> None:
    mlflow = mlflow_module()
    try:
        store.create_registered_model(name, description="A PRTS policy; @champion only through the gate.")
    except mlflow.exceptions.MlflowException as err:
        if err.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


# ---- the gate ----------------------------------------------------------------------------------------------------
def _judge(
    config: RegisterConfig,
    context: Context,
    store: MlflowClient,
    version: ModelVersion,
    episodes: Path,
    benchmark: Manifest,
    standins: str,
) -> dict[str, Any]:
    """Ask the gate once per version, benchmark and setting; the answer is kept on the version before any alias moves.

    A second run reads that answer, so that its registration is the same although the champion has changed meanwhile.
    """
    question = _question(config, benchmark, context.suites)
    tag, done = promotion.verdict_tag(question), promotion.promoted_tag(question)
    present = store.get_model_version(version.name, version.version)
    if tag in present.tags:
        verdict = json.loads(present.tags[tag])
    else:
        verdict = _ask(config, context, store, version, episodes)
        own, words = policy_episodes(episodes), {"alarm": verdict["alarm"], "reason": verdict["reason"][:2000]}
        result = SuiteResult(OWN_BENCHMARK, int(own["success"].sum()), own.height, standins=standins, **words)
        write_result(context.outputs, version, OWN_BENCHMARK, result)
        store.set_model_version_tag(version.name, version.version, tag, json.dumps(verdict, sort_keys=True))
    store.set_model_version_tag(version.name, version.version, promotion.QUESTION, question)
    if verdict["promote"] and done not in present.tags:
        # A champion that came after the question was answered is not thrown out by an interrupted run's late answer.
        now = registry.version_of_alias(store, version.name, registry.CHAMPION)
        if now is None or str(now.version) == verdict["champion_version"]:
            store.set_registered_model_alias(version.name, registry.CHAMPION, version.version)
        store.set_model_version_tag(version.name, version.version, done, "true")
    if verdict["alarm"]:
        logger.warning("%s version %s: %s", version.name, version.version, verdict["reason"])
    return verdict


def _question(config: RegisterConfig, benchmark: Manifest, suites: tuple[str, ...]) -> str:
    return digest_value([config.margin, config.floor, benchmark.digest, suites])[len("sha256:") :][:16]


def _ask(
    config: RegisterConfig, context: Context, store: MlflowClient, version: ModelVersion, episodes: Path
) -> dict[str, Any]:
    """The gate's verdict as plain data. Episodes that do not pair are no reason not to register: the reason says so."""
    champion = registry.version_of_alias(store, version.name, registry.CHAMPION)
    number = None if champion is None else str(champion.version)
    own = policy_episodes(episodes)
    try:
        stored = None
        if champion is not None:
            stored = policy_episodes(registry.version_files(context.outputs, champion, registry.EPISODES))
        verdict = decide(own, stored, config.margin, config.floor).to_json() | {"champion_version": number}
    except (DataError, StageError) as err:
        logger.warning("not promoted: %s", err)
        refused = {"promote": False, "alarm": False, "reason": f"not compared with version {number}: {err}"}
        verdict = refused | {"lower": None, "upper": None, "n_pairs": 0, "champion_version": number}
    if context.suites:
        present = store.get_model_version(version.name, version.version)
        held = promotion.held_back(context.outputs, present, champion, config, context.suites)
        verdict = promotion.hold(verdict, held)
    return verdict


# ---- the model ---------------------------------------------------------------------------------------------------
def _logged_model(
    store: MlflowClient,
    context: Context,
    package: Manifest,
    folder: Path,
    episodes: Path,
    contract: PolicyContract,
    success_rate: float,
) -> tuple[str, str]:
    """(id, location) of the LoggedModel that holds this package; one that a killed run left behind is completed."""
    from mlflow.entities import LoggedModelOutput

    experiment, run_id = experiment_id(context.outputs, context.recipe), _run_id(context, package)
    found = store.search_logged_models(
        [experiment], filter_string=f"tags.`prts.package_digest` = '{package.content_digest}'", max_results=1
    )
    if found:
        model = found[0]
    else:
        model = store.create_logged_model(
            experiment,
            name=context.recipe,
            source_run_id=run_id,
            tags={"prts.package_digest": package.content_digest, "prts.manifest_digest": package.digest},
            params={"chunk_length": str(contract.chunk_length), "embodiment_tag": contract.embodiment_tag},
            model_type="policy",
        )
    if str(model.status) != "READY":
        staged = context.work / "mlflow-model"
        shutil.rmtree(staged, ignore_errors=True)
        _save(staged, model, folder, episodes, contract)
        with patient():
            store.log_model_artifacts(model.model_id, str(staged))
        store.finalize_logged_model(model.model_id, "READY")
        shutil.rmtree(staged)
    if run_id is not None:
        store.log_outputs(run_id, models=[LoggedModelOutput(model.model_id, step=0)])
        store.log_metric(run_id, "success_rate", success_rate, model_id=model.model_id)
    return model.model_id, model.artifact_location


def _save(target: Path, model: Any, folder: Path, episodes: Path, contract: PolicyContract) -> None:
    """Write MLflow's model folder: the code file, the package and the episodes; nothing is pickled."""
    import mlflow.pyfunc
    from mlflow.models import Model

    staging = target.with_name(target.name + "-artifacts")  # MLflow keeps a folder's own name: give it the fixed one
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(folder, staging / "package", copy_function=link_or_copy)
    link_or_copy(str(episodes), str(staging / "episodes.parquet"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an input example would run the model; the signature is given
        mlflow.pyfunc.save_model(
            path=str(target),
            python_model=str(MODEL_CODE),
            artifacts={"package": str(staging / "package"), "episodes": str(staging / "episodes.parquet")},
            signature=signature(contract),
            pip_requirements=_requirements(),
            mlflow_model=Model(
                artifact_path=model.artifact_location,
                model_uuid=model.model_id,
                model_id=model.model_id,
                metadata={"policy_contract": contract.to_json()},
            ),
        )
    shutil.rmtree(staging)


def _requirements() -> list[str]:
    pinned = []
    for name in REQUIREMENTS:
        try:
            pinned.append(f"{name}=={importlib.metadata.version(name).split('+')[0]}")
        except importlib.metadata.PackageNotFoundError:
            pinned.append(name)
    return pinned


def signature(contract: PolicyContract) -> ModelSignature:
    """Names, dtypes and shapes that MLflow enforces: (B, D) state, (B, H, W, 3) cameras, (B,) prompts."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    cameras = [
        TensorSpec(np.dtype("uint8"), (-1, camera.height, camera.width, 3), camera.key)
        for camera in contract.contract.cameras
    ]
    state = TensorSpec(np.dtype("float32"), (-1, len(contract.contract.state)), "observation.state")
    actions = TensorSpec(np.dtype("float32"), (-1, contract.chunk_length, len(contract.contract.action)))
    return ModelSignature(
        inputs=Schema([state, *cameras, TensorSpec(np.dtype("str"), (-1,), "prompt")]),
        outputs=Schema([actions]),
        params=ParamSchema([ParamSpec("seed", DataType.long, 0)]),
    )


def _run_id(context: Context, package: Manifest) -> str | None:
    """The MLflow run that made the package, if the same store tracks it."""
    known = load_provenance(context.outputs, package).get("mlflow", {})
    return known.get("run_id") if known.get("tracking_uri") == recorded_uri(context.outputs) else None
