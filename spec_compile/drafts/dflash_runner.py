"""A DFlash head made runnable: one program drafts a block, two others write the context that blocks look at."""

from __future__ import annotations

from torch import Tensor

from spec_compile.hf_integration.capture import capture_block, capture_dflash_context
from spec_compile.passes.pipeline import prepare_context, prepare_head
from spec_compile.passes.select_backend import Choice
from spec_compile.runtime.model_runner import ModelRunner, pack
from spec_compile.runtime.program import StageProgram


class DFlashRunner(ModelRunner):
    """``ModelRunner`` of a ``DFlashHead``: entry i of its cache belongs to token i and the target's state of token i."""

    def _first_choices(self) -> list[Choice]:
        """Of a block: the other programs have no attention, and this one fuses the weights that they share."""
        self.block_program(1, self.model.num_drafts)
        return next(iter(self.choices.values()))

    def block_program(self, batch: int, num_drafts: int) -> StageProgram:
        """Blocks [batch, block_size], ``tree_mask`` of ones int32 [batch, block_size, W] -> logits [batch, num_drafts, Vd]."""
        return self._program(
            f"draft, {batch} rows × {num_drafts} tokens",
            ("draft", batch, num_drafts),
            (),
            lambda: capture_block(self.model, batch, num_drafts),
            lambda graph: prepare_head(graph, num_outputs=1, tree=True),
            self.compiler,
        )

    def prefill_program(self, *, argmax: bool) -> StageProgram:
        """Target states [1, T, n * Ht] of packed prompts -> nothing; the cache is filled."""
        del argmax  # no logits
        return self._program(
            "prefill",
            ("prefill",),
            (),
            lambda: capture_dflash_context(self.model, 1, None),
            prepare_context,
            self._prefill_compiler,
        )

    def extend_program(self, batch: int, num_tokens: int) -> StageProgram:
        """Target states [batch, num_tokens, n * Ht] of committed tokens -> nothing; they are written behind ``cache_len``."""
        return self._program(
            f"draft_extend, {batch} rows × {num_tokens} tokens",
            ("draft_extend", batch, num_tokens),
            (),
            lambda: capture_dflash_context(self.model, batch, num_tokens),
            prepare_context,
            self.compiler,
        )

    def fill(self, prompts: list[Tensor], page_table: Tensor, states: Tensor) -> None:
        """Fill the cache with all of each prompt.

        Args:
            prompts: int64 [len] each.
            page_table: int32 [len(prompts), M].
            states: [T, n * Ht], the target's states of the packed prompts.
        """
        packed = pack(prompts, self.device)
        self.prefill_program(argmax=False)(
            position_ids=packed.position_ids,
            hidden_states=states[None],
            page_table=page_table,
            cu_seqlens=packed.cu_seqlens,
            num_tokens=packed.num_tokens,
        )
