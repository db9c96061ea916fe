"""CUDA graphs: one memory pool and one stream for every captured round."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class CapturedRound:
    """A recorded round and what it cost."""

    name: str
    graph: torch.cuda.CUDAGraph
    nbytes: int
    seconds: float
    result: object  # what the recorded call returned: its tensors hold the last replay's values


@dataclass
class GraphCache:
    """Captured rounds by key. They never run concurrently, so they share one memory pool and need only the largest's.

    Attributes:
        device: where everything runs.
    """

    device: torch.device
    rounds: dict[tuple, CapturedRound] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(self.device)

    def replay(self, key: tuple) -> object:
        """Enqueue a captured round on the current stream; the tensors it returns hold its values when it has run."""
        self.rounds[key].graph.replay()
        return self.rounds[key].result

    def capture(self, key: tuple, name: str, step: Callable[[], object]) -> None:
        """Record ``step``, which must leave the state as it was (see ``DecodeState``): it runs twice before.

        Raises:
            torch.OutOfMemoryError: the graph does not fit.
        """
        start = time.perf_counter()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # JIT builds, autotuning and lazy CUDA set-up must happen before capture
                step()
        self.stream.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = step()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        nbytes = max(0, torch.cuda.memory_reserved(self.device) - before)
        self.rounds[key] = CapturedRound(name, graph, nbytes, time.perf_counter() - start, result)

    def clear(self) -> None:
        """Forget every graph; their pool is released with them."""
        self.rounds.clear()
        self.pool = torch.cuda.graph_pool_handle()
