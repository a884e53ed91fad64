"""Perturbations of LIBERO as data: what each axis says, draws and refuses, without a simulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prts_core.io.errors import ConfigError
from prts_core.sim.suite import Task
from prts_core.sim.suites.libero import perturb
from prts_core.sim.suites.libero.perturb import camera, language, light, noise, robot
from prts_core.sim.suites.libero.perturb.camera import CameraPose
from prts_core.sim.suites.libero.perturb.draws import LEVELS, draw

MILK = "pick_up_the_milk_and_place_it_in_the_basket"
SAID = "pick up the milk and place it in the basket"
# LIBERO's scene camera over a table: position (m) and quaternion w x y z.
TABLE_CAMERA = (
    np.array([0.6586131746834771, 0.0, 1.6103500240372423]),
    np.array([0.6380177736282349, 0.3048497438430786, 0.30484986305236816, 0.6380177736282349]),
)


def change(**perturbation: object) -> perturb.Change:
    said = perturb.instruction(SAID, perturbation, MILK)
    return perturb.Change(Task("any", said, 50, 280, {"base": MILK, **perturbation}))


@pytest.mark.parametrize(
    "perturbation, match",
    [
        ({"camra": {"level": 1}}, "no such perturbation"),
        ({"camera": {"level": 0}}, "1 to 5"),
        ({"camera": {"level": 6}}, "1 to 5"),
        ({"camera": {"level": True}}, "1 to 5"),
        ({"camera": {"level": 2.0}}, "1 to 5"),
        ({"camera": {}}, "1 to 5"),
        ({"camera": {"level": 1, "kind": "roll"}}, "position, distance, orientation"),
        ({"camera": {"level": 1, "seed": -1}}, "seed"),
        ({"camera": {"level": 1, "angle": 3}}, "angle"),
        ({"camera": {"view": [0, 0, 0, 0, 0]}}, "scale 1 to 1000"),
        ({"camera": {"view": [0, 0, 100, 0]}}, "scale 1 to 1000"),
        ({"camera": {"view": [0, 0, 100, 0, 0], "level": 1}}, "no such setting"),
        ({"camera": 3}, "no mapping"),
        ({"robot": {"index": 501}}, "1 to 500"),
        ({"robot": {"index": 1, "applied": "both"}}, "joints or posture"),
        ({"noise": {"index": 51}}, "1 to 50"),
        ({"noise": {"kind": "snow", "level": 1}}, "motion, gaussian"),
        ({"layout": {"kind": "swap", "level": 1}}, "add, move"),
        ({"position": {"pair": ["a", "a"]}}, "two names"),
        ({"position": {}}, "two names"),
        ({"task": {"goal": [["in"]]}}, "clauses"),
        ({"task": {"goal": [["in", "a", "b"]]}, "camera": {"level": 1}}, "combines with nothing"),
        ({"environment": {"arena": "moon"}}, "kitchen"),
        ({"language": {"level": 1}, "semantic": {"level": 1}}, "once"),
    ],
)
def test_a_perturbation_that_cannot_be_is_refused(perturbation: dict, match: str):
    with pytest.raises(ConfigError, match=match):
        change(**perturbation)


def test_an_instruction_axis_needs_its_instruction():
    """Laid over a task at run time, the sentence would still be the old one."""
    laid = replace(Task(MILK, SAID, 50, 280), perturbation={"language": {"level": 4}})
    with pytest.raises(ConfigError, match="without the new instruction"):
        perturb.Change(laid).expect(SAID)
    change(language={"level": 4}).expect(SAID)
    change(camera={"level": 4}).expect(SAID)
    perturb.Change(Task(MILK, SAID, 50, 280)).expect(SAID)


def test_views_step_through_the_published_ranges():
    for level in LEVELS:
        for seed in range(20):
            made = {kind: camera.view_of({"kind": kind, "level": level, "seed": seed}, MILK) for kind in camera.KINDS}
            position, turned = made["position"], made["orientation"]
            assert np.hypot(position.horizontal, position.vertical) == pytest.approx(15 * level, abs=1)
            assert camera.ELEVATION[0] <= position.vertical <= camera.ELEVATION[1]
            assert np.hypot(turned.turn, turned.tilt) == pytest.approx(2 * level, abs=1)
            assert made["distance"] == CameraPose(scale=100 + 20 * level)
            assert made == {k: camera.view_of({"kind": k, "level": level, "seed": seed}, MILK) for k in camera.KINDS}
    seeds = {camera.view_of({"level": 3, "seed": seed}, MILK) for seed in range(8)}
    assert len(seeds) > 4, "a seed says which direction"


def test_a_view_is_what_its_numbers_say():
    position, facing = TABLE_CAMERA
    same = camera.pose(position, facing, CameraPose())
    np.testing.assert_array_equal(same[0], position)
    np.testing.assert_allclose(same[1], facing, atol=1e-6)
    away, _ = camera.pose(position, facing, CameraPose(scale=200))
    np.testing.assert_allclose(away - camera.PIVOT, 2 * (position - camera.PIVOT), atol=1e-4)
    beside, _ = camera.pose(position, facing, CameraPose(horizontal=90))
    np.testing.assert_allclose(beside, [0.0, position[0], position[2]], atol=1e-4)
    above, _ = camera.pose(position, facing, CameraPose(vertical=20))
    assert above[2] > position[2] and above[0] < position[0]
    for view in (CameraPose(horizontal=75), CameraPose(vertical=30), CameraPose(30, 20, 150)):
        place, look = camera.pose(position, facing, view)
        assert seen_from(place, look) == pytest.approx(seen_from(position, facing), abs=2e-3)
    place, look = camera.pose(position, facing, CameraPose(turn=10, tilt=352))
    np.testing.assert_array_equal(place, position)
    assert np.degrees(2 * np.arccos(min(1.0, abs(float(look @ facing))))) == pytest.approx(np.hypot(10, 8), abs=1.0)


def seen_from(place: np.ndarray, quaternion: np.ndarray) -> float:
    """Cosine between where the camera looks (its -z) and the pivot."""
    w, x, y, z = quaternion
    ahead = -np.array([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])
    towards = camera.PIVOT - place
    return float(ahead @ towards / np.linalg.norm(towards))


def test_robot_starts_are_those_of_the_public_table():
    """Two rows of it, and its radii."""
    first = [0.02097405, -0.16687568, 0.02734903, -2.38028663, -0.00988726, 2.21686563, 0.85208136]
    np.testing.assert_allclose(robot.joints(1), first, atol=1e-7)
    twentieth = [0.01877035, -0.19747782, 0.06143005, -2.47564091, -0.01276458, 2.25899512, 0.73661412]
    np.testing.assert_allclose(robot.joints(20), twentieth, atol=1e-7)
    for level in LEVELS:
        start = robot.start_of({"level": level}, MILK)
        assert np.linalg.norm(start.joints - robot.REST) == pytest.approx(0.1 * level) and start.moved
    assert not robot.start_of({"index": 500, "applied": "posture"}, MILK).moved


def test_noise_numbers_are_families_of_ten():
    assert [noise.filter_of({"index": k}) for k in (1, 10, 11, 26, 40, 50)] == [
        ("motion", 1),
        ("motion", 10),
        ("gaussian", 1),
        ("zoom", 6),
        ("fog", 10),
        ("glass", 10),
    ]
    assert noise.filter_of({"kind": "fog", "level": 3}) == ("fog", 6)


def picture() -> np.ndarray:
    """(64, 64, 3) with edges, gradients and both extremes."""
    rows, columns = np.mgrid[:64, :64]
    out = np.stack([rows * 2, columns * 2, 255 * ((rows // 12 + columns // 12) % 2)], axis=-1)
    return out.astype(np.uint8)


@pytest.mark.parametrize("family", noise.KINDS)
def test_a_filter_is_stronger_at_higher_severity(family: str):
    clean = picture()
    off = []
    for severity in range(1, 11):
        seen = noise.filtered(clean, family, severity, draw(severity))
        assert seen.shape == clean.shape and seen.dtype == np.uint8
        np.testing.assert_array_equal(seen, noise.filtered(clean, family, severity, draw(severity)))
        off.append(np.abs(seen.astype(int) - clean).mean())
    assert off[0] > 0.5 and off[9] > 1.3 * off[0]
    assert np.median(np.diff(off)) >= 0
    flat = np.full((64, 48, 3), 90, np.uint8)
    if family != "fog":
        np.testing.assert_array_equal(noise.filtered(flat, family, 7, draw(0)), flat)


@given(st.integers(2, 40), st.integers(2, 40), st.sampled_from(noise.KINDS), st.integers(1, 10), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_filters_take_any_picture(height: int, width: int, family: str, severity: int, seed: int):
    seen = noise.filtered(draw(seed).integers(0, 256, (height, width, 3), np.uint8), family, severity, draw(seed))
    assert seen.shape == (height, width, 3)


def test_noise_is_on_the_scene_camera_and_drawn_for_every_picture():
    seen = {noise.CAMERA_KEY: picture(), "observation.images.wrist_image": picture()}
    fog = change(noise={"kind": "fog", "level": 2})
    first, later, again = fog.pictures(seen, 3), fog.pictures(seen, 4), fog.pictures(seen, 3)
    assert first["observation.images.wrist_image"] is seen["observation.images.wrist_image"]
    np.testing.assert_array_equal(first[noise.CAMERA_KEY], again[noise.CAMERA_KEY])
    assert (first[noise.CAMERA_KEY] != later[noise.CAMERA_KEY]).any()
    assert change(camera={"level": 1}).pictures(seen, 3) is seen


def test_rewritten_sentences_say_the_same_in_other_words():
    for kind in language.KINDS:
        made = [language.rewritten(SAID, {"kind": kind, "level": level}, MILK) for level in LEVELS]
        assert len(set(made)) == 5 and SAID not in made
        assert SAID in made[0], "level 1 only asks nicely"
        if kind == "commonsense":
            assert "milk" not in made[4] and "basket" not in made[4]
        else:
            assert all("milk" in one and "basket" in one for one in made)
            assert len(made[4]) > len(made[2]) > len(made[1])
        assert not any(digit in " ".join(made) for digit in "0123456789")


class Lamps:
    """The arrays of a MjModel that a lamp is made of."""

    def __init__(self) -> None:
        self.nlight = 2
        self.light_diffuse = np.full((2, 3), 0.8, np.float32)
        self.light_specular = np.full((2, 3), 0.3, np.float32)
        self.light_dir = np.tile([0.0, -0.15, -0.99], (2, 1))
        self.light_pos = np.array([[1.0, 1.0, 4.0], [-3.0, -3.0, 4.0]])
        self.light_castshadow = np.zeros(2, np.uint8)
        self.mat_specular, self.mat_shininess = np.full(4, 0.2), np.full(4, 0.1)


def test_light_changes_what_its_kind_says():
    changes = {"diffuse": {"light_diffuse"}, "direction": {"light_dir", "light_pos"}}
    changes["specular"] = {"light_specular", "mat_specular", "mat_shininess"}
    changes["shadow"] = {"light_dir", "light_pos", "light_castshadow"}
    for kind, wanted in changes.items():
        before, made = Lamps(), Lamps()
        light.begin(made, {"kind": kind, "level": 3}, MILK)
        assert {key for key, value in vars(made).items() if np.any(value != getattr(before, key))} == wanted
    np.testing.assert_allclose(np.linalg.norm(made.light_dir, axis=1), 1.0)
