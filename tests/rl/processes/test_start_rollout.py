"""The rollout side of a run, started where its placement says."""

from __future__ import annotations

from typing import Any

import pytest

from prts_core.config.rl_placement import PlacementConfig
from prts_core.io.errors import ConfigError
from prts_core.rl.processes.fleet import Fleet
from prts_core.rl.processes.local_backend import LocalBackend
from prts_core.rl.processes.start import start_rollout
from tests.fixtures.toy_collector import ToyPolicy, orders, record_of, same, update


def started(components: dict[str, Any], model: ToyPolicy, told: list[str], **more: Any) -> Fleet:
    config = PlacementConfig(components=components, silence=60.0)
    asked = {"simulators": 4, "log": told.append} | more
    return start_rollout(config, model, "tests.fixtures.toy_collector:make", {}, **asked)


def test_processes_give_the_records_that_one_would():
    model, told = ToyPolicy(), []
    with started({"actor": 0, "env,rollout": "0:0-1"}, model, told, version=5) as fleet:
        assert told[0].startswith("placement shared: ")
        for version in (5, 6):
            assert fleet.report.version == version
            assert same(fleet.collect(orders(6), 2), [record_of(model, order) for order in orders(6)])
            update(model, version)
            fleet.publish()
        fleet.check()
        assert isinstance(fleet.backend, LocalBackend)
        assert [(place.rank, place.simulators) for place in fleet.backend.places] == [(0, 2), (1, 2)]
        assert fleet.silence == 60.0 and not fleet.lost


def test_what_cannot_be_is_refused_before_anything_is_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("subprocess.Popen", None)
    told: list[str] = []
    two = {"actor": 0, "env,rollout": "0:0-1"}
    for components, more in ((two, {"simulators": 3}), (two, {"stages": 3}), (two, {"group_size": 4})):
        with pytest.raises(ConfigError):
            started(components, ToyPolicy(), told, **more)
    with pytest.raises(ConfigError, match="no node 1"):
        started({"actor,env,rollout": "0-1"}, ToyPolicy(), told)
    assert not told
