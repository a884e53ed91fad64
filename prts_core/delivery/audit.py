"""Move aliases of registered models and keep the trail: one MLflow run a move, written before the alias moves.

Nothing here is ever changed afterwards but a move's state.
"""

from __future__ import annotations

import contextlib
import getpass
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prts_core.delivery import registry
from prts_core.io.errors import StageError
from prts_core.io.files import canonical_json
from prts_core.io.locks import locked
from prts_core.tracking.store import client, every, experiment_id, tracking_uri

if TYPE_CHECKING:
    from mlflow.entities import Run

EXPERIMENT = "prts-alias-moves"
State = Literal["intended", "done", "abandoned"]
Verdict = Literal["registered", "promoted", "rolled back"]


@dataclass(frozen=True)
class Move:
    """before, after: versions; before is empty where nobody was called so. evidence: suite -> digests of the results
    that spoke for it. state: `intended` while it is under way, `abandoned` where it was cut short."""

    model: str
    alias: str
    before: str
    after: str
    verdict: str
    reason: str
    evidence: str
    by: str
    at: str
    number: int
    state: State
    run_id: str


def moves(outputs: Path, model: str) -> list[Move]:
    """The model's trail, oldest first."""
    from mlflow.entities import ViewType

    store = client(outputs)
    experiment = store.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    ids, wanted = [experiment.experiment_id], f"tags.`prts.model` = '{model}'"
    # Of any state: what somebody deleted on the page has happened all the same.
    runs = every(lambda token: store.search_runs(ids, wanted, ViewType.ALL, page_token=token))
    return sorted(map(_read, runs), key=lambda move: (move.number, move.at))


def _read(run: Run) -> Move:
    texts = {name: run.data.tags.get(f"prts.{name}", "") for name in Move.__dataclass_fields__}
    return Move(**texts | {"number": int(texts["number"]), "run_id": run.info.run_id})  # type: ignore[arg-type]


@contextlib.contextmanager
def aliases_locked(outputs: Path) -> Iterator[None]:
    """Hold the registry's aliases against other processes of this machine; a server's against those on `outputs`."""
    uri = os.environ.get("MLFLOW_REGISTRY_URI") or tracking_uri(outputs)
    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else outputs.resolve() / "mlflow"
    with locked(file.with_name(f".{file.name}.aliases.lock")):
        yield


def version_called(outputs: Path, model: str, alias: str) -> str:
    """The number of the version that is called so now, or empty."""
    found = registry.version_of_alias(client(outputs), model, alias)
    return "" if found is None else str(found.version)


def require_at(outputs: Path, model: str, alias: str, number: str) -> None:
    """StageError unless the alias is where it was seen last."""
    present = version_called(outputs, model, alias)
    if present != number:
        raise StageError(
            f"@{alias} of {model!r} was moved meanwhile",
            found=f"version {present or 'none'}",
            expected=f"version {number or 'none'}",
            cure="run the same again",
        )


def move_alias(
    outputs: Path,
    model: str,
    alias: str,
    before: str,
    after: str,
    *,
    verdict: Verdict,
    reason: str = "",
    evidence: Mapping[str, Any] | None = None,
    caller: Mapping[str, str] | None = None,
) -> None:
    """Write the move into the trail, look once more that the alias is where `before` says, and move it.

    Whoever calls holds `aliases_locked`. A StageError says that another machine moved the alias meanwhile; nothing is
    moved then.
    """
    settle(outputs, model)
    trail, store = moves(outputs, model), client(outputs)
    facts = {
        "model": model,
        "alias": alias,
        "before": before,
        "after": after,
        "verdict": verdict,
        "reason": reason[:4000],
        "evidence": canonical_json(dict(evidence or {})),
        "by": person(),
        "at": datetime.now(UTC).isoformat("T", "seconds"),
        "state": "intended",
        "number": str(1 + max((move.number for move in trail), default=0)),
    }
    run = store.create_run(
        experiment_id(outputs, EXPERIMENT),
        run_name=f"{model} @{alias} {before or 'none'} to {after}",
        tags={f"prts.{name}": value for name, value in facts.items()} | dict(caller or {}),
    )
    try:
        require_at(outputs, model, alias, before)
    except StageError:
        _end(outputs, run.info.run_id, "abandoned")
        raise
    store.set_registered_model_alias(model, alias, after)
    _end(outputs, run.info.run_id, "done")


def settle(outputs: Path, model: str) -> Move | None:
    """Say of moves that a killed process left open whether they were carried out; the last of these that was.

    Whoever calls holds `aliases_locked`, so that nobody is in the middle of one.
    """
    carried_out = None
    for cut in moves(outputs, model):
        if cut.state == "intended":
            done = version_called(outputs, model, cut.alias) == cut.after
            _end(outputs, cut.run_id, "done" if done else "abandoned")
            carried_out = cut if done else carried_out
    return carried_out


def _end(outputs: Path, run_id: str, state: State) -> None:
    store = client(outputs)
    if store.get_run(run_id).info.lifecycle_stage == "deleted":  # on MLflow's page: the trail keeps it
        store.restore_run(run_id)
    store.set_tag(run_id, "prts.state", state)
    store.set_terminated(run_id, "FINISHED" if state == "done" else "KILLED")


def earlier_champion(trail: list[Move], present: str, able: Container[str]) -> str:
    """Who of the versions that are `able` was champion before `present`, by what was carried out; empty: nobody."""
    line: list[str] = []
    for move in trail:
        if move.alias == registry.CHAMPION and move.state == "done":
            if move.before and line[-1:] != [
                move.before
            ]:  # an alias that was moved by hand, or before there was a trail
                line = [*_until(line, move.before), move.before]
            line = [*_until(line, move.after), move.after]
    return ([version for version in _until(line, present) if version in able] or [""])[-1]


def _until(line: list[str], version: str) -> list[str]:
    return line[: line.index(version)] if version in line else line


def person() -> str:
    """Who acts: $PRTS_USER, else the name at this machine."""
    try:
        return os.environ.get("PRTS_USER") or getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"
