"""Kernel providers: who can run an attention node or a delta rule node, and with which op.

A provider is a module with four functions (see ``Provider``). What depends on a graph's lengths and page tables alone, not
on a layer, can be computed once for all layers by a plan op (see ``Lowered``).

Nothing of a provider's dependencies is imported before ``probe()``. ``docs/adding-a-provider.md`` shows how one is added.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spec_compile.hardware import Hardware
from spec_compile.ops.torch_private import OpOverload, schema_of

# Name -> module, in no order of preference (that is passes/preference.py). A kernel author's own module may be added here at
# run time: PROVIDERS["mine"] = "my_package.my_provider", then backend="mine".
PROVIDERS: dict[str, str] = {
    "torch": "spec_compile.ops.providers.torch_sdpa",
    "triton": "spec_compile.ops.providers.triton",
    "fa4": "spec_compile.ops.providers.fa4",
    "flashinfer": "spec_compile.ops.providers.flashinfer",
    "aiter": "spec_compile.ops.providers.aiter",
}

# The same for gated delta rules: recurrent states have other kernels than attention.
DELTA_PROVIDERS: dict[str, str] = {
    "torch": "spec_compile.ops.providers.delta_torch",
    "triton": "spec_compile.ops.providers.delta_triton",
    "flashinfer": "spec_compile.ops.providers.delta_flashinfer",
    "fla": "spec_compile.ops.providers.delta_fla",
}


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
    max_context: int | None = None  # most slots of a row, its window included; None before a pool exists

    @property
    def backend_key(self) -> str:
        """What ``backend``'s dict calls it."""
        return self.stage


@dataclass(frozen=True)
class DeltaNode:
    """One gated delta rule, likewise."""

    op: str  # "gdn_verify" or "gdn_prefill"
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


# The arguments of an attention op that belong to the rows of the batch, not to a layer.
ROW_ARGUMENTS = ("page_table", "cache_len", "cu_seqlens", "tree_mask")


@dataclass(frozen=True)
class Lowered:
    """What takes a generic attention op's place.

    Attributes:
        op: the generic op's arguments, then the plan's outputs.
        plan: called as ``plan(*row_arguments, *plan_args)`` before the first layer that needs it; layers of equal ``plan``,
            ``plan_args`` and row arguments share its outputs, one tensor or a tuple of tensors. Functional, without host
            sync where its graph is captured. Row arguments, in this order: ``page_table, cache_len, tree_mask`` of a window
            op (``tree_mask`` None for a chain), ``page_table, cu_seqlens`` of a prefill op.
        plan_args: ints, floats and bools.
    """

    op: OpOverload
    plan: OpOverload | None = None
    plan_args: tuple[int | float | bool, ...] = ()

    def row_arguments(self, args: tuple) -> tuple:
        """Those of the generic op's ``args`` that the plan takes."""
        names = [argument.name for argument in schema_of(self.op).arguments]
        return tuple(arg for name, arg in zip(names, args, strict=False) if name in ROW_ARGUMENTS)

    def __call__(self, *args: object) -> Tensor:
        """One call of the generic op, planned for itself alone: for warming up, testing and timing."""
        return self.op(*args, *self._planned(args))

    def over_layers(self, layers: Sequence[tuple]) -> None:
        """A call for every layer's arguments, planned once for all: what a graph does."""
        planned = self._planned(layers[0])
        for args in layers:
            self.op(*args, *planned)

    def _planned(self, args: tuple) -> tuple[Tensor, ...]:
        if self.plan is None:
            return ()
        planned = self.plan(*self.row_arguments(args), *self.plan_args)
        return (planned,) if isinstance(planned, Tensor) else tuple(planned)


def as_lowered(result: OpOverload | Lowered) -> Lowered:
    """What ``Provider.lower`` returned, with a bare op as ``Lowered``."""
    return result if isinstance(result, Lowered) else Lowered(result)


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


def names(node: Node) -> tuple[str, ...]:
    """Who may be asked to run ``node``."""
    return tuple(DELTA_PROVIDERS if isinstance(node, DeltaNode) else PROVIDERS)


def load(name: str) -> Provider:
    """The attention provider's module called ``name``; raises ``KeyError`` for an unknown name."""
    return importlib.import_module(PROVIDERS[name])


def load_for(node: Node, name: str) -> Provider:
    """The module of provider ``name`` that runs nodes of this kind; raises ``KeyError`` for an unknown name."""
    return importlib.import_module(DELTA_PROVIDERS[name]) if isinstance(node, DeltaNode) else load(name)
