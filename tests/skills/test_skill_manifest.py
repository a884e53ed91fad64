"""Manifests: what is read is written and read again, slots cover each number once, a kind has what it has to have."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prts_core.io.errors import ConfigError
from prts_core.io.plain_yaml import parse
from prts_core.skills.manifest import Manifest, check_manifest, ignored_keys, read_manifest, write_manifest
from prts_core.skills.manifest.contracts import SLOT_TARGETS
from prts_core.skills.manifest.document import LENIENT
from prts_core.skills.manifest.identity import EmbodimentTag, SuiteId, Verb
from prts_core.skills.manifest.interfaces import ControlMode, Modality
from prts_core.skills.manifest.kinds import BLOCKS, KINDS, KindName
from prts_core.skills.manifest.resources import Dtype
from prts_core.skills.manifest.weights import hub_parts
from prts_core.skills.notes import notes
from prts_core.skills.template import MANIFEST, write_template
from tests.skills.made_packages import manifest, raw_manifest

TEXT = st.text(st.characters(exclude_categories=["C"]), max_size=30)
WORD = st.text(string.ascii_letters + string.digits, min_size=1, max_size=8)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def some(literal: Any) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(get_args(literal)), min_size=1, max_size=4)


SOUND = st.fixed_dictionaries(
    {"description": TEXT.filter(bool)},
    optional={
        "actions": some(Verb),
        "objects": st.lists(TEXT, max_size=3),
        "embodiment_tags": some(EmbodimentTag).filter(lambda tags: "custom" not in tags),
        "capabilities_required": st.dictionaries(
            WORD, st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | TEXT, max_size=3
        ),
        "sensors_required": st.lists(
            st.fixed_dictionaries(
                {"modality": st.sampled_from(get_args(Modality))}, optional={"count": st.integers(1, 3)}
            ),
            max_size=2,
        ),
        "min_vram_gb": st.dictionaries(st.sampled_from(get_args(Dtype)), st.floats(0.001, 1000), max_size=3),
        "benchmarks": st.dictionaries(st.sampled_from(get_args(SuiteId)), st.floats(0, 1), max_size=2),
        "policy_extras": st.dictionaries(TEXT, PLAIN, max_size=3),
        "goal_params_schema": st.dictionaries(WORD, PLAIN, max_size=2),
        "image_preprocessing": st.just({}) | st.just({"flip_180": True, "aliases": {"a": "b"}}),
        "envelope": st.just({}) | st.just({"max_force_n": 3, "workspace_box_max_xyz": [1, 2, 3]}),
        "starting_pose": st.lists(st.floats(-3, 3), max_size=4),
        "n_action_steps": st.integers(1, 99),
        "latency_budget": st.fixed_dictionaries(
            {"per_chunk_ms": st.floats(0.01, 1e6)}, optional={"load_ms": st.just(5)}
        ),
    },
)


@given(change=SOUND)
def test_what_is_written_is_what_was_read(change: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    made = manifest(**change)
    path = write_manifest(made, tmp_path_factory.mktemp("written") / "rskill.yaml")
    assert read_manifest(path) == made
    assert path.read_bytes() == write_manifest(read_manifest(path), path).read_bytes()


@given(key=st.sampled_from([*sorted(raw_manifest()), "detector", "reward", "envelope", "x"]), value=PLAIN)
def test_whatever_a_field_holds_is_one_error_or_none(key: str, value: Any):
    try:
        check_manifest(raw_manifest() | {key: value}, "a test")
    except ConfigError as err:
        assert len(str(err)) < 4000


# ---- slots -----------------------------------------------------------------------------------------------------------
WIDTHS = st.lists(st.integers(1, 5), min_size=1, max_size=5)


def slots(widths: list[int]) -> list[dict[str, Any]]:
    ends = [sum(widths[: n + 1]) for n in range(len(widths))]
    return [
        {"range": [end - width, end - 1], "control_mode": "joint_position"}
        for end, width in zip(ends, widths, strict=True)
    ]


@given(widths=WIDTHS, order=st.randoms())
def test_slots_that_cut_the_vector_are_sound_in_any_order(widths: list[int], order: Any):
    cut = slots(widths)
    order.shuffle(cut)
    made = manifest(action_contract={"dim": sum(widths), "slots": cut})
    assert made.action_contract is not None and sum(slot.width for slot in made.action_contract.slots or ()) == sum(
        widths
    )


@given(widths=WIDTHS, at=st.integers(0, 4), by=st.sampled_from([-1, 1]), end=st.sampled_from([0, 1]))
def test_a_gap_or_an_overlap_anywhere_is_refused(widths: list[int], at: int, by: int, end: int):
    cut = slots(widths)
    cut[at % len(cut)]["range"][end] += by
    with pytest.raises(ConfigError):
        manifest(action_contract={"dim": sum(widths), "slots": cut})


def test_a_slot_that_reaches_far_costs_nothing():
    with pytest.raises(ConfigError, match="reach beyond dim"):
        manifest(action_contract={"dim": 3, "slots": [{"range": [0, 2**60], "control_mode": "joint_position"}]})
    with pytest.raises(ConfigError, match="no slot covers"):
        manifest(action_contract={"dim": 2**60, "slots": [{"range": [0, 2], "control_mode": "joint_position"}]})


@pytest.mark.parametrize("mode", get_args(ControlMode))
def test_a_slot_names_the_targets_of_its_mode(mode: str):
    needed, allowed = SLOT_TARGETS.get(mode, ((), ("ee", "frame", "joint_names")))
    values = {"ee": "hand", "frame": "base", "joint_names": ["joint0"]}
    given_ = {name: values[name] for name in needed}
    slot = {"range": [0, 0], "control_mode": mode}
    manifest(action_contract={"dim": 1, "slots": [slot | given_]})
    for name in values:
        changed = {k: v for k, v in given_.items() if k != name} if name in needed else given_ | {name: values[name]}
        if name in allowed:
            manifest(action_contract={"dim": 1, "slots": [slot | changed]})
        else:
            with pytest.raises(ConfigError, match=name):
                manifest(action_contract={"dim": 1, "slots": [slot | changed]})


# ---- kinds -----------------------------------------------------------------------------------------------------------
def test_every_kind_has_a_row_and_every_block_a_kind():
    assert tuple(KINDS) == get_args(KindName)
    fields = set(Manifest.__dataclass_fields__)
    assert all(
        {*kind.needs, *kind.forbids} <= fields and not {*kind.needs} & {*kind.forbids} for kind in KINDS.values()
    )
    assert all(any(block in kind.needs for kind in KINDS.values()) for block in BLOCKS)


def test_a_kind_is_told_all_that_it_lacks():
    with pytest.raises(
        ConfigError, match=r"kind detector needs detector; kind detector has no model_family.*no actuators"
    ):
        manifest(kind="detector")
    with pytest.raises(ConfigError, match="model_family pi05 needs processors"):
        manifest(model_family="pi05")


# ---- the template ----------------------------------------------------------------------------------------------------
def test_the_template_is_sound_until_its_words_are_replaced_and_says_what_to_do(tmp_path: Path):
    folder = write_template(tmp_path / "new")
    made = read_manifest(folder)
    assert made.is_template and not manifest().is_template and not ignored_keys(parse(MANIFEST))
    assert [*notes(made)] == ["weights_uri names no revision: which weights it means changes with the repository"]
    with pytest.raises(ConfigError, match="something at this place"):
        write_template(folder)


@pytest.mark.parametrize("field", ["name", "weights_uri", "source_repo"])
def test_a_word_that_is_left_anywhere_makes_it_a_template(field: str):
    assert manifest(**{field: {"name": "a/TEMPLATE_ID"}.get(field, "hf://TEMPLATE_ORG/x")}).is_template


# ---- what readers should look at -------------------------------------------------------------------------------------
def test_keys_that_the_schema_ignores_are_named():
    raw = raw_manifest(
        latency_budget={"per_chunk_ms": 1, "p99_ms": 2}, envelope={"max_speed": 1}, quantization={"scheme": 1}
    )
    made = check_manifest(raw, "a test")
    assert made.envelope is not None and made.envelope.max_force_n is None
    assert ignored_keys(raw) == ["latency_budget.p99_ms", "quantization.scheme", "envelope.max_speed"]
    assert set(LENIENT.values()) == {type(made.latency_budget), type(made.quantization), type(made.envelope)} | {
        LENIENT["state_contract", "bindings"]
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_action_steps": 17}, "n_action_steps 17 is more than a chunk holds"),
        ({"action_contract": {"dim": 8, "representation": "delta_ee_6d"}}, "says absolute joint_position"),
        ({"action_contract": {"dim": 8}, "starting_pose": [0.0]}, "starting_pose has 1 numbers, an action 8"),
        ({"evaluated_tasks": None}, "evaluated_tasks is empty"),
        ({"quantization": {"dtype": "int4"}}, "min_vram_gb does not say what int4 needs"),
        ({"weights_uri": "hf://a/b"}, "names no revision"),
        (
            {"action_contract": {"dim": 1, "slots": [{"range": [0, 0], "control_mode": "gripper_binary", "ee": "g"}]}},
            "slots command gripper_binary",
        ),
    ],
)
def test_notes(change: dict[str, Any], said: str):
    assert not [*notes(manifest())]
    found = [*notes(manifest(**change))]
    assert len(found) == 1 and said in found[0]


def test_the_parts_of_a_uri():
    assert hub_parts("hf://a/b") == ("a/b", None) and hub_parts("hf://a/b@c.1") == ("a/b", "c.1")
    assert hub_parts("local://a/b") is None and hub_parts("a/b") is None


def test_faults_in_lists_and_closed_words_have_a_suggestion():
    with pytest.raises(ConfigError, match=r"did you mean 'min_width'.*the fields of sensors_required.0"):
        manifest(sensors_required=[{"modality": "rgb", "min_widht": 3}])
    with pytest.raises(ConfigError, match="did you mean 'franka_panda'"):
        manifest(embodiment_tags=["franka_pandas"])
