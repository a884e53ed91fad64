"""Describe where the parts of a reinforcement-learning run stand: which processes, on which accelerators or nodes.

placement:
  cluster: {gpu: {nodes: 2, accelerators: 8}, cpu: {nodes: 4}}
  components:
    env,rollout: 0-11
    actor: 12
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from prts_core.config.checks import Strict, check_names, check_numbers


@dataclass(frozen=True)
class NodeGroup(Strict):
    """nodes: machines of one kind. accelerators: of each; 0: its processes are placed by node."""

    nodes: int = 1
    accelerators: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, {"[1, 65536]": "nodes", "[0, 1024]": "accelerators"})


@dataclass(frozen=True)
class GroupPlacement(Strict):
    """A placement whose resources are counted within one group of nodes; `node`: the nodes of the whole cluster."""

    node_group: str
    placement: str | int

    def __post_init__(self) -> None:
        check_names(self, "node_group")


@dataclass(frozen=True)
class PlacementConfig(Strict):
    """components: which of `env` (simulators), `rollout` (the policy that acts in them) and `actor` (the policy that
    learns) stand where; several that stand alike may share a key ("env,rollout"). Empty: everything in one process.

    A value is "resources[:processes]", or several of them separated by commas: "0-3" gives each of four resources a
    process, "0-1:0-3" two processes to each of two, "0-3:0" one process four; "all": each resource that there is. In
    "0-1:0-3,3-5,7-10:7-14" the middle part continues the count with processes 4 to 6.

    cluster: kinds of nodes, numbered in this order. Empty: this machine. Resources are the accelerators of a cluster or
    group, numbered in the order of their nodes; where it has none, its nodes.

    backend: "local" (processes of this machine) or "ray". silence: seconds without a sign of life after which a process
    counts as hung. start: seconds that it is given to load its policy. attempts: processes that the same episodes may
    cost before they are to blame, and that may fail to start in a row.
    """

    components: dict[str, str | int | GroupPlacement] = field(default_factory=dict)
    cluster: dict[str, NodeGroup] = field(default_factory=dict)
    backend: Literal["local", "ray"] = "local"
    silence: float = 600.0
    start: float = 900.0
    attempts: int = 3

    def __post_init__(self) -> None:
        check_numbers(self, {"(0, 86400]": "silence start", "[1, 1000]": "attempts"})
        if "node" in self.cluster:
            raise ValueError("cluster: `node` stands for the nodes of the whole cluster; give the group another name")
