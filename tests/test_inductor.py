"""Segments under Inductor: the same text, shared artifacts, no cache in sight, and a disk cache that notices changed ops."""

from __future__ import annotations

import math
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import trace_once
from tiny import left_padded, tiny_model
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code
from transformers import PreTrainedModel

from spec_compile import ops, spec_compile
from spec_compile.passes.graph import CacheSlot, placeholders
from spec_compile.runtime.engine import Engine
from spec_compile.runtime.program import CacheSalt, CompiledSegment, SegmentCompiler, compile_segment, source_hash

BATCH, NEW_TOKENS = 2, 20


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    print("seed", seed)  # shown when a test fails
    random.seed(seed)


def compiled(num_layers: int) -> PreTrainedModel:
    model = tiny_model("llama", num_hidden_layers=num_layers)
    return spec_compile(model, draft="ngram", min_ngram=1, num_steps=3, adaptive=False, compile="inductor", progress=False)


def generate(model: PreTrainedModel, seed: int = 0, length: int = 11) -> torch.Tensor:
    return model.generate(**left_padded(BATCH, length, seed=seed), max_new_tokens=NEW_TOKENS, do_sample=False)


def engine_of(model: PreTrainedModel) -> Engine:
    return model.spec._engine


@pytest.fixture(scope="module")
def private_cache() -> Iterator[None]:
    """A disk cache of this module's own, so that code is generated here and hits are its own artifacts."""
    with fresh_cache():
        yield


class TwoModels:
    """Models of 2 and 5 layers, compiled one after the other, and what Inductor wrote for the first."""

    def __init__(self) -> None:
        counters.clear()
        self.models = {2: compiled(2)}
        self.texts = {}
        self.texts[2], self.code = run_and_get_code(generate, self.models[2])
        self.misses_of_first = counters["inductor"]["fxgraph_cache_miss"]
        self.models[5] = compiled(5)
        self.texts[5] = generate(self.models[5])
        self.misses_of_both = counters["inductor"]["fxgraph_cache_miss"]
        self.hits = counters["inductor"]["fxgraph_cache_hit"]


@pytest.fixture(scope="module")
def two(private_cache: None) -> TwoModels:
    return TwoModels()


# ----------------------------------------------------------------------------------------------------------------------
# End to end


@pytest.mark.slow
@pytest.mark.parametrize("num_layers", [2, 5])
def test_greedy_text_equals_plain_generate(two: TwoModels, num_layers: int):
    plain = generate(tiny_model("llama", num_hidden_layers=num_layers))
    assert torch.equal(two.texts[num_layers], plain)
    assert two.models[num_layers].spec.stats().mode == "rounds"


@pytest.mark.slow
def test_the_number_of_artifacts_does_not_grow_with_depth(two: TwoModels):
    """First segment, the one between any two attentions, last segment."""
    artifacts = {depth: engine_of(model).compiler.artifacts for depth, model in two.models.items()}
    assert len(artifacts[2]) == len(artifacts[5]) == 3
    assert set(artifacts[2]) == set(artifacts[5]), "and they are the same ones"


@pytest.mark.slow
def test_equal_segments_of_another_model_come_from_the_disk_cache(two: TwoModels):
    """Same salt, same graphs: the 5-layer model of the next process starts warm."""
    assert two.misses_of_first == 3, "the first model's segments had to be compiled"
    assert two.misses_of_both == 3 and two.hits == 3


@pytest.mark.slow
def test_fifty_rounds_over_changing_prompts_compile_nothing(two: TwoModels, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trace_once, "sharing", False)
    model, done = two.models[2], 0
    engine = engine_of(model)

    def built() -> list[int]:
        misses, traced = counters["inductor"]["fxgraph_cache_miss"], counters["stats"]["calls_captured"]
        return [misses, traced, len(engine.compiler.artifacts), len(engine.target.programs.built), len(engine._warmed)]

    before = built()
    while done < 50:
        generate(model, seed=random.randrange(1 << 30), length=random.randrange(3, 60))
        done += model.spec.stats().rounds
    assert built() == before


# ----------------------------------------------------------------------------------------------------------------------
# No cache is allocated, copied or even seen


def allocated(code: list[str]) -> list[int]:
    """Elements of every buffer that generated code allocates."""
    shapes = re.findall(r"empty_strided\w*\(\(([\d, ]*)\)", "\n".join(code))
    return [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]


@pytest.mark.slow
def test_generated_code_allocates_nothing_of_a_caches_size(two: TwoModels):
    sizes = allocated(two.code)
    cache = min(c.numel() for c in engine_of(two.models[2]).target.programs.pool.caches.values())
    row = cache // (BATCH + 1)
    assert len(two.code) == 3 and sizes, "there is code, and it allocates"
    assert max(sizes) < row / 8, "not even one row of one cache"


