"""Caches of a narrower type than the model: what they hold, that everyone sees just that, and the option end to end."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tiny import left_padded, tiny_model
from torch import Tensor

from spec_compile import SpecConfig, spec_compile
from spec_compile.errors import ConfigError
from spec_compile.hardware import Hardware
from spec_compile.ops import attention as generic
from spec_compile.ops.attention import as_cached, to_cache
from spec_compile.ops.kv_cache import kv_write, kv_write_packed
from spec_compile.ops.providers import AttentionNode, torch_sdpa, triton

FP8 = torch.float8_e4m3fn
HEADS, KV_HEADS, DIM, V_DIM, LATENT = 6, 2, 8, 5, 6
PAGE = 4


pytestmark = pytest.mark.usefixtures("fresh_seed")


# ----------------------------------------------------------------------------------------------------------------------
# What a cache holds

CODES = torch.arange(256, dtype=torch.uint8)
VALUES = CODES.view(FP8).double()  # of every e4m3 code, two of them NaN
FINITE = CODES[~VALUES.isnan() & (CODES != 128)]  # without -0


def nearest(x: Tensor) -> Tensor:
    """The nearest e4m3 number, ties to the even code, found by looking at all of them: float64 like ``x``."""
    table = VALUES[FINITE.long()]  # [254]
    distance = (x.double()[..., None] - table).abs()
    farther = (distance > distance.amin(-1, keepdim=True)).int()
    return table[(2 * farther + FINITE % 2).argmin(-1)]


def test_values_are_rounded_to_the_nearest_and_saturate():
    x = torch.cat(
        [torch.randn(4000) * 2.0 ** torch.randint(-12, 12, (4000,)), torch.tensor([448.0, 449.0, 464.0, 1e9, -1e9, 0.0])]
    )
    x = torch.cat([x, VALUES[FINITE.long()].float()])
    held = to_cache(x, FP8)
    assert held.dtype == FP8 and torch.equal(held.double(), nearest(x))
    assert held.double().abs().max() == 448
    assert bool(x[:4000].abs().gt(464).any()), "there was something to saturate: a plain conversion makes NaN of it"


def test_infinity_saturates_and_nan_stays():
    held = to_cache(torch.tensor([float("inf"), float("-inf"), float("nan")]), FP8).float()
    assert held[:2].tolist() == [448.0, -448.0] and bool(held[2].isnan())


def test_float16_saturates_too_and_wider_types_take_everything():
    assert to_cache(torch.tensor([1e6, -1e6]), torch.float16).tolist() == [65504.0, -65504.0]
    assert to_cache(torch.tensor([1e30]).bfloat16(), torch.float32).item() == torch.tensor(1e30).bfloat16().item()
    x = torch.randn(5)
    assert to_cache(x, torch.float32) is x and as_cached(x, torch.float32) is x


def test_what_comes_back_has_the_models_type():
    x = torch.randn(50).bfloat16() * 300
    back = as_cached(x, FP8)
    assert back.dtype == torch.bfloat16 and torch.equal(back.double(), nearest(x))


def test_writing_ops_saturate():
    table, lengths = torch.tensor([[3, 1], [4, 2]], dtype=torch.int32), torch.tensor([2, 3], dtype=torch.int32)
    k, v = torch.randn(2, 3, KV_HEADS, DIM) * 300, torch.randn(2, 3, KV_HEADS, V_DIM) * 300
    caches = [torch.zeros(5, PAGE, KV_HEADS, d).to(FP8) for d in (DIM, V_DIM)]
    kv_write(k, v, *caches, table, lengths)
    slots = generic.cache_slots(table, PAGE)
    for cache, new in zip(caches, (k, v), strict=True):
        rows = cache.flatten(0, 1)[slots]
        for b, length in enumerate(lengths.tolist()):
            assert torch.equal(rows[b, length : length + 3].double(), nearest(new[b]))
    caches = [torch.zeros(5, PAGE, KV_HEADS, d).to(FP8) for d in (DIM, V_DIM)]
    kv_write_packed(k.flatten(0, 1), v.flatten(0, 1), *caches, table, torch.tensor([0, 5, 6], dtype=torch.int32))
    assert torch.equal(caches[0].flatten(0, 1)[slots[0, :5]].double(), nearest(k.flatten(0, 1)[:5]))
    assert torch.equal(caches[1].flatten(0, 1)[slots[1, :1]].double(), nearest(v.flatten(0, 1)[5:]))


# ----------------------------------------------------------------------------------------------------------------------
# Attention sees what the cache holds, of the call's own tokens too


def page_table(rows: int, pages: int = 6) -> Tensor:
    return (torch.randperm(rows * pages) + 1).view(rows, pages).to(torch.int32)


def filled(table: Tensor, lengths: list[int], *shape: int) -> Tensor:
    """An e4m3 cache, random below each row's length and NaN anywhere else."""
    cache = torch.full((table.numel() + 1, PAGE, *shape), float("nan"))
    for row, length in enumerate(lengths):
        for slot in range(length):
            cache[table[row, slot // PAGE], slot % PAGE] = torch.randn(shape) * 3
    return cache.to(FP8)


def new_values(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers, a few beyond what e4m3 holds."""
    return (torch.randn(shape) * torch.where(torch.rand(shape) < 0.02, 1e3, 1.0)).to(dtype)


def tree(batch: int, num_tokens: int) -> Tensor:
    mask = torch.zeros(batch, num_tokens, 1, dtype=torch.int32)
    for row in mask:
        for i in range(num_tokens):
            row[i] = (row[random.randrange(i)] if i else 0) | 1 << i
    return mask


def window_problem(latent: bool, is_tree: bool, dtype: torch.dtype, num_tokens: int = 5) -> tuple[list, list]:
    """Arguments of a window op, and the same in float64 with everything that is cached rounded by hand."""
    lengths = [0, 1, 7, 13]
    table = page_table(len(lengths))
    rows = [table, torch.tensor(lengths, dtype=torch.int32), tree(len(lengths), num_tokens) if is_tree else None]
    lead = (len(lengths), num_tokens)
    if latent:
        q, new = torch.randn(*lead, HEADS, DIM).to(dtype), [new_values(*lead, DIM, dtype=dtype)]
        caches, tail = [filled(table, lengths, DIM)], [0.3, LATENT]
    else:
        q = torch.randn(*lead, HEADS, DIM).to(dtype)
        new = [new_values(*lead, KV_HEADS, d, dtype=dtype) for d in (DIM, V_DIM)]
        caches = [filled(table, lengths, KV_HEADS, d) for d in (DIM, V_DIM)]
        tail = [0.3, 6, 0.0, torch.randn(HEADS).to(dtype)]
    exact_tail = [x.double() if isinstance(x, Tensor) else x for x in tail]
    exact = [q.double(), *[nearest(x) for x in new], *[c.double() for c in caches], *rows, *exact_tail]
    return [q, *new, *caches, *rows, *tail], exact


def prompt_problem(latent: bool, dtype: torch.dtype) -> tuple[list, list]:
    bounds = [0, 9, 9, 10, 23]
    table, total = page_table(4), 23
    rows = [table, torch.tensor(bounds, dtype=torch.int32)]
    q = torch.randn(total, HEADS, DIM).to(dtype)
    if latent:
        new, shapes, tail = [new_values(total, DIM, dtype=dtype)], [(DIM,)], [0.3, LATENT]
    else:
        new = [new_values(total, KV_HEADS, d, dtype=dtype) for d in (DIM, V_DIM)]
        shapes, tail = [(KV_HEADS, DIM), (KV_HEADS, V_DIM)], [0.3, 6, 0.0, None]
    caches = [filled(table, [], *shape) for shape in shapes]
    exact = [q.double(), *[nearest(x) for x in new], *[c.double() for c in caches], *rows, *tail]
    return [q, *new, *caches, *rows, *tail], exact


def compare(op: Callable, exact_op: Callable, args: list, exact: list, num_caches: int) -> None:
    out, expected = op(*args), exact_op(*exact)
    tolerance = 2e-5 if args[0].dtype == torch.float32 else 2e-2
    assert out.dtype == args[0].dtype and bool(out.isfinite().all())
    assert ((out.double() - expected).norm() / expected.norm()).item() < tolerance
    first = 1 + num_caches  # q and as many new tensors as there are caches
    for cache, want in zip(args[first : first + num_caches], exact[first : first + num_caches], strict=True):
        torch.testing.assert_close(cache.double(), want, rtol=0, atol=0, equal_nan=True)


WHO = pytest.mark.parametrize("who", ["reference", "torch"])
LATENTS = pytest.mark.parametrize("latent", [False, True], ids=["attention", "mla"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def op_of(who: str, name: str) -> Callable:
    return getattr(torch.ops.spec_compile, name if who == "reference" else f"{name}_torch")


@WHO
@LATENTS
@DTYPES
@pytest.mark.parametrize("is_tree", [False, True], ids=["chain", "tree"])
def test_windows(who: str, latent: bool, dtype: torch.dtype, is_tree: bool):
    name = "mla_attention" if latent else "attention"
    compare(op_of(who, name), op_of("reference", name), *window_problem(latent, is_tree, dtype), 1 if latent else 2)


@WHO
@LATENTS
@DTYPES
def test_prompts(who: str, latent: bool, dtype: torch.dtype):
    name = "mla_prefill_attention" if latent else "prefill_attention"
    compare(op_of(who, name), op_of("reference", name), *prompt_problem(latent, dtype), 1 if latent else 2)


@WHO
@LATENTS
def test_a_window_of_tokens_and_single_tokens_see_the_same_numbers(who: str, latent: bool):
    op, caches = op_of(who, "mla_attention" if latent else "attention"), 1 if latent else 2
    args, _ = window_problem(latent, False, torch.float32)
    window = slice(0, 1 + caches)
    stepwise = [a.clone() if isinstance(a, Tensor) else a for a in args]
    whole = op(*args)
    singles = []
    for i in range(whole.shape[1]):
        step = [a[:, i : i + 1] for a in stepwise[window]] + stepwise[1 + caches :]
        lengths = 2 + 2 * caches
        step[lengths] = stepwise[lengths] + i
        singles.append(op(*step))
    torch.testing.assert_close(torch.cat(singles, 1), whole, rtol=1e-5, atol=1e-5)
    for one, other in zip(args[1 + caches : 1 + 2 * caches], stepwise[1 + caches : 1 + 2 * caches], strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize(
    "name", ["attention_torch", "prefill_attention_torch", "mla_attention_torch", "mla_prefill_attention_torch"]
)
def test_ops_are_sound_over_a_narrow_cache(name: str):
    latent, packed = "mla" in name, "prefill" in name
    args, _ = prompt_problem(latent, torch.float32) if packed else window_problem(latent, True, torch.float32)
    torch.library.opcheck(getattr(torch_sdpa, name), tuple(args), test_utils=("test_faketensor",))
    # torch's schema check cannot compare float8 tensors; a bfloat16 cache asks the same question.
    narrow = [a.bfloat16().nan_to_num() if isinstance(a, Tensor) and a.dtype == FP8 else a for a in args]
    torch.library.opcheck(getattr(torch_sdpa, name), tuple(narrow))


# ----------------------------------------------------------------------------------------------------------------------
# Who takes it

NODE = AttentionNode(
    op="attention", stage="verify", batch=1, num_tokens=8, num_q_heads=32, num_kv_heads=8, head_dim=128, v_head_dim=128,
    page_size=64, window=0, softcap=0.0, has_sinks=False, is_tree=False, dtype=torch.bfloat16, kv_dtype=FP8,
)  # fmt: skip


@pytest.mark.parametrize(("arch", "taken"), [("sm80", False), ("sm86", False), ("sm89", True), ("sm90", True), ("sm120", True)])
def test_triton_has_e4m3_from_compute_capability_8_9_on(arch: str, taken: bool):
    reason = triton.supports(NODE, Hardware("nvidia", arch, 100, arch))
    assert reason is None if taken else "float8_e4m3fn before compute capability 8.9" in reason


# ----------------------------------------------------------------------------------------------------------------------
# The option


def generate(family: str, kv_cache_dtype: str, draft: str | None, inputs: dict, **options: object) -> tuple[Tensor, object]:
    model = tiny_model(family)
    spec_compile(model, draft=draft, compile="none", adaptive=False, min_ngram=1, kv_cache_dtype=kv_cache_dtype, **options)
    return model.generate(**inputs, max_new_tokens=24, do_sample=False), model


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_greedy_text_is_that_of_single_tokens_over_the_same_cache(family: str):
    """Speculation changes nothing; the narrow cache does, which the caches' contents show."""
    torch.manual_seed(0)  # near-ties of another seed would make this a test of rounding
    inputs = left_padded(3, 13)
    inputs["input_ids"][:, -6:] = inputs["input_ids"][:, -12:-6]  # something to look up
    plain, model = generate(family, "fp8_e4m3", None, inputs)
    for num_steps in (2, 5):
        fast, drafted = generate(family, "fp8_e4m3", "ngram", inputs, num_steps=num_steps)
        assert torch.equal(fast, plain)
        assert drafted.spec.stats().rounds < 24, "some drafts were accepted"
    caches = model.spec._engine.target.programs.pool.caches.values()
    assert {cache.dtype for cache in caches} == {FP8}
    _, full = generate(family, "auto", None, inputs)
    assert model.spec.stats().kv_bytes * 4 == full.spec.stats().kv_bytes
    assert "float8_e4m3fn cache" in model.spec.explain() and "float8" not in full.spec.explain()


def test_a_draft_models_cache_is_narrow_too():
    model, draft = tiny_model("llama"), tiny_model("llama")
    spec_compile(model, draft=draft, compile="none", kv_cache_dtype="fp8_e4m3", num_steps=3)
    plain, _ = generate("llama", "fp8_e4m3", None, left_padded(2, 9))
    assert torch.equal(model.generate(**left_padded(2, 9), max_new_tokens=24, do_sample=False), plain)
    runner = model.spec._engine.draft.programs[0]
    assert {cache.dtype for cache in runner.pool.caches.values()} == {FP8}
    assert model.spec.stats().accept_length > 3.5, "a draft that is the target, over the same kind of cache, is right"


def test_a_bfloat16_cache_of_a_float32_model_rounds_and_nothing_else():
    torch.manual_seed(0)
    plain, model = generate("llama", "bfloat16", None, left_padded(2, 9))
    fast, _ = generate("llama", "bfloat16", "ngram", left_padded(2, 9))
    assert torch.equal(fast, plain)
    assert {cache.dtype for cache in model.spec._engine.target.programs.pool.caches.values()} == {torch.bfloat16}


def test_auto_is_the_models_type():
    _, model = generate("llama", "auto", None, left_padded(1, 9))
    assert {cache.dtype for cache in model.spec._engine.target.programs.pool.caches.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["fp8", "fp8_e5m2", "int8", ""])
def test_an_unknown_type_is_an_error_that_lists_the_known_ones(name: str):
    with pytest.raises(ConfigError, match="auto, bfloat16, float16, fp8_e4m3"):
        SpecConfig(kv_cache_dtype=name)
