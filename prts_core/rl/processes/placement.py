"""Resolve a placement: which process of which part of a run stands on which node and has which accelerators.

    placement = place(PlacementConfig(components={"env,rollout": "0-3", "actor": "4-7"}), accelerators=8)
    placement.mode                            # "hybrid": some parts share their resources, some do not
    placement.components["actor"][0]          # Process(rank=0, node=0, resources=(4,), local=(4,), ...)
    rollout_places(placement, simulators=64, stages=2, group_size=8, episodes=512)

Nothing is started here, and what could not run is refused: ConfigError with the field, what stands there and a cure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from prts_core.config.rl_placement import GroupPlacement, NodeGroup, PlacementConfig
from prts_core.io.errors import ConfigError, suggest
from prts_core.rl.processes.placement_grammar import Part, Range, format_placement, parse_placement

COMPONENTS = ("env", "rollout", "actor")
NODE = "node"  # the group whose resources are the nodes of the whole cluster
Kind = Literal["accelerator", "node"]
Mode = Literal["shared", "separate", "hybrid"]


@dataclass(frozen=True)
class Resource:
    """kind, number: which, in the whole cluster. node: where it is. local: its number among those of its node; of a
    node none."""

    kind: Kind
    number: int
    node: int
    local: int | None = None


@dataclass(frozen=True)
class Process:
    """rank: among its component's. resources: numbers in the whole cluster of what it has, at least one, all on `node`.
    local: the accelerators' numbers on that node, as CUDA counts them; empty where it was placed by node."""

    rank: int
    node: int
    kind: Kind
    resources: tuple[int, ...]
    local: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """components: name -> its processes by rank. cluster: (group, accelerators) of every node."""

    components: Mapping[str, tuple[Process, ...]]
    cluster: tuple[tuple[str, int], ...]

    @property
    def mode(self) -> Mode:
        """How resources are shared: by all parts alike ("shared"), by none ("separate"), or by some ("hybrid")."""
        held = [self._held(name) for name in COMPONENTS]
        if all(one == held[0] for one in held):
            return "shared"
        return "separate" if sum(map(len, held)) == len(set().union(*held)) else "hybrid"

    @property
    def one_process(self) -> bool:
        """Whether the run needs no process but its own."""
        first = self.components["actor"][0]
        return all(processes == (first,) for processes in self.components.values())

    def describe(self) -> list[str]:
        """What stands where, a line each; the first says the mode."""
        pairs = [(a, b) for at, a in enumerate(COMPONENTS) for b in COMPONENTS[at + 1 :]]
        sharing = [f"{a} and {b}" for a, b in pairs if self._held(a) & self._held(b)]
        told = {
            "shared": "all parts take turns on the same resources",
            "separate": "every part has resources of its own",
            "hybrid": "resources are shared by " + ", by ".join(sharing),
        }
        lines = [f"placement {self.mode}: {told[self.mode]}"]
        for name in COMPONENTS:
            processes = self.components[name]
            where = "; ".join(
                f"{process.kind} {_told(process.resources)}"
                + (f" of node {process.node}" if process.kind == "accelerator" else "")
                for process in processes[:16]
            )
            more = f"; and {len(processes) - 16} more" if len(processes) > 16 else ""
            lines.append(f"{name}: {len(processes)} process{'es' * (len(processes) > 1)} on {where}{more}")
        return lines

    def _held(self, name: str) -> set[tuple[Kind, int]]:
        return {(process.kind, number) for process in self.components[name] for number in process.resources}


def place(config: PlacementConfig, accelerators: int = 0) -> Placement:
    """Where every process stands. accelerators: of this machine, which is the cluster where none is described.

    Without components: one process, on the first resource, does everything.
    """
    cluster = dict(config.cluster) or {"this machine": NodeGroup(1, accelerators)}
    nodes = tuple((group, kind.accelerators) for group, kind in cluster.items() for _ in range(kind.nodes))
    if not config.components:
        first = _resources(cluster, None, "placement")[0]
        alone = _process(0, (first,))
        return Placement(dict.fromkeys(COMPONENTS, (alone,)), nodes)
    found: dict[str, tuple[Process, ...]] = {}
    for key, value in config.components.items():
        field = f"placement.components.{key}"
        group, said = (value.node_group, value.placement) if isinstance(value, GroupPlacement) else (None, value)
        there = _resources(cluster, group, field)
        processes = _processes(parse_placement(said, field), there, field)
        for name in (part.strip() for part in key.split(",")):
            if name not in COMPONENTS:
                close = "; the learner is called 'actor'" if name in ("learner", "train") else suggest(name, COMPONENTS)
                raise ConfigError(
                    f"A run has no component {name!r:.40}{close}",
                    field="placement.components",
                    found=key,
                    expected=", ".join(COMPONENTS),
                )
            if name in found:
                raise ConfigError(
                    f"Component {name!r} is placed twice",
                    field="placement.components",
                    found=", ".join(config.components),
                    expected="every component in one key",
                )
            found[name] = processes
    if missing := [name for name in COMPONENTS if name not in found]:
        raise ConfigError(
            "Not every component is placed",
            field="placement.components",
            found=f"no {', no '.join(missing)}",
            expected=", ".join(COMPONENTS),
            cure=f"add `{','.join(missing)}: all`, or place nothing: everything then runs in one process",
        )
    return Placement({name: found[name] for name in COMPONENTS}, nodes)


