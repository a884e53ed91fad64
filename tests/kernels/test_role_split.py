"""`split` on the CPU: exact in fp64 with gradients, deaf to padding, opaque to torch.compile and checkpointing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from role_layouts import Pack, ends, packs, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from prts_kernels.role_attention import RoleMask, role_attention, split, varlen
from prts_kernels.role_attention.attention_spec import AttentionSpec


def with_grads(attend, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
    out = attend(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), do)]


def named(impl: str, mask: RoleMask, scale: float | None = None):
    return lambda q, k, v: role_attention(q, k, v, mask, scale=scale, impl=impl)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=25, deadline=None)
@given(packs(), st.sampled_from(((4, 4), (4, 2), (4, 1))), st.integers(0, 2**31))
def test_split_is_the_reference_with_gradients(pack: Pack, heads: tuple[int, int], seed: int) -> None:
    given_ = tensors(pack.total, *heads, dim=4, seed=seed)
    mask = pack.mask
    assert_equal(with_grads(named("split", mask, 0.5), *given_), with_grads(named("reference", mask, 0.5), *given_))


@pytest.mark.parametrize("length", [1, 127, 128, 129])
def test_lengths_around_a_tile(length: int) -> None:
    mask = ends(length + 2, tuple(int(length * f) for f in (0.4, 0.7, 0.9, 1.0)))
    given_ = tensors(length + 2, dim=4)
    assert_equal(with_grads(named("split", mask), *given_), with_grads(named("reference", mask), *given_))


@settings(max_examples=40, deadline=None)
@given(packs())
def test_prefix_ranges_among_the_real_tokens_are_the_same_tokens(pack: Pack) -> None:
    samples = pack.mask.samples
    real = samples.real if samples.real is not None else torch.arange(pack.total)
    for whole, packed in zip(samples.prefix_ranges.tolist(), samples.prefix_ranges_of_real.tolist(), strict=True):
        for first, last in ((0, 1), (2, 3)):
            assert real[packed[first] : packed[last]].tolist() == list(range(whole[first], whole[last]))


def test_padding_neither_leaks_nor_answers() -> None:
    mask = ends(12, (3, 5, 7, 9), (2, 4, 4, 4))
    padding = mask.key_end == 0
    plain = tensors(24)
    poisoned = [x.detach().clone() for x in plain]
    for x in poisoned:  # the gradient that arrives is poisoned as well
        x[padding] = float("nan")
    expected = with_grads(named("reference", mask), *plain)
    found = with_grads(named("split", mask), *(x.requires_grad_() for x in poisoned[:3]), poisoned[3])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[padding], torch.zeros_like(a[padding]))
        torch.testing.assert_close(a[~padding], b[~padding], rtol=0, atol=1e-12)


def test_nothing_but_padding() -> None:
    given_ = tensors(6)
    mask = RoleMask.from_spans(np.zeros((0, 5)), 6)
    assert not any(x.any() for x in with_grads(named("split", mask), *given_))
    assert role_attention(*tensors(0)[:3], RoleMask.from_spans(np.zeros((0, 5)), 0), impl="split").shape == (0, 4, 8)


def test_any_strides() -> None:
    mask = ends(20, (5, 9, 15, 18))
    given_ = tensors(20)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in given_]
    assert turned[0].stride(-1) != 1
    found = with_grads(named("split", mask), *(x.requires_grad_() for x in turned[:3]), turned[3])
    assert_equal(found, with_grads(named("reference", mask), *given_))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_stays_near_the_reference(dtype: torch.dtype) -> None:
    """Like flash-attention's own tests: at most twice the error of the reference rounded to this dtype at the end."""
    mask = ends(40, (9, 20, 30, 38), (10, 25, 25, 25))
    given_ = tensors(80, dtype=dtype)
    found = with_grads(named("split", mask), *given_)
    exact = with_grads(named("reference", mask), *(x.detach().double().requires_grad_() for x in given_))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_the_operator_keeps_torchs_contract() -> None:
    """Schema, fake tensors with the right strides, autograd registration."""
    for mask, checks in ((ends(20, (5, 9, 15, 18)), "ALL"), (ends(18, (5, 9, 15, 18)), ("test_faketensor",))):
        q, k, v, do = tensors(mask.total)
        s = mask.samples
        rest = (s.real, s.parts, s.longest_part, s.prefix_ranges_of_real, s.most_queries, s.most_keys, 0.5, "eager")
        torch.library.opcheck(split._split, (q, k, v, *rest), test_utils=checks)
        out, lse = (x.detach() for x in split._split(q, k, v, *rest))
        backward = (do, *(x.detach() for x in (q, k, v)), out, lse, *rest)
        torch.library.opcheck(split._split_backward, backward, test_utils=("test_schema", "test_faketensor"))


