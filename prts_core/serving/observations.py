"""What a client sends, checked against the policy's contract: cameras, state, sentence, and the few options of ours.

It knows the PolicyContract and nothing of sockets or weights. Every fault names the field, what came and what to do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from prts_core.contract import Camera, PolicyContract, require_equal
from prts_core.io.errors import DataError, ServeError, suggest

STATE_KEYS = ("observation/state", "observation.state", "state")
OPTIONS = (
    "prompt",
    "seed",
    "value",
    "step",
    "delay",
    "reset",
    "contract_fingerprint",
    "policy_contract",
    "traceparent",
)
TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
MOST_STEPS = 2**31
MAX_PROMPT = 2000


@dataclass(frozen=True)
class Observation:
    """One checked request.

    images: camera key -> (H, W, 3) uint8. state: (D,) float32. seed none: the server draws one. value: asked for. step:
    control steps that the robot has executed in this session. delay: those that it will execute until the answer
    arrives; the chunk then goes on from the one under way (real-time chunking). reset: another task begins.
    traceparent: the client's span, in W3C's form.
    """

    images: dict[str, np.ndarray]
    state: np.ndarray
    prompt: str
    seed: int | None = None
    value: bool = False
    step: int | None = None
    delay: int | None = None
    reset: bool = False
    traceparent: str | None = None


def camera_names(contract: PolicyContract, aliases: dict[str, str] | None = None) -> dict[str, Camera]:
    """Every name a client may use -> the camera: its key, openpi's form `observation/<camera>`, the bare name, aliases.

    A name that two cameras could claim belongs to neither.
    """
    claims: dict[str, list[Camera]] = {}
    for camera in contract.contract.cameras:
        short = short_name(camera)
        for name in dict.fromkeys((camera.key, f"observation/{short}", camera.key.replace(".", "/"), short)):
            claims.setdefault(name, []).append(camera)
    names = {name: cameras[0] for name, cameras in claims.items() if len(cameras) == 1 and name not in STATE_KEYS}
    keys = {camera.key: camera for camera in contract.contract.cameras}
    for name, key in (aliases or {}).items():
        if key not in keys:
            raise ServeError(
                f"An alias names no camera of the contract{suggest(key, keys)}",
                field=name,
                found=key,
                expected=", ".join(keys),
            )
        names[name] = keys[key]
    return names


def short_name(camera: Camera) -> str:
    """The last part of a camera's key."""
    return camera.key.rsplit(".", 1)[-1].rsplit("/", 1)[-1]


def _shown(camera: Camera, names: dict[str, Camera]) -> str:
    """The name to tell a client: openpi's form where it is the camera's own."""
    openpi = f"observation/{short_name(camera)}"
    return openpi if openpi in names else camera.key


def parse_request(raw: Any, contract: PolicyContract, aliases: dict[str, str] | None = None) -> Observation:
    """`raw` (an unpacked message) as an Observation. aliases: further client key -> camera key.

    Raises ServeError; ContractError when the client states another contract.
    """
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise ServeError("A request is a mapping with text keys", found=type(raw).__name__)
    check_contract(raw.get("policy_contract"), raw.get("contract_fingerprint"), contract)
    cameras = camera_names(contract, aliases)
    allowed = [*cameras, *STATE_KEYS, *OPTIONS]
    for key in raw:
        if key not in allowed:
            raise ServeError(
                f"A request holds an unknown key{suggest(key, allowed)}",
                field=key,
                found=key,
                expected=", ".join(wanted(contract)),
                cure="send the keys of the server's metadata (`keys`), no others",
            )
    images: dict[str, np.ndarray] = {}
    for name, camera in cameras.items():
        if name in raw:
            if camera.key in images:
                raise ServeError("A camera stands twice in the request", field=name, expected="one of its names")
            images[camera.key] = _image(raw[name], camera, name)
    for camera in contract.contract.cameras:
        if camera.key not in images:
            raise ServeError(
                "A camera is missing",
                field=_shown(camera, cameras),
                found=", ".join(sorted(raw)) or "nothing",
                expected=", ".join(wanted(contract)),
                cure="send an image of every camera the policy was trained with",
            )
    step, delay = read_steps(raw)
    return Observation(
        images,
        _state(raw, contract),
        _prompt(raw),
        read_seed(raw.get("seed")),
        read_flag(raw),
        step,
        delay,
        read_flag(raw, "reset"),
        read_traceparent(raw.get("traceparent")),
    )


def wanted(contract: PolicyContract) -> list[str]:
    """The keys a request must have, in openpi's form."""
    names = camera_names(contract)
    return [STATE_KEYS[0], *(_shown(camera, names) for camera in contract.contract.cameras), "prompt"]


def check_contract(raw: Any, fingerprint: Any, contract: PolicyContract) -> None:
    """Refuse a client that means other numbers. With its whole contract the difference is told field by field."""
    if raw is not None:
        if not isinstance(raw, dict):
            raise ServeError("A client's contract is no mapping", field="policy_contract", found=type(raw).__name__)
        try:
            theirs = PolicyContract.from_json(raw, where="the client's policy_contract")
        except DataError as err:
            raise ServeError(str(err)) from err
        require_equal(theirs, contract, left_name="the client", right_name="the server")
    if fingerprint is not None and fingerprint != contract.fingerprint:
        own = contract.contract
        raise ServeError(
            "Client and server disagree on what the numbers mean",
            field="contract_fingerprint",
            found=f"{fingerprint!r:.90}",
            expected=f"{contract.fingerprint} (embodiment {contract.embodiment_tag}; state "
            f"{', '.join(d.name for d in own.state)}; action {', '.join(d.name for d in own.action)}; chunk "
            f"{contract.chunk_length} at {own.control_hz:g} Hz; {contract.normalization})",
            cure="use the contract of this policy; send `policy_contract` to see every field that differs",
        )


