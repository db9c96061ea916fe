"""Kernel providers: who can run an attention node or a delta rule node, and with which op.

A provider is a module with four functions (see ``contract.Provider``). What depends on a graph's lengths and page tables alone,
not on a layer, can be computed once for all layers by a plan op (see ``lowered.Lowered``).

Nothing of a provider's dependencies is imported before ``probe()``. ``docs/adding-a-provider.md`` shows how one is added.
"""

from __future__ import annotations

import importlib

from spec_compile.ops.providers.contract import AttentionNode, Availability, DeltaNode, Node, Provider
from spec_compile.ops.providers.lowered import Lowered, as_lowered, lowered_op

__all__ = [
    "PROVIDERS",
    "REGISTRY",
    "AttentionNode",
    "Availability",
    "DeltaNode",
    "Lowered",
    "Node",
    "Provider",
    "as_lowered",
    "delta_ops",
    "load",
    "load_for",
    "lowered_op",
    "names",
]

# Family of ops -> provider's name -> module, in no order of preference (that is passes/preference.py). A family is a kind of
# node, with a description of its own: recurrent states have other kernels than attention.
REGISTRY: dict[str, dict[str, str]] = {
    AttentionNode.FAMILY: {
        "torch": "spec_compile.ops.providers.torch_sdpa",
        "triton": "spec_compile.ops.providers.triton",
        "fa4": "spec_compile.ops.providers.fa4",
        "flashinfer": "spec_compile.ops.providers.flashinfer",
        "aiter": "spec_compile.ops.providers.aiter",
    },
    DeltaNode.FAMILY: {
        "torch": "spec_compile.ops.providers.delta_torch",
        "triton": "spec_compile.ops.providers.delta_triton",
        "flashinfer": "spec_compile.ops.providers.delta_flashinfer",
        "fla": "spec_compile.ops.providers.delta_fla",
    },
}

# The family that a provider's bare name speaks of. A kernel author's own module may be added here at run time:
# PROVIDERS["mine"] = "my_package.my_provider", then backend="mine".
PROVIDERS = REGISTRY[AttentionNode.FAMILY]


def names(node: Node) -> tuple[str, ...]:
    """Who may be asked to run ``node``."""
    return tuple(REGISTRY[node.FAMILY])


def load(name: str, family: str = AttentionNode.FAMILY) -> Provider:
    """The module of a family's provider called ``name``; raises ``KeyError`` for an unknown name."""
    return importlib.import_module(REGISTRY[family][name])


def delta_ops(name: str) -> tuple[str, ...]:
    """The gated delta rules that provider ``name`` has kernels for; raises ``KeyError`` for an unknown name."""
    return getattr(load(name, DeltaNode.FAMILY), "OPS", DeltaNode.OPS)


def load_for(node: Node, name: str) -> Provider:
    """The module of provider ``name`` that runs nodes of this kind; raises ``KeyError`` for an unknown name."""
    return load(name, node.FAMILY)
