"""The model card: README.md of a package, made from its manifest, its contract and the reports that it was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prts_core.contract import PolicyContract
from prts_core.skills.manifest import Manifest

HUB_LICENCES = ("apache-2.0", "mit", "bsd")  # postures that hubs have a word for; any other is "other" there


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def card(
    manifest: Manifest,
    contract: PolicyContract,
    benchmark: Mapping[str, Any] | None = None,
    value: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with the front matter that hubs read. benchmark, value: what was measured; none: that it was not."""
    meant = contract.contract
    licence = manifest.license if manifest.license in HUB_LICENCES else "other"
    cameras = ", ".join(f"`{c.key}` ({c.label}, {c.height}x{c.width})" for c in meant.cameras)
    sentence = "pick up the cube"
    if benchmark is not None:
        sentence = next(iter(benchmark["tasks"].values()))["instruction"]
    use = f'nats = policy.value(observation, chunk, "{sentence}")  # a batch: one more axis, in and out\n'
    return f"""---
license: {licence}
pipeline_tag: robotics
tags: [robotics, vla, prts, {meant.embodiment}]
---
# {manifest.name} {manifest.version}

{manifest.description}

Policy digest `{manifest.policy_extras["policy_digest"]}`: every figure below was measured on exactly these files.
`rskill.yaml` is the manifest (licence posture: {manifest.license}), `eval/` the results, `digests.json` every file.

## What goes in and out
- embodiment `{contract.embodiment_tag}`, {meant.control_hz:g} rows a second, chunks of {contract.chunk_length} actions
- state: {", ".join(f"{d.name} ({d.unit})" for d in meant.state)}
- action: {", ".join(f"{d.name} ({d.unit})" for d in meant.action)}
- cameras: {cameras}
- rotation: {meant.rotation}; gripper: {meant.gripper}; normalisation: {contract.normalization}

{NOT_MEASURED if benchmark is None else _success(benchmark)}{"" if value is None else _value(value)}
## Use
```python
from pathlib import Path
from prts_core.policy.policy import load_policy
policy = load_policy(Path("."))
observation = {{"observation.state": state, "{meant.cameras[0].key}": image}}  # and every other camera, uint8 (H, W, 3)
chunk = policy.act(observation, "{sentence}", seeds=0)  # ({contract.chunk_length}, {len(meant.action)})
{use if "value" in manifest.policy_extras["capabilities"] else ""}```
"""


NOT_MEASURED = "## Success\n\nNothing was measured yet: `prts benchmark --policy PACKAGE --suite SUITE`.\n"


def _success(benchmark: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {name} | {row['instruction']} | {row['successes']}/{row['n']} "
        f"| [{row['wilson95'][0]:.2f}, {row['wilson95'][1]:.2f}] "
        f"| {percent(row['expert'])} | {percent(row['blind_replay'])} | {row['max_steps']} |"
        for name, row in benchmark["tasks"].items()
    )
    labels = "".join(f"\n\n**{label}**" for label in benchmark["labels"])
    return f"""## Success on held-out episodes of {benchmark["suite"]}{labels}

| task | instruction | success | 95 % Wilson | expert | blind replay | step limit |
|---|---|---|---|---|---|---|
{rows}

| mean over tasks | |
|---|---|
| this policy | **{percent(benchmark["success_rate"])}** |
| the same network untrained | {percent(benchmark["untrained_success_rate"])} |
| blind replay of the mean training trajectory | {percent(benchmark["blind_replay_success_rate"])} |
| sentences of the pair swapped | {percent(benchmark["swapped_success_rate"])} |
| black images | {percent(benchmark["black_image_success_rate"])} |

Success is the simulator's own flag, raised at any step within the limit. {benchmark["source"]}.
"""


def _value(value: Mapping[str, Any]) -> str:
    auroc = f"{percent(value['auroc'])} ({value['n_failed']} failed, {value['n_success']} successful)"
    return f"""
## Value (goal reachability)
| | |
|---|---|
| Spearman with time, per held-out expert episode | {percent(value["spearman"])} |
| right instruction above every wrong one, last quarter | {percent(value["right_over_wrong"])} |
| AUROC failed against successful rollouts, equal elapsed steps | {auroc} |
"""
