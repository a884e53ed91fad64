"""impl="auto": flex on CUDA unless a record says otherwise, never unchecked; who is passed over is named."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from role_layouts import ends, tensors
from torch.utils.checkpoint import checkpoint

from prts_kernels.role_attention import autotune_table, role_attention, select, self_check, split
from prts_kernels.role_attention.attention_spec import AttentionSpec

MASK = ends(20, (5, 9, 15, 18))
GPU = AttentionSpec(torch.device("cuda"), (torch.bfloat16,) * 3, 128, of_samples=True, grad=True)
CACHES = (select.choose, self_check.fault, autotune_table.table)


@pytest.fixture(autouse=True)
def nothing_chosen_yet():
    for cached in CACHES:
        cached.cache_clear()
    yield
    for cached in CACHES:
        cached.cache_clear()


@pytest.fixture
def prefer(monkeypatch: pytest.MonkeyPatch):
    """As if these had been measured to be fastest here."""
    return lambda *names: monkeypatch.setattr(autotune_table, "order", lambda spec: ((*names, "sdpa"), "measured"))


def attend(**change) -> torch.Tensor:
    q, k, v, _ = tensors(20, dtype=torch.float32, **change)
    return role_attention(q, k, v, MASK)


def broken(q, k, v, mask, scale):
    return split_forward(q, k, v, mask, scale) * 1.1


split_forward = split.forward


def test_on_cuda_it_is_flex_until_a_record_of_the_device_says_otherwise(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    path = tmp_path / "measured.json"
    monkeypatch.setattr(autotune_table, "PATH", path)
    assert autotune_table.order(GPU) == (("flex", "sdpa"), "nothing measured on NVIDIA H200 yet")
    entry = {"date": "2026-11-30", "order": {"128": ["triton", "flex"], "64": ["split"]}, "tiles": {"128": {"dq": [1]}}}
    path.write_text(json.dumps({"NVIDIA H200": entry, "NVIDIA A100": {"date": "", "tiles": {}}}))
    for cached in CACHES:
        cached.cache_clear()
    assert autotune_table.order(GPU) == (("triton", "flex", "sdpa"), "measured 2026-11-30")
    assert autotune_table.tiles("NVIDIA H200", 128) == {"dq": [1]} and autotune_table.tiles("NVIDIA H200", 64) is None


def test_a_checked_implementation_is_taken_and_checked_once(prefer, monkeypatch, caplog) -> None:
    calls = []
    monkeypatch.setattr(split, "forward", lambda *given: calls.append(given[0].shape) or split_forward(*given))
    prefer("split")
    with caplog.at_level(logging.INFO, logger="prts_kernels"):
        expected = role_attention(*tensors(20, dtype=torch.float32)[:3], MASK, impl="split")
        assert torch.equal(attend(), expected) and torch.equal(attend(), expected)
    assert calls == [expected.shape, torch.Size([200, 4, 8]), expected.shape, expected.shape]
    (said,) = caplog.records
    assert said.levelno == logging.INFO and "impl=auto is split on cpu" in said.getMessage()


@pytest.mark.parametrize("fault", [broken, lambda *given: 1 / 0], ids=["wrong", "raises"])
def test_one_that_fails_its_self_check_is_passed_over_with_one_warning(fault, prefer, monkeypatch, caplog) -> None:
    monkeypatch.setattr(split, "forward", fault)
    prefer("split")
    expected = role_attention(*tensors(20, dtype=torch.float32)[:3], MASK, impl="sdpa")
    assert torch.equal(attend(), expected) and torch.equal(attend(), expected)
    (said,) = caplog.records
    assert said.levelno == logging.WARNING and "impl=auto is sdpa" in said.getMessage()
    assert "passed over split: it failed its self-check" in said.getMessage() and "Update torch" in said.getMessage()
    assert ("out is 10 % off" if fault is broken else "ZeroDivisionError") in said.getMessage()


def test_one_that_refuses_is_named_once_with_its_reason(prefer, monkeypatch, caplog) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    prefer("triton")
    attend()
    attend()
    (said,) = caplog.records
    assert said.levelno == logging.WARNING and "passed over triton: it runs on CUDA devices" in said.getMessage()
    spec = AttentionSpec(torch.device("cpu"), (torch.float32,) * 3, 8, of_samples=True, grad=True)
    assert select.choose("auto", spec).name == "sdpa" and "passed over triton" in select.choose("auto", spec).reason


def test_the_callers_modes_do_not_reach_the_check(prefer, caplog) -> None:
    """Nor the check them: hooks of activation checkpointing would count what it saves."""
    prefer("split")
    expected = role_attention(*tensors(20, dtype=torch.float32)[:3], MASK, impl="split")
    q, k, v, _ = tensors(20, dtype=torch.float32)
    out = checkpoint(lambda *x: role_attention(*x, MASK), q, k, v, use_reentrant=False)
    out.sum().backward()
    assert torch.equal(out, expected)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        for cached in CACHES[:2]:
            cached.cache_clear()
        with mode:
            role_attention(q.detach(), k.detach(), v.detach(), MASK)
    select.choose.cache_clear()
    self_check.fault.cache_clear()
    compiled = torch.compile(lambda *x: role_attention(*x, MASK), backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), expected)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("prts_kernels")] == []
