"""The proof of a capture: its graph and the model's own forward compute the same logits of a short random text.

Measured at tiny size, the median over positions of the relative error of their logits: right graphs (18 families, 2 to 32
layers, mixtures of experts, latent attention, gated delta nets) beside graphs with one planted fault (a dropped scale, soft-cap
or sink, a sliding window off by one, another rotary base):

    float32: right at most 2e-6, faulty at least 2.7e-2    float16: right at most 3e-3, faulty at least 7e-2
    bfloat16: right at most 2.5e-2, faulty at least 7e-2

A median, because a router whose choice is a near tie may choose otherwise in any position. Where many do (24 layers of 32
random experts in bfloat16: 0.4) the model's own logits move as much when its embeddings are rounded once more, and that is
allowed for.

Of an 8B model in bfloat16 it took 0.24 s on an H200, and 0.71 s as the first thing in a process, with kernels to load
(benchmarks/bench_self_check.py; torch 2.11, transformers 5.24, at commit e15c62d).
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, PreTrainedModel

from spec_compile.errors import CaptureError
from spec_compile.hf_integration.caches import cache_argument
from spec_compile.hf_integration.capture import refusal
from spec_compile.hf_integration.mask_windows import longest_text
from spec_compile.hf_integration.private_copy import ask_for_logits_alone, private_copy
from spec_compile.passes.graph import CacheSlot, RuntimeInput, StageGraph, fake, placeholders

_OPS = torch.ops.spec_compile
_PADDING, _PROMPT, _WINDOW = 3, 16, 8  # tokens: in front of the text, of its prompt, of the window behind it
_ALLOWED = {torch.bfloat16: 6e-2}
_ALLOWED_ELSE = 1e-2  # TensorFloat-32 included
_SENSITIVITY = 4.0  # allowed, in units of what one more rounding of the embeddings does
_ROUNDINGS = 5  # tried: of one right model whose routers chose otherwise (0.115) they did 0.022, 0.019, 0.023, 0.125 and 0.149
# What one pass may take to get past a sliding window: multiply-adds, a token and parameter one each (0.05 s on an H200), and
# tokens, whose scores the generic ops keep. The width of a window that is not reached rests on the mask it was read from.
_WORK = {"cuda": (2e13, 1100), "cpu": (2e9, 300)}


def check_capture(model: PreTrainedModel, graph: StageGraph) -> None:
    """Compare a captured prefill graph with ``model``'s own forward: a left-padded prompt, longer than the smallest sliding
    window where that is cheap, and a window over its cache.

    Args:
        graph: as ``capture_prefill`` returned it, its attention ops still generic. Runs over caches of its own.

    Raises:
        CaptureError: they differ by more than rounding, with both figures; or the model's own forward fails.
    """
    prompt, regions = _text(model, graph)
    if not regions:
        return
    ids = _random_ids(model, prompt + _WINDOW)
    # Where the cache keeps less than the masks show (Moshi), the graph means the masks: what a forward without a cache does.
    parts = [prompt, _WINDOW] if longest_text(graph, model.config.get_text_config(decoder=True)) is None else [len(ids)]
    with torch.no_grad():
        copy = private_copy(model)
        ask_for_logits_alone(copy)
        try:
            # The kernels of matrix products alone: loading flash attention's took 1.1 s on an H200.
            with sdpa_kernel(SDPBackend.MATH):
                own = _own_logits(copy, ids, parts)
        except Exception as error:
            raise CaptureError(
                refusal(model, f"its own forward fails on a text of {len(ids)} tokens ({type(error).__name__}: {error}).")
            ) from error
        worst = _error(_captured_logits(graph, ids, prompt), own, regions)
        allowed = _ALLOWED.get(model.get_input_embeddings().weight.dtype, _ALLOWED_ELSE)
        for seed in range(1, 1 + _ROUNDINGS):
            if worst > allowed:
                with _rounded_once_more(copy, seed), sdpa_kernel(SDPBackend.MATH):
                    allowed = max(allowed, _SENSITIVITY * _error(_own_logits(copy, ids, parts), own, regions))
    if not worst <= allowed:
        raise CaptureError(
            refusal(
                model,
                f"the captured graph is not its forward: on a random text of {len(ids)} tokens their logits differ by "
                f"{worst:.1e} of their size, and rounding explains {allowed:.1e}; self_check=False leaves this comparison out.",
            )
        )


def _text(model: PreTrainedModel, graph: StageGraph) -> tuple[int, list[slice]]:
    """Tokens of the prompt, and the positions over each of which medians are taken: in every sliding window still, past the
    smallest one, and behind the prompt. No positions where the model takes too short texts for that."""
    config = model.config.get_text_config(decoder=True)
    windows = [node.args[9] for node in graph.gm.graph.nodes if node.target is _OPS.attention and node.args[9]]
    reach = min(windows, default=0) + _WINDOW
    longest = (getattr(config, "max_position_embeddings", None) or 1 << 62) - _PADDING - _WINDOW
    work, tokens = _WORK["cuda" if model.device.type == "cuda" else "cpu"]
    cheap = min(work / max(1, sum(p.numel() for p in model.parameters())), tokens, longest)
    prompt = max(_PROMPT, reach) if max(_PROMPT, reach) <= cheap else min(_PROMPT, longest)
    if prompt < _WINDOW // 2:
        return 0, []
    cuts = [0, reach - _WINDOW] if windows and reach <= prompt else [0]
    return prompt, [slice(a, b) for a, b in zip(cuts, [*cuts[1:], prompt], strict=True)] + [slice(prompt, prompt + _WINDOW)]


def _random_ids(model: PreTrainedModel, count: int) -> Tensor:
    weight = model.get_input_embeddings().weight
    generator = torch.Generator(device="cpu").manual_seed(0)  # torch's global one is the user's
    return torch.randint(weight.shape[0], (count,), generator=generator, device="cpu").to(weight.device)


def _error(got: Tensor, expected: Tensor, regions: list[slice]) -> float:
    """The largest median over ``regions`` of the error relative to the logits' spread; got and expected are [P + N, V].

    Counted are logits that are numbers by the model itself: not those that overflow, nor those that it sets to -inf or the
    least number (tokens that must not be said), beside which all others would look alike.
    """
    counted = expected.abs() < torch.finfo(expected.dtype).max / 2  # NaN is not
    got, expected = (x.float().masked_fill(~counted, 0.0) for x in (got, expected))
    mean = expected.sum(-1, keepdim=True) / counted.sum(-1, keepdim=True).clamp(min=1)
    spread = (expected - mean).masked_fill(~counted, 0.0).norm(dim=-1)
    errors = (got - expected).norm(dim=-1) / spread.clamp(min=1e-30)  # [P + N]
    errors = torch.where(errors.isfinite(), errors, torch.inf)
    return max(float(errors[region].median()) for region in regions)


def _own_logits(model: PreTrainedModel, ids: Tensor, parts: list[int]) -> Tensor:
    """[P + N, V] of the model's own forward, behind padding: the text in ``parts`` of so many tokens, over one cache."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters  # what generate() goes by
    padded = torch.cat([ids.new_zeros(_PADDING), ids])[None]
    mask = torch.ones_like(padded)
    mask[:, :_PADDING] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = list(itertools.accumulate(parts, initial=_PADDING))
    out = []
    for start, end in zip([0, *ends[1:-1]], ends[1:], strict=True):
        result = model(
            input_ids=padded[:, start:end], attention_mask=mask[:, :end], use_cache=True, return_dict=True,
            **({"position_ids": positions[:, start:end]} if takes_positions else {}), **{cache_argument(model.forward): cache},
        )  # fmt: skip
        out.append(result.logits[0])
    return torch.cat(out)[_PADDING:]


