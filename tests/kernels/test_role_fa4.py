"""flash-attn-4 takes our very calls and compiles them for Hopper; on no GPU, where it is installed, else skipped."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from prts_kernels.role_attention import varlen

# flash-attn-4 and CuTe DSL read the architecture from the environment when imported, and compile fake tensors only.
HOPPER = {
    "FLASH_ATTENTION_ARCH": "sm_90",
    "CUTE_DSL_ARCH": "sm_90a",
    "FLASH_ATTENTION_NUM_SMS": "132",
    "OMP_NUM_THREADS": "1",
}
CODE = """
import sys, torch
from torch._subclasses.fake_tensor import FakeTensorMode
from flash_attn.cute import interface
from prts_kernels.role_attention import varlen

dim, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
torch.use_deterministic_algorithms(sys.argv[3] == "deterministic")
torch.cuda.current_device = lambda: 0  # asked for where a fake tensor is exported; there is no driver
for total, parts in ((4096, 20), (8192, 33)):
    with FakeTensorMode():
        q, do = (torch.empty(total, 32, dim, dtype=dtype, device="cuda") for _ in range(2))
        k, v = (torch.empty(total, 8, dim, dtype=dtype, device="cuda") for _ in range(2))
        bounds = torch.empty(parts + 1, dtype=torch.int32, device="cuda")
        out, lse = varlen.BACKENDS["fa4"].forward(q, k, v, bounds, 771, 0.1)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, dtype, (32, total), torch.float32)
        grads = varlen.BACKENDS["fa4"].backward(do, q, k, v, out, lse, bounds, 771, 0.1)
        assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (q, k, v)]
        for function in (interface._flash_attn_fwd, interface._flash_attn_bwd):
            assert len(function.compile_cache.cache) == 1, "another pack is compiled anew"
print("compiled")
"""


@pytest.mark.conformance
@pytest.mark.skipif(
    not varlen._holds("flash_attn", "cute/interface.py"),
    reason="flash-attn-4 is not installed (pip install flash-attn-4==4.0.0b36: 100 MB)",
)
@pytest.mark.parametrize("mode", ["fast", "deterministic"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_our_calls_compile_for_hopper(head_dim: int, dtype: str, mode: str) -> None:
    command = [sys.executable, "-c", CODE, str(head_dim), dtype, mode]
    done = subprocess.run(command, env=os.environ | HOPPER, capture_output=True, text=True)
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr
