"""Gated delta nets (Qwen3-Next, Qwen3.5): a short causal convolution and a recurrent state a layer, over windows and prompts.

A verified window never touches the states. It leaves its inputs in the layer's window buffers, and ``gdn_commit`` replays the
accepted path from there: no state per drafted token is ever stored, a tree costs what a chain costs, and a rejected draft
cannot spoil anything. (SGLang and FlashInfer store one state a token: 2 MiB a layer and token for Qwen3-Next.)

Shapes: B rows, N window tokens, T packed prompt tokens, S state slots (0 is the null slot, for padding rows), W most window
tokens, L layers; Hk key heads of D, Hv value heads of Dv, Hv a multiple of Hk; C channels of the convolution over K taps.
States are float32 and lie value-major, [Hv, Dv, D], as FlashInfer's.

With g = -exp(A_log) · softplus(a + dt_bias) and β = sigmoid(b), a token turns the state of its parent into

    S ← exp(g) S;   u = β (v - S k);   S ← S + u kᵀ;   o = S q · scale        (k, q of unit length)

Source: Gated DeltaNet (2412.06464); the window's closed form is its chunked one, section 3.3, under an ancestor mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_compile.ops.attention import window_visibility

CHUNK = 64  # prompt tokens that the reference computes at once
_EPSILON = 1e-6  # under the root of the unit lengths, as in fla and transformers


# ----------------------------------------------------------------------------------------------------------------------
# The delta rule


def gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log-decay g and strength β of every token and value head, float32: [..., Hv] each."""
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g, b.float().sigmoid()


def unit_length(x: Tensor) -> Tensor:
    """Vectors of the last dim scaled to length 1."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPSILON)


def _by_head(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, H, …] -> [B, Hv, N, …] in ``dtype``, keys and queries of unit length."""
    group = v.shape[2] // k.shape[2]
    q, k = (unit_length(x.to(dtype)).repeat_interleave(group, 2).transpose(1, 2) for x in (q, k))
    return q, k, v.to(dtype).transpose(1, 2)


def window_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Outputs of a window whose tokens stand behind their ancestors, without a state for each.

    With G the decay summed along a token's ancestors, u = (I + A)⁻¹ β (V - exp(G) S K), A[i, j] = β exp(G_i - G_j) k_i·k_j over
    the ancestors j of i, and o = exp(G) S q + Σ_j exp(G_i - G_j) (q_i·k_j) u_j over ancestors and self.

    Args:
        q, k: [B, N, Hk, D]; v: [B, N, Hv, Dv]; g, beta: [B, N, Hv].
        state: [B, Hv, Dv, D], in whose dtype is computed; before the window.
        visible: bool [B, N, N], row i sees its ancestors and itself.

    Returns:
        [B, N, Hv, Dv] in the state's dtype; NaN where a token sees one that is not finite. What it does not see it does not
        feel, though it be NaN: the products above have a 0 for it, and 0 * NaN is NaN.
    """
    group = v.shape[2] // k.shape[2]
    finite = k.isfinite().all(-1).repeat_interleave(group, 2) & v.isfinite().all(-1) & g.isfinite() & beta.isfinite()
    if k.device.type == "cpu" and bool(finite.all()):  # a host read is free there
        return _solve(q, k, v, g, beta, state, visible, scale)[0].transpose(1, 2)
    k, v, g, beta = (torch.where(x.isfinite(), x, 0.0) for x in (k, v, g, beta))
    out = _solve(q, k, v, g, beta, state, visible, scale)[0].transpose(1, 2)
    spoilt = visible.float() @ (~finite).float() > 0  # [B, N, Hv]
    return out.masked_fill(spoilt[..., None], float("nan"))


def _solve(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(outputs [B, Hv, N, Dv], the state behind the last token, which must see all others)."""
    q, k, v = _by_head(q, k, v, state.dtype)
    g, beta = (x.to(state.dtype).transpose(1, 2) for x in (g, beta))  # [B, Hv, N]
    seen = visible[:, None]  # [B, 1, N, N]
    total = (seen * g[:, :, None]).sum(-1)  # G: [B, Hv, N]
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, float("-inf")).exp()  # exp(G_i - G_j)
    strict = between * ~torch.eye(g.shape[-1], dtype=torch.bool, device=g.device)
    system = beta[..., None] * strict * (k @ k.transpose(-1, -2))
    right = beta[..., None] * (v - total.exp()[..., None] * (k @ state.transpose(-1, -2)))  # [B, Hv, N, Dv]
    eye = torch.eye(g.shape[-1], dtype=state.dtype, device=g.device)
    u = torch.linalg.solve_triangular(eye + system, right, upper=False, unitriangular=True)
    out = total.exp()[..., None] * (q @ state.transpose(-1, -2)) + (between * (q @ k.transpose(-1, -2))) @ u
    last = between[..., -1, :, None] * u  # [B, Hv, N, Dv]
    behind = total[..., -1, None, None].exp() * state + last.transpose(-1, -2) @ k
    return out * scale, behind


