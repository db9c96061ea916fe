"""The passes in order, per stage: the whole way from a captured forward to a graph of provider ops, on one screen."""

from __future__ import annotations

from collections.abc import Mapping

from spec_compile.hardware import Hardware
from spec_compile.passes.fuse_linears import fuse_linears
from spec_compile.passes.graph import StageGraph
from spec_compile.passes.lower import lower
from spec_compile.passes.narrow_logits import narrow_logits
from spec_compile.passes.partition import partition
from spec_compile.passes.select_backend import Choice, select_backend
from spec_compile.passes.stage import stage


def run_passes(
    graph: StageGraph, *, hardware: Hardware, backend: str | Mapping[str, str], page_size: int, argmax: bool
) -> tuple[StageGraph, list[Choice]]:
    """From a captured graph to segments and provider ops.

    Args:
        argmax: the stage's caller reads greedy token ids, not logits.

    Returns:
        The partitioned graph, and which provider runs which attention nodes.
    """
    graph = stage(graph)  # window or packed prompts
    graph = narrow_logits(graph, argmax=argmax)  # before fusion, which must not see the head twice
    graph = fuse_linears(graph)
    choices = select_backend(graph, hardware, backend, page_size)
    graph = lower(graph)
    return partition(graph), choices
