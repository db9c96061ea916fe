"""What FlashInfer's functions promise, in plain float64 PyTorch, so that the provider's use of them is tested without a GPU.

Written from their documentation (flashinfer/xqa.py, flashinfer/prefill.py, flashinfer/decode.py, flashinfer/gdn_decode.py of
0.7.2.post1) with no help of the library's own reference. ``install`` and ``install_delta_rule`` put it in ``flashinfer``'s
place and say what was called.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from spec_compile.hardware import Hardware
from spec_compile.ops import kv_cache

H200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")


@dataclass
class Calls:
    """What was asked of FlashInfer."""

    builds: list[tuple] = field(default_factory=list)
    launches: list[dict] = field(default_factory=list)
    plans: list[dict] = field(default_factory=list)


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float, softcap: float, sink: Tensor | None):
    """One head: q [N, D] over keys, values [S, D] where ``seen`` [N, S]. Returns ([N, D], log-sum-exp [N])."""
    scores = (q.double() @ keys.double().T) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~seen, float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink.double().expand(len(q), 1)], 1)
        values = torch.cat([values.double(), torch.zeros(1, values.shape[1], dtype=torch.float64)])
    return torch.softmax(scores, 1) @ values.double(), torch.logsumexp(scores, 1)


def xqa(
    *, page_table, seq_lens, q, k_cache, v_cache, output, q_scale, sliding_win_size, q_seq_len, mask, sinks, **rest
) -> None:
    """``flashinfer.xqa.xqa``: a row's last ``q_seq_len`` keys are its window, masked by bits; all before them are seen."""
    page, kv_heads, dim = k_cache.shape[1:]
    group = q.shape[2] // kv_heads
    assert page_table.is_contiguous() and q.is_contiguous() and output.is_contiguous() and seq_lens.shape == (len(q), 1)
    assert page_table.dtype == seq_lens.dtype == torch.int32 and k_cache.stride() == v_cache.stride()
    assert rest["num_kv_heads"] == kv_heads and rest["batch_size"] == len(q)
    assert rest["max_seq_len"] == page_table.shape[1] * page and rest["semaphores"].eq(0).all()
    assert sinks is None or sinks.dtype == torch.float32
    if q_seq_len > 1:
        assert mask.dtype == torch.uint16 and mask.shape == (len(q), q_seq_len, -(-q_seq_len // 32) * 2)
    for row, total in enumerate(seq_lens[:, 0].tolist()):
        assert q_seq_len <= total <= page_table.shape[1] * page
        slots = [page_table[row, s // page].item() * page + s % page for s in range(total)]
        keys, values = k_cache.flatten(0, 1)[slots].double(), v_cache.flatten(0, 1)[slots].double()
        seen = torch.ones(q_seq_len, total, dtype=torch.bool)
        for i in range(q_seq_len):
            for j in range(q_seq_len) if q_seq_len > 1 else ():
                seen[i, total - q_seq_len + j] = bool(mask[row, i, j // 16].item() >> (j % 16) & 1)
            if sliding_win_size:
                seen[i, : max(0, total - q_seq_len + i + 1 - sliding_win_size)] = False
        for head in range(q.shape[2]):
            kv, sink = head // group, None if sinks is None else sinks[head]
            out, _ = attend(q[row, :, head], keys[:, kv], values[:, kv], seen, q_scale / dim**0.5, 0.0, sink)
            output[row, :, head] = out.to(output.dtype)


class RaggedWrapper:
    """``BatchPrefillWithRaggedKVCacheWrapper`` as far as causal prompts need it."""

    calls: Calls

    def __init__(self, workspace: Tensor, layout: str, backend: str) -> None:
        assert workspace.dtype == torch.uint8 and layout == "NHD"
        self.backend = backend

    def plan(self, qo_indptr: Tensor, kv_indptr: Tensor, **plan) -> None:
        assert qo_indptr.dtype == torch.int32 and torch.equal(qo_indptr, kv_indptr) and plan["causal"]
        self.calls.plans.append({"backend": self.backend, "lengths": qo_indptr.tolist(), **plan})
        self.bounds, self.constants = qo_indptr.tolist(), plan

    def run(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool, lse_base: str):
        assert lse_base == "ln" and len(q) == self.bounds[-1] and q.dtype == self.constants["q_data_type"]
        out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2])
        group = q.shape[1] // k.shape[1]
        left, cap = self.constants["window_left"], self.constants["logits_soft_cap"]
        for begin, end in zip(self.bounds, self.bounds[1:], strict=False):
            place = torch.arange(end - begin)
            seen = place[:, None] >= place[None]
            seen &= (left < 0) | (place[:, None] - place[None] <= left)
            for head in range(q.shape[1]):
                keys, values = (x[begin:end, head // group] for x in (k, v))
                result = attend(q[begin:end, head], keys, values, seen, self.constants["sm_scale"], cap, None)
                out[begin:end, head], lse[begin:end, head] = result[0].to(q.dtype), result[1].float()
        return (out, lse) if return_lse else out


def install(monkeypatch: pytest.MonkeyPatch, hardware: Hardware = H200) -> Calls:
    """Puts the functions above in ``flashinfer``'s place, and the library's launchers in terms of its CPU references."""
    from spec_compile.ops.kernels import flashinfer_prefill, kv_write_packed, round_ops
    from spec_compile.ops.kernels import xqa as xqa_calls
    from spec_compile.ops.providers import flashinfer as provider

    calls = Calls()

    def get_xqa_module(*build):
        def launch(**arguments) -> None:
            calls.launches.append(arguments)
            xqa(**arguments)

        calls.builds.append(build)
        return types.SimpleNamespace(xqa=launch)

    def trtllm(**arguments) -> None:
        calls.launches.append(arguments)
        arguments["out"].zero_()

    wrapper = type("Wrapper", (RaggedWrapper,), {"calls": calls})
    modules = {
        "flashinfer": {},
        "flashinfer.xqa": {"get_xqa_module": get_xqa_module},
        "flashinfer.prefill": {"BatchPrefillWithRaggedKVCacheWrapper": wrapper},
        "flashinfer.decode": {"trtllm_batch_decode_with_kv_cache": trtllm},
    }
    put_modules(monkeypatch, modules)
    for module in (provider, xqa_calls, flashinfer_prefill):
        monkeypatch.setattr(module, "detect_hardware", lambda device: hardware)
    monkeypatch.setattr(round_ops, "kv_write", kv_cache.kv_write._init_fn)
    monkeypatch.setattr(kv_write_packed, "kv_write_packed", kv_cache.kv_write_packed._init_fn)
    monkeypatch.setattr(flashinfer_prefill, "_PLANNED", {})
    return calls


def put_modules(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict]) -> None:
    """Modules of these names and members, whether or not there are real ones."""
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


# ----------------------------------------------------------------------------------------------------------------------
# The delta rule


def gated_delta_rule_mtp(
    q, k, v, initial_state, initial_state_indices, A_log, a, dt_bias, b, scale, output, disable_state_update, use_qk_l2norm
):
    """``flashinfer.gdn_decode.gated_delta_rule_mtp`` without a state update: token by token, rounded as it rounds."""
    tokens, heads, dim = q.shape[1:]
    value_heads, value_dim = v.shape[2:]
    assert q.dtype == k.dtype == v.dtype == a.dtype == b.dtype == output.dtype == torch.bfloat16
    assert A_log.dtype == dt_bias.dtype == initial_state.dtype == torch.float32 and initial_state_indices.dtype == torch.int32
    assert initial_state.is_contiguous() and initial_state.shape[1:] == (value_heads, value_dim, dim)
    assert dim == 128 and value_dim % 64 == 0 and value_dim >= 128
    assert all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in (q, k, v, output))
    assert a.stride(-1) == b.stride(-1) == 1 and disable_state_update and use_qk_l2norm
    assert len(q) * tokens > 1, "one row's window of one token: it cannot make out the layout of its own placeholder"
    assert all(stride > 0 for x in (q, k, v, a, b) for stride in x.stride()), "a stride of 0 is compiled into a kernel"
    group = value_heads // heads
    for row, slot in enumerate(initial_state_indices.tolist()):
        if slot < 0:
            continue
        for head in range(value_heads):
            state = initial_state[slot, head].double()  # [V, K]
            for token in range(tokens):
                query, key = (x[row, token, head // group].double() for x in (q, k))
                query, key = (x / (x.square().sum() + 1e-6).sqrt() for x in (query, key))
                x = a[row, token, head].double() + dt_bias[head].double()
                state = state * torch.exp(-A_log[head].double().exp() * torch.log1p(x.exp()))
                change = torch.sigmoid(b[row, token, head].double()) * (v[row, token, head].double() - state @ key)
                state = state + torch.outer(change, key)
                output[row, token, head] = (state @ query * scale).to(output.dtype)
    return output, initial_state


def install_delta_rule(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Puts the function above in FlashInfer's place, and the kernel beside it in terms of its CPU reference."""
    from spec_compile.ops import linear_attention as ops
    from spec_compile.ops.kernels import gdn_window

    calls = Calls()

    def launch(*args: Tensor, **arguments: object) -> tuple[Tensor, Tensor]:
        calls.launches.append({"args": args, **arguments})
        return gated_delta_rule_mtp(*args, **arguments)

    def save_window(k, v, a, b, A_log, dt_bias, kv_window, gate_window, state_slot) -> Tensor:
        ops._save_window(k, v, *ops.gates(a, b, A_log, dt_bias), kv_window, gate_window, state_slot)
        return torch.stack([A_log.float(), dt_bias.float()])

    modules = ("flashinfer", "flashinfer.gdn_kernels", "flashinfer.gdn_kernels.gdn_decode_mtp")
    put_modules(monkeypatch, {**{name: {} for name in modules}, "flashinfer.gdn_decode": {"gated_delta_rule_mtp": launch}})
    monkeypatch.setattr(gdn_window, "save_window", save_window)
    return calls
