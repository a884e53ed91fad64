"""Make a package of a policy folder: its files byte for byte, rskill.yaml, what was measured of it, card, digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prts_core.contract import PolicyContract
from prts_core.delivery.model_card import card
from prts_core.delivery.skill_manifest import Terms, skill_manifest
from prts_core.io.files import link_or_copy, read_json, write_json, write_text
from prts_core.policy.policy import MODEL_TYPE, policy_digest, policy_files
from prts_core.policy.quantized import BACKBONE, Scheme, read_scheme
from prts_core.skills.digests import package_digest, write_digests
from prts_core.skills.evaluations import write_evaluation
from prts_core.skills.manifest import Manifest, read_manifest, write_manifest
from prts_core.skills.manifest.resources import Dtype

TRAINING, VALUE = "train_config.json", "value.json"
PROTOCOL = (
    "held-out episodes; the simulator's own success flag at any step within the task's limit; "
    "the policy sees images, sentence and proprioception only"
)
BASELINES = (
    "untrained_success_rate",
    "blind_replay_success_rate",
    "swapped_success_rate",
    "black_image_success_rate",
)
DTYPES: dict[Scheme, Dtype] = {"nf4": "int4", "int8": "int8", "bf16": "bf16"}
CONDITIONS = ("policy_digest", "dtype", "source", "labels", "adapter", "without_expert")


def write_package(
    source: Path,
    folder: Path,
    terms: Terms,
    *,
    benchmark: Mapping[str, Any] | None = None,
    episodes_digest: str = "",
    value: Mapping[str, Any] | None = None,
    reports: Mapping[str, Any] | None = None,
) -> Manifest:
    """Put the policy of folder `source` into `folder`, which is there, as a package.

    benchmark: the report of a run of exactly this policy, which becomes eval/<suite>.json; episodes_digest: of the
    episodes that it counts. value: the report of stage value. reports: other files of JSON, by name.
    """
    for name in (*policy_files(source), *(name for name in (TRAINING,) if (source / name).is_file())):
        (folder / name).unlink(missing_ok=True)
        link_or_copy(source / name, folder / name)
    contract = PolicyContract.load(folder / "policy_contract.json")
    digest = policy_digest(folder)
    extras = {
        "format": MODEL_TYPE,
        "capabilities": _capabilities(folder),
        "contract_fingerprint": contract.contract_fingerprint,
        "policy_digest": digest,
    }
    if (scheme := read_scheme(folder)) is not None:
        held = {"scheme": scheme, "backbone": list(BACKBONE), "head": "bf16"}
        terms = replace(terms, dtype=DTYPES[scheme], quantization=held)
    write_manifest(skill_manifest(contract, terms, extras), folder)
    manifest = read_manifest(folder)  # which checks names and lengths that the command line gave
    for name, report in {**({} if value is None else {VALUE: value}), **(reports or {})}.items():
        write_json(folder / name, report)
    write_text(folder / "README.md", card(manifest, contract, benchmark, value))
    if benchmark is not None:
        _write_record(folder, manifest, contract, benchmark, episodes_digest)
    write_digests(folder)
    return manifest


def _capabilities(folder: Path) -> list[str]:
    config = read_json(folder / "config.json")
    subtasks = read_json(folder / "processor_config.json").get("subtasks", False)
    return ["act", *(["value"] if config.get("contrastive") else []), *(["subtask"] if subtasks else [])]


def _write_record(
    folder: Path,
    manifest: Manifest,
    contract: PolicyContract,
    report: Mapping[str, Any],
    episodes_digest: str,
) -> None:
    suite, tasks = report["suite"], report["tasks"]
    write_evaluation(
        folder,
        suite,
        suite=suite,
        robot=contract.embodiment_tag,
        simulator=report["source"],
        protocol=PROTOCOL,
        protocol_digest=report["protocol_digest"],
        package_digest=package_digest(folder),
        model_variant=f"{manifest.name} {manifest.version}",
        successes={f"{suite}/{name}": row["successes"] for name, row in tasks.items()},
        episodes={f"{suite}/{name}": row["n"] for name, row in tasks.items()},
        command=f"prts benchmark --policy PACKAGE --suite {suite}",
        eval_config={name: report[name] for name in CONDITIONS if name in report}
        | {"episodes_digest": episodes_digest},
        baselines={name: report[name] for name in BASELINES if report.get(name) is not None},
    )
