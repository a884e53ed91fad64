"""Task descriptions rewritten, LIBERO-Plus's names read, and both benchmarks' suites as data, without a simulator."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import ConfigError, DataError, PrtsError
from prts_core.io.files import write_json
from prts_core.sim.installations import Installation
from prts_core.sim.suites.libero import spec as libero
from prts_core.sim.suites.libero.perturb import layout, pro
from prts_core.sim.suites.libero.perturb.bddl import Problem
from prts_core.sim.suites.libero_plus import install, names
from prts_core.sim.suites.libero_plus import spec as plus
from prts_core.sim.suites.libero_pro import spec as libero_pro

# A small scene of our own in LIBERO's form: bowl and mug lie free, the book stands on the cabinet.
SCENE = """
(define (problem LIBERO_Tabletop_Manipulation) (:domain robosuite)
  (:language Put the bowl on the plate) ; a comment
  (:regions (left_region (:target main_table) (:ranges ((0 0 0.1 0.1))))
            (right_region (:target main_table) (:ranges ((0.2 0 0.3 0.1))))
            (plate_region (:target main_table) (:ranges ((0.2 0.2 0.3 0.3)))) (top_side (:target cabinet_1)))
  (:fixtures main_table - table cabinet_1 - wooden_cabinet)
  (:objects bowl_1 bowl_2 - akita_black_bowl mug_1 - porcelain_mug plate_1 - plate book_1 - black_book)
  (:obj_of_interest bowl_1 plate_1)
  (:init (On bowl_1 main_table_left_region) (On mug_1 main_table_right_region) (On plate_1 main_table_plate_region)
         (On book_1 cabinet_1_top_side))
  (:goal (And (On bowl_1 plate_1))))
