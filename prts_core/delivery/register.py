"""Register a package as a version of an MLflow registered model; the rule decides whether it becomes champion.

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

from prts_core.config.load import RunPlan
from prts_core.config.schema import OWN_BENCHMARK
from prts_core.contract import PolicyContract
from prts_core.delivery import audit, latency, registry
from prts_core.delivery.gate import policy_episodes
from prts_core.delivery.promote import promote
from prts_core.delivery.protocol import CHUNK_LENGTH
from prts_core.delivery.suite_results import SuiteResult, result_of, results_of, write_result
from prts_core.io.errors import StageError
from prts_core.io.files import link_or_copy, read_json, write_json
from prts_core.io.locks import locked
from prts_core.skills.digests import SIGNATURE, read_digests
from prts_core.skills.manifest import read_manifest
from prts_core.skills.signature import sign
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
    "mlflow",
    "numpy",
    "pydantic",
    "pyyaml",
    "rich",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pillow",
)


@dataclass(frozen=True)
class Context:
    """Where a registration reads results and works. caller: tags that lead back to it."""

    outputs: Path
    recipe: str
    work: Path
    caller: dict[str, str]


def register_package(
    plan: RunPlan,
    package: Manifest,
    benchmark: Manifest,
    outputs: Path,
    caller: dict[str, str] | None = None,
    key: Path | None = None,
) -> dict[str, Any]:
    """Register a package as a version of the recipe's model: @challenger always, @champion by the rule.

    key: a private key that signs it, or the version that stands already (`prts skill keygen`). Always looks at the
    registry; a second call with the same package finds its version and changes nothing. Returns
    {model_uri, version, aliases, verdict, package_digest, ...} and writes it to
    `<outputs>/registrations/<recipe>.json`. Raises StageError when the registry refuses.
    """
    folder = outputs / "registrations"
    context = Context(outputs, plan.recipe.name, folder / f".work-{plan.recipe.name}", caller or {})
    name, store = plan.recipe.register.model_name, client(outputs)
    with locked(folder / ".lock"), registry.refusals(outputs, name):
        version = _version(name, package, benchmark, context)
        if key is not None:
            _sign(store, version, package.folder(outputs), context.work, key)
        with audit.aliases_locked(outputs):
            before, number = audit.version_called(outputs, name, registry.CHALLENGER), str(version.version)
            if before != number:
                audit.move_alias(
                    outputs, name, registry.CHALLENGER, before, number, verdict="registered", caller=caller
                )
        decision = promote(plan, outputs, number, caller=caller)
        for one in decision.objections:
            if one.why == "alarm":
                logger.warning("%s version %s: %s", name, number, decision.verdicts[one.subject].reason)
        made = {
            "tracking_uri": recorded_uri(outputs),
            "model_name": name,
            "model_uri": f"models:/{name}/{number}",
            "version": number,
            "aliases": sorted(store.get_model_version(name, number).aliases or []),
            "verdict": decision.to_json(),
            "package_digest": version.tags["prts.package_digest"],
            "content_digest": package.content_digest,
            "contract_fingerprint": version.tags["prts.contract_fingerprint"],
        }
        write_json(folder / f"{plan.recipe.name}.json", made)
    return made


def _version(name: str, package: Manifest, benchmark: Manifest, context: Context) -> ModelVersion:
    """The version that holds the package, made where there is none, with its result on the recipe's own benchmark."""
    folder = package.folder(context.outputs)
    episodes = benchmark.folder(context.outputs) / "episodes.parquet"
    contract = PolicyContract.load(folder / "policy_contract.json")
    report = read_json(benchmark.folder(context.outputs) / "report.json")
    packaged = read_manifest(folder).policy_extras.get("policy_digest")
    if report["policy_digest"] != packaged:
        raise StageError(
            "The benchmark measured another policy than the one in the package",
            file=folder,
            found=report["policy_digest"],
            expected=packaged,
            cure="run `prts package` again",
        )
    result = result_of(report, policy_episodes(episodes))
    store = client(context.outputs)
    tags = {
        "prts.package_digest": read_digests(folder).package_digest,
        "prts.content_digest": package.content_digest,
        "prts.manifest_digest": package.digest,
        "prts.key": package.key,
        "prts.benchmark_digest": benchmark.digest,
        "prts.parents": json.dumps(package.parents, sort_keys=True),
        "prts.contract_fingerprint": contract.fingerprint,
        "prts.embodiment_tag": contract.embodiment_tag,
        CHUNK_LENGTH: str(contract.chunk_length),
        "prts.recipe": context.recipe,
        "git.sha": source_tags()["git.sha"],
        **latency.tags_of(load_provenance(context.outputs, package)),
        **{key: str(value) for key, value in context.caller.items()},
    }
    version = registry.find_version(store, name, package.content_digest)
    if version is None:
        model_id, location = _logged_model(store, context, package, folder, episodes, contract, result)
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
            description=f"Package {package.content_digest}." + (f" {result.standins}." if result.standins else ""),
        )
    else:
        for key, value in tags.items():
            if version.tags.get(key) != value:
                store.set_model_version_tag(name, version.version, key, value)
    if OWN_BENCHMARK not in results_of(version):
        write_result(context.outputs, version, OWN_BENCHMARK, result)
    return store.get_model_version(name, version.version)


def _ensure_registered_model(store: MlflowClient, name: str) -> None:
    mlflow = mlflow_module()
    try:
        store.create_registered_model(name, description="A PRTS policy; @champion only by `prts promote` and its rule.")
    except mlflow.exceptions.MlflowException as err:
        if err.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


# ---- the model ---------------------------------------------------------------------------------------------------
def _logged_model(
    store: MlflowClient,
    context: Context,
    package: Manifest,
    folder: Path,
    episodes: Path,
    contract: PolicyContract,
    result: SuiteResult,
) -> tuple[str, str]:
    """(id, location) of the LoggedModel that holds this package; one that a killed run left behind is completed."""
    from mlflow.entities import LoggedModelOutput

    experiment, run_id = experiment_id(context.outputs, context.recipe), _run_id(context, package)
    found = store.search_logged_models(
        [experiment], filter_string=f"tags.`prts.content_digest` = '{package.content_digest}'", max_results=1
    )
    if found:
        model = found[0]
    else:
        model = store.create_logged_model(
            experiment,
            name=context.recipe,
            source_run_id=run_id,
            tags={"prts.content_digest": package.content_digest, "prts.manifest_digest": package.digest},
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
        store.log_metric(run_id, f"success_rate/{OWN_BENCHMARK}", result.rate.estimate, model_id=model.model_id)
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


def _sign(store: MlflowClient, version: ModelVersion, package: Path, work: Path, key: Path) -> None:
    """Put a signature beside the files of a registered package. Its list of digests is already what is signed."""
    signed, upload = work / "signed", work / "upload"
    for folder in (signed, upload):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(package, signed, copy_function=link_or_copy)
    sign(signed, key)
    (upload / registry.PACKAGE).mkdir(parents=True)
    link_or_copy(signed / SIGNATURE, upload / registry.PACKAGE / SIGNATURE)
    with patient():
        store.log_model_artifacts(version.tags["prts.model_id"], str(upload))
    shutil.rmtree(signed)
    shutil.rmtree(upload)


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