@pytest.mark.slow
def test_the_search_finds_a_copied_cache(private_cache: None):
    """The control of the test above."""
    cache = torch.zeros(3, 1024, 2, 16)
    _, code = run_and_get_code(torch.compile(lambda c: c + 1), cache)
    assert max(allocated(code)) == cache.numel()


@pytest.mark.slow
def test_no_compiled_segment_takes_a_cache(two: TwoModels):
    for model in two.models.values():
        engine = engine_of(model)
        caches = {cache.data_ptr() for cache in engine.target.programs.pool.caches.values()}
        programs = [program for program in engine.target.programs.built.values() if program.bound]
        assert len(programs) >= 2, "prefill and a window"
        for program in programs:
            bound = dict(zip(placeholders(program.gm), program.bound, strict=True))
            for call in segment_calls(program.gm):
                given = [bound.get(arg) for arg in call.args]
                assert not any(isinstance(arg.meta.get("binding"), CacheSlot) for arg in call.args if arg in bound)
                assert not any(isinstance(g, torch.Tensor) and g.data_ptr() in caches for g in given)


def segment_calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "call_module"]


@pytest.mark.slow
def test_every_segment_of_a_window_is_compiled(two: TwoModels):
    engine = engine_of(two.models[5])
    (window,) = [program for key, program in engine.target.programs.built.items() if key[0] == "verify"]
    segments = [window.gm.get_submodule(call.target) for call in segment_calls(window.gm)]
    assert len(segments) == 6 and all(isinstance(s, CompiledSegment) and s.artifact is not None for s in segments)


@pytest.mark.slow
def test_compiled_prompts_of_a_recurrent_target_give_the_same_text(private_cache: None):
    """As on a GPU, where prompts are compiled too: one artifact a segment for every length, over views of fused linears."""
    reference, model = tiny_model("qwen3_5_text"), tiny_model("qwen3_5_text")
    model = spec_compile(model, draft=None, compile="none", progress=False)
    target = engine_of(model).target
    target.programs._prefill_compiler = SegmentCompiler("inductor", target.options.hardware)
    target.programs.built.clear()
    for length in (11, 23):
        inputs = left_padded(BATCH, length)
        plain = reference.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), plain)
    (prompts,) = [program for key, program in target.programs.built.items() if key[0] == "prefill"]
    assert any(getattr(segment, "artifact", None) is not None for segment in prompts.gm.children())


# ----------------------------------------------------------------------------------------------------------------------
# The disk cache sees a changed op


def compile_with(salt: str) -> tuple[int, int]:
    """Hits and misses of compiling one fixed graph under ``salt``."""
    before = counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]
    graph = fx.symbolic_trace(lambda x: (torch.sin(x) * 2 + x,))
    artifact = compile_segment(graph, [torch.randn(8)], {"post_grad_custom_pre_pass": CacheSalt(salt)})
    x = torch.randn(8)
    torch.testing.assert_close(artifact(x)[0], torch.sin(x) * 2 + x)
    after = counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.slow
def test_the_salt_is_part_of_the_disk_caches_key(private_cache: None):
    assert compile_with("version 1") == (0, 1)
    assert compile_with("version 1") == (1, 0), "the same salt hits"
    assert compile_with("version 2") == (0, 1), "another salt misses"
    assert compile_with("version 1") == (1, 0), "the old artifact is still there"


@pytest.fixture
def copied_ops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The op room's sources in a place where they may be changed."""
    room = Path(ops.__file__).parent
    shutil.copytree(room, tmp_path / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(ops, "__file__", str(tmp_path / "ops" / "__init__.py"))
    return tmp_path / "ops"


def fresh_hash() -> str:
    return source_hash.__wrapped__()


def test_a_copy_of_the_ops_has_the_same_hash(copied_ops: Path, monkeypatch: pytest.MonkeyPatch):
    copied = fresh_hash()
    monkeypatch.undo()
    assert copied == fresh_hash() == source_hash()


@pytest.mark.parametrize("file", ["attention.py", "providers/torch_sdpa.py", "kernels/attention_decode.py"])
def test_an_edited_op_changes_the_hash(copied_ops: Path, file: str):
    before, path = fresh_hash(), copied_ops / file
    path.write_text(path.read_text() + "\n# one more line\n")
    assert fresh_hash() != before


def test_an_added_and_a_renamed_file_change_the_hash(copied_ops: Path):
    hashes = [fresh_hash()]
    (copied_ops / "new_op.py").write_text("")
    hashes.append(fresh_hash())
    (copied_ops / "new_op.py").rename(copied_ops / "newer_op.py")
    hashes.append(fresh_hash())
    assert len(set(hashes)) == 3
