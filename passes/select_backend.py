"""Pass 7: give every attention and delta rule node a provider, by hardware and by what the node needs.

Needs: a staged graph, cut or not. Leaves true: every such node carries ``meta["provider"]`` and
``meta["attention_node"]``; the graph's targets are untouched (``lower`` replaces them), so the choice can be read and tested
without any kernel. What is preferred where stands in ``preference.py``; what a provider cannot do it says itself.

A stage may be forced to a provider of its own (a hybrid, as SGLang's prefill and decode backends are: PR 9573). Stages meet
only in the paged cache, whose layout is the same for all of them. Whatever else a provider reads (folded page tables, lengths
that include the window, packed masks, the fill value of padding rows) it derives inside its own stage's graph from that
graph's ``page_table`` and ``cache_len`` (``providers.Lowered``), so one stage cannot be run with another's metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode, DeltaNode, Node
from spec_compile.ops.torch_private import OpOverload
from spec_compile.passes.graph import CacheSlot, StageGraph, fake
from spec_compile.passes.preference import STAGES, rule_for

ATTENTION_OPS = ("attention", "mla_attention", "prefill_attention", "mla_prefill_attention")
DELTA_OPS = ("gdn_verify", "gdn_prefill")  # also what ``backend``'s dict calls them
AUTO, TUNE = "auto", "tune"

Backend = str | Mapping[str, str]


@dataclass(frozen=True)
class Choice:
    """The provider of one kind of attention node in one stage, and why the others lost."""

    stage: str
    node: Node
    layers: tuple[int, ...]
    provider: str
    reason: str
    losers: dict[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Measured:
    """What a tuner found out about a node's candidates.

    Attributes:
        microseconds: of one call, by provider.
        failed: why a candidate could not be timed, by provider.
        source: when and how, for ``explain()``.
    """

    microseconds: Mapping[str, float]
    failed: Mapping[str, str]
    source: str


Tuner = Callable[[Node, tuple[str, ...]], Measured]


# ----------------------------------------------------------------------------------------------------------------------
# What the user asked for


def check_backend(backend: Backend) -> None:
    """Look at all of ``backend``, so that a typing error shows before anything is compiled.

    Raises:
        BackendError: an unknown provider or stage name; lists the known ones. Or neither a name nor a dict of names.
    """
    if not isinstance(backend, str | Mapping):
        raise BackendError(f"backend={backend!r}: pass 'auto', 'tune', a provider's name, or a dict of these per stage.")
    if isinstance(backend, Mapping):
        stages = (*STAGES, *DELTA_OPS)
        unknown = sorted(set(backend) - set(stages), key=str)
        if unknown:
            raise BackendError(f"backend={dict(backend)!r}: unknown stages {unknown}; stages are {', '.join(stages)}.")
    for stage, name in backend.items() if isinstance(backend, Mapping) else ((None, backend),):
        known = providers.DELTA_PROVIDERS if stage in DELTA_OPS else providers.PROVIDERS
        if isinstance(name, str) and delta_only(name):
            if stage in DELTA_OPS or f"gdn_{stage}" in DELTA_OPS:
                continue
            ways = " or ".join(f"backend={{{op!r}: {name!r}}}" for op in DELTA_OPS)
            where = "attention" if stage is None else f"the {stage} stage, which has none of its own"
            raise BackendError(f"backend={name!r} runs gated delta rules, not {where}; say which ones: {ways}.")
        if not isinstance(name, str) or name not in (AUTO, TUNE, *known):
            where = f" for {stage}" if stage in DELTA_OPS else ""
            raise BackendError(
                f"backend={name!r} is not a provider{where}; choose 'auto', 'tune', one of {', '.join(known)}, "
                "or a dict of these per stage."
            )


def check_delta_rules(backend: Backend) -> None:
    """For a model without gated delta nets: what ``backend`` says about them would say nothing.

    Raises:
        BackendError: it names a provider of theirs.
    """
    for stage, name in backend.items() if isinstance(backend, Mapping) else ():
        if stage in DELTA_OPS or delta_only(name):
            raise BackendError(
                f"backend={dict(backend)!r}: {stage!r} names {name!r} for gated delta nets, and this model has none: leave "
                "that entry out."
            )


def check_draft_stages(backend: Backend) -> None:
    """For a call without a draft model or head: what ``backend`` says about their graphs would say nothing.

    Raises:
        BackendError: it names one of their stages.
    """
    for stage, name in backend.items() if isinstance(backend, Mapping) else ():
        if stage in ("draft", "draft_extend"):
            raise BackendError(
                f"backend={dict(backend)!r}: {stage!r} names {name!r} for a draft model or head, and this call has none: leave "
                "that entry out, or pass one as draft=."
            )


def wanted(backend: Backend, stage: str) -> str:
    """What ``backend`` says about ``stage``: a provider's name, ``"auto"`` or ``"tune"``.

    A dict's ``draft`` speaks for ``draft_extend`` too unless that has its own entry; stages it does not name are automatic.
    A bare provider's name speaks of attention: delta rules, a dict's ``gdn_verify`` and ``gdn_prefill``, stay automatic. A name
    that no attention provider has speaks of its stage's delta rules: ``{"prefill": "fla"}`` is ``{"gdn_prefill": "fla"}``.

    Raises:
        BackendError: as ``check_backend``.
    """
    check_backend(backend)
    if isinstance(backend, str):
        return AUTO if stage in DELTA_OPS and backend != TUNE else backend
    if stage in DELTA_OPS:
        name = backend.get(stage.removeprefix("gdn_"), AUTO)
        return backend.get(stage, name if delta_only(name) else AUTO)
    if stage == "draft_extend" and stage not in backend:
        stage = "draft"
    name = backend.get(stage, AUTO)
    return AUTO if delta_only(name) else name


def delta_only(name: str) -> bool:
    """Whether ``name`` is a provider of gated delta rules and of nothing else."""
    return name in providers.DELTA_PROVIDERS and name not in providers.PROVIDERS


# ----------------------------------------------------------------------------------------------------------------------
# The pass


def select_backend(
    graph: StageGraph,
    hardware: Hardware,
    backend: Backend = AUTO,
    page_size: int = 64,
    *,
    kv_dtype: torch.dtype | None = None,
    max_context: int | None = None,
    tuner: Tuner | None = None,
) -> list[Choice]:
    """Choose a provider for each attention and delta rule node of ``graph``.

    Args:
        backend: ``"auto"``, ``"tune"``, a provider's name, or a dict of these by stage.
        page_size: slots in a cache page.
        kv_dtype: type of the cache; None for the queries'.
        max_context: most slots of a row, where a pool exists.
        tuner: measures candidates for ``"tune"``; without one that is ``"auto"``.

    Returns:
        One ``Choice`` per distinct node; layers that need the same share one.

    Raises:
        BackendError: no candidate can run a node, or not the forced one; names the node, the reasons and the way out.
    """
    grouped: dict[Node, list[tuple[int, fx.Node]]] = {}
    for node in provided_nodes(graph):
        description = describe(node, graph.stage, page_size, kv_dtype, max_context)
        grouped.setdefault(description, []).append((_layer(node), node))
    choices = []
    for description, members in grouped.items():
        layers = tuple(layer for layer, _ in members)
        choice = choose(description, layers, hardware, wanted(backend, description.backend_key), tuner)
        choices.append(choice)
        for _, node in members:
            node.meta["provider"] = choice.provider
            node.meta["attention_node"] = description
    graph.note("select_backend: " + "; ".join(f"{len(c.layers)} layers -> {c.provider}" for c in choices))
    return choices


def choose(node: Node, layers: tuple[int, ...], hardware: Hardware, want: str = AUTO, tuner: Tuner | None = None) -> Choice:
    """The provider of ``node``: what ``want`` forces, measures, or leaves to the table. Raises as ``select_backend``."""
    if want == TUNE and tuner is not None and hardware.is_cuda:
        return _choose_fastest(node, layers, hardware, tuner)
    if want in (AUTO, TUNE):
        choice = _choose_preferred(node, layers, hardware)
        if want == AUTO:
            return choice
        when = "nothing was measured yet" if hardware.is_cuda else "tuning measures GPUs only"
        return Choice(choice.stage, node, layers, choice.provider, f"{when}: {choice.reason}", choice.losers)
    reason = refusal(want, node, hardware)
    if reason is not None:
        raise BackendError(
            f"backend={want!r} cannot run {_call(node, layers)} on {hardware.arch}: {reason}\n" + _way_out(want, node, hardware)
        )
    losers = {name: "not asked for" for name in providers.names(node) if name != want}
    return Choice(node.stage, node, layers, want, f"forced by backend={want!r}", losers)


def refusal(name: str, node: Node, hardware: Hardware) -> str | None:
    """None when ``name`` can run ``node`` here, else why not: what it cannot do, or how to install it."""
    provider = providers.load_for(node, name)
    return provider.supports(node, hardware) or provider.probe().problem


def _choose_preferred(node: Node, layers: tuple[int, ...], hardware: Hardware) -> Choice:
    rule = rule_for(node, hardware)
    losers: dict[str, str] = {}
    for name in rule.providers:
        reason = refusal(name, node, hardware)
        if reason is None:
            why = f"first of {', '.join(rule.providers)} on {hardware.arch}; {rule.reason}"
            return Choice(node.stage, node, layers, name, why, losers | _behind(name, losers, rule.providers, node, hardware))
        losers[name] = reason
    raise _nobody(node, layers, hardware, losers)


def _behind(winner: str, losers: Mapping[str, str], order: tuple[str, ...], node: Node, hardware: Hardware) -> dict[str, str]:
    """A reason for everyone whom the choice did not reach; asks what they support, but probes nobody."""
    rest = [n for n in (*order, *providers.names(node)) if n != winner and n not in losers]
    return {
        name: providers.load_for(node, name).supports(node, hardware)
        or (f"{winner} comes first" if name in order else f"not in the order for {hardware.arch}")
        for name in dict.fromkeys(rest)
    }


def _choose_fastest(node: Node, layers: tuple[int, ...], hardware: Hardware, tuner: Tuner) -> Choice:
    order = rule_for(node, hardware).providers
    losers = {name: reason for name in order if (reason := refusal(name, node, hardware)) is not None}
    able = tuple(name for name in order if name not in losers)
    if not able:
        raise _nobody(node, layers, hardware, losers)
    if len(able) == 1:
        losers |= _behind(able[0], losers, order, node, hardware)
        return Choice(node.stage, node, layers, able[0], f"the only one that can on {hardware.arch}", losers)
    measured = tuner(node, able)
    losers |= measured.failed
    times = {name: time for name, time in measured.microseconds.items() if name in able}
    if not times:
        choice = _choose_preferred(node, layers, hardware)
        why = f"nothing could be timed ({next(iter(measured.failed.values()))}): {choice.reason}"
        return Choice(node.stage, node, layers, choice.provider, why, choice.losers | measured.failed)
    winner = min(times, key=times.__getitem__)
    losers |= {name: f"{time:.1f} µs" for name, time in times.items() if name != winner}
    losers |= _behind(winner, losers, order, node, hardware)
    why = f"fastest, {times[winner]:.1f} µs a call; {measured.source}"
    return Choice(node.stage, node, layers, winner, why, losers)


def _nobody(node: Node, layers: tuple[int, ...], hardware: Hardware, losers: Mapping[str, str]) -> BackendError:
    tried = "\n".join(f"  {name}: {reason}" for name, reason in losers.items())
    return BackendError(
        f"no provider for {_call(node, layers)} on {hardware.arch}:\n{tried}\n"
        "Install one of those that are only missing, or change what the node needs (page_size, kv_cache_dtype, dtype)."
    )


def _way_out(forced: str, node: Node, hardware: Hardware) -> str:
    """Whom to use instead: the first in the table's order that can, else the first that could once it is installed."""
    missing = ""
    for name in rule_for(node, hardware).providers:
        provider = providers.load_for(node, name)
        if name == forced or provider.supports(node, hardware) is not None:
            continue
        problem = provider.probe().problem
        if problem is None:
            entry = f"backend={{{node.backend_key!r}: {name!r}}}"
            return f"The nearest that can is {name}: {entry} (other stages: automatic), or backend='auto'."
        missing = missing or f"The nearest that could is {name}, but: {problem}"
    return missing or "No provider can."


