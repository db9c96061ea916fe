"""``spec-compile doctor`` tries what it says: versions that were tested, and a call that has to run in rounds."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from spec_compile import doctor, handle
from spec_compile.versions import TESTED


def test_the_self_test_runs_rounds_and_compares_texts() -> None:
    before = torch.random.get_rng_state()
    check = doctor.self_test()
    assert check.status == "ok" and "rounds on" in check.detail
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_call_that_runs_plain_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when transformers gives the model an input that nobody knows: everything imports, nothing is accelerated."""
    monkeypatch.setattr(handle, "why_plain", lambda *args: "model inputs ['cache'] are not accelerated")
    check = doctor.self_test()
    assert check.status == "problem" and "plain transformers" in check.detail and "['cache']" in check.detail and check.fix


def test_a_text_that_differs_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle.Transcript, "sequences", lambda self: torch.zeros(1, 48, dtype=torch.int64))
    check = doctor.self_test()
    assert check.status == "problem" and "differs" in check.detail


def test_a_release_in_the_range_that_was_not_tested_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    middle = "5.20.1"
    assert middle not in TESTED["transformers"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: middle if name == "transformers" else real(name))
    (check,) = [check for check in doctor._versions() if check.name == "transformers"]
    assert check.status == "optional" and middle in check.detail and TESTED["transformers"][-1] in check.detail
    assert check.fix.startswith("pip install")
