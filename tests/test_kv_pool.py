"""The paged key/value pool: what each layer stores, who owns which page, and when it grows."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from spec_compile.errors import BackendError
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode, torch_sdpa
from spec_compile.passes.select_backend import Choice
from spec_compile.runtime.kv_pool import KVPool, LayerLayout, allocate, layouts
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler

CPU = torch.device("cpu")


def choice(layers: tuple[int, ...], op: str = "attention", **changes: object) -> Choice:
    node = {
        "op": op, "stage": "verify", "batch": 2, "num_tokens": 4, "num_q_heads": 8, "num_kv_heads": 2, "head_dim": 16,
        "v_head_dim": 12, "page_size": 64, "window": 0, "softcap": 0.0, "has_sinks": False, "is_tree": False,
        "dtype": torch.bfloat16, "kv_dtype": torch.bfloat16,
    }  # fmt: skip
    return Choice("verify", AttentionNode(**{**node, **changes}), layers, "torch", "")


# ----------------------------------------------------------------------------------------------------------------------
# Layouts


def test_a_layer_stores_its_key_and_value_heads():
    (layout,) = layouts([choice((0,))])
    assert layout == LayerLayout(0, (("k", (2, 16)), ("v", (2, 12))), torch.bfloat16)


@pytest.mark.parametrize("op", ["mla_attention", "mla_prefill_attention"])
def test_a_latent_layer_stores_one_vector(op: str):
    (layout,) = layouts([choice((3,), op, num_kv_heads=1, head_dim=576, v_head_dim=512)])
    assert layout.layer == 3 and layout.shapes == (("kv", (576,)),)


def test_layers_of_every_choice_come_in_order():
    """Layers alternate between providers or needs; the pool is by layer all the same."""
    mixed = layouts([choice((1, 3), head_dim=32), choice((0, 2, 4))])
    assert [layout.layer for layout in mixed] == [0, 1, 2, 3, 4]
    assert [dict(layout.shapes)["k"] for layout in mixed] == [(2, 16), (2, 32), (2, 16), (2, 32), (2, 16)]


def test_the_cache_has_the_caches_own_type():
    (layout,) = layouts([choice((0,), kv_dtype=torch.float8_e4m3fn)])
    assert layout.dtype == torch.float8_e4m3fn


# ----------------------------------------------------------------------------------------------------------------------
# Pages


def pool(rows: int = 3, capacity: int = 64, page_size: int = 16) -> KVPool:
    two = [LayerLayout(0, (("k", (2, 4)), ("v", (2, 3))), torch.float32), LayerLayout(1, (("kv", (5,)),), torch.float16)]
    return allocate(two, rows, capacity, page_size, CPU)


def test_pages_belong_to_one_row_each_and_page_zero_to_none():
    table = pool().page_table
    assert table.shape == (3, 4) and table.dtype == torch.int32 and table.is_contiguous()
    assert sorted(table.flatten().tolist()) == list(range(1, 13))


def test_every_layers_cache_has_every_page():
    made = pool()
    assert {key: tuple(cache.shape) for key, cache in made.caches.items()} == {
        (0, "k"): (13, 16, 2, 4),
        (0, "v"): (13, 16, 2, 3),
        (1, "kv"): (13, 16, 5),
    }
    assert made.caches[1, "kv"].dtype == torch.float16
    assert made.nbytes == 13 * 16 * (2 * 4 * 4 + 2 * 3 * 4 + 5 * 2)
    assert all(int(cache.count_nonzero()) == 0 for cache in made.caches.values()), "a masked slot must be finite"


def test_one_page_a_row():
    made = pool(rows=2, capacity=48, page_size=48)
    assert made.page_table.tolist() == [[1], [2]] and made.caches[0, "k"].shape == (3, 48, 2, 4)


def gemma3_layers(heads: int = 8, dim: int = 256, window: int = 1024) -> list[LayerLayout]:
    """48 layers of Gemma-3-12B's sizes; every sixth sees everything."""
    shapes = (("k", (heads, dim)), ("v", (heads, dim)))
    return [LayerLayout(i, shapes, torch.bfloat16, 0 if i % 6 == 5 else window) for i in range(48)]


def test_window_layers_hold_a_window_and_a_round_of_a_long_text():
    """32K tokens of two rows: 5.1 times less, by formula on the real sizes and by allocation on smaller heads."""
    rows, capacity, page = 2, 32768, 64
    slots = {0: rows * capacity + page, 1024: rows * 1152 + page}  # 1024 + 128, a whole number of pages
    for (heads, dim), device in (((8, 256), torch.device("meta")), ((1, 2), CPU)):
        windowed, slot_bytes = gemma3_layers(heads, dim), 2 * 2 * heads * dim
        small = allocate(windowed, rows, capacity, page, device)
        assert small.nbytes == slot_bytes * sum(slots[layer.window] for layer in windowed)
        whole = allocate([LayerLayout(x.layer, x.shapes, x.dtype) for x in windowed], rows, capacity, page, device)
        assert whole.nbytes == slot_bytes * 48 * slots[0]
        assert 5.0 < whole.nbytes / small.nbytes < 5.2
    assert small.caches[0, "k"].shape[0] == 2 * 18 + 1 and small.caches[5, "k"].shape[0] == 2 * 512 + 1


