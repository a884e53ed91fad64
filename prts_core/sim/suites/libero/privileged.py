"""What LIBERO's scripted expert may see of the simulator: poses, joint values, the goal, and every shape as a box.

It reads an environment of the `libero` package and changes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Privileged:
    """Bound to one built environment (`env`: libero's ControlEnv or the problem inside it) until its model is rebuilt.

    Calling it gives, in world coordinates, metres and radians: hand (3,), hand_mat (3, 3): the grip site between the
    finger tips; base (3,): the robot's; fingers (2, 3): the tips; objects {name: (position (3,), rotation (3, 3))} of
    things and fixtures; sites {name: (position, rotation, half size (3,))} of the regions that goals speak of; joints
    {name: value} of the fixtures; links {joint: {slides, axis (3,), anchor (3,), value, boxes: rows of what it moves}};
    joints_of {fixture or region: its joints}; ranges {fixture: {open, close, turnon: (low, high) of a joint's value}};
    box_owner (N,) index into `owners` (-1: something else), box_center (N, 3), box_mat
    (N, 3, 3), box_half (N, 3): a box around every colliding shape but the robot's; goal: [[predicate, argument, ...]].
    """

    def __init__(self, env: Any) -> None:
        inner = getattr(env, "env", env)
        self._inner, self._sim = inner, inner.sim
        self._model = getattr(inner.sim.model, "_model", inner.sim.model)
        model = self._model
        named = {**inner.objects_dict, **inner.fixtures_dict}
        self.bodies = {name: inner.obj_body_id[name] for name in named if name in inner.obj_body_id}
        self.owners = list(self.bodies)
        owner_of_root = {int(body): index for index, body in enumerate(self.bodies.values())}
        owner = [_owner(model, int(body), owner_of_root) for body in model.geom_bodyid]
        robot = _robot_bodies(model)
        solid = [g for g in range(model.ngeom) if _solid(model, g) and int(model.geom_bodyid[g]) not in robot]
        keep = [g for g in solid if model.geom_type[g] in _BOXED]
        self._geoms = np.array(keep, dtype=int)
        self._owner = np.array([owner[g] for g in keep], dtype=int)
        self._offset, self._half = model.geom_aabb[keep, :3].copy(), model.geom_aabb[keep, 3:].copy()
        self._site_sizes = {name: np.asarray(site.size, float) for name, site in inner.object_sites_dict.items()}
        self._sites = {name: _id(model, "site", name) for name in self._site_sizes}
        self._joints = {
            joint: int(model.jnt_qposadr[_id(model, "joint", joint)])
            for fixture in inner.fixtures_dict.values()
            for joint in getattr(fixture, "joints", None) or []
        }
        self._links = {joint: self._link(model, joint) for joint in self._joints}
        movable = {**inner.fixtures_dict, **inner.object_sites_dict}
        self._joints_of = {name: list(getattr(each, "joints", None) or []) for name, each in movable.items()}
        self._ranges = {name: _ranges(fixture) for name, fixture in inner.fixtures_dict.items()}
        robot_model = inner.robots[0]
        self._grip = int(robot_model.eef_site_id)
        self._base = _id(model, "body", "robot0_link0")
        self._fingers = [_id(model, "geom", f"gripper0_finger{side}_pad_collision") for side in (1, 2)]
        self._goal = [list(part) for part in inner.parsed_problem["goal_state"]]

    def __call__(self) -> dict[str, Any]:
        data = getattr(self._sim.data, "_data", self._sim.data)
        mats = data.geom_xmat[self._geoms].reshape(-1, 3, 3)
        return {
            "hand": data.site_xpos[self._grip].copy(),
            "hand_mat": data.site_xmat[self._grip].reshape(3, 3).copy(),
            "base": data.xpos[self._base].copy(),
            "fingers": data.geom_xpos[self._fingers].copy(),
            "objects": {
                name: (data.xpos[body].copy(), data.xmat[body].reshape(3, 3).copy())
                for name, body in self.bodies.items()
            },
            "sites": {
                name: (data.site_xpos[site].copy(), data.site_xmat[site].reshape(3, 3).copy(), self._site_sizes[name])
                for name, site in self._sites.items()
                if site >= 0
            },
            "joints": {name: float(data.qpos[address]) for name, address in self._joints.items()},
            "owners": self.owners,
            "links": {
                name: {
                    "slides": slides,
                    "axis": data.xaxis[joint].copy(),
                    "anchor": data.xanchor[joint].copy(),
                    "value": float(data.qpos[self._joints[name]]),
                    "boxes": boxes,
                }
                for name, (joint, slides, boxes) in self._links.items()
            },
            "joints_of": self._joints_of,
            "ranges": self._ranges,
            "box_owner": self._owner,
            "box_center": data.geom_xpos[self._geoms] + np.einsum("nij,nj->ni", mats, self._offset),
            "box_mat": mats.copy(),
            "box_half": self._half,
            "goal": self._goal,
        }

    def _link(self, model: Any, name: str) -> tuple[int, bool, np.ndarray]:
        """(joint, whether it slides, rows of the boxes that move with it)."""
        joint = _id(model, "joint", name)
        body = int(model.jnt_bodyid[joint])
        moved = [_owner(model, int(model.geom_bodyid[geom]), {body: 0}) == 0 for geom in self._geoms]
        return joint, int(model.jnt_type[joint]) == _SLIDE, np.flatnonzero(moved)


def _ranges(fixture: Any) -> dict[str, tuple[float, float]]:
    """What LIBERO says of a fixture's joints: {"open": (low, high), ...}."""
    said = getattr(fixture, "object_properties", {}).get("articulation", {})
    known = {name: said.get(f"default_{name}_ranges") for name in ("open", "close", "turnon", "turnoff")}
    return {name: (float(min(pair)), float(max(pair))) for name, pair in known.items() if pair}


_SLIDE = 2  # mjtJoint
_BOXED = (2, 3, 4, 5, 6, 7)  # mjtGeom: sphere, capsule, ellipsoid, cylinder, box, mesh; not planes and height fields
_KINDS = {"body": 1, "joint": 3, "geom": 5, "site": 6}  # mjtObj


def _solid(model: Any, geom: int) -> bool:
    return bool(model.geom_contype[geom] or model.geom_conaffinity[geom])


def _id(model: Any, kind: str, name: str) -> int:
    import mujoco

    return int(mujoco.mj_name2id(model, _KINDS[kind], name))


def _owner(model: Any, body: int, roots: dict[int, int]) -> int:
    while body:
        if body in roots:
            return roots[body]
        body = int(model.body_parentid[body])
    return -1


def _robot_bodies(model: Any) -> set[int]:
    import mujoco

    names = {body: mujoco.mj_id2name(model, 1, body) or "" for body in range(model.nbody)}
    return {body for body, name in names.items() if name.startswith(("robot", "gripper", "mount"))}
