"""The house rules that no single room can hold: floors, file sizes, GPU-path imports, frozen surfaces.

Snapshots lie in tests/snapshots/; `PRTS_UPDATE_SNAPSHOTS=1 pytest tests/test_structure.py` writes them anew.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOTS = Path(__file__).parent / "snapshots"
FLOORS = ("kernels", "prts_core", "assets", "pipelines")  # each may import those before it
# The rooms of prts_core from the ground up: each may import those before it, at any depth of its code.
ROOMS = (
    "io",
    "contract",
    "robot",
    "statistics",
    "config",
    "models",
    "text",
    "data",
    "store",
    "policy",
    "release",
    "training",
    "sim",
    "rollout",
    "rl",
    "value",
    "skills",
    "tracking",
    "delivery",
    "serving",
    "launch",
    "stages",
    "bench",
    "cli",
)
PACKAGES = {"kernels": "prts_kernels", "prts_core": "prts_core", "assets": "assets", "pipelines": "pipelines"}
GPU_PATH = ("kernels/prts_kernels", "prts_core/models", "prts_core/training")
NOT_ON_THE_GPU_PATH = (
    "datasets.py",
    "episodes.py",
    "initial_weights.py",
)  # of training: they read data and checkpoints
GPU_PATH_MAY_IMPORT = {"torch", "numpy", "safetensors", "transformers", "triton", "prts_core", "prts_kernels"}
ABSENT_ON_A_GPU_MACHINE = (
    "pydantic",
    "av",
    "websockets",
    "deepspeed",
    "mlflow",
    "dagster",
    "dvc",
    "polars",
    "pandera",
    "pandas",
    "h5py",
    "mujoco",
    "metaworld",
    "gymnasium",
    "matplotlib",
    "msgpack",
    "zmq",
    "accelerate",
    "peft",
    "assets",
    "pipelines",
)


def sources(*rooms: str) -> list[Path]:
    return sorted(
        path for room in rooms or FLOORS for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts
    )


def gpu_path() -> list[Path]:
    settings = [ROOT / "prts_core/config" / name for name in ("model.py", "train.py")]
    return settings + [path for path in sources(*GPU_PATH) if path.name not in NOT_ON_THE_GPU_PATH]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; `top_level_only` leaves out those inside functions and TYPE_CHECKING blocks."""
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            yield ".".join([*package, *([node.module] if node.module else [])])
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not (top_level_only and (lazy or typing_only)):
            stack.extend(ast.iter_child_nodes(node))


def tracked_texts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this copy is no git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [p for p in paths if p.is_file() and p.suffix not in (".png", ".jpg", ".mp4", ".parquet", ".npz", ".hdf5")]


@pytest.mark.parametrize("room", FLOORS)
def test_nothing_imports_upward(room: str):
    above = {PACKAGES[other] for other in FLOORS[FLOORS.index(room) + 1 :]}
    if room in ("kernels", "prts_core"):
        above |= {"dagster"}
    wrong = [
        f"{name_of(p)} imports {name}" for p in sources(room) for name in imports(p) if name.split(".")[0] in above
    ]
    assert not wrong, "\n".join(wrong)


def test_no_room_of_the_library_imports_one_above_it():
    there = {
        path.stem for path in (ROOT / "prts_core").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert there == {*ROOMS, "__init__"}
    wrong = []
    for path in sources("prts_core"):
        own = path.relative_to(ROOT / "prts_core").parts[0].removesuffix(".py")
        for name in imports(path):
            room = name.split(".")[1] if name.startswith("prts_core.") else None
            if room in ROOMS and own in ROOMS and ROOMS.index(room) > ROOMS.index(own):
                wrong.append(f"{name_of(path)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_only_the_files_of_the_light_client_import_each_other_relatively():
    """prts-client is these files under another name (prts_core/robot/pyproject.toml): they need no others of ours."""
    folder = ROOT / "prts_core" / "robot"
    wheel = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    light = {(folder / name).resolve() for name in wheel["force-include"] if name.endswith(".py")}
    assert set(folder.glob("*.py")) <= light
    for name, inside in wheel["force-include"].items():
        if name.endswith(".py"):
            assert (folder / name).resolve().relative_to(ROOT / "prts_core").as_posix() == inside.partition("/")[2]
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10) if path in light else None)):
            if isinstance(node, ast.Import | ast.ImportFrom) and path not in light:
                wrong += [f"{name_of(path)}: a relative import"] * bool(getattr(node, "level", 0))
        if path in light:
            modules = {name_of(one).removesuffix(".py").replace("/", ".") for one in light}
            ours = [name for name in imports(path) if name.split(".")[0] in (*PACKAGES.values(),)]
            wrong += [f"{name_of(path)} imports {name}" for name in ours if name not in modules]
            wrong += [
                f"{name_of(path)} imports {node.module} by its full name"
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).startswith("prts_core")
            ]
    assert not wrong, "\n".join(wrong)


