"""Actions of `prts skill` that make packages and vouch for them: pack, quantize, keygen, sign, verify."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from prts_core.cli.main import add_plan_arguments, plain_console, table, wide_console
from prts_core.config.licence import Licence

SCHEMES = ("nf4", "int8", "bf16")  # those of prts_core.policy.quantized, which brings torch


def add_actions(actions: Any) -> argparse.ArgumentParser:
    """Returns the parser of verify, which shares an option with others."""
    pack = actions.add_parser("pack", help="make a package of a policy folder, an imported checkpoint's too")
    pack.add_argument("policy", help="a policy folder, or models:/name@alias")
    pack.add_argument("--name", required=True, metavar="OWNER/NAME", help="the package's id")
    pack.add_argument("--out", type=Path, required=True, metavar="DIR", help="where; must not exist")
    pack.add_argument(
        "--licence", choices=get_args(Licence), default="unknown", help="of the weights (default: %(default)s)"
    )
    pack.add_argument(
        "--budget-ms", type=float, default=200.0, metavar="MS", help="for one chunk (default: %(default)s)"
    )
    pack.add_argument("--description", default="", help="what it does, for whoever chooses: up to 500 characters")
    quantize = actions.add_parser("quantize", help="hold a package's backbone in few bits, where figures allow it")
    quantize.add_argument("package", help="a package, models:/name@alias, hf://owner/name[@revision] or rskill://name")
    quantize.add_argument(
        "--as",
        dest="scheme",
        required=True,
        choices=SCHEMES,
        help="how matrices of the backbone are held; the action head stays in bf16",
    )
    quantize.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new package; must not exist")
    add_plan_arguments(quantize)
    keygen = actions.add_parser("keygen", help="make an Ed25519 key pair for signing")
    keygen.add_argument("key", type=Path, help="where the private key goes, such as keys/me.pem; must not exist")
    sign = actions.add_parser("sign", help="list a package's digests anew and sign the list")
    sign.add_argument("package", type=Path, help="a package's folder")
    sign.add_argument("--key", type=Path, required=True, metavar="PEM", help="a private Ed25519 key")
    verify: argparse.ArgumentParser = actions.add_parser(
        "verify", help="hold files, weights and records against the list of digests"
    )
    verify.add_argument("package", type=Path, help="a package's folder")
    return verify


def pack(args: argparse.Namespace) -> int:
    from prts_core.delivery.latency import measure
    from prts_core.delivery.packaging import write_package
    from prts_core.delivery.resolve import policy_folder
    from prts_core.delivery.skill_manifest import Terms
    from prts_core.io.files import new_folder
    from prts_core.policy.policy import load_policy

    source = policy_folder(args.policy)
    policy = load_policy(source)
    said = args.description or f"Vision-language-action policy for {policy.contract.embodiment_tag}."
    terms = Terms(args.name, args.licence, said, args.budget_ms, dtype=policy.dtype)
    with new_folder(args.out) as partial:
        write_package(source, partial, terms)
    took = measure(policy, args.budget_ms)
    plain_console().print(
        f"{args.out}: a chunk takes {took.p50_ms:g} ms on {took.machine} ({took.device}), 95 of 100 at most "
        f"{took.p95_ms:g}, 99 at most {took.p99_ms:g}; budget {args.budget_ms:g}" + (", EXCEEDED" if took.over else "")
    )
    plain_console().print(f"next: `prts skill check {args.out}`, `prts skill sign {args.out} --key KEY.pem`")
    return 0


def quantize(args: argparse.Namespace) -> int:
    from prts_core.config.load import load_plan
    from prts_core.delivery.quantize import quantize_package
    from prts_core.delivery.resolve import resolve

    plan = load_plan(args.config, args.overrides)
    say = plain_console().print
    price = quantize_package(plan, resolve(args.package, args.outputs), args.scheme, args.out, args.outputs, say)
    rows = table("dimension", "mean error", "largest", "of its range")
    for name, error in price.errors.items():
        rows.add_row(name, f"{error.mean:.4g}", f"{error.largest:.4g}", f"{error.share:.2%}")
    wide_console().print(rows)
    before, after = price.full_bytes / 1e6, price.bytes / 1e6
    say(f"weights in memory: {before:.2f} MB before, {after:.2f} MB after, {1 - after / before:.0%} less")
    say(price.verdict.reason)
    say(f"{args.out}")
    return 0


def keygen(args: argparse.Namespace) -> int:
    from prts_core.skills.signature import new_key

    public = new_key(args.key)
    plain_console().print(f"{args.key}: the private key, to sign with; keep it to yourself")
    plain_console().print(f"{public}: the public key, for whoever is to trust you (--trusted, --require-signature)")
    return 0


def sign(args: argparse.Namespace) -> int:
    from prts_core.skills.signature import sign as put

    listed = put(args.package, args.key)
    plain_console().print(f"{args.package}: {len(listed.files)} files listed and signed, {listed.package_digest}")
    return 0


def verify(args: argparse.Namespace) -> int:
    from prts_core.skills.signature import verify as hold

    listed = hold(args.package, args.trusted)
    who = "signed by a trusted key" if args.trusted else "no signature asked for (--trusted KEYS)"
    plain_console().print(f"{args.package}: {len(listed.files)} files as listed, {listed.package_digest}; {who}")
    return 0


ACTIONS = {"pack": pack, "quantize": quantize, "keygen": keygen, "sign": sign, "verify": verify}
