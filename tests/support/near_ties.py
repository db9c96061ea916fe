"""Comparing greedy text of two ways to run one model in a low precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BFLOAT16_GAP = 0.08  # eight bfloat16 steps at the tiny models' logits' magnitude of about 2


def assert_equal_up_to_near_ties(
    reference: nn.Module, inputs: dict[str, Tensor], plain: Tensor, ours: Tensor, gap: float = BFLOAT16_GAP
) -> int:
    """Rows may leave the plain text only where the reference's two best logits are closer than ``gap``.

    A wider GEMM or another attention kernel may round differently; behind a tie that was broken differently the texts
    are different texts, so each row is judged at its first difference.

    Args:
        inputs: the left-padded prompts, with their ``attention_mask``.
        plain, ours: int64 [B, P + new].

    Returns:
        How many rows diverged.
    """
    diverged = 0
    for row in range(plain.shape[0]):
        differ = (plain[row] != ours[row]).nonzero().flatten()
        if len(differ) == 0:
            continue
        diverged += 1
        start = int(inputs["attention_mask"][row].argmax())
        with torch.no_grad():
            logits = reference(plain[row : row + 1, start : int(differ[0])]).logits[0, -1].float()
        best = logits.topk(2).values
        assert best[0] - best[1] < gap, f"row {row} left the text with a gap of {float(best[0] - best[1]):.3f}"
    return diverged