# ----------------------------------------------------------------------------------------------------------------------
# What capture emits


@torch.library.custom_op("spec_compile::gated_delta_rule", mutates_args=("kv_window", "gate_window"))
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    kv_window: Tensor,
    gate_window: Tensor,
    state_slot: Tensor,
    tree_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """``gdn_verify`` of gates that were computed already: what a model's own code hands over. ``fold_gates`` takes it out of
    every graph, so it has no kernel.

    Args: ``g``, ``beta`` [B, N, Hv]; the others as ``gdn_verify``.
    """
    _save_window(k, v, g.float(), beta.float(), kv_window, gate_window, state_slot)
    visible = window_visibility(tree_mask, q.shape[0], q.shape[1], q.device)
    return window_delta_rule(q, k, v, g, beta, state[state_slot.long()], visible, scale).to(q.dtype).contiguous()


@gated_delta_rule.register_fake
def gated_delta_rule_fake(q, k, v, g, beta, state, kv_window, gate_window, state_slot, tree_mask, scale) -> Tensor:
    return q.new_empty(v.shape)


# ----------------------------------------------------------------------------------------------------------------------
# Windows


def _save_window(
    k: Tensor, v: Tensor, g: Tensor, beta: Tensor, kv_window: Tensor, gate_window: Tensor, state_slot: Tensor
) -> None:
    num_tokens, slots = k.shape[1], state_slot.long()
    kv_window[slots, :num_tokens] = torch.cat([k.flatten(2), v.flatten(2)], -1).to(kv_window.dtype)
    gate_window[slots, :num_tokens] = torch.cat([g, beta], -1)


