"""Send recorded episodes through a policy and compare its actions with the recorded ones. No robot, no simulator.

A small error says that the policy does what the demonstrator did where the demonstrator was; how far it gets on its own
says only a closed loop (`prts benchmark`, a robot).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from prts_core.contract import PolicyContract
from prts_core.data.goals import stretches
from prts_core.data.index import described
from prts_core.data.lerobot_v21.reader import LeRobotDataset
from prts_core.io.errors import ConfigError, DataError
from prts_core.io.files import digest_file, digest_value, read_json, write_json
from prts_core.io.journal import Journal
from prts_core.io.progress import track
from prts_core.policy.observation import STATE
from prts_core.rollout.action_errors import ActionErrors
from prts_core.rollout.local_policy import PolicyUnderTest, ask_filled
from prts_core.training.batch import chunk_windows
from prts_core.training.episodes import EpisodeReader

VERSION = 1  # of what is measured: another one is another key
REPORT, JOURNAL, PAGE = "report.json", "episodes.jsonl", "page.html"


def replay_header(
    identity: Mapping[str, Any],
    dataset: LeRobotDataset,
    episodes: Sequence[int],
    contract: PolicyContract,
    *,
    every: int | None = None,
    seed: int = 0,
    batch: int = 1,
) -> dict[str, Any]:
    """Everything that a report depends on; its digest names it. every: rows between two looks; none: a chunk.

    ConfigError where there is nothing to replay, DataError where the dataset's numbers are not as wide as the policy's.
    """
    every = contract.chunk_length if every is None else every
    if every < 1 or not episodes:
        raise ConfigError(
            "There is nothing to replay",
            field="--every" if every < 1 else "--episode",
            found=every if every < 1 else "no episodes",
            expected="1 or more",
        )
    for key, dimensions in ((STATE, contract.contract.state), ("action", contract.contract.action)):
        columns = dataset.columns(episodes[0], [key])[key]
        if (width := columns.reshape(len(columns), -1).shape[1]) != len(dimensions):
            raise DataError(
                "The dataset's numbers are not those of the policy",
                file=dataset.root,
                field=key,
                found=f"{width} numbers",
                expected=f"{len(dimensions)}: {', '.join(dimension.name for dimension in dimensions)}",
            )
    return {
        "version": VERSION,
        "policy": dict(identity),
        "dataset": episodes_digest(dataset, episodes),
        "episodes": list(episodes),
        "every": every,
        "seed": seed,
        "batch": batch,
    }


def episodes_digest(dataset: LeRobotDataset, episodes: Sequence[int]) -> str:
    """Of what a replay reads: metadata, the tables of these episodes, and the sizes of their videos."""
    files = sorted({file for episode in episodes for file in dataset.info.episode_files(episode)})
    listed = []
    for file in files:
        path = dataset.path(file)
        if not path.is_file():
            raise DataError(
                "A file of the dataset is missing",
                file=path,
                expected="a table or video of the episodes that are replayed",
                cure="restore it, or name other episodes; `prts validate` lists every missing file",
            )
        one = {"path": file, "size": path.stat().st_size}
        listed.append(one | ({"sha256": digest_file(path)} if path.suffix == ".parquet" else {}))
    return digest_value({"meta": described(dataset.root), "files": listed})


def finished(folder: Path, header: Mapping[str, Any]) -> dict[str, Any] | None:
    """The report that stands in `folder`, if it is that of `header`.

    A server that does not say which policy it is may be another one today: what it has answered before is removed.
    """
    if not (header["policy"].get("policy_digest") or header["policy"].get("package_digest")):
        for name in (REPORT, JOURNAL, PAGE):
            (folder / name).unlink(missing_ok=True)
    if not (folder / REPORT).is_file():
        return None
    report: dict[str, Any] = read_json(folder / REPORT)
    return report if report.get("header") == header else None


def replay(policy: PolicyUnderTest, dataset: LeRobotDataset, header: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Ask for a chunk at every look of every episode and write the report; an interrupted replay goes on.

    Raises as the policy and the dataset do. header: of `replay_header`.
    """
    contract, rows = policy.contract.contract, policy.contract.chunk_length
    with Journal(folder / JOURNAL, header, ("episode",)) as journal:
        left = [episode for episode in header["episodes"] if (episode,) not in journal.rows]
        with closing(EpisodeReader(dataset)) as reader:
            for episode in track(left, what="replaying"):
                found = _episode(policy, reader, episode, header)
                told = {"episode": episode, "instruction": dataset.instruction(episode)}
                journal.add(told | {"errors": found.to_json()})
        measured = [journal.rows[(episode,)] for episode in header["episodes"]]
    total = ActionErrors.empty(rows, len(contract.action))
    errors = [ActionErrors.from_json(row["errors"]) for row in measured]
    for one in errors:
        total.merge(one)
    spread = total.spread
    report = {
        "header": header,
        **total.summary(contract.action, contract.control_hz),
        "episodes": [
            {
                "episode": row["episode"],
                "instruction": row["instruction"],
                "looks": one.looks,
                "relative": float(np.average(one.relative(spread), weights=one.count)),
            }
            for row, one in zip(measured, errors, strict=True)
        ],
    }
    write_json(folder / REPORT, report)
    return report


def _episode(policy: PolicyUnderTest, reader: EpisodeReader, episode: int, header: Mapping[str, Any]) -> ActionErrors:
    contract, rows = policy.contract.contract, policy.contract.chunk_length
    states, actions = reader.numbers(episode)
    recorded, clamped = chunk_windows(actions, rows)
    sentences = [one.instruction for one in stretches(reader.dataset, episode) for _ in range(one.start, one.end)]
    looks = list(range(0, len(actions), header["every"]))
    found = ActionErrors.empty(rows, len(contract.action))
    for start in range(0, len(looks), policy.batch):
        at = looks[start : start + policy.batch]
        seen = [
            {STATE: states[row]} | {camera.key: reader.rgb(episode, camera.key, row) for camera in contract.cameras}
            for row in at
        ]
        seeds = [look_seed(header["seed"], episode, row) for row in at]
        chunks = ask_filled(policy, seen, [sentences[row] for row in at], seeds).chunks
        found.add(chunks, recorded[at], ~clamped[at])
    return found


def look_seed(seed: int, episode: int, row: int) -> int:
    """The noise of one look: the same in every run, whatever else is replayed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {episode} {row}".encode()).digest()[:4], "big")
