"""Pass 4: give every attention node a provider, by hardware and by what the node needs.

Needs: a staged graph. Leaves true: every attention node carries ``meta["provider"]``; the graph's targets are untouched
(``lower`` replaces them), so the choice can be read and tested without any kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode
from spec_compile.passes.graph import StageGraph, fake

ATTENTION_OPS = ("attention", "mla_attention", "prefill_attention", "mla_prefill_attention")
STAGES = ("prefill", "verify", "draft")

# Best first, by vendor. A provider's own ``supports`` says what it cannot do; this says what is preferred.
_PREFERENCE = {"cpu": ("torch",), "nvidia": ("triton", "torch"), "amd": ("triton", "torch")}


@dataclass(frozen=True)
class Choice:
    """The provider of one kind of attention node in one stage, and why the others lost."""

    stage: str
    node: AttentionNode
    layers: tuple[int, ...]
    provider: str
    reason: str
    losers: dict[str, str] = field(default_factory=dict, hash=False)


def candidates(hardware: Hardware, backend: str | Mapping[str, str], stage: str) -> tuple[str, ...]:
    """Providers to try, best first: all of the hardware's with ``"auto"``, the named one alone otherwise.

    Raises:
        BackendError: an unknown provider or stage name.
    """
    if isinstance(backend, Mapping):
        unknown = sorted(set(backend) - set(STAGES))
        if unknown:
            raise BackendError(f"backend={dict(backend)!r}: unknown stages {unknown}; stages are {', '.join(STAGES)}.")
        backend = backend.get(stage, "auto")
    if backend == "auto":
        return _PREFERENCE[hardware.vendor]
    if backend not in providers.PROVIDERS:
        raise BackendError(
            f"backend={backend!r} is not a provider; choose 'auto', one of {', '.join(providers.PROVIDERS)}, "
            "or a dict of these per stage."
        )
    return (backend,)


def select_backend(graph: StageGraph, hardware: Hardware, backend: str | Mapping[str, str], page_size: int) -> list[Choice]:
    """Choose a provider for each attention node of ``graph``.

    Args:
        backend: ``"auto"``, a provider's name, or a dict of these by stage.
        page_size: slots in a cache page.

    Returns:
        One ``Choice`` per distinct node; layers that need the same share one.

    Raises:
        BackendError: no candidate can run a node; names the node and each candidate's reason.
    """
    names = candidates(hardware, backend, graph.stage)
    grouped: dict[AttentionNode, list[tuple[int, fx.Node]]] = {}
    for layer, node in enumerate(attention_nodes(graph)):
        grouped.setdefault(describe(node, graph.stage, page_size), []).append((layer, node))
    choices = []
    for description, members in grouped.items():
        layers = tuple(layer for layer, _ in members)
        choice = choose(description, layers, hardware, names)
        choices.append(choice)
        for _, node in members:
            node.meta["provider"] = choice.provider
            node.meta["attention_node"] = description
    graph.note("select_backend: " + "; ".join(f"{len(c.layers)} layers -> {c.provider}" for c in choices))
    return choices


def choose(node: AttentionNode, layers: tuple[int, ...], hardware: Hardware, names: tuple[str, ...]) -> Choice:
    """The first of ``names`` that is installed and supports ``node``; every other provider with its reason."""
    losers: dict[str, str] = {}
    for name in names:
        provider = providers.load(name)
        availability = provider.probe()
        reason = availability.problem if not availability.ok else provider.supports(node, hardware)
        if reason is None:
            why = "forced" if len(names) == 1 and hardware.is_cuda else f"first of {', '.join(names)} on {hardware.arch}"
            rest = {n: f"{name} comes first" for n in names if n != name and n not in losers}
            return Choice(node.stage, node, layers, name, why, losers | rest)
        losers[name] = reason
    tried = "\n".join(f"  {name}: {reason}" for name, reason in losers.items())
    raise BackendError(
        f"no provider for {node.op} in the {node.stage} graph (layers {_span(layers)}; head_dim {node.head_dim}, "
        f"{node.num_q_heads}/{node.num_kv_heads} heads, {node.dtype}) on {hardware.arch}:\n{tried}\n"
        "Use backend='auto', or another provider for this stage with backend={'" + node.stage + "': ...}."
    )


def _span(layers: tuple[int, ...]) -> str:
    return f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else str(layers[0])


def attention_nodes(graph: StageGraph) -> list[fx.Node]:
    """The generic attention nodes in layer order."""
    packets = {getattr(torch.ops.spec_compile, name) for name in ATTENTION_OPS}
    return [n for n in graph.gm.graph.nodes if n.op == "call_function" and _packet(n) in packets]


def _packet(node: fx.Node) -> object:
    """What a node calls: Dynamo writes an op's packet, providers name an overload."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def describe(node: fx.Node, stage: str, page_size: int) -> AttentionNode:
    """What a provider may know of an attention node, read from its fakes and constant arguments."""
    op = _packet(node).__name__
    packed = op in ("prefill_attention", "mla_prefill_attention")
    query = fake(node.args[0])
    if op in ("mla_attention", "mla_prefill_attention"):
        num_kv_heads, v_head_dim, window, softcap, sinks = 1, node.args[-1], 0, 0.0, None
        tree_mask = None if packed else node.args[5]
    else:
        num_kv_heads, v_head_dim = fake(node.args[1]).shape[-2], fake(node.args[2]).shape[-1]
        window, softcap, sinks = node.args[-3:]
        tree_mask = None if packed else node.args[7]
    return AttentionNode(
        op=op,
        stage=stage,
        batch=None if packed else int(query.shape[0]),
        num_tokens=None if packed else int(query.shape[1]),
        num_q_heads=int(query.shape[-2]),
        num_kv_heads=int(num_kv_heads),
        head_dim=int(query.shape[-1]),
        v_head_dim=int(v_head_dim),
        page_size=page_size,
        window=window,
        softcap=softcap,
        has_sinks=sinks is not None,
        is_tree=tree_mask is not None,
        dtype=query.dtype,
        kv_dtype=query.dtype,
    )
