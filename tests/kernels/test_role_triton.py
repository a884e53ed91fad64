"""The Triton kernels without a GPU: right in the interpreter, compiled for Hopper with tensor cores and few spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prts_kernels.role_attention import role_attention, select

HERE = Path(__file__).parent
triton = pytest.importorskip("triton")


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / "role_triton_cases.py")]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["forward_kernel", "dkdv_kernel", "dq_kernel"])
def test_compiles_for_hopper(kernel: str, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prts_kernels.role_attention import triton as ours
    from prts_kernels.role_attention import triton_kernels

    function = getattr(triton_kernels, kernel)
    blocks = dict(
        zip(
            ("forward_kernel", "dkdv_kernel", "dq_kernel"),
            ours.default_blocks(torch.empty(1, 1, 1, head_dim, dtype=torch.bfloat16)),
            strict=True,
        )
    )[kernel]
    constants = {"G": 4, "D": head_dim, "BM": blocks.queries, "BN": blocks.keys, "UPCAST": False, "PRECISION": "tf32"}
    kinds = {"LSE": "*fp32", "DELTA": "*fp32", "scale": "fp32", "sm_scale": "fp32"} | dict.fromkeys(
        constants, "constexpr"
    )
    kinds |= dict.fromkeys(("Q", "K", "V", "OUT", "DOUT", "DQ", "DK", "DV"), "*bf16")
    names = function.arg_names
    aligned = [n for n in names if n not in constants and (n.isupper() or n.startswith("stride"))]
    compiled = triton.compile(
        ASTSource(
            function,
            {n: kinds.get(n, "*i32" if n.isupper() else "i32") for n in names},
            {(names.index(n),): value for n, value in constants.items()},
            {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": blocks.warps, "num_stages": blocks.stages},
    )
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024
    assert _spilled_bytes(compiled.asm["cubin"], tmp_path / "kernel.cubin") <= (0 if kernel != "dkdv_kernel" else 256)


def _spilled_bytes(cubin: bytes, path: Path) -> int:
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", report.stdout + report.stderr)[1])


def test_on_the_cpu_triton_is_refused_and_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 2, 4, 16)
    key_end = torch.full((1, 4), 4, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"impl='triton' cannot compute this: it runs on CUDA devices, found cpu"):
        role_attention(q, q, q, key_end, impl="triton")
    assert select._choose(q, q, q) == "sdpa"


def test_everything_but_triton_works_where_it_is_not_installed() -> None:
    code = """
import sys, importlib.abc
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "transformers", "prts_core", "pydantic"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import torch
from prts_kernels.role_attention import role_attention, role_key_end
q = torch.randn(1, 2, 6, 16)
print(role_attention(q, q, q, role_key_end(6, *torch.tensor([[2], [3], [4], [5]]))).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "[1, 2, 6, 16]" in done.stdout, done.stderr
