"""The passes in order, per stage: the whole way from a captured forward to a graph of provider ops, on one screen.

They run in two groups. ``prepare`` ends with segments that can be compiled, attention still generic. ``choose_kernels`` must
know the cache (page size, type, most slots a row): it runs when a KV pool exists, and again when a larger one replaces it.
"""

from __future__ import annotations

import torch

from spec_compile.hardware import Hardware
from spec_compile.passes.backend_option import Backend
from spec_compile.passes.fold_gates import fold_gates
from spec_compile.passes.fuse_linears import fuse_linears
from spec_compile.passes.graph import StageGraph, finish
from spec_compile.passes.lower import lower
from spec_compile.passes.narrow_logits import narrow_logits
from spec_compile.passes.partition import partition
from spec_compile.passes.ring_tables import ring_tables
from spec_compile.passes.select_backend import Choice, Tuner, select_backend
from spec_compile.passes.stage import stage
from spec_compile.passes.tap_hidden_states import tap_hidden_states


def prepare(graph: StageGraph, *, argmax: bool, tree: bool = False, num_taps: int = 0) -> StageGraph:
    """From a captured causal language model to segments between generic attention ops and delta rules.

    Args:
        argmax: the stage's caller reads greedy token ids, not logits.
        tree: windows are trees of drafts.
        num_taps: hidden states that were captured for a draft.
    """
    graph = fold_gates(graph)
    graph = stage(graph, tree=tree)  # window or packed prompts
    graph = tap_hidden_states(graph, num_taps)
    graph = narrow_logits(graph, argmax=argmax)  # before fusion, which must not see the head twice
    graph = fuse_linears(graph)
    return partition(graph)


def prepare_head(graph: StageGraph, *, num_outputs: int, tree: bool = False) -> StageGraph:
    """From a captured draft head, which narrows its own logits, to segments between generic attention ops.

    Args:
        num_outputs: outputs of the captured forward; what follows them is Dynamo's.
        tree: as in ``prepare``.
    """
    graph = stage(graph, tree=tree)
    output = graph.gm.graph.output_node()
    output.args = (tuple(output.args[0][:num_outputs]),)
    graph = fuse_linears(finish(graph))
    return partition(graph)


def prepare_context(graph: StageGraph) -> StageGraph:
    """From captured writes of a DFlash head's context to segments between them.

    Its linears stay single: they all read one tensor, and as one GEMM they would tear keys and values out of the queries'
    fused weights in the head's other graphs.
    """
    graph = stage(graph)
    graph.gm.graph.output_node().args = ((),)
    return partition(finish(graph))


def choose_kernels(
    graph: StageGraph,
    *,
    hardware: Hardware,
    backend: Backend,
    page_size: int,
    kv_dtype: torch.dtype | None = None,
    max_context: int | None = None,
    tuner: Tuner | None = None,
) -> tuple[StageGraph, list[Choice]]:
    """A copy of a prepared graph with provider ops in it; the segments' modules are shared with ``graph``.

    Args: as ``select_backend``.

    Returns:
        The lowered graph, and which provider runs which attention nodes.
    """
    graph = graph.copy()
    if max_context is not None:
        graph = ring_tables(graph, page_size, max_context // page_size)
    choices = select_backend(graph, hardware, backend, page_size, kv_dtype=kv_dtype, max_context=max_context, tuner=tuner)
    return lower(graph), choices