def _call(node: Node, layers: tuple[int, ...]) -> str:
    """A node in words, for errors."""
    return f"{node.op} in the {node.stage} graph (layers {span(layers)}; {needs(node)})"


def span(layers: tuple[int, ...]) -> str:
    """Layer numbers in words: ``"0–31"``, ``"0, 2, 4, …, 30"``, ``"3"``."""
    first, last = layers[0], layers[-1]
    if len(layers) == 1:
        return str(first)
    if len(layers) == last - first + 1:
        return f"{first}–{last}"
    return ", ".join(map(str, layers)) if len(layers) <= 4 else f"{layers[0]}, {layers[1]}, {layers[2]}, …, {last}"


def needs(node: Node) -> str:
    """What a node asks of a kernel, in words."""
    if isinstance(node, DeltaNode):
        words = [f"{node.num_v_heads}/{node.num_k_heads} value/key heads × {node.v_head_dim}/{node.head_dim}"]
        words += [str(node.dtype).removeprefix("torch."), f"{str(node.state_dtype).removeprefix('torch.')} states"]
        words += [f"{node.batch} rows × {node.num_tokens} tokens"] if node.batch is not None else []
        return ", ".join(words + (["a tree"] if node.is_tree else []))
    head = f"{node.head_dim}" if node.head_dim == node.v_head_dim else f"{node.head_dim}/{node.v_head_dim}"
    words = [f"{node.num_q_heads}/{node.num_kv_heads} heads × {head}", str(node.dtype).removeprefix("torch.")]
    words += [f"{str(node.kv_dtype).removeprefix('torch.')} cache"] if node.kv_dtype != node.dtype else []
    words += [f"{node.batch} rows × {node.num_tokens} tokens"] if node.batch is not None else []
    words += ["a tree"] if node.is_tree else []
    words += [f"window {node.window}"] if node.window else []
    words += ["sinks"] if node.has_sinks else []
    words += [f"softcap {node.softcap:g}"] if node.softcap else []
    words += [f"pages of {node.page_size}"]
    words += [f"at most {node.max_context} slots a row"] if node.max_context is not None else []
    return ", ".join(words)


