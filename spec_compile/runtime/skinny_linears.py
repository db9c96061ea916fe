"""Linear layers of a few tokens, each by the faster of the matrix library and our kernel, measured on this device.

Rounds of small batches are bound by reading weights. The matrix library reads wide ones at the device's bandwidth and narrow
ones (4096 to 4096) at two thirds of it, so that what is faster depends on the shape; nothing is assumed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from spec_compile.ops.providers.triton import device_limits
from spec_compile.ops.skinny_tiles import MAX_TOKENS, fitting_tiles
from spec_compile.passes.graph import placeholders
from spec_compile.runtime.device_time import graph_milliseconds

log = logging.getLogger("spec_compile.linears")

Tiles = tuple[int, int, int, int]  # block_n, block_k, num_stages, num_warps


@dataclass(frozen=True)
class LinearChoice:
    """What a linear of some tokens was measured to take.

    Attributes:
        tiles: the kernel's, None where the matrix library stays.
        library_us: microseconds of the matrix library.
        kernel_us: of the best tiles.
    """

    tiles: Tiles | None
    library_us: float
    kernel_us: float


Known = dict[tuple, LinearChoice | None]  # (tokens, N, K, dtype) -> None where nothing could be tried

_LEAST_BYTES = 8 << 20  # of a weight: a smaller one is read in less time than its launch takes
_LEAST_GAIN = 0.97  # of the library's time: what is no faster than noise changes nothing


def use_skinny_linears(segment: fx.GraphModule, args: tuple, known: Known) -> int:
    """Put ``spec_compile::skinny_linear`` in the place of linears that it computes faster; the number of them.

    Args:
        segment: changed in place.
        args: its inputs, real tensors; None for what is not known, whose linears stay.
        known: what was measured; what is new is added.
    """
    values, replaced = dict(zip(placeholders(segment), args, strict=True)), 0
    for node in list(segment.graph.nodes):
        weight = _weight(node, values)
        if weight is None:
            continue
        tokens = node.meta["example_value"].shape.numel() // weight.shape[0]
        if not isinstance(tokens, int):  # compiled for any number of them
            continue
        key = (tokens, *weight.shape, weight.dtype)
        if key not in known:
            known[key] = measured(tokens, weight) if tokens <= MAX_TOKENS else None
        choice = known[key]
        if choice is not None and choice.tiles is not None:
            node.target, node.args = torch.ops.spec_compile.skinny_linear.default, (*node.args[:2], *choice.tiles)
            replaced += 1
    if replaced:
        segment.recompile()
    return replaced


def _weight(node: fx.Node, values: dict[fx.Node, object]) -> Tensor | None:
    """The weight of a linear that may be replaced: 16-bit, without bias, large."""
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "linear" or node.kwargs:
        return None
    weight = values.get(node.args[1])
    plain = type(weight) in (Tensor, nn.Parameter)  # what is stored otherwise, quantised say, has a linear of its own
    if any(bias is not None for bias in node.args[2:]) or not plain or not weight.is_contiguous():
        return None
    return weight if weight.dtype in (torch.float16, torch.bfloat16) and weight.nbytes >= _LEAST_BYTES else None


def measured(tokens: int, weight: Tensor) -> LinearChoice | None:
    """``F.linear`` and the kernel, in CUDA graphs over more weights than the L2 cache holds; None if nothing fits."""
    _, shared = device_limits(weight.device)
    candidates = fitting_tiles(*weight.shape, weight.element_size(), shared)
    if not candidates:
        return None
    weight = weight.detach()
    try:
        l2 = torch.cuda.get_device_properties(weight.device).L2_cache_size
        weights = [weight] + [weight.clone() for _ in range(2 * l2 // weight.nbytes)]
        generator = torch.Generator(weight.device).manual_seed(0)  # the caller's own random numbers stay what they were
        x = torch.randn(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device, generator=generator)
        with torch.cuda.device(weight.device):
            candidates = _usable(x, weight, candidates)
            library = _microseconds(F.linear, x, weights)
            times = {tiles: _microseconds(lambda x, w, tiles=tiles: _run(x, w, tiles), x, weights) for tiles in candidates}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        log.info("linear %d x %s: no memory to measure it", tokens, tuple(weight.shape))
        return None
    if not times:
        return None
    best = min(times, key=times.__getitem__)
    log.info("linear %d x %s: %.1f us, by tiles %s %.1f us", tokens, tuple(weight.shape), library, best, times[best])
    return LinearChoice(best if times[best] < _LEAST_GAIN * library else None, library, times[best])


def _run(x: Tensor, weight: Tensor, tiles: Tiles) -> Tensor:
    return torch.ops.spec_compile.skinny_linear(x, weight, *tiles)


def _usable(x: Tensor, weight: Tensor, candidates: list[Tiles]) -> list[Tiles]:
    """Those that can be built here and compute what the matrix library does; each of the others is named in a warning."""

    def build(tiles: Tiles) -> Exception | None:
        try:
            _run(x, weight, tiles)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of Triton's compiler: the matrix library is still there
            return error
        return None

    with ThreadPoolExecutor(len(candidates)) as threads:  # compiled side by side
        errors = list(threads.map(build, candidates))
    expected, usable = F.linear(x, weight), []
    for tiles, error in zip(candidates, errors, strict=True):
        if error is not None:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            log.warning("skinny_linear with tiles %s cannot be built on this device, not used: %s", tiles, reason)
        elif _agrees(_run(x, weight, tiles), expected, tiles):  # again: a thread's own stream does not wait for this one's x
            usable.append(tiles)
    return usable


def _agrees(out: Tensor, expected: Tensor, tiles: Tiles) -> bool:
    """Whether tiles were compiled right: two roundings apart at most, on the scale of the largest result."""
    bound = 4 * torch.finfo(out.dtype).eps * expected.abs().max()
    right = bool(((out - expected).abs() <= bound).all())
    if not right:
        log.warning("skinny_linear with tiles %s gives wrong results on this device: Triton compiled it wrong; not used", tiles)
    return right


def _microseconds(linear: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> float:
    return graph_milliseconds(lambda: [linear(x, weight) for weight in weights]) * 1e3 / len(weights)
