"""``partition``: segments between attention ops, each distinct one recognised by its key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from stage_graphs import Input, bindings, find, name, names, parameter, planning, run, stage_graph
from torch import Tensor, fx

from spec_compile.hardware import Hardware
from spec_compile.ops.providers import torch_sdpa
from spec_compile.passes.graph import CacheSlot, StageGraph, placeholders
from spec_compile.passes.lower import lower
from spec_compile.passes.node_description import describe
from spec_compile.passes.partition import partition, segment_key
from spec_compile.passes.select_backend import select_backend

CPU = Hardware("cpu", "cpu", 4, "CPU")
HEADS, DIM = 2, 4
HIDDEN = HEADS * DIM
PAGE_SIZE = 8
ATTENTION = "attention"


pytestmark = pytest.mark.usefixtures("fresh_seed")


def deep_model(depth: int, window: int = 0, every: int = 1) -> StageGraph:
    """A miniature of what capture makes of a model of ``depth`` equal layers.

    Every ``every``-th layer slides over ``window`` tokens.
    """

    def model(x, table, lens, head, **layers):
        h = x + 1
        for i in range(depth):
            w, k_cache, v_cache = (layers[f"{part}{i}"] for part in ("w", "k_cache", "v_cache"))
            q = F.linear(h * 0.5, w).unflatten(-1, (HEADS, DIM))
            caches = (k_cache, v_cache, table, lens)
            slides = window if i % every == 0 else 0
            out = torch.ops.spec_compile.attention(q, q, q + 1, *caches, None, 0.5, slides, 0.0, None)
            h = h + F.silu(out.flatten(2))
        return F.linear(torch.relu(h), head)

    layers = {f"w{i}": parameter(HIDDEN, HIDDEN) for i in range(depth)}
    layers |= {f"{part}_cache{i}": CacheSlot(i, part) for i in range(depth) for part in ("k", "v")}
    return stage_graph(
        model,
        "verify",
        x=Input("x", torch.zeros(2, 3, HIDDEN)),
        table=Input("page_table", torch.zeros(2, 1, dtype=torch.int32)),
        lens=Input("cache_len", torch.zeros(2, dtype=torch.int32)),
        head=parameter(5, HIDDEN),
        **layers,
    )


def lowered(graph: StageGraph) -> StageGraph:
    """A copy of ``graph`` with provider ops, in which form alone it may run."""
    graph = graph.copy()
    select_backend(graph, CPU, "auto", PAGE_SIZE)
    return lower(graph)


def caches(depth: int) -> dict[tuple[int, str], Tensor]:
    return {(i, part): torch.zeros(3, PAGE_SIZE, HEADS, DIM) for i in range(depth) for part in ("k", "v")}


def values() -> dict[str, Tensor]:
    return {
        "x": torch.randn(2, 3, HIDDEN),
        "page_table": torch.tensor([[2], [1]], dtype=torch.int32),
        "cache_len": torch.tensor([4, 0], dtype=torch.int32),
    }


def segments(graph: StageGraph) -> list[fx.GraphModule]:
    return [graph.gm.get_submodule(n.target) for n in graph.gm.graph.nodes if n.op == "call_module"]


def keys(graph: StageGraph) -> list[str]:
    return [segment_key(segment) for segment in segments(graph)]


# ----------------------------------------------------------------------------------------------------------------------
# The cut


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_cut_graph_computes_the_same_bits(depth: int):
    graph, inputs = deep_model(depth, window=4), values()
    before, after = caches(depth), caches(depth)
    expected = run(lowered(graph), before, **inputs)
    out = run(lowered(partition(graph)), after, **inputs)
    assert torch.equal(out[0], expected[0])
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_top_graph_holds_attention_ops_and_segments_only():
    graph = partition(deep_model(3))
    called = [name for name in names(graph) if name != "getitem"]
    assert called == ["submod_0", ATTENTION, "submod_2", ATTENTION, "submod_4", ATTENTION, "submod_6"]
    for segment in segments(graph):
        assert not any("attention" in str(n.target) for n in segment.graph.nodes if n.op != "placeholder")
    assert {name for name, _ in graph.gm.named_children()} == {n.target for n in graph.gm.graph.nodes if "submod" in n.name}


def test_placeholders_keep_their_bindings():
    graph = deep_model(2)
    before = bindings(graph)
    after = bindings(partition(graph))
    assert len(after) == len(before)
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_no_segment_sees_a_cache_a_page_table_or_a_length():
    """They enter attention ops alone, so Inductor can neither copy nor allocate anything of a cache's size."""
    graph = partition(deep_model(3))
    hidden_from_segments = {"page_table", "cache_len"}
    for node in placeholders(graph.gm):
        binding = node.meta["binding"]
        if isinstance(binding, CacheSlot) or getattr(binding, "name", None) in hidden_from_segments:
            assert node.users and all(user in find(graph, ATTENTION) for user in node.users)


