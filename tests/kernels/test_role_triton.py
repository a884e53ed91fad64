"""The Triton kernels without a GPU: right in the interpreter, compiled for Hopper with tensor cores and few spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from prts_kernels.role_attention import role_attention
from prts_kernels.role_attention import triton as ours

HERE = Path(__file__).parent
triton = pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.3.0",
    reason="the interpreter of triton 3.6 needs numpy < 2.3 for loops whose bounds were loaded",
)
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / "role_triton_cases.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True)
class Built:
    """What the compiler made for sm_90a. stack: bytes, where spilled registers go."""

    ptx: str
    registers: int
    stack: int
    shared: int


def build(
    kernel: str, tile: ours.KernelTile, head_dim: int, tmp_path: Path, dtype: str = "bf16", groups: int = 4
) -> Built:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prts_kernels.role_attention import triton_kernels

    function = getattr(triton_kernels, f"{kernel}_kernel")
    q, k = (torch.empty(1, heads, head_dim, dtype=torch.float32 if dtype == "fp32" else None) for heads in (groups, 1))
    constants = ours._constants(q, k, tile)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    kinds = {"LSE": "*fp32", "DELTA": "*fp32", "TILES": "*i32", "scale": "fp32", "sm_scale": "fp32"}
    names = function.arg_names
    aligned = [n for n in names if n not in constants and (n.isupper() or n.startswith("stride"))]
    compiled = triton.compile(
        ASTSource(
            function,
            {n: "constexpr" if n in constants else kinds.get(n, f"*{dtype}" if n.isupper() else "i32") for n in names},
            {(names.index(n),): value for n, value in constants.items()},
            {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        ),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True)
    registers, stack = (re.search(rf"{what}:(\d+)", report.stdout + report.stderr) for what in ("REG", "STACK"))
    assert registers and stack
    return Built(compiled.asm["ptx"], int(registers[1]), int(stack[1]), compiled.metadata.shared)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "head_dim", "number"),
    [
        (kernel, dim, i)
        for kernel in ours.KERNELS
        for dim in (64, 128)
        for i in range(len(ours.CANDIDATES[kernel][dim]))
    ],
)
def test_compiles_for_hopper(kernel: str, head_dim: int, number: int, cache: Path) -> None:
    tile = ours.CANDIDATES[kernel][head_dim][number]
    built = build(kernel, tile, head_dim, cache)
    print(f"{tile}: {built.registers} registers, {built.stack} bytes of stack, {built.shared} shared")
    assert "wgmma.mma_async" in built.ptx
    assert re.search(r"cp\.async\.cg\.shared\.global \[.*?\], \[.*?\], 0x10", built.ptx), (
        "loads of 16 bytes, running ahead"
    )
    assert built.shared <= 227 * 1024
    assert built.registers * 32 * tile.warps <= 65536
    assert built.stack <= (96 if number == 0 else 160)
    if tile.registers or (tile.warps == 4 and head_dim == 64):
        assert built.registers * 32 * tile.warps * 2 <= 65536 and built.shared <= 113 * 1024, "two programs at once"


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ours.KERNELS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "groups"),
    [("bf16", 128, 1), ("bf16", 128, 7), ("fp16", 64, 2), ("bf16", 32, 4), ("fp32", 128, 4)],
)
def test_other_shapes_compile(kernel: str, dtype: str, head_dim: int, groups: int, cache: Path) -> None:
    """Groups of 7 leave rows of a tile idle."""
    if dtype == "fp32":
        tile = ours.default_tiles(torch.empty(1, 1, head_dim))[ours.KERNELS.index(kernel)]
    else:
        tile = ours.CANDIDATES[kernel][64 if head_dim <= 64 else 128][0]
    built = build(kernel, tile, head_dim, cache, dtype, groups)
    assert ("wgmma.mma_async" in built.ptx) == (dtype != "fp32")
    assert built.shared <= 227 * 1024 and built.stack <= 384, "some spills, off the shapes that matter"


def test_on_the_cpu_triton_is_refused_and_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(4, 2, 16)
    key_end = torch.full((4,), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"impl='triton' cannot compute this: it runs on CUDA devices, found cpu"):
        role_attention(q, q, q, key_end, impl="triton")
    assert role_attention(q, q, q, key_end).shape == q.shape


def test_measured_tiles_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ours._chosen(torch.device("cpu"), torch.bfloat16, 128)
    monkeypatch.setattr(
        ours.autotune_table, "tiles", lambda device, head_dim: {"dq": [64, 32, 4, 2], "forward": [64, 64, 4, 2, 96]}
    )
    found = ours.default_tiles(torch.empty(1, 1, 128, dtype=torch.bfloat16))
    assert found == (ours.KernelTile(64, 64, 4, 2, 96), ours.CANDIDATES["dkdv"][128][0], ours.KernelTile(64, 32, 4, 2))


@pytest.mark.parametrize(
    ("rows", "groups", "tokens"), [(128, 1, 128), (128, 4, 32), (128, 7, 16), (64, 16, 4), (16, 16, 1)]
)
def test_tokens_a_tile(rows: int, groups: int, tokens: int) -> None:
    assert ours.tokens_a_tile(rows, groups) == tokens


def test_everything_but_triton_works_where_it_is_not_installed() -> None:
    code = """
import sys, importlib.abc
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers", "prts_core", "pydantic"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import torch
from prts_kernels.role_attention import RoleMask, role_attention
q = torch.randn(6, 2, 16)
print(role_attention(q, q, q, RoleMask.from_spans([[0, 2, 3, 4, 5]], 6)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "[6, 2, 16]" in done.stdout, done.stderr
