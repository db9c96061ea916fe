"""A stage graph made callable: segments compiled by Inductor (each distinct one once), inputs bound to weights and caches."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import pathlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import spec_compile.ops
from spec_compile.hardware import Hardware
from spec_compile.ops.torch_private import (
    CustomGraphPass,
    FakeTensorMode,
    TracingContext,
    detect_fake_mode,
    inductor_compile,
    tracing,
)
from spec_compile.passes.graph import CacheSlot, RuntimeInput, StageGraph, fake, placeholders
from spec_compile.passes.partition import segment_key
from spec_compile.runtime.skinny_linears import Known, use_skinny_linears

Caches = dict[tuple[int, str], Tensor]  # (layer, "k" | "v" | "kv") -> [P, page_size, ...]


class CacheSalt(CustomGraphPass):
    """Does nothing but enter Inductor's disk-cache key: torch keys a custom op by its name only, so a changed op would
    meet a stale artifact (pytorch#160472). The salt is the library's version and the hash of its op sources."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, graph: fx.Graph) -> None:
        pass

    def uuid(self) -> str:
        return self.key


@functools.lru_cache(maxsize=1)
def source_hash() -> str:
    """sha256 over every source file of the op room."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(spec_compile.ops.__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@dataclass
class SegmentCompiler:
    """Compiles segments with Inductor on their first real inputs; the same segment of another layer or stage is free.

    Attributes:
        mode: ``"inductor"`` or ``"none"``.
        seconds: time spent tracing, compiling, choosing and building kernels.
        linears: what was measured of linear layers of a few tokens.
    """

    mode: str
    hardware: Hardware
    seconds: float = 0.0
    artifacts: dict[str, Callable] = field(default_factory=dict)
    linears: Known = field(default_factory=dict)

    def prepare(self, gm: fx.GraphModule) -> fx.GraphModule:
        """Replace every segment of a partitioned graph by its compiled form."""
        if self.mode == "none":
            return gm
        for call in [n for n in gm.graph.nodes if n.op == "call_module"]:
            if any(_is_row_index(arg) for arg in call.args):
                continue  # as many rows as prompts: a shape Dynamo did not see and Inductor would fix
            segment = gm.get_submodule(call.target)
            setattr(gm, call.target, CompiledSegment(segment, segment_key(segment), self))
        return gm

    def compile(self, key: str, segment: fx.GraphModule, args: tuple) -> Callable:
        """The artifact of ``segment``: for exactly these shapes, or for every packed length if one is symbolic."""
        if key in self.artifacts:
            return self.artifacts[key]
        with self.counting():
            salt = CacheSalt(f"spec_compile {source_hash()} {self.hardware.arch}")
            fakes = [fake(node) for node in placeholders(segment)]
            symbolic = any(isinstance(value, torch.SymInt) for value in fakes)
            examples = fakes if symbolic else [a.detach() if isinstance(a, Tensor) else a for a in args]
            fixed = {"post_grad_custom_pre_pass": salt} | (sort_options(segment) if symbolic else {})
            segment = copy.deepcopy(segment)  # which is changed below and by Inductor
            if self.hardware.vendor == "nvidia" and not symbolic:
                use_skinny_linears(segment, args, self.linears)
            self.artifacts[key] = compile_segment(segment, examples, fixed | _inductor_options(self.hardware))
        return self.artifacts[key]

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the time inside as compiling; what is counted within it counts once."""
        start, before = time.perf_counter(), self.seconds
        try:
            yield
        finally:
            self.seconds = before + time.perf_counter() - start


def compile_segment(
    segment: fx.GraphModule, examples: list, options: dict[str, object], mode: FakeTensorMode | None = None
) -> Callable:
    """Inductor with its disk cache: torch bypasses that unless a tracing context has a shape environment.

    Args:
        mode: of the fakes among ``examples``; None looks for it, or makes one.
    """
    mode = mode or detect_fake_mode(examples) or FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
    with tracing(TracingContext(mode)):
        return inductor_compile(segment, examples, options)


# A mixture of experts sorts its packed tokens by expert. Inductor's own sort, a persistent kernel, holds 512 elements; compiled
# for a symbolic length, more of them than that read out of bounds (seen on an H200 with torch 2.11; why it is chosen there is
# not established). Without persistent kernels aten sorts: tests/gpu/test_end_to_end.py, test_experts_of_a_long_prompt.
def sort_options(segment: fx.GraphModule) -> dict[str, object]:
    """Inductor's options for a segment of symbolic sizes, for the sake of its sorts."""
    sorts = any("sort" in getattr(node.target, "__name__", str(node.target)) for node in segment.graph.nodes)
    return {"triton.persistent_reductions": False} if sorts else {}


def _is_row_index(arg: object) -> bool:
    binding = arg.meta.get("binding") if isinstance(arg, fx.Node) else None
    return isinstance(binding, RuntimeInput) and binding.name == "logit_index"


def _inductor_options(hardware: Hardware) -> dict[str, object]:
    """On a GPU rounds are captured by us, and small independent kernels (query and key rotation) become one launch.

    Tried on an H200 and left out: programmatic dependent launch (``triton.enable_pdl``: 4.55 ms a step with and without), and
    for single tokens ``coordinate_descent_tuning``: its fused matrix-vector products took most of 22 to 30 s to tune (8B) and
    lost to cuBLAS beside ``skinny_linear`` in every segment, of a 4B hybrid in all but one that runs once.
    """
    return {"triton.cudagraphs": False, "combo_kernels": True} if hardware.is_cuda else {}


class CompiledSegment(nn.Module):
    """A segment that compiles itself on its first call."""

    def __init__(self, segment: fx.GraphModule, key: str, compiler: SegmentCompiler) -> None:
        super().__init__()
        object.__setattr__(self, "source", segment)  # not a submodule: its parameters are the caller's business
        self.key, self.compiler, self.artifact = key, compiler, None

    def forward(self, *args):
        if self.artifact is None:
            self.artifact = self.compiler.compile(self.key, self.source, args)
            object.__setattr__(self, "source", None)
        out = self.artifact(*args)
        # split_module expects a segment with one output to return it bare; Inductor's callables return a sequence.
        return out[0] if isinstance(out, list | tuple) and len(out) == 1 else out


@dataclass
class StageProgram:
    """A stage, ready to run: ``program(input_ids=…, position_ids=…, page_table=…, …)`` returns (logits or token ids, …).

    Attributes:
        graph: segments in the form that runs, attention ops still generic: what kernels are chosen for, again and again.
        gm: the same with the chosen providers' ops.
        bound: an argument for each input of ``gm``, runtime inputs as they are; empty before ``bind``.
    """

    graph: StageGraph
    gm: fx.GraphModule | None = None
    bound: list = field(default_factory=list)

    def install(self, lowered: StageGraph) -> None:
        """Run ``lowered`` from now on: a copy of ``graph`` with provider ops. Unbinds."""
        self.gm, self.bound = lowered.gm, []

    def bind(self, caches: Caches) -> None:
        """Fix every weight and cache; only runtime inputs stay open."""
        bindings = [node.meta["binding"] for node in placeholders(self.gm)]
        self.bound = [
            caches[b.layer, b.part] if isinstance(b, CacheSlot) else b if isinstance(b, RuntimeInput) else b.detach()
            for b in bindings
        ]

    @torch.no_grad()
    def __call__(self, **inputs: Tensor | int) -> tuple[Tensor, ...]:
        args = [inputs[b.name] if isinstance(b, RuntimeInput) else b for b in self.bound]
        return self.gm(*args)


def build_program(graph: StageGraph, compiler: SegmentCompiler) -> StageProgram:
    """The program of a partitioned graph, without kernels yet."""
    compiler.prepare(graph.gm)
    return StageProgram(graph)
