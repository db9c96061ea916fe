"""What every implementation of gated delta nets must do, against a token-by-token recurrence in float64.

Fresh random inputs, ragged trees, rows whose slots are shuffled and one padding row; NaN in every state and window slot that
must not be read, in outputs that were not written, and in window slots behind the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from attention_contract import poisoned_empty
from torch import Tensor

NAN = float("nan")
TAPS = 4


@dataclass(frozen=True)
class Heads:
    """Key heads, value heads, key dim, value dim."""

    key: int = 2
    value: int = 4
    key_dim: int = 16
    value_dim: int = 24

    @property
    def channels(self) -> int:
        return 2 * self.key * self.key_dim + self.value * self.value_dim


@dataclass
class Pool:
    """States and window buffers of two layers; NaN wherever no row lives."""

    state: Tensor
    conv_state: Tensor
    kv_window: Tensor
    gate_window: Tensor
    conv_window: Tensor
    slots: Tensor  # int32 [B], the last row is a padding row

    def to(self, device: str) -> Pool:
        return Pool(**{name: value.to(device, copy=True) for name, value in vars(self).items()})


@dataclass
class Window:
    """One layer's inputs: the convolution's [B, N, C], whose output is split into q, k, v; gates [B, N, Hv] and weights."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor

    def to(self, device: str) -> Window:
        return Window(**{name: None if value is None else value.to(device) for name, value in vars(self).items()})


def random_parents(batch: int, num_tokens: int, tree: bool) -> list[list[int]]:
    """Parents stand in front of their children; -1 for the root."""
    behind = [[-1, *range(num_tokens - 1)]] * batch
    if not tree:
        return behind
    return [[-1, *(int(torch.randint(i, ())) for i in range(1, num_tokens))] for _ in range(batch)]


