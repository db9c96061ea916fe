"""Hand-made stage graphs for the pass tests: a plain function becomes what capture would hand over, and runs again.

``stage_graph(fn, "verify", x=..., weight=...)`` traces ``fn`` with one placeholder a keyword. What a keyword is given
says what the placeholder is bound to: ``Input("input_ids", example)`` to a runtime input, ``CacheSlot`` to a cache,
a tensor or parameter to itself. ``run`` evaluates a graph before or after any pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spec_compile.ops.providers import AttentionNode, Lowered
from spec_compile.passes.graph import CacheSlot, RuntimeInput, StageGraph, placeholders


@dataclass(frozen=True)
class Input:
    """A runtime input ``name`` of ``example``'s shape and type."""

    name: str
    example: Tensor


def stage_graph(fn: Callable[..., object], stage: str, **inputs: Input | CacheSlot | Tensor) -> StageGraph:
    """``fn`` as a captured graph: bindings on placeholders, fakes on every node, outputs in a tuple."""
    gm = _trace(fn, list(inputs))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for node in placeholders(gm):
        given = inputs[node.target]
        node.meta["binding"] = RuntimeInput(given.name) if isinstance(given, Input) else given
        example = given.example if isinstance(given, Input) else given
        example = torch.zeros(1, 1, 1, 1) if isinstance(example, CacheSlot) else example.detach()
        node.meta["example_value"] = mode.from_tensor(example)
    _propagate(gm, mode)
    return StageGraph(gm, stage)


def _trace(fn: Callable[..., object], inputs: list[str]) -> fx.GraphModule:
    """Calls ``fn`` with proxies by keyword (``symbolic_trace`` knows no ``**layers``)."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    result = fn(**{name: fx.Proxy(graph.placeholder(name), tracer) for name in inputs})
    result = result if isinstance(result, tuple) else (result,)
    graph.output(tuple(proxy.node for proxy in result))
    return fx.GraphModule(nn.Module(), graph)


def _propagate(gm: fx.GraphModule, mode: FakeTensorMode) -> None:
    def value(node: fx.Node) -> object:
        return node.meta["example_value"]

    with mode:
        for node in gm.graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            if node.op == "call_function":
                if isinstance(node.target, torch._ops.OpOverload):
                    node.target = node.target.overloadpacket  # as Dynamo writes custom ops
                node.meta["example_value"] = node.target(*args, **kwargs)
            elif node.op == "call_method":
                node.meta["example_value"] = getattr(args[0], node.target)(*args[1:], **kwargs)


def run(graph: StageGraph, caches: dict[tuple[int, str], Tensor] | None = None, **inputs: Tensor) -> tuple:
    """Evaluate ``graph`` over real tensors: caches by (layer, part), runtime inputs by name. Returns its outputs."""
    args = []
    for node in placeholders(graph.gm):
        binding = node.meta["binding"]
        if isinstance(binding, CacheSlot):
            args.append(caches[binding.layer, binding.part])
        elif isinstance(binding, RuntimeInput):
            args.append(inputs[binding.name])
        else:
            args.append(binding)
    with torch.no_grad():
        return graph.gm(*args)


def calls(graph: StageGraph) -> list[fx.Node]:
    return [n for n in graph.gm.graph.nodes if n.op in ("call_function", "call_method", "call_module")]


def name(node: fx.Node) -> str:
    """What a node calls, by its bare name: ``"linear"``, ``"attention_torch"``, ``"submod_0"``."""
    target = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
    return getattr(target, "__name__", str(target)).rsplit(".", 1)[-1]


def names(graph: StageGraph) -> list[str]:
    """What the graph calls, in order."""
    return [name(node) for node in calls(graph)]


def find(graph: StageGraph, wanted: str) -> list[fx.Node]:
    """The nodes that call ``wanted``."""
    return [node for node in calls(graph) if name(node) == wanted]


def runtime_inputs(graph: StageGraph) -> list[str]:
    """Names of the runtime inputs in placeholder order."""
    bindings = [n.meta["binding"] for n in placeholders(graph.gm)]
    return [b.name for b in bindings if isinstance(b, RuntimeInput)]


def bindings(graph: StageGraph) -> list:
    return [n.meta["binding"] for n in placeholders(graph.gm)]


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Attention calls, the way capture writes them


def attention_inputs(batch: int = 2, num_tokens: int = 3, heads: int = 4, kv_heads: int = 2, dim: int = 8) -> dict:
    """Keywords of ``stage_graph`` for one layer's attention over windows [batch, num_tokens]."""
    return {
        "q": Input("q", torch.zeros(batch, num_tokens, heads, dim)),
        "k": Input("k", torch.zeros(batch, num_tokens, kv_heads, dim)),
        "v": Input("v", torch.zeros(batch, num_tokens, kv_heads, dim)),
        "k_cache": CacheSlot(0, "k"),
        "v_cache": CacheSlot(0, "v"),
        "page_table": Input("page_table", torch.zeros(batch, 1, dtype=torch.int32)),
        "cache_len": Input("cache_len", torch.zeros(batch, dtype=torch.int32)),
    }


