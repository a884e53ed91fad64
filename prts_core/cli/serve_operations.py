"""`prts serve`'s arguments for operators: encryption, recording, traces and logs, files for a deployment, limits."""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prts_core.io.errors import ServeError

if TYPE_CHECKING:
    from prts_core.serving.service import ServerConfig

MIB = 2**20


class Print(argparse.Action):
    """Print a file that comes with the package, as --version prints, whatever else is asked for."""

    def __init__(self, option_strings: list[str], dest: str, file: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)
        self.file = file

    def __call__(self, parser: argparse.ArgumentParser, *asked: Any) -> None:
        text = files("prts_core.serving").joinpath("deploy", self.file).read_text(encoding="utf-8")
        print(text, end="")
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    secret = parser.add_argument_group("encryption", "Without these nothing is encrypted, keys included.")
    secret.add_argument(
        "--tls-cert", type=Path, metavar="PEM", help="certificate: the websocket becomes wss, and https"
    )
    secret.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    secret.add_argument(
        "--curve-key",
        type=Path,
        metavar="FILE",
        help="ZeroMQ's CURVE: the server's *.key_secret of zmq.auth.create_certificates. GR00T's own clients do not "
        "speak it; ours does, and others behind a tunnel may",
    )
    secret.add_argument(
        "--curve-clients",
        type=Path,
        metavar="FOLDER",
        help="clients' public keys (*.key): nobody else gets past ZeroMQ's handshake (default: who knows the server's)",
    )
    kept = parser.add_argument_group("recording")
    kept.add_argument(
        "--record",
        type=Path,
        metavar="FOLDER",
        help="keep every session as an episode of a LeRobot v2.1 dataset: FOLDER/steps where the client counts its "
        "control steps, else FOLDER/looks_<rate>hz (needs the extra data)",
    )
    kept.add_argument(
        "--record-max-gb",
        type=float,
        default=20.0,
        metavar="GB",
        help="recording stops there, with a warning; what is there stays (default: %(default)s)",
    )
    seen = parser.add_argument_group("observation")
    seen.add_argument(
        "--otel",
        action="store_true",
        help="send traces to an OpenTelemetry collector over HTTP, as OTEL_EXPORTER_OTLP_ENDPOINT says (extra otel)",
    )
    seen.add_argument("--log-json", action="store_true", help="the log as JSON, a line an event")
    deploy = parser.add_argument_group("deployment")
    deploy.add_argument("--print-unit", action=Print, file="prts-serve.service", help="print a unit for systemd")
    deploy.add_argument("--print-containerfile", action=Print, file="Containerfile", help="print a Containerfile")
    bounds = parser.add_argument_group("limits", "A client is a connection, of ZeroMQ a socket.")
    bounds.add_argument(
        "--max-rate", type=float, default=0.0, metavar="N", help="requests a second of one client (default: any)"
    )
    bounds.add_argument(
        "--max-queued-mb",
        type=float,
        default=512.0,
        metavar="MB",
        help="of messages that are here, over all clients (default: %(default)s)",
    )
    bounds.add_argument(
        "--idle-timeout",
        type=float,
        default=0.0,
        metavar="S",
        help="close a websocket on which nothing came for so long (default: never)",
    )
    bounds.add_argument(
        "--message-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="a message that has begun must be whole within so long (default: %(default)s)",
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say, as fields of ServerConfig. ServeError for those that do not go together."""
    from prts_core.serving.admission import Guards
    from prts_core.serving.encryption import Curve, Tls
    from prts_core.serving.recorder import RecordSettings
    from prts_core.serving.tracing import Tracing

    if (args.tls_cert is None) != (args.tls_key is None):
        raise ServeError("TLS needs a certificate and its key", field="--tls-cert, --tls-key", expected="both, or none")
    if args.curve_clients is not None and args.curve_key is None:
        raise ServeError("CURVE needs the server's own key", field="--curve-key", expected="a *.key_secret file")
    record = None if args.record is None else RecordSettings(args.record, int(args.record_max_gb * 1e9))
    return {
        "record": record,
        "tracing": Tracing.to_collector() if args.otel else None,
        "tls": None if args.tls_cert is None else Tls(args.tls_cert, args.tls_key),
        "curve": None if args.curve_key is None else Curve(args.curve_key, args.curve_clients),
        "guards": Guards(args.max_rate, int(args.max_queued_mb * MIB), args.idle_timeout, args.message_timeout),
    }


def open_to_readers(config: ServerConfig) -> str | None:
    """One line on what others on the network can read; none where there is nothing to say."""
    from prts_core.serving.service import GROOT, OPENPI, is_loopback

    plain = {OPENPI: ("the websocket", config.tls), GROOT: ("ZeroMQ", config.curve)}
    named = [plain[protocol][0] for protocol in config.protocols if plain[protocol][1] is None]
    if is_loopback(config.host) or not named:
        return None
    return (
        f"not encrypted: {' and '.join(named)}; who is on the way reads pictures and API keys (--tls-cert, --curve-key)"
    )
