"""The ``aiter`` slot: it tells the two packages of that name apart, and says precisely why it runs nothing."""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import replace

import pytest

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops.providers import aiter
from spec_compile.passes.select_backend import choose
from spec_compile.support_matrix import MODES

MI300X, MI250X = Hardware("amd", "gfx942", 304, "MI300X"), Hardware("amd", "gfx90a", 104, "MI250X")


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_absent_it_gives_the_command(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch)
    assert not aiter.probe().ok and aiter.probe().problem.endswith("pip install amd-aiter")


def test_the_package_that_is_only_called_aiter_is_told_apart(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, aiter="0.13.20")
    problem = aiter.probe().problem
    assert "aiter 0.13.20 is an unrelated package" in problem and "pip install amd-aiter" in problem


def test_present_it_gives_its_version_and_imports_nothing(monkeypatch: pytest.MonkeyPatch):
    installed(monkeypatch, amd_aiter="0.1.7", aiter="0.13.20")
    assert aiter.probe().ok and aiter.probe().version == "0.1.7" and "aiter" not in sys.modules


@pytest.mark.parametrize(
    ("hardware", "reason"),
    [
        (Hardware("nvidia", "sm90", 132, "H200"), "AMD GPUs, not for sm90"),
        (Hardware("cpu", "cpu", 8, "CPU"), "AMD GPUs, not for cpu"),
        (MI250X, "gfx942 and gfx950, not for gfx90a"),
        (MI300X, "does not call aiter's verify kernels yet"),
    ],
)
def test_it_refuses_with_the_precise_reason(hardware: Hardware, reason: str):
    assert reason in aiter.supports(MODES["chain"], hardware)


def test_on_amd_it_comes_first_and_triton_runs():
    choice = choose(MODES["tree"], (0,), MI300X)
    assert choice.provider == "triton" and next(iter(choice.losers)) == "aiter"
    assert "does not call aiter's verify kernels yet" in choice.losers["aiter"]


def test_forcing_it_is_an_error_that_names_triton():
    node = replace(MODES["chain"], stage="draft")
    with pytest.raises(BackendError, match=r"aiter's draft kernels(.|\n)*nearest that can is triton"):
        choose(node, (0, 1), MI300X, "aiter")
    with pytest.raises(BackendError, match="no op for attention"):
        aiter.lower(node)