def test_attention_ops_keep_what_later_passes_read_of_them():
    graph = partition(deep_model(2, window=4))
    nodes = [describe(n, "verify", PAGE_SIZE) for n in find(graph, ATTENTION)]
    assert [(n.batch, n.num_tokens, n.num_q_heads, n.head_dim, n.window) for n in nodes] == [(2, 3, HEADS, DIM, 4)] * 2
    assert [n.args[3].meta["binding"] for n in find(graph, ATTENTION)] == [CacheSlot(0, "k"), CacheSlot(1, "k")]


def test_every_value_in_the_top_graph_has_its_fake():
    graph = deep_model(3)
    shapes = {n.name: n.meta["example_value"].shape for n in graph.gm.graph.nodes if n.op == "call_function"}
    values = [n.meta["example_value"] for n in partition(graph).gm.graph.nodes if n.op not in ("placeholder", "output")]
    assert len(values) > 6 and all(isinstance(v, Tensor | tuple) for v in values)
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    assert {v.shape for v in flat} <= set(shapes.values())


def test_choosing_again_leaves_the_segments_as_they_are(monkeypatch: pytest.MonkeyPatch):
    """What a larger pool asks for: new kernels between the same compiled segments."""
    graph = partition(deep_model(3))
    before = lowered(graph)
    with monkeypatch.context() as patch:
        patch.setattr(torch_sdpa, "lower", planning)
        after = lowered(graph)
    assert names(before).count("attention_torch") == 3 and names(after).count("planned_attention") == 3
    assert names(graph).count(ATTENTION) == 3, "the generic graph is still there"
    assert [id(x) for x in segments(before)] == [id(x) for x in segments(after)] == [id(x) for x in segments(graph)]


def test_attention_ops_may_stand_first_last_and_side_by_side():
    def bare(q, k_cache, v_cache, k_cache1, v_cache1, table, lens):
        op = torch.ops.spec_compile.attention
        out = op(q, q, q, k_cache, v_cache, table, lens, None, 0.5, 0, 0.0, None)
        return op(out, q, q, k_cache1, v_cache1, table, lens, None, 0.5, 0, 0.0, None)

    graph = stage_graph(
        bare,
        "verify",
        q=Input("x", torch.zeros(2, 3, HEADS, DIM)),
        k_cache=CacheSlot(0, "k"),
        v_cache=CacheSlot(0, "v"),
        k_cache1=CacheSlot(1, "k"),
        v_cache1=CacheSlot(1, "v"),
        table=Input("page_table", torch.zeros(2, 1, dtype=torch.int32)),
        lens=Input("cache_len", torch.zeros(2, dtype=torch.int32)),
    )
    inputs = values() | {"x": torch.randn(2, 3, HEADS, DIM)}
    expected = run(lowered(graph), caches(2), **inputs)
    out = run(lowered(partition(graph)), caches(2), **inputs)
    assert names(graph) == [ATTENTION, ATTENTION] and torch.equal(out[0], expected[0])


# ----------------------------------------------------------------------------------------------------------------------
# Plans


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch provider's layers need plans, one for each window."""
    monkeypatch.setattr(torch_sdpa, "lower", planning)