def pack_mask(parents: list[list[int]]) -> Tensor:
    """int32 [B, N, W]."""
    num_tokens = len(parents[0])
    words = torch.zeros(len(parents), num_tokens, (num_tokens + 31) // 32, dtype=torch.int64)
    for row, tree in enumerate(parents):
        for token, parent in enumerate(tree):
            if parent >= 0:
                words[row, token] = words[row, parent]
            words[row, token, token // 32] |= 1 << (token % 32)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def random_pool(rows: int, window: int, heads: Heads, dtype: torch.dtype) -> Pool:
    num_slots = rows + 3
    slots = 1 + torch.randperm(num_slots - 1)[:rows]
    live = torch.zeros(num_slots, dtype=torch.bool)
    live[slots] = True
    live[0] = True  # the null slot is zero at first, and finite ever after
    width = heads.key * heads.key_dim + heads.value * heads.value_dim

    def values(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        made = torch.randn(2, num_slots, *shape).to(dtype)
        made[:, ~live] = NAN
        return made

    slots[-1] = 0
    return Pool(
        values(heads.value, heads.value_dim, heads.key_dim, dtype=torch.float32),
        values(TAPS - 1, heads.channels),
        torch.full((2, num_slots, window, width), NAN, dtype=dtype),
        torch.full((2, num_slots, window, 2 * heads.value), NAN),
        torch.full((2, num_slots, window, heads.channels), NAN, dtype=dtype),
        slots.to(torch.int32),
    )


def random_window(rows: int, num_tokens: int, heads: Heads, dtype: torch.dtype, *, bias: bool = False) -> Window:
    """Gates as models have them: decays from none to strong; keys that resemble each other."""
    x = torch.randn(rows, heads.channels, num_tokens) + torch.randn(1, heads.channels, 1)
    return Window(
        x.to(dtype).transpose(1, 2),  # channels first in memory, as after a transpose
        (torch.randn(heads.channels, TAPS) * 0.5).to(dtype),
        torch.randn(heads.channels).to(dtype) if bias else None,
        (3 * torch.randn(rows, num_tokens, heads.value)).to(dtype),
        (2 * torch.randn(rows, num_tokens, heads.value)).to(dtype),
        (torch.rand(heads.value) * 4 - 3).to(dtype),
        torch.randn(heads.value).to(dtype),
    )


def split(y: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [.., Hk, D] and v [.., Hv, Dv] as views of the convolution's output, as in a model."""
    keys = heads.key * heads.key_dim
    q, k, v = y.split([keys, keys, heads.value * heads.value_dim], -1)
    return (
        q.unflatten(-1, (heads.key, heads.key_dim)),
        k.unflatten(-1, (heads.key, heads.key_dim)),
        v.unflatten(-1, (heads.value, heads.value_dim)),
    )


# ----------------------------------------------------------------------------------------------------------------------
# One token behind another, in float64


@dataclass
class Row:
    """Outputs of one row's tokens, and what stands behind each: [N, C], [N, Hv, Dv], states and inputs."""

    conv: Tensor
    out: Tensor
    states: list[Tensor]
    histories: list[Tensor]


def step_by_step(
    window: Window, row: int, parents: list[int], state: Tensor, history: Tensor, heads: Heads, y: Tensor, scale: float
) -> Row:
    """Walk a row's tokens by the definition.

    Args:
        state: [Hv, Dv, D] before the window; history: [K - 1, C].
        y: the convolution's output [N, C] as the implementation under test rounded it.
    """
    w = {name: None if value is None else value.double() for name, value in vars(window).items()}
    group = heads.value // heads.key
    result = Row(torch.empty(len(parents), heads.channels).double(), torch.empty(0), [], [])
    outs = []
    for token, parent in enumerate(parents):
        before = history.double() if parent < 0 else result.histories[parent]
        inputs = torch.cat([before, w["x"][row, token][None]])  # [K, C]
        mixed = (inputs * w["weight"].T).sum(0) + (0 if w["bias"] is None else w["bias"])
        result.conv[token] = F.silu(mixed)
        result.histories.append(inputs[1:])

        q, k, v = split(y[token].double(), heads)
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
        q, k = (x.repeat_interleave(group, 0) for x in (q, k))  # [Hv, D]
        decay = (-w["A_log"].exp() * F.softplus(w["a"][row, token] + w["dt_bias"])).exp()
        strength = w["b"][row, token].sigmoid()
        current = (state.double() if parent < 0 else result.states[parent]) * decay[:, None, None]
        u = strength[:, None] * (v - torch.einsum("hvd,hd->hv", current, k))
        current = current + u[:, :, None] * k[:, None]
        result.states.append(current)
        outs.append(torch.einsum("hvd,hd->hv", current, q) * scale)
    result.out = torch.stack(outs)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# The checks


@dataclass(frozen=True)
class Implementation:
    """The functions under test, with the arguments of the ops of ``ops.linear_attention``."""

    conv_verify: Callable
    gdn_verify: Callable
    gdn_commit: Callable
    conv_prefill: Callable
    gdn_prefill: Callable
    device: str = "cpu"


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, times: int = 1) -> None:
    """Within ``times`` the rounding of ``dtype``, relative to the largest value."""
    bound = times * {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}[dtype]
    assert torch.isfinite(actual).all(), "NaN: something that must not be read was read, or nothing was written"
    error = (actual.cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error < bound, f"error {error:.1e}, bound {bound:.1e}"


def check_window(
    implementation: Implementation,
    *,
    rows: int,
    num_tokens: int,
    tree: bool = False,
    heads: Heads = Heads(),
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
) -> None:
    """Verify a window, then commit a random path of it (0 tokens in one row), and look at everything."""
    device, scale = implementation.device, heads.key_dim**-0.5
    pool = random_pool(rows + 1, num_tokens + 2, heads, dtype)
    window = random_window(rows + 1, num_tokens, heads, dtype, bias=bias)
    parents = random_parents(rows + 1, num_tokens, tree)
    mask = pack_mask(parents).to(device) if tree else None
    there, w = pool.to(device), window.to(device)
    before = Pool(**{name: value.clone() for name, value in vars(there).items()})
    with poisoned_empty():
        y = implementation.conv_verify(w.x, w.weight, w.bias, there.conv_state[1], there.conv_window[1], there.slots, mask)
        out = implementation.gdn_verify(
            *split(y, heads), w.a, w.b, w.A_log, w.dt_bias, there.state[1], there.kv_window[1], there.gate_window[1],
            there.slots, mask, scale,
        )  # fmt: skip
    assert y.dtype == out.dtype == dtype and y.is_contiguous() and out.is_contiguous()
    same(there.state, before.state), same(there.conv_state, before.conv_state)

    walked = [
        step_by_step(window, r, parents[r], pool.state[1, s], pool.conv_state[1, s], heads, y[r].cpu(), scale)
        for r, s in enumerate(pool.slots.tolist())
    ]
    close(y[:rows], torch.stack([row.conv for row in walked[:rows]]), dtype)
    close(out[:rows], torch.stack([row.out for row in walked[:rows]]), dtype)

    # The other layer's windows are the same, so that one call commits two layers.
    for name in ("kv_window", "gate_window", "conv_window"):
        getattr(there, name)[0].copy_(getattr(there, name)[1])
    paths = [random_path(parents[r], stop=r == 0) for r in range(rows)] + [[]]
    count = torch.tensor([len(path) for path in paths], dtype=torch.int32)
    path = torch.tensor([p + [-1] * (num_tokens + 1 - len(p)) for p in paths], dtype=torch.int32)
    implementation.gdn_commit(
        there.state, there.conv_state, there.kv_window, there.gate_window, there.conv_window, there.slots,
        path.to(device) if tree else None, count.to(device),
    )  # fmt: skip
    for layer in range(2):
        for r, slot in enumerate(pool.slots.tolist()[:rows]):
            if not paths[r]:
                same(there.state[layer, slot], before.state[layer, slot])
                continue
            start = walked[r] if layer == 1 else None
            if start is None:
                args = (pool.state[0, slot], pool.conv_state[0, slot], heads, y[r].cpu(), scale)
                start = step_by_step(window, r, parents[r], *args)
            close(there.state[layer, slot], start.states[paths[r][-1]], torch.float32)
            close(there.conv_state[layer, slot], start.histories[paths[r][-1]], torch.float64)
    untouched = [s for s in range(pool.state.shape[1]) if s not in pool.slots.tolist()[:rows]]
    same(there.state[:, untouched], before.state[:, untouched])


def check_unseen(implementation: Implementation, *, num_tokens: int, tree: bool, dtype: torch.dtype = torch.float32) -> None:
    """A token that is no number spoils those that stand behind it, and is not felt by the others."""
    heads, rows, device = Heads(), 3, implementation.device
    pool, window = random_pool(rows, num_tokens, heads, dtype), random_window(rows, num_tokens, heads, dtype)
    parents = random_parents(rows, num_tokens, tree)
    mask = pack_mask(parents)
    args = [*split(window.x.contiguous(), heads), window.a, window.b, window.A_log, window.dt_bias]
    outs = []
    for number in (1.0, NAN, float("inf")):
        given = [x.clone().to(device) for x in args]
        for row in range(rows):
            given[1][row, num_tokens - 1 - row, :, 0] *= number
            given[2][row, num_tokens - 1 - row] *= number
        there = pool.to(device)
        buffers = there.state[1], there.kv_window[1], there.gate_window[1], there.slots
        out = implementation.gdn_verify(*given, *buffers, mask.to(device) if tree else None, heads.key_dim**-0.5)
        outs.append(out.cpu())
    for row in range(rows - 1):  # the last is a padding row
        bad = num_tokens - 1 - row
        sees = torch.tensor([bool(int(mask[row, token, bad // 32]) >> bad % 32 & 1) for token in range(num_tokens)])
        for out in outs[1:]:
            assert out[row, ~sees].equal(outs[0][row, ~sees]), "a token was felt that is not seen"
            assert not out[row, sees].isfinite().all(2).all(1).any(), "a token was not felt that is seen"


def random_path(parents: list[int], *, stop: bool) -> list[int]:
    """From the root to a random token; nothing if ``stop``."""
    if stop:
        return []
    token, path = int(torch.randint(len(parents), ())), []
    while token >= 0:
        path.insert(0, token)
        token = parents[token]
    return path


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def check_prompts(
    implementation: Implementation,
    lengths: tuple[int, ...],
    *,
    heads: Heads = Heads(),
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    rounded: int = 0,
    steep: bool = False,
) -> None:
    """Packed prompts from empty states, shorter ones than the convolution reaches among them, and empty ones.

    Args:
        rounded: how often the implementation rounds to ``dtype`` on the way, if at all: then the states, too, are only as good
            as that, and everything is within so many of its roundings.
        steep: every third token forgets everything and the others hardly anything.
    """
    device, scale, rows = implementation.device, heads.key_dim**-0.5, len(lengths)
    pool = random_pool(rows + 1, 2, heads, dtype)
    window = random_window(1, sum(lengths), heads, dtype, bias=bias)
    if steep:
        window.a.fill_(-6)[:, ::3] = 300
    there, w = pool.to(device), window.to(device)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens, slots = bounds.to(device, torch.int32), there.slots[:rows]
    before = there.state.clone()
    with poisoned_empty():
        y = implementation.conv_prefill(w.x[0], w.weight, w.bias, there.conv_state[1], slots, cu_seqlens)
        out = implementation.gdn_prefill(
            *split(y, heads), w.a[0], w.b[0], w.A_log, w.dt_bias, there.state[1], slots, cu_seqlens, scale
        )
    assert y.dtype == out.dtype == dtype and y.is_contiguous() and out.is_contiguous()
    empty = torch.zeros(heads.value, heads.value_dim, heads.key_dim), torch.zeros(TAPS - 1, heads.channels)
    for row, slot in enumerate(slots.tolist()):
        here = slice(int(bounds[row]), int(bounds[row + 1]))
        if lengths[row] == 0:
            same(there.state[1, slot].cpu(), empty[0])
            continue
        part = Window(**{**vars(window), **{name: getattr(window, name)[:, here] for name in ("x", "a", "b")}})
        walked = step_by_step(part, 0, [-1, *range(lengths[row] - 1)], *empty, heads, y[here].cpu(), scale)
        close(y[here], walked.conv, dtype)
        close(out[here], walked.out, dtype, max(rounded, 1))
        close(there.state[1, slot], walked.states[-1], dtype if rounded else torch.float32, max(rounded, 1))
        close(there.conv_state[1, slot], walked.histories[-1], torch.float64)
    others = [slot for slot in range(before.shape[1]) if slot not in slots.tolist()]
    same(there.state[0], before[0]), same(there.state[1, others], before[1, others])
