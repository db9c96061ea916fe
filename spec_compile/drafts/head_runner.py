"""A draft head made runnable: programs that read the target's hidden states, over the head's own KV pool."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.hf_integration.capture import capture_head_prefill, capture_head_window
from spec_compile.hf_integration.heads.draft_head import DraftHead
from spec_compile.passes.pipeline import prepare_head
from spec_compile.runtime.model_runner import groups, pack
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import StageProgram
from spec_compile.runtime.programs import Programs


class HeadRunner:
    """Runs a ``DraftHead``: entry i of its cache belongs to token i + 1 and the target's state of token i.

    Raises:
        CaptureError: the head cannot be captured.
        BackendError: no provider, or not the forced one, can run its attention.
    """

    def __init__(self, head: DraftHead, options: RuntimeOptions) -> None:
        self.head, self.programs = head, Programs(head, options)
        self.prefill_program()  # fails early
        self.programs.check_stages(("draft", "draft_extend"))

    def prefill_program(self) -> StageProgram:
        """Packed tokens [1, T] and target states [1, T, n * Ht] -> the head's states [1, T, H]; its cache is filled."""
        return self.programs.get(
            "prefill",
            ("prefill",),
            (),
            lambda: capture_head_prefill(self.head),
            lambda graph: prepare_head(graph, num_outputs=1),
        )

    def extend_program(self, batch: int, num_tokens: int, *, all_states: bool = False) -> StageProgram:
        """Committed tokens and target states of them -> logits [batch, 1, Vd] and states [batch, 1, H] of slot ``slots``.

        Args:
            all_states: put out every slot's state [batch, num_tokens, H], for a head that reads them in turn.
        """
        return self._head_program("draft_extend", batch, num_tokens, 1, all_states=all_states)

    def step_program(self, batch: int, num_tokens: int, num_rows: int) -> StageProgram:
        """Drafted tokens and their parents' own states -> logits [batch, num_rows, Vd] and states [batch, num_rows, H].

        More than one token is a tree: the program takes ``tree_mask`` int32 [batch, num_tokens, W].
        """
        return self._head_program("draft", batch, num_tokens, num_rows, tree=num_tokens > 1)

    def _head_program(
        self, stage: str, batch: int, num_tokens: int, num_rows: int, *, tree: bool = False, all_states: bool = False
    ) -> StageProgram:
        return self.programs.get(
            f"{stage}, {batch} rows × {num_tokens} tokens{', tree' if tree else ''}",
            (stage, batch, num_tokens, num_rows, all_states),
            (),
            lambda: capture_head_window(self.head, batch, num_tokens, num_rows, stage, all_states),
            lambda graph: prepare_head(graph, num_outputs=2, tree=tree),
        )

    def fill(self, prompts: list[Tensor], page_table: Tensor, states: Tensor, max_tokens: int) -> list[Tensor]:
        """Fill the cache with all of each prompt that is known: entries 0 to len - 2.

        Args:
            prompts: int64 [len] each.
            page_table: int32 [len(prompts), M].
            states: [T, n * Ht], the target's states of the packed prompts.
            max_tokens: process at most this many tokens at once (one prompt at least).

        Returns:
            The head's states [T, H] of these entries, packed, in one tensor or several.
        """
        first_token = 0
        tokens, kept, rows = [], [], []
        for row, prompt in enumerate(prompts):
            if len(prompt) > 1:  # the last token's entry needs the token behind it
                tokens.append(prompt[1:])
                kept.append(states[first_token : first_token + len(prompt) - 1])
                rows.append(row)
            first_token += len(prompt)
        program = self.prefill_program()
        filled = []
        for first, group in groups(tokens, max_tokens) if tokens else ():
            packed = pack(group, self.programs.device)
            index = torch.tensor(rows[first : first + len(group)], device="cpu").to(self.programs.device)
            (hidden,) = program(
                input_ids=torch.cat(group)[None].to(self.programs.device),
                position_ids=packed.position_ids,
                hidden_states=torch.cat(kept[first : first + len(group)])[None],
                page_table=page_table.index_select(0, index),
                cu_seqlens=packed.cu_seqlens,
                num_tokens=packed.num_tokens,
            )
            filled.append(hidden[0])
        return filled
