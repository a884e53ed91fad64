"""Read GR00T's observations strictly by a PolicyContract, describe it as modality configs, hand actions back by key.

GR00T (and RLDX-1 after it) names groups of numbers: state and action are {key: (batch, time, width) float32}, video
{key: (batch, time, height, width, 3) uint8}, language {key: [[sentence]]}. An observation comes nested, as those four
maps, or flat, as the simulators' clients send it: "state.<key>", "video.<key>" and one list of sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prts_core.contract import Camera, Dimension, PolicyContract
from prts_core.io.errors import ServeError, suggest
from prts_core.robot.groot_arrays import ModalityConfig
from prts_core.serving.observations import (
    MAX_PROMPT,
    Observation,
    camera_names,
    check_contract,
    read_flag,
    read_seed,
    read_steps,
    read_traceparent,
    require_finite,
    short_name,
)

KINDS = ("video", "state", "language")
# The first is what we tell clients; the others are what GR00T's embodiments and simulators call it.
LANGUAGE_KEYS = (
    "annotation.human.action.task_description",
    "annotation.human.coarse_action",
    "annotation.human.task_description",
    "task",
)


@dataclass(frozen=True)
class Modality:
    """What a policy's numbers are called in GR00T's terms.

    state, action: key -> places in the contract's vector. cameras: every name a client may use -> camera.
    shown: the cameras' names as clients are told.
    """

    contract: PolicyContract
    state: dict[str, list[int]]
    action: dict[str, list[int]]
    cameras: dict[str, Camera]
    shown: list[str]

    @staticmethod
    def of(
        contract: PolicyContract,
        groups: Mapping[str, Sequence[str]] | None = None,
        aliases: dict[str, str] | None = None,
    ) -> Modality:
        """Every dimension is a key of its own unless `groups` ("state.gripper" -> names of dimensions) says otherwise.

        aliases: further camera name -> camera key. Raises ServeError for names that the contract does not have.
        """
        own, groups = contract.contract, groups or {}
        for key in groups:
            if key.split(".", 1)[0] not in ("state", "action") or not key.partition(".")[2]:
                raise ServeError("A key is of state or of action", field=key, expected="state.NAME or action.NAME")
        cameras = camera_names(contract, aliases)
        short = [short_name(camera) for camera in own.cameras]
        shown = [name if name in cameras else c.key for name, c in zip(short, own.cameras, strict=True)]
        return Modality(
            contract, _places("state", own.state, groups), _places("action", own.action, groups), cameras, shown
        )

    def configs(self) -> dict[str, ModalityConfig]:
        """As `get_modality_config` answers. The policy sees one frame and one state, and acts for the whole chunk."""
        found = {
            "video": ModalityConfig([0], self.shown),
            "state": ModalityConfig([0], list(self.state)),
            "action": ModalityConfig(list(range(self.contract.chunk_length)), list(self.action)),
            "language": ModalityConfig([0], [LANGUAGE_KEYS[0]]),
        }
        return {name: config for name, config in found.items() if config.modality_keys}  # N1.7 refuses empty ones

    def read(
        self, raw: Any, options: Any = None, contract_named: Callable[[Any], PolicyContract] | None = None
    ) -> tuple[list[Observation], bool, list[str]]:
        """(samples of an observation, whether it came nested, their sessions where those have names). Keys that are not
        the policy's are ignored.

        options: none, or a map with `seed`, `step` and `delay` (whole numbers, one a sample), `value`, `traceparent`,
        `contract_fingerprint`, `policy_contract`, and RLDX-1's session_ids and reset_memory, one a sample. Raises
        ServeError; ContractError where the client states another contract. contract_named: by its fingerprint, of all
        versions that are served; none: there is one.
        """
        if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
            raise ServeError("An observation is a mapping with text keys", field="observation", found=_kind(raw))
        nested = any(kind in raw for kind in KINDS)
        parts = {kind: _part(raw, kind, nested) for kind in KINDS}
        images: dict[str, np.ndarray] = {}
        sizes: dict[str, int] = {}
        for shown, camera in zip(self.shown, self.contract.contract.cameras, strict=True):
            names = [name for name, other in self.cameras.items() if other is camera]
            name = next((name for name in (shown, *names) if name in parts["video"]), shown)
            images[camera.key] = _image(parts["video"], name, camera)
            sizes[f"video.{name}"] = len(images[camera.key])
        columns: dict[int, np.ndarray] = {}
        for key, places in self.state.items():
            array = _state(parts["state"], key, len(places))
            sizes[f"state.{key}"] = len(array)
            columns |= {place: array[:, column] for column, place in enumerate(places)}
        field, prompts = _sentences(parts["language"], nested)
        sizes[field] = len(prompts)
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{key} {size}" for key, size in sizes.items())
            raise ServeError("The parts of an observation disagree on the batch", field=field, found=told)
        dimensions = [dimension.name for dimension in self.contract.contract.state]
        rows = np.zeros((len(prompts), len(dimensions)), np.float32)
        for place, column in columns.items():
            rows[:, place] = column
        for row in rows:
            require_finite(row, row, dimensions, "state")
        seeds, steps, value = self._options(
            options, len(prompts), contract_named or (lambda fingerprint: self.contract)
        )
        seen = [{key: image[i] for key, image in images.items()} for i in range(len(prompts))]
        options = options or {}
        parent = read_traceparent(options.get("traceparent"))
        fresh = options.get("reset_memory") or [False] * len(prompts)
        found = [
            Observation(pictures, row, prompt, seed, value, step, delay, again, parent)
            for pictures, row, prompt, seed, (step, delay), again in zip(
                seen, rows, prompts, seeds, steps, fresh, strict=True
            )
        ]
        return found, nested, list(options.get("session_ids") or ())

    def _options(
        self, options: Any, batch: int, contract_named: Callable[[Any], PolicyContract]
    ) -> tuple[list[int | None], list[tuple[int | None, int | None]], bool]:
        """(seeds, (step, delay) of every sample, whether the value is asked for)."""
        options = {} if options is None else options
        if not isinstance(options, dict):
            raise ServeError("Options are a mapping", field="options", found=_kind(options))
        stated = options.get("policy_contract"), options.get("contract_fingerprint")
        check_contract(*stated, contract_named(stated[1]))
        for name, kind in (("session_ids", str), ("reset_memory", bool)):
            given = options.get(name)
            if given is not None and not (
                isinstance(given, list) and len(given) == batch and all(isinstance(item, kind) for item in given)
            ):
                raise ServeError(
                    "An option is not one for each sample",
                    field=f"options.{name}",
                    found=f"{given!r:.80}",
                    expected=f"a list of {batch} {'texts' if kind is str else 'booleans'}",
                )
        if options.get("action_prefix") is not None or options.get("rtc_prefix_len"):
            raise ServeError(
                "Real-time chunking is not served",
                field="options.action_prefix, options.rtc_prefix_len",
                expected="no prefix",
                cure="leave them out; the answer would not continue the prefix",
            )
        numbers = {name: self._numbers(name, options.get(name), batch) for name in ("seed", "step", "delay")}
        steps = [
            read_steps({"step": step, "delay": delay})
            for step, delay in zip(numbers["step"], numbers["delay"], strict=True)
        ]
        return [read_seed(seed) for seed in numbers["seed"]], steps, read_flag(options)

    def _numbers(self, name: str, given: Any, batch: int) -> list[Any]:
        """One for each sample; none where the option is left out. One alone does for a batch of one."""
        found = given if isinstance(given, list) else [given] * (batch if given is None else 1)
        if len(found) != batch:
            raise ServeError(
                f"There is not one {name} for each sample",
                field=f"options.{name}",
                found=f"{len(found)} of them",
                expected=f"a list of {batch} whole numbers",
            )
        return found

    def answer(self, actions: np.ndarray, nested: bool) -> dict[str, np.ndarray]:
        """(B, chunk, A) float32 -> {key: (B, chunk, width) float32}; "action.<key>" where the observation was flat."""
        return {
            key if nested else f"action.{key}": np.ascontiguousarray(actions[:, :, places])
            for key, places in self.action.items()
        }


def _places(kind: str, dimensions: Sequence[Dimension], groups: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    names = [dimension.name for dimension in dimensions]
    found: dict[str, list[int]] = {}
    group_of: dict[str, str] = {}
    for key, members in groups.items():
        own, _, group = key.partition(".")
        if own != kind:
            continue
        for name in members:
            if name not in names or name in group_of:
                problem = "A key names a number twice" if name in group_of else "A key names no number of the contract"
                raise ServeError(
                    f"{problem}{suggest(name, names)}", field=key, found=name, expected=", ".join(names) or "none"
                )
            group_of[name] = group
        found[group] = [names.index(name) for name in members]
    ordered: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        key = group_of.get(name, name)
        if name not in group_of and key in found:
            raise ServeError(
                "A key has the name of another number", field=f"{kind}.{key}", expected="a name of its own"
            )
        ordered.setdefault(key, found.get(key, [place]))
    return ordered


def _kind(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _part(raw: dict[str, Any], kind: str, nested: bool) -> dict[str, Any]:
    """One modality of an observation. In a flat one, language is whatever is neither video nor state."""
    if not nested:
        others = tuple(f"{other}." for other in KINDS[:2])
        if kind == "language":
            return {key: value for key, value in raw.items() if not key.startswith(others)}
        return {key.removeprefix(f"{kind}."): value for key, value in raw.items() if key.startswith(f"{kind}.")}
    part = raw.get(kind, {})
    if not isinstance(part, dict):
        raise ServeError("A modality is no mapping", field=kind, found=_kind(part), expected="{key: array}")
    return part


def _array(part: dict[str, Any], kind: str, key: str, dtype: type, form: str) -> np.ndarray:
    """part[key] with as many axes as `form` has, of that dtype, and a time axis of one step."""
    field, axes = f"{kind}.{key}", form.count(",") + 1
    if key not in part:
        raise ServeError(
            f"An observation lacks a key{suggest(key, part)}",
            field=field,
            found=", ".join(sorted(map(str, part))) or f"no {kind}",
            expected=f"{np.dtype(dtype)} ({form})",
            cure="send what get_modality_config names, nested or flat",
        )
    array = part[key]
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != axes:
        raise ServeError(
            "An observation has another form than the protocol's",
            field=field,
            found=_kind(array),
            expected=f"{np.dtype(dtype)} ({form})",
            cure="N1.6 and later want batch and time axes everywhere; the arrays are those of GR00T's two serializers",
        )
    if array.shape[1] != 1:
        raise ServeError(
            "The policy sees one moment", field=field, found=f"{array.shape[1]} time steps", expected="a time axis of 1"
        )
    return array


def _image(part: dict[str, Any], key: str, camera: Camera) -> np.ndarray:
    array = _array(part, "video", key, np.uint8, "batch, 1, height, width, 3")[:, 0]
    if array.shape[1:] != (camera.height, camera.width, 3):
        raise ServeError(
            "An image has another shape than the policy was trained with",
            field=f"video.{key}",
            found=str(array.shape[1:]),
            expected=str((camera.height, camera.width, 3)),
            cure="resize on the client, and put the colour axis last",
        )
    return array


def _state(part: dict[str, Any], key: str, width: int) -> np.ndarray:
    array = _array(part, "state", key, np.float32, "batch, 1, width")[:, 0]
    if array.shape[1] != width:
        raise ServeError(
            "A state has another width than the contract", field=f"state.{key}", found=array.shape[1], expected=width
        )
    return array


def _sentences(part: dict[str, Any], nested: bool) -> tuple[str, list[str]]:
    """The key they came under, and one sentence a sample."""
    key = next((key for key in LANGUAGE_KEYS if key in part), None)
    if key is None:
        raise ServeError(
            "An observation lacks its sentences",
            field=f"language.{LANGUAGE_KEYS[0]}" if nested else LANGUAGE_KEYS[0],
            found=", ".join(sorted(map(str, part))) or "no language",
            expected="one of " + ", ".join(LANGUAGE_KEYS),
        )
    given, form = part[key], "[[sentence], ...]" if nested else "[sentence, ...]"
    rows = given if isinstance(given, list) else None
    if nested and rows is not None:
        rows = [row[0] if isinstance(row, list) and len(row) == 1 else None for row in rows]
    if rows is None or not all(isinstance(text, str) and len(text) <= MAX_PROMPT for text in rows):
        raise ServeError(
            "Language is not one sentence for each sample",
            field=f"language.{key}" if nested else key,
            found=f"{given!r:.120}",
            expected=f"{form}, a sentence of at most {MAX_PROMPT} characters",
        )
    return (f"language.{key}" if nested else key), rows
