"""Shares of the rollout processes: whole ones, or a refusal before anything starts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prts_core.config.rl_placement import GroupPlacement, NodeGroup, PlacementConfig
from prts_core.io.errors import ConfigError
from prts_core.rl.processes.placement import Placement, place
from prts_core.rl.processes.rollout_places import rollout_places


def placed(components: dict, cluster: dict | None = None) -> Placement:
    return place(PlacementConfig(components=components, cluster=cluster or {}), 8)


def test_one_process_has_all_simulators():
    (found,) = rollout_places(place(PlacementConfig()), simulators=6, stages=2, group_size=3)
    assert found.simulators == 6 and found.accelerators == ()


def test_rollout_processes_share_simulators():
    placement = placed({"env": "0-3:0-7", "rollout": "0-3", "actor": "4-7"})
    found = rollout_places(placement, simulators=64, stages=2, group_size=4, episodes=512)
    assert [(one.rank, one.env, one.simulators, one.accelerators) for one in found] == [
        (0, (0, 1), 16, (0,)),
        (1, (2, 3), 16, (1,)),
        (2, (4, 5), 16, (2,)),
        (3, (6, 7), 16, (3,)),
    ]
    placement = placed({"env": "0:0", "rollout,actor": "0-3"})
    found = rollout_places(placement, simulators=8)
    assert [(one.env, one.simulators) for one in found] == [((0,), 2)] * 4


@pytest.mark.parametrize(
    ("asked", "field", "told"),
    [
        ({"simulators": 10}, "workers", "10 simulators for 4 env"),
        ({"simulators": 0}, "workers", "0 simulators"),
        ({"simulators": 64, "stages": 3}, "stages", "3 stages of 16"),
        ({"simulators": 4, "stages": 2}, "stages", "2 stages of 1"),
        ({"simulators": 64, "stages": 0}, "stages", "0 stages"),
        ({"simulators": 64, "stages": 2, "group_size": 16}, "algorithm.group_size", "groups of 16 in stages of 8"),
        ({"simulators": 64, "group_size": 3}, "algorithm.group_size", "groups of 3 in stages of 16"),
        ({"simulators": 64, "episodes": 100}, "episodes", "100 episodes, 64 simulators"),
    ],
)
def test_what_would_be_cut_short(asked: dict, field: str, told: str):
    placement = placed({"env,rollout": "0-3", "actor": "4-7"})
    with pytest.raises(ConfigError, match=told) as caught:
        rollout_places(placement, **asked)
    assert caught.value.field == field


def test_processes_that_do_not_pair():
    with pytest.raises(ConfigError, match="do not pair"):
        rollout_places(placed({"env": "0-2", "rollout": "0-1", "actor": "4"}), simulators=6)
    cluster = {"gpu": NodeGroup(1, 2), "cpu": NodeGroup(1)}
    apart = placed({"env": GroupPlacement("cpu", "0"), "rollout,actor": "0"}, cluster=cluster)
    with pytest.raises(ConfigError, match="env process 0 on node 1, rollout process 0 on node 0"):
        rollout_places(apart, simulators=6)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 48))
def test_shares_are_whole(env: int, rollout: int, stages: int, group: int, simulators: int):
    placement = placed({"env": f"0:0-{env - 1}", "rollout": f"0:0-{rollout - 1}", "actor": "0"})
    try:
        found = rollout_places(placement, simulators=simulators, stages=stages, group_size=group)
    except ConfigError:
        many = max(env, rollout)
        assert many % env or many % rollout or simulators % (many * stages * group)
        return
    assert sum(one.simulators for one in found) == simulators and len({one.simulators for one in found}) == 1
    assert found[0].simulators % (stages * group) == 0
    assert {at for one in found for at in one.env} == set(range(env))
