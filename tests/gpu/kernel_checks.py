"""What the tests of kernels share: an op on the CPU against its kernel on the device, bit by bit.

With ``TRITON_INTERPRET=1`` the kernels' logic runs on the CPU too, so that it can be checked without a device; what
only a device can show (capture, no host sync, registration) is skipped then.
"""

from __future__ import annotations

import os

import pytest
import torch

from spec_compile.ops import sampling

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    import interpreted_bfloat16

    interpreted_bfloat16.install()

needs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a CUDA device (or TRITON_INTERPRET=1 for the kernels' logic alone)",
)
needs_device = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device, not the interpreter")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def seeds(count):
    return torch.randint(-(1 << 62), 1 << 62, (count,))


def to_device(x):
    if isinstance(x, torch.Tensor):
        # A copy of the whole storage, so that strides survive, also those of views: the kernels must honour them.
        storage = x.new_empty(0).set_(x.untyped_storage()).to(DEVICE, copy=True)
        return storage.as_strided(x.shape, x.stride(), x.storage_offset())
    return [to_device(y) for y in x] if isinstance(x, list) else x


def flat(x):
    if x is None:
        return []
    return [y for part in x for y in flat(part)] if isinstance(x, (list, tuple)) else [x]


def lose_distributions(window, draft, seed, position):
    """Make some q [B, K, V] not finite, wholly or at some tokens, and the drafts of a window what ``sample_token`` draws
    then."""
    rows = draft.view(-1, draft.shape[2])
    rows[::3] = float("nan")
    rows[1::6, 3::5] = float("nan")
    for j in range(draft.shape[1]):
        window[:, j + 1] = sampling.sample_token(draft[:, j].contiguous(), seed, position + 1 + j, sampling.DRAFT_STREAM)


def raw(x):
    return x.cpu().contiguous().view(torch.uint8) if x.dtype.is_floating_point else x.cpu()


def check(op, kernel, *args):
    """Run the op on the CPU and its kernel on the device; results and mutated arguments must be equal, bit by bit.

    Args:
        op: dispatches to its kernel on CUDA tensors.
        kernel: called instead under the interpreter, whose tensors are the CPU's.

    Returns:
        What the op returned on the CPU.
    """
    moved = [to_device(x) for x in args]
    expected = op(*args)
    actual = kernel(*moved) if INTERPRETED else op(*moved)
    for a, b in zip(flat(actual) + flat(moved), flat(expected) + flat(list(args)), strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape
            torch.testing.assert_close(raw(a), raw(b), rtol=0, atol=0)
    return expected


def check_no_host_sync(op, args):
    op(*args)  # compiles, and builds what is built once
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_capture(op, args):
    """A replayed graph gives what the eager op gave, twice: it depends on nothing but its inputs."""
    before = [x.clone() for x in flat(args) if isinstance(x, torch.Tensor)]
    expected = [x.clone() for x in flat(op(*args)) + flat(args) if isinstance(x, torch.Tensor)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*args)
    for _ in range(2):
        for x, old in zip([x for x in flat(args) if isinstance(x, torch.Tensor)], before, strict=True):
            x.copy_(old)
        graph.replay()
        results = [x for x in flat(captured) + flat(args) if isinstance(x, torch.Tensor)]
        for a, b in zip(results, expected, strict=True):
            assert raw(a).equal(raw(b))