def _image(raw: Any, camera: Camera, name: str) -> np.ndarray:
    shape = (camera.height, camera.width, 3)
    if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8:
        found = f"{raw.dtype} array" if isinstance(raw, np.ndarray) else type(raw).__name__
        raise ServeError(
            "An image is not made of bytes",
            field=name,
            found=found,
            expected=f"uint8 {shape}",
            cure="send 0..255 as uint8, height x width x 3",
        )
    if raw.shape != shape:
        raise ServeError(
            "An image has another shape than the policy was trained with",
            field=name,
            found=str(raw.shape),
            expected=str(shape),
            cure="resize on the client: openpi_client.image_tools.resize_with_pad"
            f"(image, {camera.height}, {camera.width})",
        )
    return raw


def _state(raw: dict[str, Any], contract: PolicyContract) -> np.ndarray:
    names = [dimension.name for dimension in contract.contract.state]
    given = [key for key in STATE_KEYS if key in raw]
    if len(given) != 1:
        raise ServeError(
            "A request needs its state once",
            field=STATE_KEYS[0],
            found=", ".join(given) or "no state",
            expected=f"{len(names)} numbers: {', '.join(names)}",
        )
    try:
        state = np.asarray(raw[given[0]])
    except ValueError as err:
        raise ServeError("A state is no list of numbers", field=given[0], found=str(err)[:80]) from err
    if state.dtype.kind not in "iuf" or state.shape != (len(names),):
        raise ServeError(
            "A state does not have the width of the contract",
            field=given[0],
            found=f"{state.dtype} {state.shape}",
            expected=f"{len(names)} numbers: {', '.join(names)}",
        )
    with np.errstate(over="ignore"):
        out = state.astype(np.float32)
    require_finite(out, state, names, given[0])
    return out


def require_finite(out: np.ndarray, came: np.ndarray, names: list[str], field: str) -> None:
    """Refuse a state (D,) that is not finite as float32; `came` is what the client sent."""
    if not np.isfinite(out).all():
        bad = [f"{name} = {value}" for name, value in zip(names, came.tolist(), strict=True) if not np.isfinite(value)]
        raise ServeError(
            "A state holds numbers that are not finite",
            field=field,
            found=", ".join(bad) or "too large for float32",
            expected="finite numbers",
            cure="check the robot's sensors before asking for actions",
        )


def _prompt(raw: dict[str, Any]) -> str:
    prompt = raw.get("prompt")
    if isinstance(prompt, np.ndarray) and prompt.shape == () and prompt.dtype.kind == "U":
        prompt = prompt.item()
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROMPT:
        found = f"{len(prompt)} characters" if isinstance(prompt, str) else type(prompt).__name__
        raise ServeError(
            "A request needs a sentence", field="prompt", found=found, expected=f"1 to {MAX_PROMPT} characters"
        )
    return str(prompt)


def read_seed(seed: Any) -> int | None:
    """A client's `seed`: none, or a whole number."""
    if seed is None:
        return None
    if isinstance(seed, bool | np.bool_) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise ServeError("A seed is a whole number", field="seed", found=f"{seed!r:.40}", expected="0 to 2^63 - 1")
    return int(seed)


def read_flag(raw: dict[str, Any], name: str = "value") -> bool:
    """Whether a client asks for the value, or begins another task (`reset`)."""
    value = raw.get(name, False)
    if not isinstance(value, bool | np.bool_):
        raise ServeError(f"`{name}` is yes or no", field=name, found=f"{value!r:.40}", expected="true or false")
    return bool(value)


def read_traceparent(given: Any) -> str | None:
    """A client's `traceparent`: none, or a span as W3C's Trace Context writes it."""
    if given is not None and not (isinstance(given, str) and TRACEPARENT.fullmatch(given)):
        raise ServeError(
            "A trace's parent has W3C's form",
            field="traceparent",
            found=f"{given!r:.80}",
            expected="00-<32 hexadecimal digits>-<16>-<2>",
        )
    return given


def read_steps(raw: dict[str, Any]) -> tuple[int | None, int | None]:
    """(`step`, `delay`) of a client that counts its control steps; a delay needs the step."""
    found = []
    for name in ("step", "delay"):
        value = raw.get(name)
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)
        if value is not None and not (whole and 0 <= value < MOST_STEPS):
            raise ServeError(
                f"`{name}` counts control steps", field=name, found=f"{value!r:.40}", expected="0, or a number above"
            )
        found.append(None if value is None else int(value))
    step, delay = found
    if delay is not None and step is None:
        raise ServeError(
            "A delay says nothing without the step that it begins at",
            field="delay",
            found=delay,
            expected="`step` with it: control steps executed so far in this session",
        )
    return step, delay
