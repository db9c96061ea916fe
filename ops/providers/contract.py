"""What a kernel provider is asked, and what it answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from spec_compile.hardware import Hardware
from spec_compile.ops.providers.lowered import Lowered
from spec_compile.ops.torch_private import OpOverload


@dataclass(frozen=True)
class AttentionNode:
    """One attention call as far as a provider's choice may depend on it: shapes and constants, never data."""

    FAMILY: ClassVar[str] = "attention"
    OPS: ClassVar[tuple[str, ...]] = ("attention", "mla_attention", "prefill_attention", "mla_prefill_attention")

    op: str  # one of OPS
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
    max_context: int | None = None  # most slots of a row, its window included; None before a pool exists

    @property
    def backend_key(self) -> str:
        """What ``backend``'s dict calls it."""
        return self.stage


@dataclass(frozen=True)
class DeltaNode:
    """One gated delta rule, likewise."""

    FAMILY: ClassVar[str] = "gated_delta_rule"
    OPS: ClassVar[tuple[str, ...]] = ("gdn_verify", "gdn_prefill")

    op: str  # one of OPS
    stage: str
    batch: int | None  # rows; None in prefill, where it is dynamic
    num_tokens: int | None  # window tokens a row (N); None in prefill
    num_k_heads: int
    num_v_heads: int
    head_dim: int
    v_head_dim: int
    is_tree: bool
    dtype: torch.dtype
    state_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # of A_log and dt_bias; None for ``dtype``

    @property
    def backend_key(self) -> str:
        """What ``backend``'s dict calls it."""
        return self.op


Node = AttentionNode | DeltaNode


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

    def supports(self, node: Node, hardware: Hardware) -> str | None:
        """None when the provider can run this node on this hardware, otherwise the reason why not."""

    def lower(self, node: Node) -> OpOverload | Lowered:
        """The op that takes the generic op's place: with the same arguments, or with a plan's outputs behind them."""

    def warm_up(self, node: Node, device: torch.device) -> None:
        """Build whatever must exist before CUDA-graph capture (JIT modules, autotuning)."""
