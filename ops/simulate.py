"""Acceptance by decree: accept lengths drawn from given rates, for measuring speed on weights that accept nothing.

What a round does around it is the real thing: the path is one of the tree's, the caches are compacted, the tokens committed.
Whoever reports a figure made with it has to call it SIMULATED.

Prior art: SGLang's SGLANG_SIMULATE_ACC_LEN (python/sglang/srt/speculative/spec_utils.py) draws one length for the whole batch,
vLLM's ``rejection_sample_method="synthetic"`` one per request, as here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.ops.sampling import ACCEPT_STREAM, uniform


def acceptance_rates(mean_accept_length: float, num_steps: int) -> list[float]:
    """The constant rate per draft that gives a mean accept length (the token behind the drafts counts), ``num_steps`` times.

    With rate a the mean is 1 + a + a^2 + ... + a^num_steps.

    Raises:
        ValueError: the mean is not in 1..num_steps + 1.
    """
    if not 1.0 <= mean_accept_length <= num_steps + 1:
        raise ValueError(
            f"A mean accept length of {mean_accept_length} cannot come from {num_steps} drafted tokens; "
            f"choose one from 1 to {num_steps + 1}."
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        mean = sum(rate**i for i in range(num_steps + 1))
        low, high = (rate, high) if mean < mean_accept_length else (low, rate)
    return [high] * num_steps


@torch.library.custom_op("spec_compile::simulate_accept", mutates_args=())
def simulate_accept(
    window_ids: Tensor,
    parents: Tensor | None,
    depth: Tensor | None,
    target_ids: Tensor,
    rates: Tensor,
    seed: Tensor,
    position: Tensor,
    max_accept: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accept drafts at given rates instead of by the target's opinion.

    Draft j + 1 of a row stands when the draft before it does and a uniform number of its position is below ``rates[b, j]``.
    On a tree the path leads to the first of the deepest nodes within that length.

    Args:
        window_ids: int64 [B, N].
        parents, depth: int32 [B, N] of a tree (see ``ops.tree.build_tree``); both None for a chain.
        target_ids: int64 [B, N]; the one behind the last accepted node is emitted last.
        rates: float32 [B, T], the probability that a draft stands given that those before it do. 0 beyond T.
        seed: int64 [B].
        position: int32 [B], the root's position (``cache_len``).
        max_accept: E, at least 1.

    Returns:
        emitted, path, accept_length as in ``ops.accept_tree``; the drafts on the path are emitted, so that the text is what
        the caches hold.
    """
    batch, num_tokens = window_ids.shape
    device, steps = window_ids.device, min(rates.shape[1], max_accept - 1)
    if parents is None or depth is None:
        depth = torch.arange(num_tokens, dtype=torch.int32, device=device).expand(batch, -1)
        parents = depth - 1
    at = position.long()[:, None] + 1 + torch.arange(steps, device=device)
    hits = uniform(seed[:, None], at, ACCEPT_STREAM) < rates[:, :steps]  # [B, steps]
    wanted = hits.cumprod(1).sum(1, keepdim=True)  # [B, 1]: drafts
    node = depth.masked_fill(depth > wanted, -1).argmax(1, keepdim=True)  # [B, 1]; argmax takes the first
    last = depth.gather(1, node).long()
    bonus = target_ids.gather(1, node)
    slots = []
    for j in range(max_accept - 1, -1, -1):  # up from the deepest node, which is at j == last
        slots.append(torch.where(last >= j, node, -1))
        node = torch.where(last >= j, parents.gather(1, node).long(), node).clamp(min=0)
    path = torch.cat(slots[::-1], 1)  # [B, E]
    drafted = window_ids.gather(1, path.roll(-1, 1).clamp(min=0))  # behind the last node: anything
    emitted = torch.where(torch.arange(max_accept, device=device) < last, drafted, bonus)
    return emitted, path.to(torch.int32), (last[:, 0] + 1).to(torch.int32)


@simulate_accept.register_fake
def simulate_accept_fake(
    window_ids, parents, depth, target_ids, rates, seed, position, max_accept
) -> tuple[Tensor, Tensor, Tensor]:
    batch = window_ids.shape[0]
    emitted = window_ids.new_empty(batch, max_accept)
    return emitted, emitted.new_empty(batch, max_accept, dtype=torch.int32), emitted.new_empty(batch, dtype=torch.int32)


@simulate_accept.register_kernel("cuda")
def simulate_accept_cuda(
    window_ids, parents, depth, target_ids, rates, seed, position, max_accept
) -> tuple[Tensor, Tensor, Tensor]:
    from spec_compile.ops.kernels import accept_tree as kernels  # here, so that machines without Triton can import this module

    return kernels.simulate_accept(window_ids, parents, depth, target_ids, rates, seed, position, max_accept)