"""
WORDS = ["(", ")", "(", ")", "a_b", "-", "on", "and", ":objects", ":fixtures", ":init", ":goal"]
BOWL = "pick_up_the_black_bowl_between_the_plate_and_the_ramekin_and_place_it_on_the_plate"


def test_a_description_is_read_changed_and_written():
    problem = Problem(SCENE)
    assert problem.objects == {
        "bowl_1": "akita_black_bowl",
        "bowl_2": "akita_black_bowl",
        "mug_1": "porcelain_mug",
        "plate_1": "plate",
        "book_1": "black_book",
    }
    assert problem.workspace() == "main_table" and problem.goal == [["on", "bowl_1", "plate_1"]]
    assert list(problem.lying()) == ["bowl_1", "mug_1", "plate_1"]
    assert Problem(problem.text()).tree == problem.tree


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        ")",
        "(define",
        "define",
        "(a) (b)",
        "(define))",
        "((",
        "(define (:objects a - (b)))",
        "(" * 100 + ")" * 100,
    ],
)
def test_a_damaged_description_is_refused(text: str):
    with pytest.raises(DataError):
        Problem(text).objects  # noqa: B018 - read by asking


@given(st.lists(st.sampled_from(WORDS), max_size=25))
@settings(max_examples=60, deadline=None)
def test_any_text_is_a_description_or_a_data_error(words: list[str]):
    with contextlib.suppress(DataError):
        problem = Problem("(define (:goal) (:init) " + " ".join(words) + ")")
        assert problem.tree[0] == "define"
        assert problem.lying() is not None and problem.goal is not None


def test_position_swaps_two_regions_and_nothing_else():
    problem = Problem(SCENE)
    made = pro.settings_of("position", problem, {}, 0)
    assert made["pair"][0] == "bowl_1" and made["pair"][1] in ("mug_1", "plate_1"), "not its twin"
    changed = Problem(SCENE)
    assert pro.rewrite(changed, "position", made) == made["pair"]
    first, second = made["pair"]
    assert changed.lying()[first] == problem.lying()[second] and changed.lying()[second] == problem.lying()[first]
    assert (changed.goal, changed.objects) == (problem.goal, problem.objects)
    with pytest.raises(ConfigError, match="lies free"):
        pro.rewrite(Problem(SCENE), "position", {"pair": ["bowl_1", "book_1"]})


def test_task_takes_another_goal_of_the_same_scene_or_another_object():
    problem = Problem(SCENE)
    sibling = Problem(SCENE.replace("(On bowl_1 plate_1)", "(On mug_1 cabinet_1_top_side)"))
    made = pro.settings_of("task", problem, {"put the mug on the cabinet": sibling}, 0)
    assert made == {"seed": 0, "goal": sibling.goal, "instruction": "put the mug on the cabinet"}
    alone = pro.settings_of("task", problem, {"the same": problem}, 0)
    ((predicate, target, place),) = alone["goal"]
    assert (predicate, place) == ("on", "plate_1") and target in ("mug_1", "book_1")
    assert alone["instruction"].startswith("pick up the ") and alone["instruction"].endswith(" on the plate")
    changed = Problem(SCENE)
    assert pro.rewrite(changed, "task", alone) == [] and changed.goal == alone["goal"]
    assert changed.init == problem.init
    with pytest.raises(ConfigError, match="no such thing"):
        pro.rewrite(Problem(SCENE), "task", {"goal": [["on", "moon_1", "plate_1"]]})


@pytest.mark.parametrize("arena", sorted(pro.ARENAS))
def test_environment_renames_the_workspace_everywhere(arena: str):
    changed = Problem(SCENE)
    pro.rewrite(changed, "environment", {"arena": arena})
    name, top, category, _ = pro.ARENAS[arena]
    assert changed.section("problem")[-1] == name and changed.workspace() == top
    assert changed.fixtures == {top: category, "cabinet_1": "wooden_cabinet"}
    assert set(changed.lying()) == {"bowl_1", "mug_1", "plate_1"} and changed.goal == Problem(SCENE).goal
    assert arena == "tabletop" or "main_table" not in changed.text()


def test_layout_adds_one_object_a_level_that_was_not_there():
    for level in range(1, 6):
        changed = Problem(SCENE)
        added = layout.rewrite(changed, {"kind": "add", "level": level}, "t")
        assert len(added) == level and list(changed.objects)[-level:] == added
        assert not {changed.objects[name] for name in added} & set(Problem(SCENE).objects.values())
        assert set(added) <= set(changed.lying())
    assert layout.rewrite(Problem(SCENE), {"kind": "move", "level": 2}, "t") == []
    assert layout.moved(Problem(SCENE)) == "bowl_1"


@pytest.mark.parametrize(
    "suffix, perturbation, missing",
    [
        ("", {}, ()),
        ("_view_0_0_100_0_0_initstate_0", {}, ()),
        ("_view_43_0_100_0_0_initstate_0", {"camera": {"view": [43, 0, 100, 0, 0]}}, ()),
        ("_view_0_0_100_2_352_initstate_0.bddl", {"camera": {"view": [0, 0, 100, 2, 352]}}, ()),
        ("_view_0_0_100_0_0_initstate_323", {"robot": {"index": 323, "applied": "posture"}}, ()),
        ("_view_0_0_100_0_0_initstate_0_noise_38", {"noise": {"index": 38}}, ()),
        ("_light_5", {}, ("light",)),
        ("_table_17", {}, ("background",)),
        ("_tb_3", {}, ("background",)),
        ("_add_20", {}, ("layout",)),
        ("_level1_sample3", {}, ("layout",)),
        ("_language_5_view_0_0_100_0_0_initstate_0", {}, ("language",)),
    ],
)
def test_names_are_read_back(suffix: str, perturbation: dict, missing: tuple):
    named = names.parse(BOWL + suffix)
    assert (named.base, named.perturbation, named.missing) == (BOWL, perturbation, missing)


def test_names_beyond_the_benchmark_are_refused():
    for suffix in (
        "_view_0_0_100_0_0_initstate_501",
        "_view_0_0_100_0_0_initstate_0_noise_51",
        "_view_0_0_0_0_0_initstate_0",
    ):
        with pytest.raises(ConfigError):
            names.parse(BOWL + suffix)


def test_lists_are_read_in_both_forms(tmp_path: Path):
    wanted = [f"{BOWL}_view_0_0_100_2_352_initstate_0", f"{BOWL}_light_5"]
    text = tmp_path / "list.txt"
    text.write_text("# ours\n" + "\n".join(wanted) + "\n\n" + wanted[0] + "\n")
    classified = tmp_path / "task_classification.json"
    entries = [{"id": i, "name": name, "category": "?", "difficulty_level": None} for i, name in enumerate(wanted)]
    write_json(classified, {"libero_spatial": entries})
    for path in (text, classified):
        assert [task.name for task in names.read(path, {BOWL})] == wanted
    with pytest.raises(DataError, match="over no task"):
        names.read(text, {"another"})


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"{", b'{"a": 3}', b'[{"nom": 1}]', b"[" * 5000])
def test_a_damaged_list_is_told(tmp_path: Path, content: bytes):
    path = tmp_path / "list"
    path.write_bytes(content)
    with pytest.raises(DataError, match="list"):
        names.read(path, {BOWL})


def bases(tmp_path: Path) -> dict:
    """LIBERO's suites of one task each, from a list as the installed simulator has it."""
    folders = dict(zip((BOWL, "take_the_milk", "turn_on_the_stove", "put_both"), plus.BASES, strict=True))
    tasks = {
        name: {"folder": folder, "instruction": name.replace("_", " "), "initial_states": 50, "digest": "d"}
        for name, folder in folders.items()
    }
    write_json(tmp_path / "tasks.json", {"order": list(tasks), "tasks": tasks})
    for name, folder in folders.items():
        (tmp_path / "bddl" / folder).mkdir(parents=True)
        (tmp_path / "bddl" / folder / f"{name}.bddl").write_text(SCENE)
    return libero.suites_of(tmp_path / "tasks.json", "stand-in assets")