def verify_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    kv_window: Tensor,
    gate_window: Tensor,
    state_slot: Tensor,
    tree_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Outputs of a window's tokens, each from the state behind its parent; the states stay as they are.

    Args:
        q, k: [B, N, Hk, D]; v: [B, N, Hv, Dv]; a, b: [B, N, Hv]. Any strides with a contiguous last dim.
        A_log, dt_bias: [Hv].
        state: float32 [S, Hv, Dv, D], read.
        kv_window: [S, W, Hk * D + Hv * Dv], written: keys and values as they come, for ``gdn_commit``.
        gate_window: float32 [S, W, 2 * Hv], written: g and β.
        state_slot: int32 [B]; 0 for padding rows.
        tree_mask: int32 [B, N, ceil(N / 32)], see ``attention``; None for a chain.
        scale: of the outputs.

    Returns:
        [B, N, Hv, Dv] in the queries' dtype, contiguous.
    """
    g, beta = gates(a, b, A_log, dt_bias)
    _save_window(k, v, g, beta, kv_window, gate_window, state_slot)
    visible = window_visibility(tree_mask, q.shape[0], q.shape[1], q.device)
    return window_delta_rule(q, k, v, g, beta, state[state_slot.long()], visible, scale).to(q.dtype).contiguous()


gdn_verify = torch.library.custom_op("spec_compile::gdn_verify", verify_reference, mutates_args=("kv_window", "gate_window"))


@gdn_verify.register_fake
def gdn_verify_fake(
    q, k, v, a, b, A_log, dt_bias, state, kv_window, gate_window, state_slot, tree_mask, scale
) -> Tensor:  # fmt: skip
    return q.new_empty(v.shape)


@torch.library.custom_op("spec_compile::conv_verify", mutates_args=("conv_window",))
def conv_verify(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    conv_window: Tensor,
    state_slot: Tensor,
    tree_mask: Tensor | None,
) -> Tensor:
    """Causal depthwise convolution and SiLU of a window: each token sees its K - 1 nearest ancestors and what stands before
    the window; the states stay as they are.

    Args:
        x: [B, N, C], any strides.
        weight: [C, K], the last tap is the token's own; bias: [C] or None.
        conv_state: [S, K - 1, C], read: the last inputs before the window, the newest last.
        conv_window: [S, W, C], written: ``x`` for ``gdn_commit``.
        state_slot, tree_mask: as ``gdn_verify``.

    Returns:
        [B, N, C] in ``x``'s dtype, contiguous.
    """
    batch, num_tokens, _ = x.shape
    taps, slots = weight.shape[1], state_slot.long()
    conv_window[slots, :num_tokens] = x.to(conv_window.dtype)
    source = _conv_sources(tree_mask, batch, num_tokens, taps, x.device)  # [B, N, K]
    inputs = torch.cat([conv_state[slots].to(x.dtype), x], 1)  # [B, K - 1 + N, C]
    rows = torch.arange(batch, device=x.device)[:, None, None]
    out = (inputs[rows, source].float() * weight.float().T).sum(2)  # [B, N, K, C] -> [B, N, C]
    if bias is not None:
        out = out + bias.float()
    return F.silu(out).to(x.dtype).contiguous()


@conv_verify.register_fake
def conv_verify_fake(x, weight, bias, conv_state, conv_window, state_slot, tree_mask) -> Tensor:
    return x.new_empty(x.shape)


@conv_verify.register_kernel("cuda")
def conv_verify_cuda(x, weight, bias, conv_state, conv_window, state_slot, tree_mask):
    from spec_compile.ops.kernels import gdn  # here, so that machines without Triton can import this module

    return gdn.conv_verify(x, weight, bias, conv_state, conv_window, state_slot, tree_mask)


def _conv_sources(tree_mask: Tensor | None, batch: int, num_tokens: int, taps: int, device: torch.device) -> Tensor:
    """Which of [K - 1 stored inputs, N window inputs] each tap of each token reads: int64 [B, N, K]."""
    visible = window_visibility(tree_mask, batch, num_tokens, device)
    column = torch.arange(num_tokens, device=device)
    depth = visible.sum(-1)  # ancestors and self
    # An ancestor has a lower index than its descendants: sorted by index, the nearest come last.
    order = torch.where(visible, column, -1).sort(-1).values  # [B, N, N]
    wanted = torch.arange(taps, device=device) - (taps - 1)  # 0 is the token itself, -1 its parent, …
    index = (num_tokens - 1 + wanted).clamp(min=0).expand(batch, num_tokens, -1)
    inside = order.gather(2, index) + taps - 1
    before = taps - 1 + depth[..., None] - 1 + wanted  # stored inputs follow behind the path's root
    return torch.where(-wanted < depth[..., None], inside, before)


@torch.library.custom_op("spec_compile::gdn_commit", mutates_args=("state", "conv_state"))
def gdn_commit(
    state: Tensor,
    conv_state: Tensor,
    kv_window: Tensor,
    gate_window: Tensor,
    conv_window: Tensor,
    state_slot: Tensor,
    path: Tensor | None,
    count: Tensor,
) -> None:
    """Advance the states of all layers by the tokens of a window that stand.

    Args:
        state: float32 [L, S, Hv, Dv, D], written; conv_state: [L, S, K - 1, C], written.
        kv_window: [L, S, W, Hk * D + Hv * Dv]; gate_window: float32 [L, S, W, 2 * Hv]; conv_window: [L, S, W, C].
        state_slot: int32 [B].
        path: int32 [B, E], window index of the j-th token that stands, the root first; None for a chain.
        count: int32 [B], how many stand, 0 to min(E, W); 0 leaves a row's states alone.
    """
    value_heads, value_dim, key_dim = state.shape[2:]
    key_heads = (kv_window.shape[-1] - value_heads * value_dim) // key_dim
    counts = count.tolist()  # the reference runs on a CPU, where a host read is free
    for row, (slot, steps) in enumerate(zip(state_slot.tolist(), counts, strict=True)):
        if steps == 0:
            continue
        index = torch.arange(steps, device=count.device) if path is None else path[row, :steps].long()
        entry = kv_window[:, slot, index]  # [L, E, …]
        k = entry[..., : key_heads * key_dim].unflatten(-1, (key_heads, key_dim))
        v = entry[..., key_heads * key_dim :].unflatten(-1, (value_heads, value_dim))
        g, beta = gate_window[:, slot, index].chunk(2, -1)
        visible = window_visibility(None, 1, steps, count.device)
        state[:, slot] = _solve(k, k, v, g, beta, state[:, slot], visible, 1.0)[1]
        history = torch.cat([conv_state[:, slot], conv_window[:, slot, index].to(conv_state.dtype)], 1)
        conv_state[:, slot] = history[:, -conv_state.shape[2] :]


@gdn_commit.register_fake
def gdn_commit_fake(state, conv_state, kv_window, gate_window, conv_window, state_slot, path, count) -> None:
    return None


@gdn_commit.register_kernel("cuda")
def gdn_commit_cuda(state, conv_state, kv_window, gate_window, conv_window, state_slot, path, count):
    from spec_compile.ops.kernels import gdn  # here, so that machines without Triton can import this module

    return gdn.gdn_commit(state, conv_state, kv_window, gate_window, conv_window, state_slot, path, count)


# ----------------------------------------------------------------------------------------------------------------------
# Prompts


def prefill_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_slot: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> Tensor:
    """Packed prompts from empty states; each row's slot gets the state behind its prompt.

    Args:
        q, k: [T, Hk, D]; v: [T, Hv, Dv]; a, b: [T, Hv]. Any strides with a contiguous last dim.
        state: float32 [S, Hv, Dv, D], written.
        cu_seqlens: int32 [B + 1], prompt boundaries.
        Others as ``gdn_verify``.

    Returns:
        [T, Hv, Dv] in the queries' dtype, contiguous.
    """
    g, beta = gates(a, b, A_log, dt_bias)
    out = q.new_zeros(v.shape)
    bounds, slots = cu_seqlens.tolist(), state_slot.tolist()
    for slot, start, end in zip(slots, bounds[:-1], bounds[1:], strict=True):
        current = state.new_zeros(1, *state.shape[1:])
        for first in range(start, end, CHUNK):
            here = slice(first, min(first + CHUNK, end))
            visible = window_visibility(None, 1, here.stop - here.start, q.device)
            chunk = (x[None, here] for x in (q, k, v, g, beta))
            result, current = _solve(*chunk, current, visible, scale)
            out[here] = result[0].transpose(0, 1).to(out.dtype)
        state[slot] = current[0]
    return out


gdn_prefill = torch.library.custom_op("spec_compile::gdn_prefill", prefill_reference, mutates_args=("state",))


@gdn_prefill.register_fake
def gdn_prefill_fake(q, k, v, a, b, A_log, dt_bias, state, state_slot, cu_seqlens, scale) -> Tensor:
    return q.new_empty(v.shape)


@torch.library.custom_op("spec_compile::conv_prefill", mutates_args=("conv_state",))
def conv_prefill(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_slot: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """``conv_verify`` over packed prompts with nothing before them; keeps each prompt's last K - 1 inputs.

    Args:
        x: [T, C], any strides.
        conv_state: [S, K - 1, C], written; zeros stand before a shorter prompt.
        cu_seqlens: int32 [B + 1], prompt boundaries.
        Others as ``conv_verify``.

    Returns:
        [T, C] in ``x``'s dtype, contiguous.
    """
    taps = weight.shape[1]
    out = x.new_zeros(x.shape)
    bounds, slots = cu_seqlens.tolist(), state_slot.tolist()
    for slot, start, end in zip(slots, bounds[:-1], bounds[1:], strict=True):
        padded = F.pad(x[start:end].float(), (0, 0, taps - 1, 0))  # [K - 1 + len, C]
        kernel = weight.float()[:, None]  # [C, 1, K]
        if end > start:
            result = F.conv1d(padded.T[None], kernel, None if bias is None else bias.float(), groups=x.shape[1])[0].T
            out[start:end] = F.silu(result).to(out.dtype)
        conv_state[slot] = padded[padded.shape[0] - (taps - 1) :].to(conv_state.dtype)
    return out


@conv_prefill.register_fake
def conv_prefill_fake(x, weight, bias, conv_state, state_slot, cu_seqlens) -> Tensor:
    return x.new_empty(x.shape)


@conv_prefill.register_kernel("cuda")
def conv_prefill_cuda(x, weight, bias, conv_state, state_slot, cu_seqlens):
    from spec_compile.ops.kernels import gdn_prefill  # here, so that machines without Triton can import this module

    return gdn_prefill.conv_prefill(x, weight, bias, conv_state, state_slot, cu_seqlens)
