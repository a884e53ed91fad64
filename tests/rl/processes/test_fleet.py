"""What a fleet does with whatever its workers do, on a simulated clock; no process is started."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import CheckpointError, ConfigError, SimulatorError, StageError
from prts_core.rl.processes.fleet import LOOK_S, Fleet
from prts_core.rl.processes.weights import Publisher
from prts_core.rl.processes.workers import Sign
from tests.fixtures.simulated_workers import Fate, Simulated
from tests.fixtures.toy_collector import ToyPolicy, orders, record_of, same, update

SILENCE, START = 10.0, 30.0


def well(rank: int, call: str) -> Fate:
    return Fate(seconds=0.5)


class Script:
    """Fates of collects in the order in which they are begun; everything else goes well."""

    def __init__(self, *fates: Fate, of: str = "collect") -> None:
        self.fates, self.of = list(fates), of

    def __call__(self, rank: int, call: str) -> Fate:
        return self.fates.pop(0) if call == self.of and self.fates else Fate(seconds=0.5)


def fleet_of(backend: Simulated, model: ToyPolicy | None = None, **more: Any) -> Fleet:
    told = {"silence": SILENCE, "start": START, "clock": backend.clock} | more
    return Fleet(backend, Publisher(model or ToyPolicy()), **told)


def expected(model: ToyPolicy, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record_of(model, order) for order in asked]


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("count", [1, 3])
def test_records_come_in_the_order_of_their_orders(count: int, batch: int):
    model = ToyPolicy()
    with fleet_of(Simulated(count, well), model) as fleet:
        for version in range(3):
            asked = orders(10)
            assert same(fleet.collect(asked, batch), expected(model, asked))
            update(model, version)
            assert fleet.publish().version == version + 1
        assert fleet.collect([], batch) == [] and not fleet.lost
        assert isinstance(fleet.backend, Simulated)
    assert fleet.backend.closed


def test_a_dead_worker_costs_one_batch():
    backend = Simulated(2, Script(Fate(), Fate("gone", 0.2)))
    told: list[str] = []
    fleet = fleet_of(backend, log=told.append)
    assert same(fleet.collect(orders(8), 2), expected(ToyPolicy(), orders(8)))
    (lost,) = fleet.lost
    assert told == ["rollout worker 1 died (killed here), while collecting batch 1"] == [str(lost)]
    begun = [(rank, argument[0]["seed"]) for _, rank, call, argument in backend.calls if call == "collect"]
    assert sorted(seed for _, seed in begun) == [0, 2, 2, 4, 6], "its batch once more, whole, and nothing else"
    assert begun[2] == (0, 2), "by the other worker"
    assert backend.workers.keys() == {0, 1}, "and it was replaced"


def test_a_silent_worker_is_named_within_the_stated_time():
    backend = Simulated(2, Script(Fate("hang", beats=(1.0, 2.0)), Fate("reply", 50.0, tuple(range(1, 50, 5)))))
    fleet = fleet_of(backend)
    assert same(fleet.collect(orders(6), 2), expected(ToyPolicy(), orders(6)))
    (lost,) = fleet.lost
    assert str(lost) == f"rollout worker 0 gave no sign of life for {SILENCE:g} s (killed here), while " + lost.doing
    begun = next(at for at, rank, call, _ in backend.calls if call == "collect" and rank == 0)
    ((at, rank),) = backend.killed
    assert rank == 0 and begun + 2.0 + SILENCE <= at <= begun + 2.0 + SILENCE + LOOK_S
    assert backend.now >= 50.0, "who gives signs of life is waited for"


def test_time_in_which_nobody_listens_is_nobodys_silence():
    backend = Simulated(1, Script(Fate("reply", 3 * SILENCE, tuple(range(1, 30)))))
    fleet = fleet_of(backend)
    (number,) = fleet.submit([orders(2)])
    while not any(call == "collect" for _, _, call, _ in backend.calls):
        assert fleet.next(0.1) is None
    backend.now += 2.5 * SILENCE  # the learner is busy, and what was said meanwhile is lost
    backend.due = [one for one in backend.due if one[0] > backend.now]
    batch = fleet.next()
    assert batch is not None and batch.number == number and not fleet.lost


def test_episodes_that_cost_worker_after_worker_are_told():
    deadly = {"seed": 3, "steps": 1, "deadly": True}
    backend = Simulated(2, well)
    backend.fate = lambda rank, call: Fate("gone") if call == "collect" and backend.calls[-1][3] == [deadly] else Fate()
    fleet = fleet_of(backend, attempts=4)
    with pytest.raises(SimulatorError, match="4 lost; the last: rollout worker") as caught:
        fleet.collect([*orders(3), deadly, *orders(3)], 1)
    assert "'deadly': True" in str(caught.value.field) and len(fleet.lost) == 4
    assert same(fleet.collect(orders(3), 2), expected(ToyPolicy(), orders(3))), "the fleet goes on"


@pytest.mark.parametrize("call", ["build", "load"])
@pytest.mark.parametrize("end", ["gone", "hang"])
def test_a_worker_that_cannot_be_started(call: str, end: str):
    backend = Simulated(2, well)
    backend.fate = lambda rank, asked: Fate(end) if asked == call and rank == 1 else Fate(beats=(0.5,))
    fleet = fleet_of(backend)
    with pytest.raises(StageError, match=r"rollout worker 1.*3 in a row"):
        fleet.collect(orders(4000), 1)
    assert [lost.doing for lost in fleet.lost] == ["starting" if call == "build" else "loading weights"] * 3


def test_starts_that_fail_in_between_do_no_harm():
    fates = Script(*(Fate(end) for end in ("reply", "gone", "gone", "reply", "gone")), of="build")
    fleet = fleet_of(Simulated(1, fates), attempts=9)
    backend = fleet.backend
    assert isinstance(backend, Simulated)
    for _ in range(4):
        assert same(fleet.collect(orders(2), 1), expected(ToyPolicy(), orders(2)))
        backend.due.append((backend.now, Sign(0, "gone")))  # between two iterations
    assert {lost.doing for lost in fleet.lost} == {"idle", "starting"}


def test_what_a_worker_refuses_is_raised():
    fleet = fleet_of(Simulated(2, Script(Fate(), Fate("refused"))))
    with pytest.raises(SimulatorError, match="The toy cannot be played") as caught:
        fleet.collect(orders(8), 2)
    assert caught.value.__notes__ == ["(told by rollout worker 1, while collecting batch 1)"]
    assert not fleet.lost and not fleet.under_way
    assert same(fleet.collect(orders(4), 2), expected(ToyPolicy(), orders(4))), "nobody was lost"


def test_weights_travel_as_what_changed_and_whole_to_who_is_new():
    model, backend = ToyPolicy(), Simulated(2, well)
    fleet = fleet_of(backend, model)
    fleet.collect(orders(4), 1)
    update(model, 0)
    first = fleet.publish()
    assert fleet.collect(orders(4), 1) and fleet.report.bytes == first.bytes > 0 and fleet.report.load_seconds == 0.5
    backend.due.append((backend.now, Sign(1, "gone")))
    update(model, 1)
    fleet.publish()
    assert same(fleet.collect(orders(4), 1), expected(model, orders(4)))
    fleet.check()
    bases = [
        (rank, backend.shared[argument].base)
        for _, rank, call, argument in backend.calls[-30:]
        if call == "load" and argument in backend.shared
    ]
    assert set(bases) == {(0, 1), (1, -1)} and len(backend.shared) == 2, "older ones are dropped"


def test_weights_that_differ_are_told():
    model, backend = ToyPolicy(), Simulated(2, well)
    fleet = fleet_of(backend, model)
    fleet.collect(orders(4), 1)
    fleet.check()
    update(backend.workers[1].collector.model, 5)
    with pytest.raises(CheckpointError, match=r"not those of the learner.*rollout worker 1"):
        fleet.check()


def test_asynchronously_batches_say_their_version():
    model = ToyPolicy()
    fleet = fleet_of(Simulated(1, well), model)
    kept = [copy.deepcopy(model)]
    asked = [orders(2, tag=at) for at in range(4)]
    numbers = fleet.submit(asked)
    seen = []
    while len(seen) < 4:
        batch = fleet.next()
        assert batch is not None and batch.rank == 0 and batch.seconds >= 0
        seen.append(batch.version)
        assert same(batch.records, expected(kept[batch.version], asked[numbers.index(batch.number)]))
        update(model, len(seen))
        kept.append(copy.deepcopy(model))
        fleet.publish()
    assert seen[0] == 0 and seen == sorted(seen) and seen[-1] > 0
    assert not fleet.under_way
    with pytest.raises(AssertionError, match="nothing is under way"):
        fleet.next()


def test_what_is_cancelled_is_done_in_vain():
    backend = Simulated(2, Script(Fate(seconds=5.0), Fate("gone", 5.0)))
    fleet = fleet_of(backend)
    fleet.submit([orders(2)] * 5)
    while sum(call == "collect" for _, _, call, _ in backend.calls) < 2:
        assert fleet.next(0.1) is None
    fleet.cancel()
    assert not fleet.under_way
    assert same(fleet.collect(orders(9), 2), expected(ToyPolicy(), orders(9)))
    assert [lost.doing for lost in fleet.lost] == ["collecting what nobody wants any more"]


fates = st.builds(
    Fate,
    st.sampled_from(["reply", "reply", "reply", "gone", "hang"]),
    st.floats(0.0, 9.0),
    st.lists(st.floats(0.1, 9.0), max_size=2).map(lambda beats: tuple(sorted(beats))),
)


@settings(max_examples=150)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 12), st.lists(fates, max_size=25), st.data())
def test_records_are_the_same_whatever_is_lost(workers: int, batch: int, count: int, script: list[Fate], data: Any):
    """Any call may fail, at any time and in any way."""

    def fate(rank: int, call: str) -> Fate:
        fate = script.pop(0) if script else Fate()
        beats = tuple(beat for beat in fate.beats if fate.end == "hang" or beat < fate.seconds)
        return Fate(fate.end, fate.seconds, beats)

    model, backend = ToyPolicy(), Simulated(workers, fate)
    fleet = fleet_of(backend, model, attempts=99)
    for version in range(3):
        asked = orders(count)
        assert same(fleet.collect(asked, batch), expected(model, asked))
        update(model, version)
        fleet.publish()
    fleet.check()
    assert len(fleet.lost) == len(backend.killed) and not fleet.under_way and not fleet.queue


def test_a_refusal_to_build_is_raised_at_once():
    fleet = fleet_of(Simulated(1, Script(Fate("refused"), of="build")))
    with pytest.raises(SimulatorError):
        fleet.collect(orders(1), 1)
    assert issubclass(ConfigError, ValueError) and not fleet.lost
