"""A DFlash head made runnable: one program drafts a block, two others write the context that blocks look at."""

from __future__ import annotations

from torch import Tensor

from spec_compile.hf_integration.capture import capture_block, capture_dflash_context
from spec_compile.hf_integration.heads.dflash import DFlashHead
from spec_compile.passes.pipeline import prepare_context, prepare_head
from spec_compile.runtime.model_runner import pack
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import StageProgram
from spec_compile.runtime.programs import Programs


class DFlashRunner:
    """Runs a ``DFlashHead``: entry i of its cache belongs to token i and the target's state of token i.

    Raises:
        CaptureError: the head cannot be captured.
        BackendError: no provider, or not the forced one, can run its attention.
    """

    def __init__(self, head: DFlashHead, options: RuntimeOptions) -> None:
        self.head, self.programs = head, Programs(head, options)
        # The first program tells the layout of the caches: the others have no attention, and this one fuses the weights that
        # they share.
        self.block_program(1, head.num_drafts)

    def block_program(self, batch: int, num_drafts: int) -> StageProgram:
        """Blocks [batch, block_size], ``tree_mask`` of ones int32 [batch, block_size, W] -> logits [batch, num_drafts, Vd]."""
        return self.programs.get(
            f"draft, {batch} rows × {num_drafts} tokens",
            ("draft", batch, num_drafts),
            (),
            lambda: capture_block(self.head, batch, num_drafts),
            lambda graph: prepare_head(graph, num_outputs=1, tree=True),
        )

    def prefill_program(self) -> StageProgram:
        """Target states [1, T, n * Ht] of packed prompts -> nothing; the cache is filled."""
        return self.programs.get(
            "prefill",
            ("prefill",),
            (),
            lambda: capture_dflash_context(self.head, 1, None),
            prepare_context,
        )

    def extend_program(self, batch: int, num_tokens: int) -> StageProgram:
        """Target states [batch, num_tokens, n * Ht] of committed tokens -> nothing; they are written behind ``cache_len``."""
        return self.programs.get(
            f"draft_extend, {batch} rows × {num_tokens} tokens",
            ("draft_extend", batch, num_tokens),
            (),
            lambda: capture_dflash_context(self.head, batch, num_tokens),
            prepare_context,
        )

    def fill(self, prompts: list[Tensor], page_table: Tensor, states: Tensor) -> None:
        """Fill the cache with all of each prompt.

        Args:
            prompts: int64 [len] each.
            page_table: int32 [len(prompts), M].
            states: [T, n * Ht], the target's states of the packed prompts.
        """
        packed = pack(prompts, self.programs.device)
        self.prefill_program()(
            position_ids=packed.position_ids,
            hidden_states=states[None],
            page_table=page_table,
            cu_seqlens=packed.cu_seqlens,
            num_tokens=packed.num_tokens,
        )