def test_it_is_one_operator_to_torch_compile() -> None:
    mask = ends(20, (5, 9, 15, 18))
    given_ = tensors(20)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return role_attention(q * 1.5, k, v + 1, mask, impl="split") * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_equal(with_grads(compiled, *given_), with_grads(layer, *given_))


def test_it_may_be_checkpointed() -> None:
    mask = ends(20, (5, 9, 15, 18))
    given_ = tensors(20)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return role_attention(q * 1.5, k, v + 1, mask, impl="split")

    again = with_grads(lambda *x: checkpoint(layer, *x, use_reentrant=False), *given_)
    assert_equal(again, with_grads(layer, *given_))


def test_refusals_say_why() -> None:
    q, k, v, _ = tensors(4)
    with pytest.raises(ValueError, match="does not consist of sample parts"):
        role_attention(q, k, v, torch.tensor([2, 4, 3, 4], dtype=torch.int32), impl="split")
    with pytest.raises(ValueError, match=r"have one dtype, found torch\.float64, torch\.float64, torch\.float32"):
        role_attention(q, k, v.float(), ends(4, (2, 3, 3, 4)), impl="split")
    with pytest.raises(ValueError, match=r"Unknown varlen backend 'fa5'\. Allowed: fa4, fa3, fa2, torch, eager"):
        split.forward(q, k, v, ends(4, (2, 3, 3, 4)), 1.0, backend="fa5")
    with pytest.raises(ValueError, match="split by varlen backend 'torch': "):
        split.forward(q, k, v, ends(4, (2, 3, 3, 4)), 1.0, backend="torch")


def spec(device: str = "cuda", dtype: torch.dtype = torch.bfloat16, head_dim: int = 128) -> AttentionSpec:
    return AttentionSpec(torch.device(device), (dtype,) * 3, head_dim, of_samples=True, grad=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """A pretended GPU of some compute capability with some packages installed."""

    def pretend(capability: tuple[int, int], *installed: str) -> None:
        varlen.choose.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(varlen, "_holds", lambda package, file: file in installed)
        monkeypatch.setattr(varlen, "_broken", lambda module: None)

    yield pretend
    varlen.choose.cache_clear()


def test_the_best_stock_kernel_that_fits_is_taken(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    fa4 = "cute/interface.py"
    gpu((9, 0), fa4, "flash_attn_interface.py")
    monkeypatch.setattr(varlen.importlib.util, "find_spec", lambda package: object())  # flash-attn 3 too
    assert varlen.choose(spec()) == ("fa4", None)
    assert varlen.choose(spec(head_dim=256)) == ("fa3", None)
    monkeypatch.undo()
    gpu((9, 0), "flash_attn_interface.py")
    assert varlen.choose(spec())[0] == "fa2"
    gpu((8, 0), fa4)
    assert varlen.choose(spec()) == ("torch", None) and split.unsupported_reason(spec()) is None
    gpu((7, 5))
    reason = split.unsupported_reason(spec())
    assert reason and "fa4: flash-attn-4 is not installed" in reason and "found 7.5" in reason
    assert "eager: slow" in reason
    gpu((9, 0), fa4)
    assert "found torch.float32" in (split.unsupported_reason(spec(dtype=torch.float32)) or "")
    assert "found 36" in (split.unsupported_reason(spec(head_dim=36)) or "")


def test_torchs_own_kernel_takes_our_call() -> None:
    """By fake tensors: the schema, grouped queries, the shape of the log-sum-exp. No kernel runs."""
    with FakeTensorMode():
        q, do = (torch.empty(100, 8, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        k, v = (torch.empty(100, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        bounds = torch.empty(4, dtype=torch.int32, device="cuda")
        out, lse = varlen.BACKENDS["torch"].forward(q, k, v, bounds, 60, 0.1)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (8, 100), torch.float32)
        grads = varlen.BACKENDS["torch"].backward(do, q, k, v, out, lse, bounds, 60, 0.1)
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_a_cutlass_that_hangs_is_refused(gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu((9, 0), "cute/interface.py")
    monkeypatch.setattr(varlen, "_version", lambda distribution: "4.6.1")
    assert "hangs" in (varlen.choose(spec(), "fa4")[1] or "")


def test_a_package_that_does_not_import_is_passed_over() -> None:
    assert varlen._broken("no_such_package") == "no_such_package does not import: No module named 'no_such_package'"
    assert varlen._broken("torch") is None


def test_on_the_cpu_it_is_eager() -> None:
    assert varlen.choose(spec("cpu", torch.float64, 4)) == ("eager", None)
