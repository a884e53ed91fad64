"""Role attention's results as the tables that one reads: on the console and in the README. It does not measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prts_kernels.bench.goals import MODES, PACKS, Row, evaluate
from prts_kernels.bench.report import NOTHING, markdown_table, number, text_table

HEADER = ("pack / mean sample", "pass", "median ms", "p20", "p80", "useful TFLOP/s", "x of the peer", "max error")
LEVELS = ("must", "target", "stretch")
GOAL_HEADER = ("goal", "measured", *LEVELS, "met")
NO_PEER = "no Hopper peer"


def console(results: dict[str, Any]) -> str:
    """Every contender in every cell, the peers' published figures, what was left out, and the goals."""
    rows: list[Row] = results["rows"]
    parts = [machine(results)]
    header = (
        "pack / mean",
        "pass",
        "D",
        "contender",
        "median ms",
        "p20",
        "p80",
        "TFLOP/s",
        "ratio",
        "max error",
        "host us",
    )
    lines = [
        (
            _pack(r),
            r["mode"],
            str(r["head_dim"]),
            r["contender"],
            *_times(r),
            number(r["tflops"]),
            _ratio(r),
            number(r.get("max_error")),
            number(r["host_us"]),
        )
        for r in sorted(rows, key=_order)
    ]
    parts.append(text_table(header, lines, left=4) if lines else "nothing was timed")
    beside = sorted(
        {
            (r["pack"], r["mode"], r["contender"], r["tflops"], r["published_tflops"])
            for r in rows
            if r.get("published_tflops") and r["mean"] == 771 and r["head_dim"] == 128
        }
    )
    for pack, mode, name, found, published in beside:
        parts.append(f"{name}, {mode}, {pack // 1024}k: {number(found)} TFLOP/s; published for an H100: {published}")
    parts += [f"{name}: {note}" for name, note in sorted({(r["contender"], r["note"]) for r in rows if r["note"]})]
    parts += [f"left out: {name}: {why}" for name, why in results["excluded"].items()]
    parts += [f"fault: {fault}" for fault in results["faults"]]
    for name, bits in results["same_bits"].items():
        parts.append(f"{name}: {bits}")
    if results["metadata"]:
        parts.append("mask metadata, us: " + ", ".join(f"{k} {number(v)}" for k, v in results["metadata"].items()))
    if results["tuning"]:
        parts += [f"tiles of {kernel}: {tile}" for kernel, tile in results["tuning"]["blocks"].items()]
    parts.append(f"chosen, the fastest of ours: {results['chosen'] or 'none'}")
    parts.append(text_table(GOAL_HEADER, _goals(results["goals"])))
    return "\n".join(parts)


def markdown(results: dict[str, Any] | None) -> str:
    """The README's tables of one run on a GPU, or, without results, the same tables with "not measured"."""
    rows = [r for r in results["rows"] if r["head_dim"] == 128] if results else []
    chosen = results["chosen"] if results else None
    if results is None:
        head = "Not measured on a GPU yet: `python3 kernels/bench/role_attention.py` fills this table."
    else:
        head = f"{machine(results)}. Ours: `{chosen}`. Peer: the fastest of FA3, flash-attn-4 and cuDNN, varlen-causal."
    lines = []
    for pack, mean in PACKS:
        for mode in MODES:
            mine = [r for r in rows if (r["pack"], r["mean"], r["mode"], r["contender"]) == (pack, mean, mode, chosen)]
            cells = [f"{pack // 1024}k / {mean}", mode]
            if mine:
                r = mine[0]
                cells += [*_times(r), number(r["tflops"]), _ratio(r), number(r.get("max_error"))]
            else:
                cells += [NOTHING] * (len(HEADER) - 2)
            lines.append(cells)
    tables = [head, markdown_table(HEADER, lines, left=2)]
    if rows:
        tables += ["All contenders, median ms, mean sample 771:", _comparison(rows)]
    goals = results["goals"] if results else evaluate([], None, "", {})
    tables.append(markdown_table(GOAL_HEADER, _goals(goals)))
    return "\n\n".join(tables)


def _goals(goals: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            g["what"],
            NOTHING if g["value"] is None else f"{number(g['value'])} {g['unit']}",
            *(f"{g['sign']} {g['bounds'][level]}" if level in g["bounds"] else "-" for level in LEVELS),
            g["met"],
        ]
        for g in goals
    ]


def _comparison(rows: Sequence[Row]) -> str:
    cells = [(pack, mode) for pack, mean in PACKS if mean == 771 for mode in ("forward", "backward")]
    names = list(dict.fromkeys(r["contender"] for r in sorted(rows, key=lambda r: (r["group"], r["median_ms"]))))
    found = {(r["contender"], r["pack"], r["mode"]): r["median_ms"] for r in rows if r["mean"] == 771}
    lines = [[f"`{n}`", *(number(found.get((n, *cell))) for cell in cells)] for n in names]
    return markdown_table(("contender", *(f"{pack // 1024}k {mode}" for pack, mode in cells)), lines)


def machine(results: dict[str, Any]) -> str:
    device, versions = results["device"], results["versions"]
    if device["type"] == "cpu":
        name = f"CPU, {device['architecture']}, {device['cores']} cores"
    else:
        name = device["name"]
    named = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    return f"{name}; {named}; {results['date'][:10]}, seed {results['seed']}"


def _order(row: Row) -> tuple[float, ...]:
    return -row["head_dim"], row["pack"], row["mean"], MODES.index(row["mode"]), row["median_ms"]


def _pack(row: Row) -> str:
    size = f"{row['pack'] // 1024}k" if row["pack"] % 1024 == 0 else str(row["pack"])
    return f"{size} / {row['mean']}"


def _times(row: Row) -> tuple[str, str, str]:
    return number(row["median_ms"]), number(row["p20_ms"]), number(row["p80_ms"])


def _ratio(row: Row) -> str:
    return NO_PEER if row["ratio"] is None else number(row["ratio"])