@pytest.mark.parametrize("depth,every,kinds", [(1, 1, 1), (5, 1, 1), (5, 2, 2), (4, 3, 2)])
def test_plans_stand_in_the_top_graph_and_leave_the_segments_alone(depth: int, every: int, kinds: int, planned: None):
    graph = deep_model(depth, window=4, every=every)
    inputs, before, after = values(), caches(depth), caches(depth)
    expected = run(lowered(graph), before, **inputs)

    cut = lowered(partition(graph))

    assert len(find(cut, "plan")) == kinds and len(find(cut, "planned_attention")) == depth
    assert len(segments(cut)) == depth + 1 and len(set(keys(cut))) == min(3, depth + 1)
    assert not any("plan" in str(n.target) for segment in segments(cut) for n in segment.graph.nodes)
    for plan in find(cut, "plan"):
        assert all(name(output) == "getitem" for output in plan.users)
        assert all(name(user) == "planned_attention" for output in plan.users for user in output.users)
    assert torch.equal(run(cut, after, **inputs)[0], expected[0])
    assert all(torch.equal(after[key], before[key]) for key in before)


# ----------------------------------------------------------------------------------------------------------------------
# Equal segments are one artifact


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_a_deeper_model_has_no_more_distinct_segments(depth: int):
    graph = partition(deep_model(depth))
    assert len(keys(graph)) == depth + 1 and len(set(keys(graph))) == 3
    assert graph.report[-1] == f"partition: {depth + 1} segments, 3 distinct"


def test_segments_of_equal_models_have_equal_keys():
    """Weights are inputs: another model, or another stage, of the same shape is served by the same artifacts."""
    assert keys(partition(deep_model(4))) == keys(partition(deep_model(4)))


def test_equal_keys_mean_exchangeable_segments():
    graph = partition(deep_model(4))
    _, second, third, *_ = segments(graph)
    args = [torch.randn(tuple(n.meta["example_value"].shape)) for n in placeholders(second)]
    for a, b in zip(second(*args), third(*args), strict=True):
        assert torch.equal(a, b)


def single(fn: Callable, **shapes: Tensor) -> str:
    """The key of ``fn`` as a segment."""
    return segment_key(stage_graph(fn, "verify", **{n: Input(n, t) for n, t in shapes.items()}).gm)


ROW = torch.zeros(2, 6)


def test_a_key_does_not_depend_on_names():
    def first(x, y):
        return x.relu() + y

    def second(left, right):
        renamed = left.relu()
        return renamed + right

    assert single(first, x=ROW, y=ROW) == single(second, left=ROW, right=ROW)


@pytest.mark.parametrize(
    "one,other",
    [
        ((lambda x: x + 1, ROW), (lambda x: x + 2, ROW)),
        ((lambda x: x + 1, ROW), (lambda x: x + 1.0, ROW)),
        ((lambda x: x + 1, ROW), (lambda x: x - 1, ROW)),
        ((lambda x: x.relu(), ROW), (lambda x: torch.relu(x), ROW)),
        ((lambda x: x.sum(-1), ROW), (lambda x: x.sum(-1, keepdim=True), ROW)),
        ((lambda x: x + 1, ROW), (lambda x: x + 1, torch.zeros(3, 6))),
        ((lambda x: x + 1, ROW), (lambda x: x + 1, ROW.double())),
        ((lambda x: x + 1, ROW), (lambda x: x + 1, torch.zeros(6, 2).t())),
        ((lambda x: (x + 1, x), ROW), (lambda x: (x, x + 1), ROW)),
        ((lambda x: x.to(torch.float64), ROW), (lambda x: x.to(torch.bfloat16), ROW)),
    ],
    ids=["constant", "type", "op", "kind", "keyword", "shape", "dtype", "stride", "outputs", "dtype argument"],
)
def test_whatever_changes_the_artifact_changes_the_key(one, other):
    assert single(one[0], x=one[1]) != single(other[0], x=other[1])


def test_which_input_goes_where_is_part_of_the_key():
    assert single(lambda x, y: x - y, x=ROW, y=ROW) != single(lambda x, y: y - x, x=ROW, y=ROW)
    assert single(lambda x, y: x * y, x=ROW, y=ROW) != single(lambda x, y: x * x + 0 * y, x=ROW, y=ROW)


def test_a_string_argument_is_not_taken_for_a_node():
    def rounded(x, y):
        return torch.div(x, y, rounding_mode="floor"), y

    key = single(rounded, x=ROW, y=ROW)
    assert "'floor'" in key and "'%0'" not in key
