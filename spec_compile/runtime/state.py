"""Every tensor a round reads or writes, allocated once: CUDA graphs record their addresses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from spec_compile.ops.accept_block import round_seed
from spec_compile.ops.sampling import remove_invalid_values, suppress_tokens, warp_logits


@dataclass(frozen=True)
class SamplingPlan:
    """What of the sampling settings is fixed in a graph; the values themselves (temperature, …) are tensors in the state.

    Attributes:
        do_sample: False is greedy.
        max_top_k: 0 for no top-k, else a bound of every row's ``top_k``.
        use_top_p, use_min_p: whether any row filters so.
        use_min_len: whether end-of-sequence is forbidden for a while (``min_new_tokens``).
        remove_invalid: whether logits that are not finite become finite first.
        block: whether drafts that were drawn from a distribution are judged as a block.
    """

    do_sample: bool = False
    max_top_k: int = 0
    use_top_p: bool = False
    use_min_p: bool = False
    use_min_len: bool = False
    remove_invalid: bool = False
    block: bool = False

    def draft_seed(self, state: DecodeState) -> Tensor:
        """Seeds of what a round draws drafts with, int64 [B]: the rows' own, or the round's where blocks are judged."""
        return round_seed(state.seed, state.cache_len) if self.block else state.seed

    @property
    def ids_only(self) -> bool:
        """Whether the target's token ids suffice and its logits need never leave the graph."""
        return not (self.do_sample or self.use_min_len or self.remove_invalid)

    def probabilities(self, logits: Tensor, state: DecodeState) -> Tensor:
        """The distribution of the next token: logits [B, N, V] -> float32 [B, N, V]."""
        batch, num_tokens, _ = logits.shape

        def per_slot(x: Tensor) -> Tensor:
            return x[:, None].expand(batch, num_tokens).reshape(-1)  # [B * N]

        probs = warp_logits(
            logits.flatten(0, 1),
            per_slot(state.temperature),
            per_slot(state.top_k),
            per_slot(state.top_p),
            per_slot(state.min_p),
            max_top_k=self.max_top_k,
            use_top_p=self.use_top_p,
            use_min_p=self.use_min_p,
            every_row_top_k=True,  # one setting serves a whole call
        )
        return probs.unflatten(0, (batch, num_tokens))

    def restrict(self, logits: Tensor, state: DecodeState, depth: Tensor | None = None) -> Tensor:
        """Logits [B, N, V], made finite where that is asked for, with end-of-sequence ids forbidden where the text is still
        too short; ``depth`` [B, N] of a tree."""
        if self.remove_invalid:
            logits = remove_invalid_values(logits)
        if not self.use_min_len:
            return logits
        return suppress_tokens(logits, state.eos_ids, state.cache_len, state.min_len, depth)


@dataclass
class DecodeState:
    """B rows of text in the making. ``tokens[b, : cache_len[b] + 1]`` is known; the last of these is the round's root.

    Padding rows, and every row before a request, are finished with ``cache_len`` 0 and a page table of zeros: a round
    over them changes nothing but the null page, which is what lets graphs be warmed up and captured at any time.
    """

    tokens: Tensor  # int64 [B, C]
    cache_len: Tensor  # int32 [B]
    finished: Tensor  # bool [B]
    end_len: Tensor  # int32 [B], most tokens of a row
    position_end: Tensor  # int32 [B], positions of a row that may be asked for: end_len, or fewer where the model has fewer
    min_len: Tensor  # int32 [B], tokens before which no row may end
    page_table: Tensor  # int32 [B, M]
    state_slot: Tensor  # int32 [B], of recurrent states; 0 is the null slot
    eos_ids: Tensor  # int64 [E], -1 matches nothing
    seed: Tensor  # int64 [B]
    temperature: Tensor  # float32 [B]
    top_k: Tensor  # int64 [B]
    top_p: Tensor  # float32 [B]
    min_p: Tensor  # float32 [B]
    next_draft: Tensor  # int64 [B, K], drafts that extend found
    out: Tensor  # int64 [B, K + 4]: emitted tokens [K + 1], how many of them count, status (ops.accept), match length

    def positions(self, cache_len: Tensor, num_tokens: int) -> Tensor:
        """Positions of a window behind ``cache_len``: int64 [B, N]. Slots past a row's end repeat its last position, so
        that a model with learned positions is never asked for one it does not have."""
        last = (self.end_len - 1).clamp(min=0)[:, None]  # [B, 1]
        offsets = torch.arange(num_tokens, dtype=torch.int32, device=cache_len.device)
        return torch.minimum(cache_len[:, None] + offsets, last).long()

    def rows(self, count: int) -> DecodeState:
        """The first ``count`` rows: views, so a graph of a smaller bucket works on the same memory."""
        views = {
            f.name: value[:count] if isinstance(value := getattr(self, f.name), Tensor) and f.name != "eos_ids" else value
            for f in dataclasses.fields(self)
        }
        return DecodeState(**views)

    def clear(self) -> None:
        """Every row becomes a padding row."""
        for tensor in (self.tokens, self.cache_len, self.end_len, self.position_end, self.min_len, self.page_table):
            tensor.zero_()
        self.state_slot.zero_()
        self.out.zero_()
        self.next_draft.zero_()
        self.finished.fill_(True)
        self.eos_ids.fill_(-1)
        self.temperature.fill_(1.0)
        self.top_p.fill_(1.0)


MAX_EOS_IDS = 16


def new_state(rows: int, capacity: int, pages_per_row: int, num_steps: int, device: torch.device) -> DecodeState:
    """A state of padding rows.

    Args:
        capacity: token slots a row (C).
        num_steps: the most tokens drafted a round (K).
    """

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    state = DecodeState(
        tokens=zeros(rows, capacity, dtype=torch.int64),
        cache_len=zeros(rows, dtype=torch.int32),
        finished=zeros(rows, dtype=torch.bool),
        end_len=zeros(rows, dtype=torch.int32),
        position_end=zeros(rows, dtype=torch.int32),
        min_len=zeros(rows, dtype=torch.int32),
        page_table=zeros(rows, pages_per_row, dtype=torch.int32),
        state_slot=zeros(rows, dtype=torch.int32),
        eos_ids=zeros(MAX_EOS_IDS, dtype=torch.int64),
        seed=zeros(rows, dtype=torch.int64),
        temperature=zeros(rows, dtype=torch.float32),
        top_k=zeros(rows, dtype=torch.int64),
        top_p=zeros(rows, dtype=torch.float32),
        min_p=zeros(rows, dtype=torch.float32),
        next_draft=zeros(rows, max(num_steps, 1), dtype=torch.int64),
        out=zeros(rows, num_steps + 4, dtype=torch.int64),
    )
    state.clear()
    return state