def mla_inputs(batch: int = 2, num_tokens: int = 3, heads: int = 4, latent: int = 6, rotary: int = 2) -> dict:
    """The same for latent attention."""
    return {
        "q": Input("q", torch.zeros(batch, num_tokens, heads, latent + rotary)),
        "kv": Input("kv", torch.zeros(batch, num_tokens, latent + rotary)),
        "kv_cache": CacheSlot(0, "kv"),
        "page_table": Input("page_table", torch.zeros(batch, 1, dtype=torch.int32)),
        "cache_len": Input("cache_len", torch.zeros(batch, dtype=torch.int32)),
    }


# ----------------------------------------------------------------------------------------------------------------------
# A provider with a plan


@torch.library.custom_op("spec_compile_tests::plan", mutates_args=())
def plan(page_table: Tensor, cache_len: Tensor, tree_mask: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    """The first visible slot of each row, int32 [B], and how many are visible."""
    first = (cache_len - window + 1).clamp(min=0) if window else torch.zeros_like(cache_len)
    return first, cache_len - first


@plan.register_fake
def _(page_table, cache_len, tree_mask, window):
    return torch.empty_like(cache_len), torch.empty_like(cache_len)


@torch.library.custom_op("spec_compile_tests::count", mutates_args=())
def count(page_table: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Prompt lengths: a plan with one output, over packed prompts."""
    return cu_seqlens.diff()


@count.register_fake
def _(page_table, cu_seqlens):
    return cu_seqlens.new_empty(cu_seqlens.shape[0] - 1)


@torch.library.custom_op("spec_compile_tests::planned_attention", mutates_args=("k_cache", "v_cache"))
def planned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cache_len: Tensor,
    tree_mask: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    first: Tensor,
    visible: Tensor,
) -> Tensor:
    """``attention`` that believes its plan: the lengths are ``first + visible``, not ``cache_len``."""
    out = torch.ops.spec_compile.attention(
        q, k, v, k_cache, v_cache, page_table, first + visible, tree_mask, scale, window, softcap, sinks
    )
    return out * (first + 1).to(out.dtype)[:, None, None, None]


@planned_attention.register_fake
def _(q, k, v, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks, first, visible):
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("spec_compile_tests::planned_prefill", mutates_args=("k_cache", "v_cache"))
def planned_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    lengths: Tensor,
) -> Tensor:
    """``prefill_attention`` whose boundaries come from its plan."""
    bounds = torch.cat([cu_seqlens[:1], lengths.cumsum(0).to(cu_seqlens.dtype)])
    return torch.ops.spec_compile.prefill_attention(
        q, k, v, k_cache, v_cache, page_table, bounds, scale, window, softcap, sinks
    )


@planned_prefill.register_fake
def _(q, k, v, k_cache, v_cache, page_table, cu_seqlens, scale, window, softcap, sinks, lengths):
    return q.new_empty(*q.shape[:2], v.shape[2])


def planning(node: AttentionNode) -> Lowered:
    """``lower`` of a provider whose layers share a plan by their window."""
    ops = torch.ops.spec_compile_tests
    if node.op == "prefill_attention":
        return Lowered(ops.planned_prefill.default, ops.count.default)
    return Lowered(ops.planned_attention.default, ops.plan.default, (node.window,))
