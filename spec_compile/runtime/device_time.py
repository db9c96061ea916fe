"""What something costs on the GPU: milliseconds by CUDA events, without the host's part."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

_REPEATS = 15


def graph_milliseconds(step: Callable[[], object]) -> float:
    """Milliseconds of ``step`` inside a CUDA graph, which is how rounds run; launching would hide the kernels' time.

    Raises:
        RuntimeError: ``step`` cannot be captured.
    """
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return eager_milliseconds(graph.replay)


def eager_milliseconds(step: Callable[[], object]) -> float:
    """Milliseconds between the moments at which the device begins and ends ``step``, launched from the host: the median."""
    step()
    times = []
    for _ in range(_REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
