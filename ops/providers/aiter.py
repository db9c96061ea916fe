"""The ``aiter`` provider: AMD's own kernels on ROCm. Its place in the table only; no op of this version calls them.

The package is ``amd-aiter``; ``aiter`` on PyPI is an unrelated asyncio helper under the same import name, so ``probe`` goes by
the distribution, never by ``import aiter``.
"""

from __future__ import annotations

import importlib.metadata

import torch

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops.providers.contract import AttentionNode, Availability
from spec_compile.ops.torch_private import OpOverload

NAME = "aiter"

_INSTALL = "pip install amd-aiter"
_ARCHS = ("gfx942", "gfx950")


def probe() -> Availability:
    """Whether AMD's aiter is installed; imports nothing."""
    if (version := _version("amd-aiter")) is not None:
        return Availability(version)
    if (unrelated := _version("aiter")) is not None:
        problem = f"the installed aiter {unrelated} is an unrelated package: pip uninstall aiter && {_INSTALL}"
        return Availability(None, problem)
    return Availability(None, f"amd-aiter is not installed: {_INSTALL}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def supports(node: AttentionNode, hardware: Hardware) -> str | None:
    """The reason why not; there always is one in this version."""
    if hardware.vendor != "amd":
        return f"aiter's kernels are for AMD GPUs, not for {hardware.arch}"
    if hardware.arch not in _ARCHS:
        return f"aiter's kernels are for {' and '.join(_ARCHS)}, not for {hardware.arch}"
    return f"this version of spec_compile does not call aiter's {node.stage} kernels yet"


def lower(node: AttentionNode) -> OpOverload:
    """Raises ``BackendError``: ``supports`` accepts nothing."""
    raise BackendError(f"aiter has no op for {node.op}: this version of spec_compile does not call its kernels yet.")


def warm_up(node: AttentionNode, device: torch.device) -> None:
    """Nothing to warm up."""
