"""What the numbers of a dataset or a policy mean: two immutable records and the one function that compares them.

A `Contract` is born when recordings become a dataset; a `PolicyContract` when training starts.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .io.errors import ContractError, DataError
from .io.files import digest_value, read_json, write_json

Normalization = Literal["QUANTILE", "MEAN_STD", "MIN_MAX"]


def checked_limits(name: str, limits: Any) -> tuple[float, float] | None:
    """`limits` of dimension `name` as two floats; ValueError unless the first is below the second."""
    if limits is None:
        return None
    low, high = (float(limit) for limit in limits)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"limits of {name!r} are [{low:g}, {high:g}]: give [lowest, highest], two finite numbers")
    return low, high


@dataclass(frozen=True)
class Dimension:
    """One entry of a state or action vector. `relative`: actions are stored absolute, trained as a[t+h] - s[t].

    limits: (lowest, highest) number a sound recording holds, in `unit`. They judge data and do not change what a number
    means: two contracts that differ in them only are equal and have one fingerprint.
    """

    __pydantic_config__ = {"extra": "forbid"}
    name: str
    unit: str = "unknown"
    relative: bool = False
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "limits", checked_limits(self.name, self.limits))


@dataclass(frozen=True)
class Camera:
    """One camera: dataset feature `key`, the words the prompt uses for it, stored size in pixels."""

    __pydantic_config__ = {"extra": "forbid"}
    key: str
    label: str
    height: int
    width: int


@dataclass(frozen=True)
class Contract:
    """What one embodiment's recordings mean. `control_hz`: rows a second, one action a row."""

    __pydantic_config__ = {"extra": "forbid"}
    embodiment: str
    control_hz: float
    state: tuple[Dimension, ...]
    action: tuple[Dimension, ...]
    cameras: tuple[Camera, ...]
    rotation: str = "none"
    gripper: str = "unknown"

    def __post_init__(self) -> None:
        object.__setattr__(self, "control_hz", float(self.control_hz))  # 20 and 20.0 are one rate and one fingerprint

    @property
    def fingerprint(self) -> str:
        return digest_value(asdict(self, dict_factory=_meaning))

    @property
    def relative(self) -> tuple[bool, ...]:
        """Of each action dimension: is it trained relative to the state?"""
        return tuple(dimension.relative for dimension in self.action)

    def to_json(self) -> dict[str, Any]:
        return record(self)

    @staticmethod
    def from_json(raw: dict[str, Any], where: object = None) -> Contract:
        try:
            return Contract(
                embodiment=str(raw["embodiment"]),
                control_hz=float(raw["control_hz"]),
                state=tuple(Dimension(**d) for d in raw["state"]),
                action=tuple(Dimension(**d) for d in raw["action"]),
                cameras=tuple(Camera(**c) for c in raw["cameras"]),
                rotation=str(raw.get("rotation", "none")),
                gripper=str(raw.get("gripper", "unknown")),
            )
        except (KeyError, TypeError, ValueError) as err:
            raise DataError("A contract is malformed", file=where, found=f"{type(err).__name__}: {err}") from err

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @staticmethod
    def load(path: Path) -> Contract:
        return Contract.from_json(read_json(path), where=path)


@dataclass(frozen=True)
class PolicyContract:
    """What a trained policy expects and returns for one embodiment tag.

    `chunk_length` actions of `contract.action` at `contract.control_hz`; `statistics_digest` is the digest of the
    norm statistics that normalise its inputs and outputs.
    """

    embodiment_tag: str
    contract: Contract
    chunk_length: int
    normalization: Normalization
    statistics_digest: str
    contract_fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "contract_fingerprint", self.contract.fingerprint)

    @property
    def fingerprint(self) -> str:
        return digest_value(asdict(self, dict_factory=_meaning))

    def to_json(self) -> dict[str, Any]:
        return record(self) | {"fingerprint": self.fingerprint}

    @staticmethod
    def from_json(raw: dict[str, Any], where: object = None) -> PolicyContract:
        try:
            made = PolicyContract(
                embodiment_tag=str(raw["embodiment_tag"]),
                contract=Contract.from_json(raw["contract"], where),
                chunk_length=int(raw["chunk_length"]),
                normalization=raw["normalization"],
                statistics_digest=str(raw["statistics_digest"]),
            )
        except (KeyError, TypeError, ValueError) as err:
            if isinstance(err, DataError):
                raise
            raise DataError("A policy contract is malformed", file=where, found=f"{type(err).__name__}: {err}") from err
        if raw.get("fingerprint", made.fingerprint) != made.fingerprint:
            raise DataError(
                "A policy contract's fingerprint does not match its own fields",
                file=where,
                field="fingerprint",
                found=raw["fingerprint"],
                expected=made.fingerprint,
                cure="the file was edited by hand; restore it from the package or the registry",
            )
        return made

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    @staticmethod
    def load(path: Path) -> PolicyContract:
        return PolicyContract.from_json(read_json(path), where=path)


def record(value: Any) -> dict[str, Any]:
    """A dataclass as plain data. Limits that nobody gave leave no trace, so that files and digests from before there
    were any stay what they are."""
    return asdict(value, dict_factory=lambda items: {k: v for k, v in items if (k, v) != ("limits", None)})


def _meaning(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name != "limits"}


def differences(left: Any, right: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(field, left value, right value) for every leaf in which two records of one type differ."""
    if type(left) is not type(right):
        return [(path or "type", left, right)]
    if hasattr(left, "__dataclass_fields__"):
        found = []
        for f in fields(left):
            name = f"{path}.{f.name}" if path else f.name
            found += differences(getattr(left, f.name), getattr(right, f.name), name)
        return found
    if isinstance(left, tuple) and len(left) == len(right):
        return [d for i, (a, b) in enumerate(zip(left, right, strict=True)) for d in differences(a, b, f"{path}[{i}]")]
    if isinstance(left, tuple):
        return [(f"{path}.length", len(left), len(right))]
    return [] if left == right else [(path, left, right)]


def require_equal(
    left: Contract | PolicyContract, right: Contract | PolicyContract, *, left_name: str, right_name: str
) -> None:
    """Stop with a field-by-field difference unless both sides mean the same. Called wherever two sides meet."""
    found = [d for d in differences(left, right) if not re.search(r"contract_fingerprint$|\.limits\b", d[0])]
    if not found:
        return
    shown = "; ".join(f"{name}: {a!r} in {left_name}, {b!r} in {right_name}" for name, a, b in found[:12])
    more = f" (and {len(found) - 12} more)" if len(found) > 12 else ""
    raise ContractError(
        f"{left_name} and {right_name} disagree on what the numbers mean",
        field=found[0][0],
        found=shown + more,
        expected="equal contracts",
        cure=f"use data and weights of one embodiment, or convert {left_name} again with the contract of {right_name}",
    )