def _resources(cluster: Mapping[str, NodeGroup], group: str | None, field: str) -> list[Resource]:
    """What can be given to processes: accelerators of the group (none: of the cluster), nodes where it has none."""
    if group is not None and group != NODE and group not in cluster:
        raise ConfigError(
            f"The cluster has no such group of nodes{suggest(group, cluster)}",
            field=f"{field}.node_group",
            found=group,
            expected=", ".join([*cluster, NODE]),
        )
    nodes, accelerators = [], []
    node = number = 0
    for name, kind in cluster.items():
        for _ in range(kind.nodes):
            if group in (None, NODE, name):
                nodes.append(Resource("node", node, node))
                accelerators += [Resource("accelerator", number + at, node, at) for at in range(kind.accelerators)]
            node, number = node + 1, number + kind.accelerators
    return nodes if group == NODE or not accelerators else accelerators


def _processes(parts: tuple[Part, ...], there: list[Resource], field: str) -> tuple[Process, ...]:
    made: dict[int, Process] = {}
    following = 0
    for part in parts:
        taken = Range(0, len(there) - 1) if part.resources is None else part.resources
        ranks = part.processes or Range(following, following + len(taken) - 1)
        if taken.last >= len(there):
            raise ConfigError(
                f"There is no {there[0].kind} {taken.last} to place a process on",
                field=field,
                found=format_placement(parts),
                expected=f"0 to {len(there) - 1}, of what is described as cluster (none: this machine)",
            )
        for process in _spread([there[at] for at in taken.numbers()], ranks, field, parts):
            if process.rank in made:
                raise _ranks_wrong(f"process {process.rank} is placed twice", field, parts)
            made[process.rank] = process
        following = ranks.last + 1
    if missing := sorted(set(range(max(made) + 1)) - made.keys()):
        raise _ranks_wrong(f"process {missing[0]} is placed nowhere", field, parts)
    return tuple(made[rank] for rank in range(len(made)))


def _spread(taken: list[Resource], ranks: Range, field: str, parts: tuple[Part, ...]) -> Iterator[Process]:
    """Deal resources out to processes: several processes to each, or several of them to each process."""
    if len(ranks) % len(taken) and len(taken) % len(ranks):
        raise ConfigError(
            "Resources and processes do not divide",
            field=field,
            found=f"{len(taken)} {taken[0].kind}s for {len(ranks)} processes in {format_placement(parts)}",
            expected="as many of one as of the other, or a whole multiple of it",
        )
    each = max(1, len(taken) // len(ranks))
    for at, rank in enumerate(ranks.numbers()):
        first = at * len(taken) // len(ranks)
        process = _process(rank, tuple(taken[first : first + each]))
        if any(one.node != process.node for one in taken[first : first + each]):
            raise ConfigError(
                f"Process {rank} would stand on two nodes",
                field=field,
                found=f"{process.kind}s {_told(process.resources)} in {format_placement(parts)}",
                expected="a process on one node",
                cure="give it as many accelerators as divide those of a node, beginning with a node's first",
            )
        yield process


def _process(rank: int, held: tuple[Resource, ...]) -> Process:
    local = tuple(one.local for one in held if one.local is not None)
    return Process(rank, held[0].node, held[0].kind, tuple(one.number for one in held), local)


def _ranks_wrong(problem: str, field: str, parts: tuple[Part, ...]) -> ConfigError:
    return ConfigError(
        "Process ranks do not count from 0 without gaps",
        field=field,
        found=f"{problem} in {format_placement(parts)}",
        expected="0, 1, 2, ... over all parts",
        cure="leave the process ranks out where each resource has one process",
    )


def _told(numbers: tuple[int, ...]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
