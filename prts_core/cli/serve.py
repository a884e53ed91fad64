"""`prts serve`: a package or registered model behind openpi's or GR00T's protocol, or both, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from prts_core.cli import serve_operations, serve_sidecar
from prts_core.cli.main import add_dtype_argument, add_outputs_argument
from prts_core.io.errors import ServeError, require

if TYPE_CHECKING:
    from prts_core.contract import PolicyContract

EPILOG = (
    """\
examples
  prts serve --model models:/prts-quickstart@champion
  prts serve --model outputs/runs/quickstart/package/output --port 8001 --value
  PRTS_API_KEY=... prts serve --model models:/prts-quickstart/3 --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem
  prts serve --model models:/prts-quickstart@champion --protocol both     # websocket 8000, ZeroMQ 5555

protocols
  openpi   a websocket; a connection is one robot. Images as they are (H, W, 3), one state vector.
  groot    ZeroMQ, as GR00T N1.6/N1.7 and RLDX-1 serve; every array has batch and time axes, state and action are maps.
  both     the two over one policy: requests of all clients are answered together, --max-clients counts them together.

openpi: a client (pip install openpi-client, or prts-client: docs/how-to/run-a-robot.md)
  from openpi_client.websocket_client_policy import WebsocketClientPolicy
  policy = WebsocketClientPolicy("127.0.0.1", 8000)
  policy.get_server_metadata()["policy_contract"]     # what every number means
  policy.infer({"observation/state": state, "observation/top": image, ..., "prompt": "open the faucet"})["actions"]

  A request may also hold  seed (the flow's noise: same seed, same actions),  value: true (how near the goal is),
  policy_contract or contract_fingerprint (the server then refuses a client that means other numbers),
  step and delay (control steps executed so far, and those until the answer arrives: the chunk goes on from the one that
  is under way, its first `delay` rows the old ones),  reset: true (another task begins).
  A reply also holds  drift (how far the state lies outside what training saw) and, to a client that tells its step,
  where the package brings an alarm,  alarm (how the task goes: on_course, unsure or failing).
  GET /healthz answers OK, or 503 where the policy hangs; /readyz whether new clients may come; /metrics is Prometheus'.
  http://127.0.0.1:8000/ in a browser shows cameras, values, chunks, latency and errors of all sessions.
  A request may hold traceparent (W3C): with --otel it becomes part of the client's own trace.

groot: a client (GR00T's or RLDX-1's own, or prts-client's)
  from prts_client.robot.groot import GrootClient
  policy = GrootClient("tcp://127.0.0.1:5555")
  policy.get_modality_config()                        # the keys of video, state, action, language
  actions, info = policy.get_action({
      "video": {"top": image[None, None], ...}, "state": {"hand_x": np.float32([[[x]]]), ...},
      "language": {"annotation.human.action.task_description": [["open the faucet"]]},
  })                                                  # {"hand_dx": (1, chunk, 1), ...}

  The flat form of simulators is read too: video.top, state.hand_x and one list of sentences; action.hand_dx comes back.
  Each number of the contract is a key of its own; --groot-key state.gripper=finger_left,finger_right makes one of two.
  The endpoint kill needs an API key (api_token).
"""
    + serve_sidecar.EPILOG
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="a package or policy folder, models:/<name>@<alias>, models:/<name>/<version>, hf://owner/name[@revision] "
        "or, of an installed skill, rskill://name; with --sidecar, a checkpoint of its family: a folder, or its id on "
        "the hub",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than this machine's own need an API key"
    )
    parser.add_argument(
        "--protocol",
        choices=("openpi", "groot", "both"),
        default="openpi",
        help="what clients speak; see below (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=int,
        help="where to listen; 0 takes any free one (default: 8000 for openpi, 5555 for groot; with both, of openpi)",
    )
    parser.add_argument("--groot-port", type=int, metavar="PORT", help="the same for groot (default: 5555)")
    parser.add_argument(
        "--api-key-env",
        default="PRTS_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key clients must send (default: %(default)s; unset: no key)",
    )
    parser.add_argument(
        "--keys",
        type=Path,
        metavar="FILE",
        help="more keys, a line each: NAME sha256:DIGEST; read again when it changes, so that one can be revoked",
    )
    parser.add_argument(
        "--require-signature",
        type=Path,
        metavar="KEYS",
        help="serve only what one of these public keys signed: a PEM file, or a folder of them (`prts skill sign`)",
    )
    parser.add_argument(
        "--follow",
        type=float,
        default=0.0,
        metavar="S",
        help="of models:/<name>@<alias>: look every S seconds whether the alias has moved, and serve the new version "
        "to new sessions (default: never)",
    )
    parser.add_argument(
        "--canary",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="with --follow: the share of new sessions that a new version gets (default: all)",
    )
    parser.add_argument(
        "--max-clients", type=int, default=8, help="clients at once, of both protocols (default: %(default)s)"
    )
    parser.add_argument("--max-batch", type=int, default=8, help="requests answered together (default: %(default)s)")
    parser.add_argument("--max-message-mb", type=float, default=16.0, help="largest request (default: %(default)s)")
    parser.add_argument(
        "--request-timeout", type=float, default=30.0, metavar="S", help="seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--value", action="store_true", help="send the value with every reply, not only where asked for"
    )
    parser.add_argument(
        "--no-alarm",
        dest="alarm",
        action="store_false",
        help="do not watch how tasks go, where the package brings an alarm and clients count their steps: it costs the "
        "value of every answer",
    )
    parser.add_argument(
        "--best-of",
        type=int,
        default=1,
        metavar="N",
        help="draw N chunks for every answer and give the one of the highest value (default: %(default)s)",
    )
    parser.add_argument(
        "--devices",
        type=lambda text: tuple(text.split(",")),
        default=(None,),
        metavar="D,...",
        help="where the policy computes, such as cuda:0,cuda:1: a process each behind one port (default: the GPU, "
        "where there is one)",
    )
    parser.add_argument(
        "--subtask-looks",
        type=int,
        default=1,
        metavar="N",
        help="a policy that reasons in subtasks says one for N action chunks of the same prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--camera",
        action="append",
        default=[],
        metavar="CLIENT_KEY=CAMERA",
        help="accept another name for a camera, such as observation/image=observation.images.top; may be repeated",
    )
    parser.add_argument(
        "--groot-key",
        action="append",
        default=[],
        metavar="KEY=NAMES",
        help="put numbers under one key for groot's clients, such as state.arm=joint_1,joint_2; may be repeated",
    )
    serve_operations.add_arguments(parser)
    add_dtype_argument(parser)
    add_outputs_argument(parser, "whose registry models:/ means")
    parser.add_argument("--verbose", action="store_true", help="log every client")
    serve_sidecar.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    serve_sidecar.check(args)
    if args.dry_run:
        return serve_sidecar.dry_run(args)
    with contextlib.ExitStack() as stack:
        return _serve(args, stack)


def _serve(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    """stack: what must end with the server."""
    require("msgpack", "serve")
    from prts_core.delivery.resolve import CONTRACT, plain_policy, resolve, version_of
    from prts_core.io.msgpack import LIMITS
    from prts_core.serving.engine import warm_up
    from prts_core.serving.follow import follow
    from prts_core.serving.logs import handler
    from prts_core.serving.server import PolicyServer
    from prts_core.serving.service import OPENPI, ServerConfig
    from prts_core.serving.versions import Version
    from prts_core.value.alarm import read_alarm

    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, handlers=[handler(args.log_json)])
    logging.getLogger("websockets.server").setLevel(logging.WARNING)
    console = Console(width=None if sys.stdout.isatty() else 140)
    config = ServerConfig(  # before any weights are loaded: a wrong setting is told at once
        host=args.host,
        **_protocols(args),
        api_key=os.environ.get(args.api_key_env) or None,
        key_file=args.keys,
        max_clients=args.max_clients,
        max_batch=args.max_batch,
        request_timeout_s=args.request_timeout,
        always_value=args.value,
        subtask_looks=args.subtask_looks,
        best_of=args.best_of,
        limits=replace(LIMITS, max_bytes=int(args.max_message_mb * 2**20)),
        **serve_operations.settings(args),
        aliases=_pairs("--camera client_key=camera", args.camera, "observation/image=observation.images.top"),
        groot_keys={
            key: tuple(names.split(","))
            for key, names in _pairs("--groot-key key=names", args.groot_key, "state.arm=joint_1,joint_2").items()
        },
    )
    if args.follow < 0 or not 0 < args.canary <= 1:
        raise ServeError(
            "Versions cannot be followed so",
            field="--follow, --canary",
            found=f"{args.follow:g} s, a share of {args.canary:g}",
            expected="seconds above 0, and a share above 0 and at most 1",
        )
    if not args.follow and args.canary != 1:
        raise ServeError(
            "A share of new sessions is given, and no new versions are looked for",
            field="--canary",
            found=f"{args.canary:g}",
            cure="say with --follow how often to look, or leave it out",
        )
    if args.follow and not (args.model.startswith("models:/") and "@" in args.model):
        raise ServeError(
            "Only a model of the registry can be followed",
            field="--follow",
            found=args.model,
            expected="--model models:/<name>@<alias>",
        )
    from prts_core.policy.policy import load_policy, policy_digest
    from prts_core.serving.replicas import Replica

    def loaded(name: str, folder: Path, digest: str) -> Version:
        """The policy on the first device, a replica on each other one, and the alarm that lies beside it."""
        first, *others = args.devices
        policy = load_policy(folder, args.dtype, first)
        own = policy_digest(folder) if others else ""
        replicas = tuple(Replica(policy, folder, policy.dtype, device, own) for device in others)
        return Version(name, policy, digest, read_alarm(folder) if args.alarm else None, replicas)

    def load(reference: str) -> tuple[Version, float | None]:
        """The version, and its package's budget in ms; none for a policy folder, which has none."""
        folder = plain_policy(reference) if args.require_signature is None else None
        if folder is not None and (folder / CONTRACT).is_file():
            digest = policy_digest(folder)
            return loaded(digest[7:19], folder, digest), None
        found = resolve(reference, args.outputs, args.require_signature)
        return loaded(found.version or found.content_digest[7:19], found.policy, found.package_digest), found.budget_ms

    if args.sidecar:
        version, budget = stack.enter_context(serve_sidecar.opened(args, config)), None
    else:
        version, budget = load(args.model)
    dtype = getattr(version.policy, "dtype", args.dtype)
    about = {"model": args.model, "model_version": version.name, "package_digest": version.digest, "dtype": dtype}
    server = PolicyServer(version, replace(config, about=about, budget_ms=budget, replicas=len(version.replicas)))
    warm_ms = warm_up(version, (version.policy, *version.replicas), server.service.engine.limits)
    if version.alarm is not None and args.best_of > 1:
        console.print("the best of several draws has a higher value: the alarm's rates are not what they say")
    console.print(summary(args.model, version.name, version.digest, version.policy.contract, budget, dtype, warm_ms))

    def ready(*ports: int) -> None:
        host = f"[{args.host}]" if ":" in args.host else args.host
        key = f"API key from ${args.api_key_env}" if config.api_key else "no API key"
        key = f"API keys of {args.keys}" if args.keys else key
        for protocol, port in zip(config.protocols, ports, strict=True):
            curve = "" if config.curve is None else "; CURVE key " + config.curve.keys()[0].decode()
            told = f"tcp://{host}:{port}  (GR00T's protocol over ZeroMQ; {key}{curve})"
            if protocol == OPENPI:
                s = "" if config.tls is None else "s"
                told = f"ws{s}://{host}:{port}  ({key}; health: http{s}://{host}:{port}/healthz)"
            console.print(f"serving on {told}", highlight=False, markup=False, soft_wrap=True)
        if readable := serve_operations.open_to_readers(config):
            console.print(readable, highlight=False, markup=False, soft_wrap=True)

    async def live() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        followed = None
        if args.follow:
            newest, name = partial(version_of, args.model, args.outputs), args.model.partition("@")[0]
            following = follow(
                server.service.engine,
                server.service.versions,
                newest,
                lambda number: load(f"{name}/{number}")[0],
                args.follow,
                args.canary,
            )
            followed = asyncio.create_task(following)
        try:
            await server.run(stop, ready)
        finally:
            if followed is not None:
                followed.cancel()

    asyncio.run(live())
    if server.service.engine.hangs:
        console.print("stopped, while the policy hung")
        stack.close()
        sys.stdout.flush()
        os._exit(1)  # the thread that hangs would keep the process for ever
    console.print("stopped")
    return 0


def _protocols(args: argparse.Namespace) -> dict[str, Any]:
    """The protocols and their ports: --port is of the one that is served, and of openpi where both are."""
    from prts_core.serving.service import GROOT, OPENPI

    names = (OPENPI, GROOT) if args.protocol == "both" else (args.protocol,)
    if args.groot_port is not None and (GROOT not in names or (args.port is not None and OPENPI not in names)):
        raise ServeError(
            "A port is given for a protocol that is not served",
            field="--port, --groot-port",
            found=f"--protocol {args.protocol}",
            cure="leave out one of the two, or serve with --protocol both",
        )
    alone = names == (GROOT,) and args.groot_port is None
    ports = {"port": args.port, "groot_port": args.port if alone else args.groot_port}
    return {"protocols": names} | {name: port for name, port in ports.items() if port is not None}


def _pairs(form: str, given: list[str], example: str) -> dict[str, str]:
    """name=value arguments. form: "--flag name=value", to say what was wanted."""
    out = {}
    for pair in given:
        name, sign, key = pair.partition("=")
        if not sign or not name or not key:
            raise ServeError(" takes ".join(form.split()), found=pair, expected=example)
        out[name] = key
    return out


def summary(
    reference: str,
    version: str,
    digest: str,
    contract: PolicyContract,
    budget: float | None,
    dtype: str,
    warm_ms: float,
) -> Table:
    """What is served, as a table: the contract's meaning in words, and latency beside the package's budget, if any."""
    own = contract.contract
    table = Table(title=Text(f"{reference} (version {version})"), show_header=False)
    relative = [d.name for d in own.action if d.relative]
    rows = [
        (
            "embodiment",
            f"{contract.embodiment_tag}, {own.control_hz:g} Hz, gripper {own.gripper}, rotation {own.rotation}",
        ),
        ("state", ", ".join(f"{d.name} [{d.unit}]" for d in own.state)),
        ("action", ", ".join(f"{d.name} [{d.unit}]" for d in own.action) + f"; chunks of {contract.chunk_length}"),
        ("relative", ", ".join(relative) or "none: actions are absolute"),
        ("cameras", ", ".join(f"{c.key} ({c.label}) {c.height}x{c.width}" for c in own.cameras)),
        ("normalisation", f"{contract.normalization}, statistics {contract.statistics_digest[:19]}"),
        ("contract", contract.fingerprint),
        ("package", digest),
        ("latency", f"{_latency(budget, warm_ms)}, in {dtype}"),
    ]
    for row in rows:
        table.add_row(*map(Text, row))  # units in brackets are no markup
    return table


def _latency(budget: float | None, warm_ms: float) -> str:
    if budget is None:
        return f"{warm_ms:.0f} ms a chunk here; a policy folder has no budget"
    return f"{warm_ms:.0f} ms a chunk here; budget {budget:g} ms" + ("" if warm_ms <= budget else ", EXCEEDED")
