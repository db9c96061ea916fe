"""Prompt look-up: draft what followed the last time the text ended like this.

Source: prompt lookup decoding (A. Saxena, 2023), the ``prompt_lookup_num_tokens`` of transformers, per row and on the
device. Shapes: B rows, C token slots of a row, K drafted tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("spec_compile::ngram_propose", mutates_args=())
def ngram_propose(tokens: Tensor, cache_len: Tensor, num_steps: int, min_ngram: int, max_ngram: int) -> tuple[Tensor, Tensor]:
    """Continue each row as it continued after the most recent earlier occurrence of its longest repeated suffix.

    The known text is ``tokens[b, : cache_len[b] + 1]``. Its suffixes of ``max_ngram`` down to ``min_ngram`` tokens are
    looked up among the earlier n-grams (which may overlap the suffix). A continuation that reaches the end of the known
    text goes on with the tokens just drafted, so repeating text is drafted to any depth.

    Args:
        tokens: int64 [B, C].
        cache_len: int32 [B].
        num_steps: K, tokens to draft.
        min_ngram, max_ngram: shortest and longest suffix that counts; 1 <= min_ngram <= max_ngram.

    Returns:
        draft int64 [B, K], the root token repeated where nothing matched; match_length int32 [B], 0 where nothing
        matched.
    """
    # A host read is free on a CPU and saves scanning the unused slots; CUDA has its own kernel.
    known = int(cache_len.max()) + 1 if tokens.device.type == "cpu" else tokens.shape[1]
    text = tokens[:, :known]
    last = cache_len.long()[:, None]  # [B, 1], index of the root
    back = torch.arange(max_ngram, device=tokens.device)
    suffix = text.gather(1, (last - back).clamp(min=0))  # [B, max_ngram], newest first
    slot = torch.arange(known, device=tokens.device)
    alive = (text == suffix[:, :1]) & (slot < last)  # [B, known]: an n-gram ending here matches so far
    score = alive.long()  # matched length
    for i in range(1, min(max_ngram, known)):
        # In place on a shifted view: an n-gram ending at slot s matches its i-th last token at s - i.
        alive[:, i:] &= text[:, : known - i] == suffix[:, i : i + 1]
        alive[:, :i] = False
        score += alive
    best = torch.where(score >= min_ngram, score * known + slot, -1).amax(1, keepdim=True)  # longest, then most recent
    found = best >= 0  # [B, 1]
    end = torch.where(found, best % known, last - 1)  # without a match the "cycle" is the root alone
    step = torch.arange(num_steps, device=tokens.device)
    draft = text.gather(1, end + 1 + step % (last - end))  # [B, K]
    match_length = torch.where(found, best // known, 0)[:, 0].to(torch.int32)
    return draft, match_length


@ngram_propose.register_fake
def ngram_propose_fake(tokens, cache_len, num_steps, min_ngram, max_ngram) -> tuple[Tensor, Tensor]:
    batch = tokens.shape[0]
    return tokens.new_empty(batch, num_steps), tokens.new_empty(batch, dtype=torch.int32)


@ngram_propose.register_kernel("cuda")
def ngram_propose_cuda(tokens, cache_len, num_steps, min_ngram, max_ngram) -> tuple[Tensor, Tensor]:
    from spec_compile.ops.kernels import round_ops  # here, so that machines without Triton can import this module

    return round_ops.ngram_propose(tokens, cache_len, num_steps, min_ngram, max_ngram)