@contextlib.contextmanager
def _rounded_once_more(copy: PreTrainedModel, seed: int) -> Iterator[None]:
    """Embeddings that are off by up to one rounding of their type, by other numbers for every ``seed``."""

    def perturb(module, args, out: Tensor) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(seed)
        noise = torch.rand(out.shape, generator=generator, device="cpu").to(out.device) * 2 - 1
        return (out.float() * (1 + torch.finfo(out.dtype).eps * noise)).to(out.dtype)

    handle = copy.get_input_embeddings().register_forward_hook(perturb)
    try:
        yield
    finally:
        handle.remove()


def _captured_logits(graph: StageGraph, ids: Tensor, prompt: int) -> Tensor:
    """[P + N, V] of the graph as it is: its generic ops over windows of one row, first the prompt, then the window."""
    caches, device, out = _caches(graph, len(ids)), ids.device, []
    for start, end in ((0, prompt), (prompt, len(ids))):
        inputs = {
            "input_ids": ids[None, start:end],
            "position_ids": torch.arange(start, end, device=device)[None],
            "page_table": torch.ones(1, 1, dtype=torch.int32, device=device),
            "cache_len": torch.full((1,), start, dtype=torch.int32, device=device),
            "state_slot": torch.ones(1, dtype=torch.int32, device=device),
            "num_tokens": end - start,
        }
        args = []
        for binding in (node.meta["binding"] for node in placeholders(graph.gm)):
            given = inputs[binding.name] if isinstance(binding, RuntimeInput) else binding
            args.append(caches[given] if isinstance(given, CacheSlot) else given)
        out.append(fx.Interpreter(graph.gm).run(*args)[0][0])  # no code is written for a graph that is run twice
        _commit(caches, end - start, inputs["state_slot"])
    return torch.cat(out)


