"""FlashInfer's ragged prefill without a GPU: plans, threads, streams and what is kept between calls.

FlashInfer's functions are stood in for by ``flashinfer_in_torch``; ``tests/gpu`` runs the real ones.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_contract import Case, make_problem
from torch import Tensor

from spec_compile.ops.providers import flashinfer

pytest.importorskip("triton", reason="the append kernels need it")

from flashinfer_in_torch import install
from two_threads import in_two_threads

from spec_compile.ops.kernels import flashinfer_prefill

RAGGED = Case((30, 0, 1, 17), 0, (4, 2), (64, 64), 16, packed=True)


def test_prompts_are_planned_once_per_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one prefill share a plan, full and sliding layers have one each, the next prefill plans anew."""
    calls = install(monkeypatch)
    full = make_problem(RAGGED, torch.float32, "cpu")
    lowered = flashinfer.lower(full.case.node(torch.float32))
    table, cu_seqlens = full.rows
    for _ in range(2):
        lengths = lowered.plan(table, cu_seqlens)
        assert lengths.device.type == "cpu" and lengths is not cu_seqlens
        for window in (0, 7, 0, 7):
            lowered.op(*full.new, *full.caches, *full.rows, 0.3, window, 0.0, None, lengths)
    assert [(p["window_left"], p["sm_scale"], p["backend"]) for p in calls.plans] == [(-1, 0.3, "fa3"), (6, 0.3, "fa3")] * 2


def test_two_threads_prefill_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first thread's plan and its run the second has time to plan the same wrapper for other lengths."""
    install(monkeypatch)
    problems = [make_problem(replace(RAGGED, lengths=lengths), torch.float32, "cpu") for lengths in ((30, 10), (10, 30))]
    outs: list[Tensor | None] = [None, None]
    planned, other_done = threading.Event(), threading.Event()
    wrapper = sys.modules["flashinfer.prefill"].BatchPrefillWithRaggedKVCacheWrapper
    plan = wrapper.plan

    def slow_plan(self, *args, **kwargs) -> None:
        plan(self, *args, **kwargs)
        if not planned.is_set():
            planned.set()
            other_done.wait(0.5)

    monkeypatch.setattr(wrapper, "plan", slow_plan)

    def prefill(i: int) -> None:
        if i == 1:
            planned.wait(5)
        outs[i] = flashinfer.lower(problems[i].case.node(torch.float32))(*problems[i].args)
        if i == 1:
            other_done.set()

    in_two_threads(lambda: prefill(0), lambda: prefill(1))
    for problem, out in zip(problems, outs, strict=True):
        torch.testing.assert_close(out, problem.expected()[0].float(), rtol=1e-4, atol=1e-5)


def test_wrappers_are_few_and_share_a_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest constants keep theirs; another stream has its own, because queued kernels read what a plan writes."""
    calls = install(monkeypatch)
    problem = make_problem(RAGGED, torch.float32, "cpu")
    q, k, v = problem.new

    def prefill(scale: float) -> None:
        flashinfer_prefill.ragged_prefill(q, k, v, problem.rows[1], scale, 0, 0.0, with_lse=False)

    kept = flashinfer_prefill.MAX_WRAPPERS
    for i in range(kept + 4):
        prefill(i + 1.0)
        prefill(1.0)  # used all along, so it stays
    assert len(flashinfer_prefill._PLANNED) == kept and len(calls.plans) == kept + 4
    assert len({id(planned.workspace) for planned in flashinfer_prefill._PLANNED.values()}) == 1
    prefill(2.0)
    assert len(calls.plans) == kept + 5, "the oldest had to go"

    monkeypatch.setattr(flashinfer_prefill, "_stream", lambda device: 7)
    prefill(1.0)
    assert len(calls.plans) == kept + 6
    assert len({id(planned.workspace) for planned in flashinfer_prefill._PLANNED.values()}) == 2


def test_a_plan_is_on_the_device_before_its_buffer_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer copies plans from one pinned buffer a wrapper, asynchronously (scheduler.cuh)."""
    calls = install(monkeypatch)
    problem = make_problem(RAGGED, torch.float32, "cpu")
    q, k, v = problem.new
    waits = []

    def prefill(lengths: Tensor, scale: float = 0.3) -> None:
        flashinfer_prefill.ragged_prefill(q, k, v, lengths, scale, 0, 0.0, with_lse=False)

    prefill(problem.rows[1])
    (planned,) = flashinfer_prefill._PLANNED.values()
    planned.copied = SimpleNamespace(synchronize=lambda: waits.append(len(calls.plans)))
    prefill(problem.rows[1])
    assert not waits, "the layers of a prefill wait for nothing"
    prefill(problem.rows[1].clone())
    assert waits == [1], "before the second plan"
    for i in range(flashinfer_prefill.MAX_WRAPPERS):
        prefill(problem.rows[1], i + 1.0)
    assert len(waits) == 2 and planned not in flashinfer_prefill._PLANNED.values(), "before it is dropped"
