"""The Triton kernels of qk_norm_rope in the interpreter, run by test_qk_norm_rope.py with TRITON_INTERPRET=1.

Outputs are allocated full of NaN (deterministic mode), so that a position no kernel writes is seen.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prts_kernels.qk_norm_rope import qk_norm_rope

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_qk_norm_rope.py instead"


@pytest.fixture(autouse=True, scope="module")
def poisoned_outputs():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def tensors(tokens: int, heads=(4, 2), dim: int = 16, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """q, k, their weights, cos, sin; q and k are slices of one projection, as a fused one gives them."""
    rng = torch.Generator().manual_seed(seed)
    both = torch.randn(tokens, sum(heads) + 1, dim, generator=rng).to(dtype)
    weights = [torch.randn(dim, generator=rng).to(dtype) for _ in range(2)]
    cos, sin = (torch.randn(tokens, dim, generator=rng).to(dtype) for _ in range(2))
    return [both[:, : heads[0]], both[:, heads[0] : sum(heads)], *weights, cos, sin]


def run(inputs: list[Tensor], impl: str, through=lambda f, *x: f(*x)) -> list[Tensor]:
    """q, k and the gradients of q, k and both weights."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    out = through(lambda *x: qk_norm_rope(*x, *inputs[4:], eps=1e-5, impl=impl), *leaves)
    rng = torch.Generator().manual_seed(1)
    # A head is twice another along the way back: strides of the incoming gradient are its own.
    douts = [torch.randn(*x.shape[:2], 2 * x.shape[2], generator=rng).to(x.dtype)[..., : x.shape[2]] for x in out]
    return [*(x.detach() for x in out), *torch.autograd.grad(out, leaves, douts)]


@pytest.mark.parametrize(("tokens", "heads"), [(1, (4, 2)), (127, (3, 1)), (128, (16, 8)), (129, (4, 2))])
def test_fp32(tokens: int, heads: tuple[int, int]) -> None:
    inputs = tensors(tokens, heads)
    for x, right in zip(run(inputs, "triton"), run(inputs, "reference"), strict=True):
        torch.testing.assert_close(x, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    inputs = tensors(20, dim=32, dtype=dtype)
    step = torch.finfo(dtype).eps
    for x, right in zip(run(inputs, "triton"), run(inputs, "reference"), strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x, right, rtol=2 * step, atol=step * float(right.float().abs().max()))


def test_mixed_dtypes_as_under_autocast() -> None:
    q, k, wq, wk, cos, sin = tensors(9, dtype=torch.bfloat16)
    inputs = [q, k, wq.float(), wk.float(), cos.float(), sin.float()]
    found, right = run(inputs, "triton"), run(inputs, "reference")
    assert [x.dtype for x in found] == [x.dtype for x in right] == [torch.bfloat16] * 4 + [torch.float32] * 2
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02)


def test_the_same_bits_and_contiguous() -> None:
    inputs = tensors(40)
    first, again = run(inputs, "triton"), run(inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].is_contiguous() and first[1].is_contiguous()


def test_checkpointed_and_compiled() -> None:
    inputs = tensors(10)
    right = run(inputs, "triton")
    for through in (
        lambda f, *x: checkpoint(f, *x, use_reentrant=False),
        lambda f, *x: torch.compile(f, backend="aot_eager", fullgraph=True)(*x),
    ):
        assert all(torch.equal(a, b) for a, b in zip(run(inputs, "triton", through), right, strict=True))


def test_the_operators_keep_torchs_laws() -> None:
    """Shapes, strides and gradients as registered are those of what runs (torch.library.opcheck)."""
    from prts_kernels.qk_norm_rope import triton as ours

    torch.use_deterministic_algorithms(False)  # opcheck's own runs fill nothing
    x, _, weight, _, cos, sin = tensors(5)
    leaf, scale = x.detach().requires_grad_(), weight.detach().requires_grad_()
    torch.library.opcheck(ours._norm_rope, (leaf, scale, cos, sin, 1e-5))
    torch.use_deterministic_algorithms(True)
