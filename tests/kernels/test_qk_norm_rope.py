"""QK norm and rotation: the specification is transformers' own; the kernels are right in the interpreter and compile
for Hopper without spills, with wide loads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prts_kernels.qk_norm_rope import qk_norm_rope

HERE = Path(__file__).parent


def test_the_reference_is_what_transformers_computes() -> None:
    theirs = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    rng = torch.Generator().manual_seed(0)
    batch, length, dim = 2, 7, 16
    q, k = (torch.randn(batch, length, h, dim, generator=rng, dtype=torch.float64) for h in (4, 2))
    cos, sin = (torch.randn(batch, length, dim, generator=rng, dtype=torch.float64) for _ in range(2))
    norms = [theirs.Qwen3VLTextRMSNorm(dim, 1e-6) for _ in range(2)]
    for norm in norms:
        norm.weight.data = torch.randn(dim, generator=rng)
    right = theirs.apply_rotary_pos_emb(
        *(norm(x.float()).transpose(1, 2) for norm, x in zip(norms, (q, k), strict=True)), cos.float(), sin.float()
    )  # fmt: skip
    found = qk_norm_rope(
        *(x.float().flatten(0, 1) for x in (q, k)), *(norm.weight for norm in norms),
        *(x.float().flatten(0, 1) for x in (cos, sin)), eps=1e-6,
    )  # fmt: skip
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x.view(batch, length, -1, dim).transpose(1, 2), y, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, w, turn = torch.ones(3, 4, 16), torch.ones(3, 2, 16), torch.ones(16), torch.ones(3, 16)
    qk_norm_rope(q, k, w, w, turn, turn)
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        qk_norm_rope(q, k, w, w, turn, turn, impl="referenz")
    with pytest.raises(ValueError, match=r"q \(T, Hq, D\)"):
        qk_norm_rope(q, k, w, w, turn[:2], turn)
    with pytest.raises(ValueError, match="constants"):
        qk_norm_rope(q, k, w, w, turn.clone().requires_grad_(), turn)
    if __import__("importlib.util").util.find_spec("triton"):
        with pytest.raises(ValueError, match="runs on CUDA devices, found cpu"):
            qk_norm_rope(q, k, w, w, turn, turn, impl="triton")


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(HERE / "qk_norm_rope_cases.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, cwd=HERE,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel"])
def test_compiles_for_hopper(kernel: str, head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from prts_kernels.qk_norm_rope import triton as ours
    from prts_kernels.qk_norm_rope import triton_kernels

    function = getattr(triton_kernels, kernel)
    constants = {"H": 32, "D": head_dim, "BT": ours.tokens(head_dim), "HB": ours.HEADS}
    kinds = dict.fromkeys(constants, "constexpr") | {"eps": "fp32", "DWEIGHT": "*fp32"}
    names = function.arg_names
    compiled = triton.compile(
        ASTSource(
            function,
            {n: kinds.get(n, "*bf16" if n.isupper() else "i32") for n in names},
            {(names.index(n),): value for n, value in constants.items()},
            {
                (names.index(n),): [["tt.divisibility", 16]]
                for n in names
                if n not in constants and (n.isupper() or n.startswith("stride"))
            },
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": ours.WARPS},
    )
    ptx = compiled.asm["ptx"]
    wide, all_loads = (len(re.findall(pattern, ptx)) for pattern in (r"ld\.global\S*\.v4", r"ld\.global"))
    assert wide == all_loads, "16 bytes a lane in every load, masked rows too"
    assert len(re.findall(r"st\.global\S*\.v4", ptx)) >= 2 and "atom" not in ptx and "red.global" not in ptx
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run(
        [str(tool), "-res-usage", str(tmp_path / "kernel.cubin")], capture_output=True, text=True, check=True
    )  # fmt: skip
    said = report.stdout + report.stderr
    assert int(re.search(r"STACK:(\d+)", said)[1]) == 0, "nothing spills"
    registers = int(re.search(r"REG:(\d+)", said)[1])
    print(f"{kernel}, head_dim {head_dim}: {registers} registers, {wide} loads of 16 bytes")
    assert registers <= 128, "four programs of four warps a scheduler"