def _caches(graph: StageGraph, capacity: int) -> dict[CacheSlot, Tensor]:
    """Zeros for every cache and state of the graph: the null page or slot, and one of ``capacity`` tokens."""
    caches: dict[CacheSlot, Tensor] = {}

    def add(node: fx.Node, *shape: int, dtype: torch.dtype) -> None:
        caches[node.meta["binding"]] = torch.zeros(2, *shape, dtype=dtype, device=fake(node).device)

    for node in graph.gm.graph.nodes:
        if node.target is _OPS.attention:
            for new, cache in zip(node.args[1:3], node.args[3:5], strict=True):
                add(cache, capacity, *fake(new).shape[2:], dtype=fake(new).dtype)
        elif node.target is _OPS.mla_attention:
            add(node.args[2], capacity, fake(node.args[1]).shape[2], dtype=fake(node.args[1]).dtype)
        elif node.target is _OPS.conv_verify:
            x, weight, _, state, window = node.args[:5]
            add(state, fake(weight).shape[1] - 1, fake(x).shape[2], dtype=fake(x).dtype)
            add(window, capacity, fake(x).shape[2], dtype=fake(x).dtype)
        elif node.target is _OPS.gated_delta_rule:
            _, k, v, _, _, state, kv_window, gate_window = node.args[:8]
            key_heads, key_dim, heads, dim = *fake(k).shape[2:], *fake(v).shape[2:]
            add(state, heads, dim, key_dim, dtype=torch.float32)
            add(kv_window, capacity, key_heads * key_dim + heads * dim, dtype=fake(v).dtype)
            add(gate_window, capacity, 2 * heads, dtype=torch.float32)
    return caches


def _commit(caches: dict[CacheSlot, Tensor], count: int, slot: Tensor) -> None:
    """Advance recurrent states by the ``count`` tokens of a window."""
    for layer in sorted({cache.layer for cache in caches if cache.part == "state"}):
        parts = ("state", "conv", "kv_window", "gate_window", "conv_window")
        _OPS.gdn_commit(*(caches[CacheSlot(layer, part)][None] for part in parts), slot, None, slot * count)
