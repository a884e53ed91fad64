"""Read what a sidecar's numbers mean from a file of the user's, and hold it against what the server says of itself.

A server of GR00T's protocol names its keys and counts its time steps. It tells neither widths nor units, so that a file
has to: a policy contract, a dataset's contract, or a robot's YAML with its rate and the size of its pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prts_core.contract import Contract, PolicyContract
from prts_core.io.errors import ConfigError, ContractError
from prts_core.io.files import read_json
from prts_core.robot.groot_arrays import ModalityConfig
from prts_core.serving.protocols.groot_modality import Modality

UNKNOWN = "unknown"  # the statistics of a server that normalises by itself


@dataclass(frozen=True)
class StatedContract:
    """file: as above. control_hz, image_size (height, width): for a robot's YAML, which has neither."""

    file: Path
    control_hz: float | None = None
    image_size: tuple[int, int] = (256, 256)

    def __post_init__(self) -> None:
        """ConfigError or DataError for a file that does not say what it should, before anything is started."""
        if not self.file.is_file():
            raise ConfigError(
                "There is no such contract",
                field="--contract",
                found=str(self.file),
                expected="a policy_contract.json, a contract.json, or a robot's YAML",
            )
        self._said(())

    def read(self, configs: Mapping[str, ModalityConfig]) -> PolicyContract:
        """With chunks as long as the server's, and a robot's cameras by the server's names where its YAML names none.
        ContractError where the YAML contradicts itself."""
        horizon = len(configs["action"].delta_indices)
        contract = self._said(configs["video"].modality_keys if "video" in configs else ())
        if isinstance(contract, PolicyContract):
            return contract
        return PolicyContract(contract.embodiment, contract, horizon, "QUANTILE", UNKNOWN)

    def _said(self, video: Sequence[str]) -> Contract | PolicyContract:
        if self.file.suffix in (".yaml", ".yml"):
            return self._of_robot(video)
        raw = read_json(self.file)
        if isinstance(raw, dict) and "chunk_length" in raw:
            return PolicyContract.from_json(raw, self.file)
        return Contract.from_json(raw, self.file)

    def _of_robot(self, video: Sequence[str]) -> Contract:
        from prts_core.config.checked_yaml import check, read_yaml
        from prts_core.config.schema import RobotConfig
        from prts_core.data.embodiment import build_contract

        robot = check(RobotConfig, read_yaml(self.file, "robot file"), self.file)
        if not robot.state or not robot.action or not self.control_hz:
            raise ConfigError(
                "This robot's file does not say enough for a server that tells no widths",
                file=self.file,
                field="--control-hz" if robot.state and robot.action else "state, action",
                found="no rate" if robot.state and robot.action else "no names of state or action",
                expected="name and unit of every number, and --control-hz",
                cure="list state and action in it, and add --control-hz 20 (the robot's own rate)",
            )
        cameras = list(robot.cameras) or [f"observation.images.{key}" for key in video]
        return build_contract(
            dataset=self.file.name,
            robot=robot,
            robot_type=None,
            control_hz=self.control_hz,
            state=[dimension.name for dimension in robot.state],
            action=[dimension.name for dimension in robot.action],
            cameras=dict.fromkeys(cameras, self.image_size),
        )


def agree(modality: Modality, configs: Mapping[str, ModalityConfig]) -> dict[str, str]:
    """The server's video key -> our camera's, once everything of both sides fits. ContractError names what does not."""
    own = modality.contract
    for kind, keys in (("state", modality.state), ("action", modality.action)):
        theirs = set(configs[kind].modality_keys) if kind in configs else set()
        if theirs != set(keys):
            more, less = sorted(theirs - set(keys)), sorted(set(keys) - theirs)
            raise ContractError(
                f"The server's {kind} and the contract's have other keys",
                field=kind,
                found=f"the server: {', '.join(sorted(theirs)) or 'none'}",
                expected=f"the contract: {', '.join(keys) or 'none'}",
                cure=f"put the contract's numbers under the server's keys: --groot-key {kind}.{more[0]}="
                f"{','.join(less) or 'NAMES'}"
                if more
                else f"name a contract without {', '.join(less)}",
            )
    horizon = len(configs["action"].delta_indices)
    if horizon != own.chunk_length:
        raise ContractError(
            "The server's chunks are of another length", field="chunk_length", found=horizon, expected=own.chunk_length
        )
    for kind in ("video", "state", "language"):
        steps = configs[kind].delta_indices if kind in configs else [0]
        if len(steps) != 1:
            raise ContractError(
                f"The model sees several moments of {kind}, and a server that is asked once a chunk has one",
                field=f"{kind}.delta_indices",
                found=str(steps),
                expected="[0]",
                cure="serve a checkpoint that was trained on single frames",
            )
    cameras: dict[str, str] = {}
    video = configs["video"].modality_keys if "video" in configs else []
    for key in video:
        if key in modality.cameras:
            cameras[key] = modality.cameras[key].key
    ours = [camera.key for camera in own.contract.cameras]
    if len(cameras) != len(video) or sorted(cameras.values()) != sorted(ours):
        raise ContractError(
            "The server sees other cameras than the contract has",
            field="video",
            found=f"the server: {', '.join(video) or 'none'}",
            expected=f"the contract: {', '.join(ours) or 'none'}",
            cure="name the contract's camera for each of the server's keys: --camera KEY=observation.images.NAME",
        )
    return cameras