# ----------------------------------------------------------------------------------------------------------------------
# The nodes of a graph that kernels are chosen for


def provided_nodes(graph: StageGraph) -> list[fx.Node]:
    """The generic attention and delta rule nodes in layer order."""
    return [n for n in graph.gm.graph.nodes if needs_provider(n)]


def needs_provider(node: fx.Node) -> bool:
    """Whether ``node`` calls a generic attention or delta rule op."""
    packets = {getattr(torch.ops.spec_compile, name) for name in (*ATTENTION_OPS, *DELTA_OPS)}
    return node.op == "call_function" and _packet(node) in packets


def _layer(node: fx.Node) -> int:
    """The layer whose cache or states a node reads."""
    bindings = (arg.meta.get("binding") for arg in node.args if isinstance(arg, fx.Node))
    return next(binding.layer for binding in bindings if isinstance(binding, CacheSlot))


def _packet(node: fx.Node) -> object:
    """What a node calls: Dynamo writes an op's packet, providers name an overload."""
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target


def describe(
    node: fx.Node,
    stage: str,
    page_size: int,
    kv_dtype: torch.dtype | None = None,
    max_context: int | None = None,
) -> Node:
    """What a provider may know of a node, read from its fakes and constant arguments."""
    op = _packet(node).__name__
    if op in DELTA_OPS:
        return _describe_delta(node, op, stage)
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
        kv_dtype=kv_dtype or query.dtype,
        max_context=max_context,
    )


def _describe_delta(node: fx.Node, op: str, stage: str) -> DeltaNode:
    query, value = fake(node.args[0]), fake(node.args[2])
    window = op == "gdn_verify"
    return DeltaNode(
        op=op,
        stage=stage,
        batch=int(query.shape[0]) if window else None,
        num_tokens=int(query.shape[1]) if window else None,
        num_k_heads=int(query.shape[-2]),
        num_v_heads=int(value.shape[-2]),
        head_dim=int(query.shape[-1]),
        v_head_dim=int(value.shape[-1]),
        is_tree=window and node.args[11] is not None,
        dtype=query.dtype,
        weight_dtype=fake(node.args[5]).dtype,
    )