def test_caches_by_their_page_table():
    made = allocate(gemma3_layers(1, 2, 100)[4:7], 2, 1024, 64, CPU)
    (ring, windowed), (table, whole) = made.by_table(made.page_table[:1])
    assert torch.equal(table, made.page_table[:1]) and ring.tolist() == [[1, 2, 3, 4] * 4]
    assert [len(windowed), len(whole)] == [4, 2] and whole[0] is made.caches[5, "k"]
    one_page = allocate(gemma3_layers(1, 2), 2, 512, 512, CPU)  # a row of a CPU: nothing to go round
    assert [len(caches) for _, caches in one_page.by_table(one_page.page_table)] == [96]


# ----------------------------------------------------------------------------------------------------------------------
# Growing


def runner(hardware: Hardware) -> ModelRunner:
    options = RuntimeOptions(hardware, SegmentCompiler("none", hardware), backend="torch", page_size=16)
    return ModelRunner(tiny_model("llama", num_hidden_layers=1), "verify", options)


def test_the_pool_grows_and_never_shrinks():
    grown = runner(Hardware("cpu", "cpu", 1, "CPU")).programs
    assert grown.reserve(2, 40), "the first pool"
    first = grown.pool
    assert not grown.reserve(1, 40) and not grown.reserve(2, 8) and grown.pool is first, "it fits"
    assert grown.reserve(1, 50) and (grown.pool.rows, grown.pool.capacity) == (2, 50), "longer, and no fewer rows"
    assert grown.reserve(5, 10) and (grown.pool.rows, grown.pool.capacity) == (5, 50)
    assert grown.pool.page_size == 50, "a CPU row has one page"


def test_programs_follow_the_pool():
    grown = runner(Hardware("cpu", "cpu", 1, "CPU"))
    program = grown.window_program(2, 3, argmax=True)
    for capacity in (32, 64):
        grown.programs.reserve(2, capacity)
        assert program.bound == [], "nothing can run over the old pool's memory"
        assert grown.window_program(2, 3, argmax=True) is program, "captured and compiled once"
        later = grown.window_program(2, 2, argmax=True)
        caches = {id(cache) for cache in grown.programs.pool.caches.values()}
        for bound in (program.bound, later.bound, grown.prefill_program(argmax=False).bound):
            assert caches <= {id(value) for value in bound}


class Asked:
    """The torch provider, which remembers what it was asked for."""

    def __init__(self) -> None:
        self.lowered: list[AttentionNode] = []
        self.warmed: list[AttentionNode] = []

    probe, supports = staticmethod(torch_sdpa.probe), staticmethod(torch_sdpa.supports)

    def lower(self, node: AttentionNode) -> object:
        self.lowered.append(node)
        return torch_sdpa.lower(node)

    def warm_up(self, node: AttentionNode, device: torch.device) -> None:
        self.warmed.append(node)


def test_a_larger_pool_has_kernels_chosen_anew(monkeypatch: pytest.MonkeyPatch):
    asked = Asked()
    monkeypatch.setattr(providers, "load", lambda *_: asked)
    grown = runner(Hardware("nvidia", "sm90", 1, "a GPU in name"))
    assert [n.max_context for n in asked.lowered] == [None] and asked.warmed == [], "there is no pool to choose for yet"
    segments = []
    for capacity in (32, 64):
        asked.lowered.clear(), asked.warmed.clear()
        grown.programs.reserve(2, capacity)
        assert grown.programs.choices == {}, "what was chosen for the old pool holds no more"
        for _ in range(3):
            program = grown.window_program(2, 3, argmax=True)
        (node,) = asked.lowered
        assert asked.warmed == [node] and (node.stage, node.num_tokens, node.max_context) == ("verify", 3, capacity)
        (choice,) = grown.programs.choices["verify, 2 rows × 3 tokens"]
        assert choice.node == node
        segments.append([id(module) for module in program.gm.children()])
    assert segments[0] and segments[0] == segments[1], "segments stay what they were"


def test_gpu_rows_are_paged_and_their_capacity_is_whole_pages():
    paged = runner(Hardware("nvidia", "sm90", 1, "a GPU in name")).programs
    paged.reserve(2, 40)
    assert (paged.pool.page_size, paged.pool.capacity, paged.pool.page_table.shape) == (16, 48, (2, 3))


def test_release_frees_the_pool():
    freed = runner(Hardware("cpu", "cpu", 1, "CPU")).programs
    freed.reserve(1, 16)
    freed.release()
    assert freed.pool is None and freed.built == {} and freed.captured == {}


def test_kernels_that_cannot_be_built_name_their_provider_and_the_way_out(monkeypatch):
    def broken(node: AttentionNode, device: torch.device) -> None:
        raise RuntimeError("Ninja build failed with status 255\nand much more")

    monkeypatch.setattr(torch_sdpa, "warm_up", broken)
    cpu = Hardware("cpu", "cpu", 1, "CPU")
    runner = ModelRunner(tiny_model("llama"), "verify", RuntimeOptions(cpu, SegmentCompiler("none", cpu)))
    runner.programs.reserve(1, 64)
    with pytest.raises(
        BackendError, match=r"torch could not be made ready for attention in verify graphs: RuntimeError: Ninja build .* 255"
    ):
        runner.window_program(1, 2, argmax=True)
