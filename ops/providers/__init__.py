"""Kernel providers: who can run an attention node, and with which op.

A provider is a module with four functions (see ``Provider``). Nothing of a provider's dependencies is imported before
``probe()``. ``PROVIDERS`` lists their module names in no order of preference; preference is the selection pass's business.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

import torch

from spec_compile.hardware import Hardware

PROVIDERS = ("torch", "triton")
_MODULES = {"torch": "torch_sdpa", "triton": "triton"}


@dataclass(frozen=True)
class AttentionNode:
    """One attention call as far as a provider's choice may depend on it: shapes and constants, never data."""

    op: str  # "attention", "mla_attention", "prefill_attention" or "mla_prefill_attention"
    stage: str  # "prefill", "verify", "draft" or "draft_extend"
    batch: int | None  # rows; None in prefill, where it is dynamic
    num_tokens: int | None  # window tokens a row (N); None in prefill
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_size: int
    window: int
    softcap: float
    has_sinks: bool
    is_tree: bool
    dtype: torch.dtype
    kv_dtype: torch.dtype


@dataclass(frozen=True)
class Availability:
    """Result of ``probe()``: a version when usable, otherwise what is missing and the command that installs it."""

    version: str | None
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None


class Provider(Protocol):
    """What a provider module offers. See ``torch_sdpa.py`` for the smallest one."""

    NAME: str

    def probe(self) -> Availability:
        """Whether the provider can be imported here, without importing more than it must."""

    def supports(self, node: AttentionNode, hardware: Hardware) -> str | None:
        """None when the provider can run this node on this hardware, otherwise the reason why not."""

    def lower(self, node: AttentionNode) -> torch._ops.OpOverload:
        """The op that takes the generic op's place, with the same arguments."""

    def warm_up(self, node: AttentionNode, device: torch.device) -> None:
        """Build whatever must exist before CUDA-graph capture (JIT modules, autotuning)."""


def load(name: str) -> Provider:
    """The provider module called ``name``; raises ``KeyError`` for an unknown name."""
    return importlib.import_module(f"spec_compile.ops.providers.{_MODULES[name]}")
