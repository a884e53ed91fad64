"""Open any policy to be asked: a folder, a package, a name of the registry or the hub, or the address of a server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prts_core.config.model import PolicyDtype
from prts_core.contract import Contract, PolicyContract
from prts_core.delivery.resolve import policy_folder
from prts_core.io.errors import ConfigError
from prts_core.rollout.local_policy import LocalPolicy, PolicyUnderTest, local_identity

SERVERS = ("ws://", "wss://")


def open_policy(
    reference: str,
    *,
    batch: int = 1,
    values: bool = True,
    patience_s: float = 300.0,
    api_key: str | None = None,
    outputs: Path = Path("outputs"),
    contract: Contract | None = None,
    dtype: PolicyDtype = "auto",
) -> PolicyUnderTest:
    """The policy that `reference` names: ws://host:port, a policy or package folder, models:/<name>@<alias>,
    hf://owner/name[@revision] (a policy or a package), rskill://name (an installed skill).

    outputs: whose registry is meant. contract: of a server that states none. dtype: of a policy that is loaded here; a
    server has its own. Raises ServeError, CheckpointError or StageError where there is none.
    """
    if batch < 1:
        raise ConfigError("A batch holds samples", field="--batch", found=batch, expected="1 or more")
    if reference.startswith(SERVERS):
        from prts_core.rollout.remote_policy import RemotePolicy

        if dtype != "auto":
            raise ConfigError(
                "A server computes in its own precision", field="--dtype", found=dtype, cure="give it to `prts serve`"
            )
        return RemotePolicy(
            reference, batch=batch, values=values, patience_s=patience_s, api_key=api_key, contract=contract
        )
    if contract is not None:
        raise ConfigError(
            "A policy's own contract is what counts",
            field="--contract",
            found=reference,
            expected="the address of a policy server that states none",
        )
    if reference.startswith(("http://", "https://")):
        raise ConfigError(
            "A policy server speaks websocket",
            field="--policy",
            found=reference,
            expected="ws" + reference.removeprefix("http"),
        )
    from prts_core.policy.policy import load_policy, policy_digest

    folder = policy_folder(reference, outputs)
    policy = load_policy(folder, dtype)
    identity = local_identity(policy, policy_digest(folder))
    return LocalPolicy(policy, identity, batch=batch, values=values, fill=policy.device.type == "cpu")


@dataclass(frozen=True)
class _Known:
    contract: PolicyContract
    dtype: str


def identify(
    reference: str, *, outputs: Path = Path("outputs"), dtype: PolicyDtype = "auto"
) -> tuple[dict[str, Any], PolicyContract]:
    """(identity, contract) that `open_policy` would give for a policy that is loaded here; its weights are not loaded.

    Raises as `open_policy` does.
    """
    from prts_core.policy.policy import policy_digest, resolve_dtype

    folder = policy_folder(reference, outputs)
    contract = PolicyContract.load(folder / "policy_contract.json")
    return local_identity(_Known(contract, resolve_dtype(dtype)), policy_digest(folder)), contract