def test_plus_has_every_kind_at_every_level(tmp_path: Path):
    suites = plus.suites_of(bases(tmp_path), tmp_path / "none.json")
    assert tuple(suites) == plus.SUITES
    for axis, kinds in plus.KINDS.items():
        spec = suites[f"libero_plus_{axis}"]
        assert len(spec.tasks) == 4 * 5 * len(kinds) == len({task.name for task in spec.tasks})
        assert all(set(task.perturbation) == {"base", axis} for task in spec.tasks)
        assert spec.standins == "stand-in assets" and "ours" in spec.source and spec.episodes_per_task == 1
        spoken = {task.instruction for task in spec.tasks}
        assert len(spoken) == 4 if axis != "language" else len(spoken) > 40
    assert len(suites["libero_plus"].tasks) == sum(len(suites[f"libero_plus_{axis}"].tasks) for axis in plus.KINDS)


def test_a_users_list_is_a_suite(tmp_path: Path):
    listed = [names.parse(f"{BOWL}_view_0_0_100_0_0_initstate_7")]
    tasks = [{"name": t.name, "base": t.base, "perturbation": t.perturbation} for t in listed]
    write_json(tmp_path / "list.json", {"tasks": tasks})
    suites = plus.suites_of(bases(tmp_path), tmp_path / "list.json")
    (task,) = suites[plus.LIST].tasks
    assert task.instruction == BOWL.replace("_", " "), "without the numbers of the file name"
    assert task.perturbation == {"base": BOWL, "robot": {"index": 7, "applied": "posture"}}
    write_json(tmp_path / "list.json", {"tasks": [{"name": "x"}]})
    with pytest.raises(PrtsError, match="damaged"):
        plus.suites_of(bases(tmp_path / "again"), tmp_path / "list.json")


def test_a_list_is_installed_with_what_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Over a LIBERO that is installed already; a second installation without a list keeps the first one's."""
    bases(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    libero_home, home = Installation("libero"), Installation("libero_plus")
    (libero_home.path / "venv" / "bin").mkdir(parents=True)
    (libero_home.path / "tasks.json").write_text((tmp_path / "tasks.json").read_text())
    write_json(libero_home.record, {"standins": "stand-in assets"})
    listed = tmp_path / "list.txt"
    listed.write_text(f"{BOWL}_light_5\n{BOWL}_view_0_0_100_0_0_initstate_0_noise_50\n{BOWL}_add_3\n")
    made = install.install(home, str(listed))
    assert made["list"]["tasks"] == 1 and made["list"]["left_out"] == {"light": 1, "layout": 1}
    assert install.install(home)["list"] == made["list"] and made["standins"] == "stand-in assets"
    assert home.python.parent.resolve() == libero_home.python.parent.resolve()
    (task,) = plus.suites()[plus.LIST].tasks
    assert task.perturbation == {"base": BOWL, "noise": {"index": 50}}
    listed.write_text(f"{BOWL}_light_5\n")
    with pytest.raises(ConfigError, match="1 need its scene files"):
        install.install(home, str(listed))


def test_pro_has_the_forty_tasks_an_axis(tmp_path: Path):
    suites = libero_pro.suites_of(bases(tmp_path), tmp_path / "bddl")
    assert tuple(suites) == libero_pro.SUITES
    for name, spec in suites.items():
        axis = name.removeprefix("libero_pro_")
        assert len(spec.tasks) == 4 and spec.episodes_per_task == 50 and "ours" in spec.source
        assert all(set(task.perturbation) == {"base", axis} for task in spec.tasks)
        said = [task.instruction == task.perturbation["base"].replace("_", " ") for task in spec.tasks]
        assert not any(said) if axis in ("task", "semantic") else all(said)


def test_a_task_is_carried_from_arena_to_arena():
    assert pro.carried(Problem(SCENE), "kitchen").tolist() == [0.0, 0.0, 0.0]
    assert pro.carried(Problem(SCENE), "study").tolist() == pytest.approx([-0.2, 0.0, -0.033])
    with pytest.raises(ConfigError, match="arena"):
        pro.carried(Problem(SCENE.replace("Tabletop", "Moon")), "study")