def test_the_gpu_path_names_only_what_a_gpu_machine_has():
    allowed = GPU_PATH_MAY_IMPORT | set(sys.stdlib_module_names)
    wrong = [
        f"{name_of(p)} imports {name}"
        for p in gpu_path()
        for name in imports(p, top_level_only=True)
        if name.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_the_gpu_path_imports_where_everything_else_is_absent():
    def module(path: Path) -> str:
        relative = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT)
        return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")

    modules = sorted({module(p) for p in gpu_path()})
    assert {"prts_kernels", "prts_core.config.model", "prts_core.config.train"} <= set(modules)
    script = f"""
import importlib, sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT_ON_A_GPU_MACHINE!r} else super().find_spec(name, path, target)

sys.meta_path = [Absent if finder is PathFinder else finder for finder in sys.meta_path
                 if "editable" not in str(finder).lower()]
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
faults = []
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ImportError as err:
        faults.append(f"{{name}}: {{err}}")
there = sorted(set(sys.modules) & set({ABSENT_ON_A_GPU_MACHINE!r}))
print("\\n".join(faults), f"present: {{there}}" if there else "")
sys.exit(bool(faults or there))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    # A module that needs Triton's runtime may say so; it must do that with ImportError at its own door.
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_no_source_file_is_longer_than_one_reads_in_a_sitting():
    long = {name_of(p): n for p in sources() if (n := len(p.read_text().splitlines())) > 600}
    assert not long


def test_every_module_says_what_it_is_for():
    silent = [
        name_of(p) for p in sources() if p.read_text().strip() and not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent


def test_no_file_names_a_place_of_one_machine():
    private = re.compile(r"(?<![\w.$}*])/(?:" + "|".join(["work", "root", "farm", "opt/" + "pypi"]) + r")/")
    hosts = re.compile(r"py(?:pi|torch)[.]org|python[h]osted")
    wrong = [
        f"{name_of(p)}:{number}: {line.strip()[:100]}"
        for p in tracked_texts()
        for number, line in enumerate(p.read_text(errors="replace").splitlines(), 1)
        if private.search(line) or hosts.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_is_told_to_install_what_is_not_ours():
    """The distribution `prts` of the public index is somebody else's, and ours is on none: a checkout is the way."""
    told = re.compile(r"(?<![\w-])prts(\[|==)|pip3? install (?!-e).*(?<![\w./-])prts(-vla)?(?![\w.-])")
    wrong = [
        f"{name_of(p)}:{number}: {line.strip()[:100]}"
        for p in tracked_texts()
        for number, line in enumerate(p.read_text(errors="replace").splitlines(), 1)
        if told.search(line)
    ]
    assert not wrong, "\n".join(wrong)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "prts-vla"


def test_nothing_from_outside_is_executed():
    wrong = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)]
                wrong += [
                    f"{name_of(path)} imports {n}"
                    for n in names
                    if n.split(".")[0] in ("pickle", "cloudpickle", "dill")
                ]
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if called in ("eval", "exec"):
                    wrong.append(f"{name_of(path)}:{node.lineno} calls {called}")
                if called == "torch.load" and given.get("weights_only") != "True":
                    wrong.append(f"{name_of(path)}:{node.lineno}: torch.load without weights_only=True")
                if given.get("trust_remote_code", "False") != "False" or given.get("allow_pickle", "False") != "False":
                    wrong.append(f"{name_of(path)}:{node.lineno} trusts what it loads")
    assert not wrong, "\n".join(wrong)


def test_test_files_have_names_of_their_own():
    """pytest imports tests by file name; two files of one name would hide each other."""
    names = Counter(p.name for p in (ROOT / "tests").rglob("*.py") if p.name not in ("conftest.py", "__init__.py"))
    assert [name for name, count in names.items() if count > 1] == []


