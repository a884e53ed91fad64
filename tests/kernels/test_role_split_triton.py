"""Prefix attention's Triton kernels without a GPU: right in the interpreter, compiled for Hopper without spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from prts_kernels.role_attention import split

HERE = Path(__file__).parent
triton = pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.3.0",
    reason="the interpreter of triton 3.6 needs numpy < 2.3 for loops whose bounds were loaded",
)
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / "role_split_cases.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
def test_compiles_for_hopper(kernel: str, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prts_kernels.role_attention import split_kernels

    function = getattr(split_kernels, f"{kernel}_kernel")
    tile = split.default_tiles(head_dim)[kernel]
    constants = {"G": 4, "D": head_dim, "BM": tile.rows, "BN": tile.keys, "UPCAST": False}
    kinds = {"LSE": "*fp32", "DELTA": "*fp32", "SPANS": "*i32", "sm_scale": "fp32"}
    names = function.arg_names
    aligned = [n for n in names if n not in constants and (n.isupper() or n.startswith("stride"))]
    compiled = triton.compile(
        ASTSource(
            function,
            {n: "constexpr" if n in constants else kinds.get(n, "*bf16" if n.isupper() else "i32") for n in names},
            {(names.index(n),): value for n, value in constants.items()},
            {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert "cp.async.cg.shared.global" in compiled.asm["ptx"], "loads of 16 bytes, overlapped with products"
    registers, stack = _usage(compiled.asm["cubin"], tmp_path / "kernel.cubin")
    print(f"{kernel} {head_dim}: {registers} registers, {stack} bytes of stack, {compiled.metadata.shared} shared")
    assert compiled.metadata.shared <= 113 * 1024, "two programs on a multiprocessor"
    assert registers * 32 * tile.warps * 2 <= 65536, "two programs on a multiprocessor"
    assert stack == 0


def _usage(cubin: bytes, path: Path) -> tuple[int, int]:
    """Registers a thread and bytes of stack, which is where spilled registers go."""
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True)
    registers, stack = (re.search(rf"{what}:(\d+)", report.stdout + report.stderr) for what in ("REG", "STACK"))
    assert registers and stack
    return int(registers[1]), int(stack[1])
