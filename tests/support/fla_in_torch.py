"""What fla's chunked delta rule promises, token by token in float64, so that the provider's use of it is tested without a GPU.

Written from its documentation and source (fla-core 0.6.0: fla/ops/gated_delta_rule/chunk.py, fla/utils/decorators.py) with no
help of the library's own reference. ``install`` puts it in fla's place and says what was called.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from flashinfer_in_torch import put_modules
from torch import Tensor


class ChunkRule:
    """``fla.ops.gated_delta_rule.chunk_gated_delta_rule`` of packed prompts, and what it was called with."""

    def __init__(self) -> None:
        self.launches: list[dict] = []
        self.remembered: list[tuple[Tensor, list[int]]] = []

    def bounds(self, cu_seqlens: Tensor) -> list[int]:
        """Read once a tensor: fla remembers its lists of chunks by the tensor's identity, whatever it holds by then."""
        for tensor, bounds in self.remembered:
            if tensor is cu_seqlens:
                return bounds
        self.remembered.append((cu_seqlens, cu_seqlens.tolist()))
        return self.remembered[-1][1]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, output_final_state: bool,
        state_v_first: bool, cu_seqlens: Tensor, use_gate_in_kernel: bool, A_log: Tensor, dt_bias: Tensor,
        use_beta_sigmoid_in_kernel: bool, use_qk_l2norm_in_kernel: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        self.launches.append(dict(locals()))
        batch, tokens, heads, dim = q.shape
        value_heads, value_dim = v.shape[2:]
        assert batch == 1 and k.shape == q.shape and v.shape[1] == tokens and value_heads % heads == 0 and dim <= 256
        assert g.shape == beta.shape == (1, tokens, value_heads) and A_log.shape == dt_bias.shape == (value_heads,)
        assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
        assert output_final_state and state_v_first and use_gate_in_kernel and use_beta_sigmoid_in_kernel
        assert cu_seqlens.dtype == torch.int64 and not torch.is_grad_enabled()
        bounds = self.bounds(cu_seqlens)
        assert bounds[0] == 0 and bounds[-1] == tokens
        out = torch.empty_like(v)
        final = torch.zeros(len(bounds) - 1, value_heads, value_dim, dim)
        for row, (begin, end) in enumerate(itertools.pairwise(bounds)):
            for head in range(value_heads):
                state = torch.zeros(value_dim, dim, dtype=torch.float64)
                for token in range(begin, end):
                    query, key = (x[0, token, head // (value_heads // heads)].double() for x in (q, k))
                    if use_qk_l2norm_in_kernel:
                        query, key = (x / (x.square().sum() + 1e-6).sqrt() for x in (query, key))
                    gate = g[0, token, head].double() + dt_bias[head].double()
                    state = state * torch.exp(-A_log[head].double().exp() * torch.logaddexp(gate, torch.zeros_like(gate)))
                    change = torch.sigmoid(beta[0, token, head].double()) * (v[0, token, head].double() - state @ key)
                    state = state + torch.outer(change, key)
                    out[0, token, head] = (state @ query * scale).to(out.dtype)
                final[row, head] = state.float()
        return out, final


def install(monkeypatch: pytest.MonkeyPatch) -> ChunkRule:
    """Puts ``ChunkRule`` in fla's place, and the kernel before it in terms of PyTorch."""
    from spec_compile.ops.kernels import gdn_unit

    def unit_prompts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        q, k = (torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-3).to(x.dtype) for x in (q, k))
        return q, k, v.contiguous()

    rule = ChunkRule()
    modules = {name: {} for name in ("fla", "fla.ops")}
    put_modules(monkeypatch, {**modules, "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": rule}})
    monkeypatch.setattr(gdn_unit, "unit_prompts", unit_prompts)
    return rule
