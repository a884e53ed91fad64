"""Speaks GR00T's protocol as RLDX-1's server does, with its flags, and thinks nothing; needs pyzmq, msgpack and numpy.

$STANDIN: how it behaves: die, memory, silent, stubborn, frames. $STANDIN_NOTES: a file that its environment and the
options of every request are written to. Sentences are orders: "die", "sleep".
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import time

import msgpack
import numpy as np
import zmq

HORIZON = 4
STATE, ACTION, VIDEO = {"position": 2, "gripper": 1}, {"move": 2}, ("top", "wrist")
LANGUAGE = "annotation.human.task_description"


def default(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def hook(item):
    return np.load(io.BytesIO(item["as_npy"]), allow_pickle=False) if "__ndarray_class__" in item else item


def note(value) -> None:
    if place := os.environ.get("STANDIN_NOTES"):
        with open(place, "a") as file:  # noqa: PTH123
            print(json.dumps(value), file=file)


def config(steps, keys) -> dict:
    return {"__ModalityConfig_class__": True, "as_json": {"delta_indices": list(steps), "modality_keys": list(keys)}}


def configs() -> dict:
    frames = [-2, 0] if os.environ.get("STANDIN") == "frames" else [0]
    return {
        "video": config(frames, VIDEO),
        "state": config([0], STATE),
        "action": config(range(HORIZON), ACTION),
        "language": config([0], [LANGUAGE]),
    }


def act(observation, options=None):
    """Row h of sample i: sum of its state and of its pictures' means, + h; the second number is ten more."""
    note({"options": options})
    sentences = [row[0] for row in observation["language"][LANGUAGE]]
    if "die" in sentences:
        os._exit(7)
    if "sleep" in sentences:
        time.sleep(1.5)
    total = np.zeros(len(sentences))
    for key, width in STATE.items():
        part = observation["state"][key]
        assert part.shape == (len(total), 1, width) and part.dtype == np.float32, f"state.{key}: {part.shape}"
        total += part.sum(axis=(1, 2))
    for key in VIDEO:
        picture = observation["video"][key]
        assert picture.ndim == 5 and picture.shape[:2] == (len(total), 1) and picture.dtype == np.uint8, key
        total += picture.mean(axis=(1, 2, 3, 4))
    rows = total[:, None, None] + np.arange(HORIZON)[None, :, None] + np.array([0.0, 10.0])
    return [{"move": rows.astype(np.float32)}, {}]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--model-path", "--embodiment-tag", "--host", "--rtc-inference-mode"):
        parser.add_argument(name, required=True)
    parser.add_argument("--port", type=int, required=True)
    for name in ("--rtc-inference-delay", "--rtc-inference-exec-horizon"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    mode = os.environ.get("STANDIN", "")
    note({"environment": dict(os.environ), "python": sys.prefix, "pid": os.getpid()})
    print(f"loading {args.model_path}", flush=True)
    if mode == "die":
        sys.exit("no such checkpoint")
    if mode == "memory":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "silent":
        time.sleep(600)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    socket = zmq.Context().socket(zmq.REP)
    socket.bind(f"tcp://{args.host}:{args.port}")
    while True:
        request = msgpack.unpackb(socket.recv(), object_hook=hook, strict_map_key=False)
        endpoint, data = request.get("endpoint", "get_action"), request.get("data") or {}
        try:
            if endpoint == "ping":
                answer = {"status": "ok", "message": "Server is running"}
            elif endpoint == "get_modality_config":
                answer = configs()
            elif endpoint == "reset":
                answer = {"cleared_sessions": []}
            else:
                answer = act(**data)
        except (AssertionError, KeyError, TypeError) as err:
            answer = {"error": str(err)}
        socket.send(msgpack.packb(answer, default=default))


if __name__ == "__main__":
    main()
