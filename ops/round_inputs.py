"""What a round is fed with besides drafted tokens: roots, positions, lengths. One launch each where plain torch takes five.

Shapes: B rows, C token slots of a row, N window tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("spec_compile::round_inputs", mutates_args=())
def round_inputs(tokens: Tensor, cache_len: Tensor, end_len: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Roots, positions and lengths of windows behind ``cache_len``.

    Args:
        tokens: int64 [B, C].
        cache_len: int32 [B], 0 <= cache_len < C; the root is ``tokens[b, cache_len[b]]``.
        end_len: int32 [B], most tokens of a row; 0 in padding rows.
        num_tokens: N.

    Returns:
        root int64 [B, 1]; position_ids int64 [B, N], ``cache_len + j``, but past a row's end its last position, so that a model
        with learned positions is never asked for one it does not have; lens int32 [N, B], ``cache_len + j``, fresh memory.
    """
    root = tokens.gather(1, cache_len[:, None].long())
    slot = torch.arange(num_tokens, dtype=torch.int32, device=cache_len.device)
    lens = slot[:, None] + cache_len
    last = (end_len - 1).clamp(min=0)[:, None]
    return root, torch.minimum(cache_len[:, None] + slot, last).long(), lens


@round_inputs.register_fake
def round_inputs_fake(tokens, cache_len, end_len, num_tokens) -> tuple[Tensor, Tensor, Tensor]:
    batch = tokens.shape[0]
    return (
        tokens.new_empty(batch, 1),
        tokens.new_empty(batch, num_tokens),
        cache_len.new_empty(num_tokens, batch),
    )


@round_inputs.register_kernel("cuda")
def round_inputs_cuda(tokens, cache_len, end_len, num_tokens) -> tuple[Tensor, Tensor, Tensor]:
    from spec_compile.ops.kernels import round_inputs as kernels  # here, so that machines without Triton can import this module

    return kernels.round_inputs(tokens, cache_len, end_len, num_tokens)


@torch.library.custom_op("spec_compile::extend_inputs", mutates_args=())
def extend_inputs(
    tokens: Tensor, start: Tensor, count: Tensor, end_len: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What a draft head reads of tokens that were committed behind ``start``.

    Args:
        tokens: int64 [B, C].
        start: int32 [B], 0 <= start < C; the committed tokens are ``tokens[b, start + 1 : start + 1 + count]``.
        count: int32 [B], 0 where nothing was committed.
        end_len: int32 [B].
        num_tokens: N; slots behind ``count`` hold whatever stands in ``tokens`` there, or in the row's last slot.

    Returns:
        input_ids int64 [B, N], ``tokens[b, start + 1 + j]``; position_ids int64 [B, N], ``start + j`` as in ``round_inputs``;
        newest int64 [B, 1], the slot of the last committed token, 0 if there is none.
    """
    slot = torch.arange(num_tokens, dtype=torch.int32, device=start.device)
    position = start[:, None] + slot  # [B, N]
    input_ids = tokens.gather(1, (position + 1).clamp(max=tokens.shape[1] - 1).long())
    last = (end_len - 1).clamp(min=0)[:, None]
    return input_ids, torch.minimum(position, last).long(), (count[:, None] - 1).clamp(min=0).long()


@extend_inputs.register_fake
def extend_inputs_fake(tokens, start, count, end_len, num_tokens) -> tuple[Tensor, Tensor, Tensor]:
    batch = tokens.shape[0]
    return tokens.new_empty(batch, num_tokens), tokens.new_empty(batch, num_tokens), tokens.new_empty(batch, 1)


@extend_inputs.register_kernel("cuda")
def extend_inputs_cuda(tokens, start, count, end_len, num_tokens) -> tuple[Tensor, Tensor, Tensor]:
    from spec_compile.ops.kernels import round_inputs as kernels

    return kernels.extend_inputs(tokens, start, count, end_len, num_tokens)
