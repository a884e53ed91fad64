"""Placements: what the grammar says, what resolves to what, and what is refused before anything starts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prts_core.config.checked_yaml import check
from prts_core.config.rl_placement import GroupPlacement, NodeGroup, PlacementConfig
from prts_core.io.errors import ConfigError
from prts_core.io.plain_yaml import parse
from prts_core.rl.processes.placement import Placement, place
from prts_core.rl.processes.placement_grammar import Part, Range, format_placement, parse_placement

TWO_BY_EIGHT = {"gpu": NodeGroup(2, 8)}


def placed(components: dict, accelerators: int = 8, cluster: dict | None = None) -> Placement:
    return place(PlacementConfig(components=components, cluster=cluster or {}), accelerators)


def resources(placement: Placement, name: str = "rollout") -> list[tuple[int, ...]]:
    return [process.resources for process in placement.components[name]]


def everywhere(text: str | int, accelerators: int = 8, cluster: dict | None = None) -> list[tuple[int, ...]]:
    return resources(placed({"env,rollout,actor": text}, accelerators, cluster))


# ---- the grammar -------------------------------------------------------------------------------------------------
def test_the_documented_mixture():
    parts = parse_placement("0-1:0-3,3-5,7-10:7-14")
    assert parts == (Part(Range(0, 1), Range(0, 3)), Part(Range(3, 5)), Part(Range(7, 10), Range(7, 14)))
    assert everywhere("0-1:0-3,3-5,7-10:7-14", 16) == [
        *((0,), (0,), (1,), (1,)),
        *((3,), (4,), (5,)),
        *((7,), (7,), (8,), (8,), (9,), (9,), (10,), (10,)),
    ]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("all", "all"),
        (" all : 0 - 3 ", "all:0-3"),
        ("0,1,2 , 4", "0-2,4"),
        ("0-3,4-7", "0-7"),
        ("2-2:0-0", "2:0"),
        ("0:0-1,1", "0:0-1,1"),
        ("007", "7"),
        (3, "3"),
    ],
)
def test_the_canonical_form(text: str | int, canonical: str):
    assert format_placement(parse_placement(text)) == canonical


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "missing"),
        ("0,,1", "missing"),
        ("0:", "missing"),
        (":0", "missing"),
        ("a", "'a' is no range"),
        ("0-1-2", "no range"),
        ("-1", "no range"),
        ("1.5", "no range"),
        ("٣", "no range"),
        ("0:0:0", "no range"),
        ("3-1", "backwards"),
        ("0-3:all", "cannot be `all`"),
        ("all:all", "cannot be `all`"),
        ("all,0", "leaves no resource"),
        ("0-999999999", "larger than any"),
        (60, "in quotes"),
        (-1, "in quotes"),
    ],
)
def test_texts_that_are_no_placement(text: str | int, told: str):
    with pytest.raises(ConfigError, match=told) as caught:
        parse_placement(text, "placement.components.actor")
    assert caught.value.field == "placement.components.actor" and caught.value.found is not None


ranges = st.tuples(st.integers(0, 40), st.integers(0, 6)).map(lambda ends: Range(ends[0], sum(ends)))
parts_ = st.one_of(
    st.lists(st.builds(Part, ranges, st.none() | ranges), min_size=1, max_size=5).map(tuple),
    st.builds(Part, st.none(), st.none() | ranges).map(lambda part: (part,)),
)


@given(parts_)
def test_formatting_and_parsing_agree(parts: tuple[Part, ...]):
    text = format_placement(parts)
    assert format_placement(parse_placement(text)) == text
    spread = ",".join(map(str, parts))
    assert parse_placement(spread) == parts and format_placement(parse_placement(spread)) == text


@given(st.text("0123456789-,: al\n\x00x", max_size=24) | st.integers())
def test_no_text_ends_otherwise_than_as_a_configuration_error(text: str | int):
    try:
        placed({"env,rollout,actor": text})
    except ConfigError as err:
        assert err.field is not None and err.found is not None and err.expected is not None


# ---- what it resolves to -----------------------------------------------------------------------------------------
def test_nothing_said_is_one_process():
    for accelerators in (0, 8):
        placement = place(PlacementConfig(), accelerators)
        assert placement.one_process and placement.mode == "shared"
        (process,) = placement.components["actor"]
        assert process.local == ((0,) if accelerators else ())


def test_several_processes_a_resource_and_several_resources_a_process():
    assert everywhere("all") == [(at,) for at in range(8)]
    assert everywhere("0-1:0-3") == [(0,), (0,), (1,), (1,)]
    assert everywhere("0-3:0-1") == [(0, 1), (2, 3)]
    assert everywhere("all:0") == [tuple(range(8))]
    assert everywhere("4-5,0:2-3") == [(4,), (5,), (0,), (0,)]
    assert everywhere(3) == [(3,)]


def test_accelerators_are_counted_through_the_nodes():
    placement = placed({"env,rollout": "6-9", "actor": "0-5:0-2"}, cluster=TWO_BY_EIGHT)
    assert [(p.node, p.local) for p in placement.components["rollout"]] == [(0, (6,)), (0, (7,)), (1, (0,)), (1, (1,))]
    assert [(p.node, p.local) for p in placement.components["actor"]] == [(0, (0, 1)), (0, (2, 3)), (0, (4, 5))]
    assert placement.mode == "hybrid"


def test_groups_of_nodes():
    cluster = {"cpu": NodeGroup(2), "gpu": NodeGroup(1, 4), "more": NodeGroup(1, 2)}
    said = {
        "env": GroupPlacement("node", "2"),
        "rollout": GroupPlacement("gpu", "0-1"),
        "actor": GroupPlacement("more", "all"),
    }
    placement = placed(said, cluster=cluster)
    of = placement.components
    assert [(p.kind, p.node, p.resources, p.local) for p in of["env"]] == [("node", 2, (2,), ())]
    assert [(p.kind, p.node, p.resources, p.local) for p in of["rollout"]] == [
        ("accelerator", 2, (0,), (0,)),
        ("accelerator", 2, (1,), (1,)),
    ]
    assert [(p.node, p.resources, p.local) for p in of["actor"]] == [(3, (4,), (0,)), (3, (5,), (1,))]
    assert placement.mode == "separate"
    assert everywhere("all", cluster=cluster) == [(at,) for at in range(6)], "nodes without accelerators give none"
    nodes = placed({"env,rollout,actor": GroupPlacement("cpu", "all")}, cluster=cluster).components["env"]
    assert [(p.kind, p.node) for p in nodes] == [("node", 0), ("node", 1)]


@pytest.mark.parametrize(
    ("components", "mode"),
    [
        ({"actor,env,rollout": "all"}, "shared"),
        ({"actor": "0-3:0-1", "env,rollout": "0-3"}, "shared"),
        ({"actor": "0-3", "env": "4-5", "rollout": "6-7"}, "separate"),
        ({"actor": "0-3", "env,rollout": "4-7"}, "hybrid"),
        ({"actor,rollout": "all", "env": "0-3"}, "hybrid"),
    ],
)
def test_the_mode_falls_out(components: dict, mode: str):
    placement = placed(components)
    assert placement.mode == mode and not placement.one_process
    told = placement.describe()
    assert told[0].startswith(f"placement {mode}:") and [line.split(":")[0] for line in told[1:]] == [
        "env",
        "rollout",
        "actor",
    ]
    assert placed({"actor,env,rollout": "all"}, 1).one_process


@pytest.mark.parametrize(
    ("components", "field", "told"),
    [
        ({"actor,env,rollout": "0-8"}, "placement.components.actor,env,rollout", "no accelerator 8"),
        ({"actor,env,rollout": "0-2:0-1"}, "placement.components.actor,env,rollout", "do not divide"),
        ({"actor,env,rollout": "0-1:0-2"}, "placement.components.actor,env,rollout", "do not divide"),
        ({"actor,env,rollout": "0:1"}, "placement.components.actor,env,rollout", "placed nowhere"),
        ({"actor,env,rollout": "0:0,1:2"}, "placement.components.actor,env,rollout", "process 1 is placed nowhere"),
        ({"actor,env,rollout": "0:0-1,1:1"}, "placement.components.actor,env,rollout", "process 1 is placed twice"),
        ({"actor,env": "0"}, "placement.components", "no rollout"),
        ({"actor,env,rollout,reward": "0"}, "placement.components", "no component 'reward'"),
        ({"learner,env,rollout": "0"}, "placement.components", "called 'actor'"),
        ({"actor,env,rolout": "0"}, "placement.components", "mean 'rollout'"),
        ({"actor,env": "0", "env,rollout": "1"}, "placement.components", "'env' is placed twice"),
        ({"actor,actor,env,rollout": "0"}, "placement.components", "'actor' is placed twice"),
        ({"": "0"}, "placement.components", "no component ''"),
        (
            {"actor,env,rollout": GroupPlacement("gpus", "0")},
            "placement.components.actor,env,rollout.node_group",
            "such group",
        ),
    ],
)
def test_what_cannot_be(components: dict, field: str, told: str):
    with pytest.raises(ConfigError, match=told) as caught:
        placed(components, cluster={"gpu": NodeGroup(1, 8)})
    assert caught.value.field == field and caught.value.found is not None and caught.value.expected is not None


def test_a_process_stands_on_one_node():
    assert everywhere("all:0-3", cluster=TWO_BY_EIGHT)[1] == (4, 5, 6, 7)
    for text in ("all:0", "6-9:0", "4-15:0-1"):
        with pytest.raises(ConfigError, match="on two nodes"):
            everywhere(text, cluster=TWO_BY_EIGHT)


clusters = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.builds(NodeGroup, st.integers(1, 3), st.integers(0, 4)), min_size=1
)


@given(clusters, parts_, st.none() | st.sampled_from(["a", "b", "c", "node"]))
def test_what_stands_has_resources_on_one_node(cluster: dict, parts: tuple[Part, ...], group: str | None):
    text = format_placement(parts)
    said = text if group is None else GroupPlacement(group, text)
    try:
        placement = placed({"env,rollout,actor": said}, cluster=cluster)
    except ConfigError:
        return
    processes = placement.components["rollout"]
    assert [process.rank for process in processes] == list(range(len(processes)))
    node_of = [at for at, (_, accelerators) in enumerate(placement.cluster) for _ in range(accelerators)]
    for process in processes:
        assert process.resources and placement.mode == "shared"
        homes = {node_of[at] if process.kind == "accelerator" else at for at in process.resources}
        assert homes == {process.node}
        assert len(process.local) == (len(process.resources) if process.kind == "accelerator" else 0)
        assert all(at < placement.cluster[process.node][1] for at in process.local)
    for part in parts:
        if part.resources is not None and group is None:
            assert set(part.resources.numbers()) <= {at for process in processes for at in process.resources}


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_equal_shares(resources_: int, each: int, nodes: int):
    """Every resource gets equally many processes, or every process equally many resources."""
    cluster = {"gpu": NodeGroup(nodes, resources_)}
    count = nodes * resources_
    several = everywhere(f"all:0-{count * each - 1}", cluster=cluster)
    assert several == [(at,) for at in range(count) for _ in range(each)]
    if resources_ % each == 0:
        held = everywhere(f"all:0-{count // each - 1}", cluster=cluster)
        assert [at for one in held for at in one] == list(range(count)) and {len(one) for one in held} == {each}


# ---- as it stands in a recipe ------------------------------------------------------------------------------------
def test_from_yaml():
    text = """
cluster: {gpu: {nodes: 2, accelerators: 8}, cpu: {nodes: 4}}
components:
  env,rollout: 0-7:0-15
  actor: {node_group: gpu, placement: 8-15}
"""
    config = check(PlacementConfig, parse(text), "recipe.yaml")
    placement = place(config)
    assert len(placement.components["rollout"]) == 16 and placement.components["actor"][0].node == 1
    single = check(PlacementConfig, parse("components: {'env,rollout,actor': 0}"), "recipe.yaml")
    assert place(single, 1).one_process


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("components: {actor: 1:0}", "in quotes"),  # sexagesimal: 60
        ("components: {actor: {node_grop: gpu, placement: 0}}", "node_grop"),
        ("components: {actor: [0]}", "actor"),
        ("cluster: {node: {nodes: 1}}", "whole cluster"),
        ("cluster: {gpu: {nodes: 0}}", "at least 1"),
        ("backend: mpi", "backend"),
        ("silence: 0", "silence"),
    ],
)
def test_yaml_that_does_not_fit(text: str, told: str):
    with pytest.raises(ConfigError, match=told):
        place(check(PlacementConfig, parse(text), "recipe.yaml"), 8)
