"""InfoNCE in chunks is the eager loss: value, terms, gradients, at any chunk, over any spread, in less memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from info_nce_samples import TERMS, outcome, samples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from prts_kernels.info_nce import Processes, chunked, info_nce

HERE = Path(__file__).parent


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 20),
    tasks=st.integers(1, 6),
    chunk=st.sampled_from([1, 7, 40, 2**18]),
    norm=st.sampled_from([1.0, 12.0]),
    failed=st.sampled_from([0.0, 0.5, 1.0]),
    far=st.sampled_from([0.0, -5000.0]),
    seed=st.integers(0, 2**16),
)
def test_chunked_is_the_reference(
    count: int, tasks: int, chunk: int, norm: float, failed: float, far: float, seed: int
) -> None:
    inputs = samples(count, tasks, seed=seed, norm=norm, failed=failed)
    inputs[3] = inputs[3] + far
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunked.CHUNK, "cpu", chunk)
        found = outcome(inputs, impl="chunked")
    for x, right in zip(found, outcome(inputs, impl="reference"), strict=True):
        torch.testing.assert_close(x, right.to(x.dtype), rtol=1e-9, atol=1e-11)


def test_in_fp32_it_is_no_less_exact_than_the_reference() -> None:
    """At a scale of 100, where an exponential without its row's and column's own maximum would overflow."""
    wide = samples(60, norm=1.0)
    wide[2] = torch.tensor(100.0, dtype=torch.float64).log().requires_grad_()
    narrow = [x.detach().float().requires_grad_() for x in wide[:3]] + [wide[3].float(), wide[4]]
    exact = outcome(wide, impl="reference")
    rough, found = (outcome(narrow, impl=impl) for impl in ("reference", "chunked"))
    for x, eager, right in zip(found, rough, exact, strict=True):
        error, eager_error = ((y.double() - right.double()).abs().max() for y in (x, eager))
        assert error <= 2 * eager_error + 1e-6 * (1 + right.abs().max())


def test_the_same_bits_every_time() -> None:
    inputs = samples(300, 20, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(outcome(inputs, impl="auto"), outcome(inputs), strict=True))


def test_no_tensor_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, Tensor):
                    self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
            return out

    count, chunk = 200, 4000
    monkeypatch.setitem(chunked.CHUNK, "cpu", chunk)
    inputs = samples(count)
    seen = {}
    for impl in ("chunked", "reference"):
        with Largest() as seen[impl]:
            outcome(inputs, impl=impl)
    assert seen["chunked"].numel <= 2 * chunk and seen["reference"].numel >= count**2


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_task_whose_samples_are_all_far_from_its_goal_has_the_shares_of_one_that_is_near(impl: str) -> None:
    """gamma ** steps is 0 in fp32 beyond some 830 steps at the default; the shares within a task do not change."""
    near = samples(12, dtype=torch.float32)
    far = [*near[:3], near[3] - 2000.0, near[4]]
    assert all(torch.isfinite(x).all() for x in outcome(far, impl=impl))
    torch.testing.assert_close(outcome(far, impl=impl)[2], outcome(near, impl=impl)[2])


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_sample_that_did_not_reach_its_goal_is_a_negative_and_nothing_else(impl: str) -> None:
    phi, psi, log_scale, log_weight, task_id = samples(8, tasks=2)
    first = task_id == task_id[0]
    lost = log_weight.masked_fill(first, -torch.inf)
    result = info_nce(phi, psi, log_scale, lost, task_id, impl=impl)
    grads = torch.autograd.grad(result.loss, psi)[0]
    assert torch.isfinite(result.loss) and torch.isfinite(grads).all()
    # A goal that no sample of the batch reached is drawn towards none and pushed from none by the second term.
    second = info_nce(phi, psi, log_scale, lost, task_id, impl=impl, terms=(0.0, 1.0))
    assert not torch.autograd.grad(second.loss, psi)[0][first].any()
    assert torch.autograd.grad(info_nce(phi, psi, log_scale, lost, task_id, impl=impl, terms=(0.0, 1.0)).loss, phi)[0][
        first
    ].any(), "it is a negative of the other goals"


def test_a_collapsed_model_scores_no_hits() -> None:
    """All goals alike: every comparison is a tie, which must not read as perfect accuracy."""
    phi, _, log_scale, log_weight, task_id = samples(8)
    alike = torch.ones_like(phi).requires_grad_()
    for impl in ("reference", "chunked"):
        assert info_nce(phi, alike, log_scale, log_weight, task_id, impl=impl).accuracy == 0
    assert info_nce(phi, phi, log_scale * 10, log_weight, task_id, impl="chunked").accuracy > 0.5


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_autocast_does_not_reach_it(impl: str) -> None:
    inputs = samples(12, dtype=torch.float32)
    plain = outcome(inputs, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(*inputs, terms=TERMS, logsumexp_weight=0.1, impl=impl).loss, plain[0])
        if impl == "chunked":  # its backward too, were it called in here
            assert all(torch.equal(a, b) for a, b in zip(plain, outcome(inputs, impl=impl), strict=True))


def test_half_precision_embeddings_are_computed_in_fp32() -> None:
    phi, psi, *rest = samples(12, dtype=torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in (phi, psi)]
    again = [x.detach().float().requires_grad_() for x in half]
    found, right = outcome([*half, *rest]), outcome([*again, *rest])
    assert found[0].dtype == torch.float32 and torch.equal(found[0], right[0])
    assert found[4].dtype == torch.bfloat16 and torch.equal(found[4], right[4].bfloat16())


def test_compiled_and_checkpointed() -> None:
    inputs = samples(10)
    right = outcome(inputs, impl="chunked")

    def loss(phi: Tensor, psi: Tensor, log_scale: Tensor) -> Tensor:
        return info_nce(phi, psi, log_scale, *inputs[3:], terms=TERMS, logsumexp_weight=0.1, impl="chunked").loss

    for call in (torch.compile(loss, backend="aot_eager"), lambda *x: checkpoint(loss, *x, use_reentrant=False)):
        grads = torch.autograd.grad(call(*inputs[:3]), inputs[:3])
        for x, y in zip(grads, right[4:], strict=True):
            torch.testing.assert_close(x, y)


def test_what_does_not_fit_is_refused() -> None:
    phi, psi, log_scale, log_weight, task_id = samples(4)
    with pytest.raises(ValueError, match="did you mean 'chunked'"):
        info_nce(phi, psi, log_scale, log_weight, task_id, impl="chunkd")
    for bad in (
        (phi[:3], psi, log_scale, log_weight, task_id),
        (phi, psi, log_scale, log_weight[:3], task_id),
        (phi[:0], psi[:0], log_scale, log_weight[:0], task_id[:0]),
    ):
        with pytest.raises(ValueError, match=r"phi and psi \(n, E\)"):
            info_nce(*bad)
    with pytest.raises(ValueError, match="constant"):
        info_nce(phi, psi, log_scale, log_weight.clone().requires_grad_(), task_id)


# ---- over processes ------------------------------------------------------------------------------------------------
class Threads(Processes):
    """A group whose processes are threads of this one."""

    def __init__(self, rank: int, counts: tuple[int, ...], board: list, barrier: threading.Barrier) -> None:
        self.rank, self.world, self.counts, self.board, self.barrier = rank, len(counts), counts, board, barrier

    def start(self, own: int) -> int:
        return sum(self.counts[: self.rank])

    def total(self, own: int) -> int:
        return sum(self.counts)

    def exchange(self, mine: Tensor) -> list[Tensor]:
        self.board[self.rank] = mine.clone()
        self.barrier.wait(120)
        everyone = list(self.board)
        self.barrier.wait(120)
        return everyone

    def gather(self, own: Tensor) -> Tensor:
        return torch.cat(self.exchange(own))

    def stack(self, values: Tensor) -> Tensor:
        return torch.stack(self.exchange(values))

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        begin = self.start(0)
        return torch.stack(self.exchange(whole)).sum(0)[begin : begin + self.counts[self.rank]]


@pytest.mark.parametrize("counts", [(5, 3), (0, 8), (2, 1, 9)])
def test_a_spread_batch_is_the_whole_batch(counts: tuple[int, ...]) -> None:
    inputs = samples(sum(counts))
    board, barrier = [None] * len(counts), threading.Barrier(len(counts))
    found: list[list[Tensor]] = [[] for _ in counts]

    def process(rank: int) -> None:
        begin = sum(counts[:rank])
        own = [x[begin : begin + counts[rank]].detach().requires_grad_() for x in inputs[:2]]
        scale = inputs[2].detach().requires_grad_()
        found[rank] = outcome([*own, scale, *inputs[3:]], processes=Threads(rank, counts, board, barrier))

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    _meet(found, outcome(inputs, impl="reference"))


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(5, 3), (0, 4)])
def test_over_gloo(tmp_path: Path, counts: tuple[int, ...]) -> None:
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error::FutureWarning",
                str(HERE / "info_nce_driver.py"),
                str(rank),
                ",".join(map(str, counts)),
                str(tmp_path / "meet"),
                str(tmp_path / f"{rank}.pt"),
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        for rank in range(len(counts))
    ]
    assert [p.wait(120) for p in processes] == [0] * len(counts)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(counts))]
    right = outcome(samples(sum(counts), failed=0.3), impl="reference")
    _meet([[*values, *(g / 2 for g in grads)] for values, grads in saved], right)


def _meet(found: list[list[Tensor]], right: list[Tensor]) -> None:
    """Every process has the joint loss; embeddings' gradients end to end and the scale's summed are the whole's."""
    for values in found:
        for x, first, y in zip(values[:4], found[0][:4], right[:4], strict=True):
            assert torch.equal(x, first)
            torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-9, atol=1e-12)
    for place in (4, 5):
        torch.testing.assert_close(torch.cat([values[place] for values in found]), right[place], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sum(values[6] for values in found), right[6], rtol=1e-9, atol=1e-12)