def same_as_snapshot(name: str, text: str) -> None:
    path = SNAPSHOTS / name
    if os.environ.get("PRTS_UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{name} changed; if that is meant, PRTS_UPDATE_SNAPSHOTS=1 pytest {__file__}"


def test_the_command_line_is_frozen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "110")
    from prts_core.cli.main import TOOLS, build_parser
    from prts_core.stages.declarations import STAGES

    parser = build_parser()
    commands = next(a for a in parser._actions if a.dest == "command").choices
    assert commands is not None and list(commands) == [*STAGES, *TOOLS]
    shown = [parser.format_help(), *(f"$ prts {name} --help\n{commands[name].format_help()}" for name in STAGES)]
    same_as_snapshot("cli_help.txt", "\n".join(shown))


@pytest.fixture
def defs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The code location, under an instance of its own: Dagster remembers the one that an earlier run has left."""
    import dagster as dg

    from pipelines.definitions import definitions

    monkeypatch.chdir(ROOT)
    with dg.DagsterInstance.ephemeral():
        yield definitions()


def test_the_assets_are_frozen(defs: Any):
    from prts_core.config.load import load_plan
    from prts_core.stages.declarations import steps

    shown: dict[str, object] = {}
    stages = dict.fromkeys(stage for stage, _ in steps(load_plan(ROOT / "configs" / "quickstart.yaml")))
    order = [f"quickstart/{name}" for name in ("source", *stages, "register", "regression")]
    for spec in sorted(defs.resolve_all_asset_specs(), key=lambda s: order.index(s.key.to_user_string())):
        shown[spec.key.to_user_string()] = {
            "group": spec.group_name,
            "kinds": sorted(spec.kinds),
            "owners": list(spec.owners),
            "code_version": spec.code_version,
            "partitions": partition_keys(spec.partitions_def),
            "deps": {
                dep.asset_key.to_user_string(): getattr(dep.partition_mapping, "partition_keys", None)
                for dep in spec.deps
            },
        }
    graph = defs.resolve_asset_graph()
    checks = {}
    for key in sorted(graph.asset_check_keys):
        check = graph.get_check_spec(key)
        split = check.partitions_def is not None
        asset = key.asset_key.to_user_string()
        checks[key.name] = {"asset": asset, "blocking": check.blocking, "partitioned": split}
    jobs = sorted(job.name for job in defs.resolve_all_job_defs() if not job.name.startswith("__"))
    schedules = {s.name: s.cron_schedule for s in defs.schedules or []}
    sensors = [s.name for s in defs.sensors or []]
    document = {"assets": shown, "checks": checks, "jobs": jobs, "schedules": schedules, "sensors": sensors}
    same_as_snapshot("assets.json", json.dumps(document, indent=1) + "\n")
    assert list(shown) == order


def partition_keys(partitions: Any) -> object:
    """Static keys; of a dynamic dimension its name."""
    import dagster as dg

    if isinstance(partitions, dg.MultiPartitionsDefinition):
        return {dimension.name: partition_keys(dimension.partitions_def) for dimension in partitions.partitions_defs}
    if isinstance(partitions, dg.DynamicPartitionsDefinition):
        return f"dynamic: {partitions.name}"
    return partitions.get_partition_keys() if partitions else None


def test_assets_depend_on_what_their_stages_read(defs: Any):
    """The graph on Dagster's page and the parents in the manifests are the same graph."""
    from prts_core.config.load import load_plan
    from prts_core.stages.declarations import STAGES

    plan = load_plan(ROOT / "configs" / "quickstart.yaml")
    for spec in defs.resolve_all_asset_specs():
        stage = STAGES.get(spec.key.path[-1])
        if stage is None:  # operations and sources; no stages of the chain
            continue
        parents = stage.parents(plan, plan.recipe.deploy if stage.partitioned else None)
        source = {"source"} if stage.external else set()
        assert {d.asset_key.path[-1] for d in spec.deps} == {p.stage for p in parents} | source, stage.name
        for dep in spec.deps:
            chosen = getattr(dep.partition_mapping, "partition_keys", None)
            if chosen is not None:
                name = dep.asset_key.path[-1]
                assert set(chosen) == {p.partition for p in parents if p.stage == name}, (stage.name, name)
