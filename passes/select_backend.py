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
from spec_compile.ops.providers import Node
from spec_compile.passes.backend_option import AUTO, TUNE, Backend, wanted
from spec_compile.passes.graph import StageGraph
from spec_compile.passes.node_description import describe, layer_of, provided_nodes
from spec_compile.passes.node_words import call_in_words
from spec_compile.passes.preference import rule_for


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
        grouped.setdefault(description, []).append((layer_of(node), node))
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
            f"backend={want!r} cannot run {call_in_words(node, layers)} on {hardware.arch}: {reason}\n"
            + _way_out(want, node, hardware)
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
    raise _no_provider(node, layers, hardware, losers)


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
        raise _no_provider(node, layers, hardware, losers)
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


def _no_provider(node: Node, layers: tuple[int, ...], hardware: Hardware, losers: Mapping[str, str]) -> BackendError:
    tried = "\n".join(f"  {name}: {reason}" for name, reason in losers.items())
    return BackendError(
        f"no provider for {call_in_words(node, layers)} on {hardware.arch}:\n{tried}\n"
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
