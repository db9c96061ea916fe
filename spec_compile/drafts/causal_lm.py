"""Drafting with a smaller causal language model that shares the target's tokenizer (Leviathan et al. 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_compile.config import RoundShape
from spec_compile.errors import DraftError
from spec_compile.ops.sampling import DRAFT_STREAM
from spec_compile.runtime.draft import Proposal, RoundInputs, Verified
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.program import StageProgram
from spec_compile.runtime.state import DecodeState, SamplingPlan

# Checkpoints of one family pad their vocabularies differently (Qwen2.5: 151936 and 152064); more is another tokenizer.
_MAX_VOCAB_PADDING = 1024


class CausalLMDraft:
    """K single-token forwards a round, over the draft's own KV pool.

    The first forward (stage ``draft_extend``) is fed the last *two* known tokens: when a whole draft was accepted, the last
    drafted token is not in the draft's cache yet, and writing one slot twice costs less than a forward to fill it.

    Raises:
        DraftError: the vocabularies are too different for one tokenizer.
    """

    kind = "causal_lm"
    taps = ()
    can_skip = False
    reports_match_length = False

    def __init__(self, runner: ModelRunner, shape: RoundShape, vocab_size: int) -> None:
        self.runner, self.programs = runner, (runner.programs,)
        self.shape, self.vocab_size, self.reach = shape, vocab_size, shape.num_steps
        self.draft_vocab_size = runner.model.config.get_text_config(decoder=True).vocab_size
        if runner.programs.recurrent:
            raise DraftError(
                f"draft={type(runner.model).__name__} has recurrent layers, whose states cannot go back to where a draft was "
                "refused. Use a draft of attention layers only, a head trained for the target, 'mtp' or 'ngram'."
            )
        context = getattr(runner.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        # A draft with a shorter context drafts badly there, but drafts; so in ``ModelRunner.prefill``.
        self.max_position = min(context or 2**31, runner.num_positions or 2**31) - 1
        if abs(self.draft_vocab_size - vocab_size) > _MAX_VOCAB_PADDING:
            raise DraftError(
                f"draft={type(runner.model).__name__} has a vocabulary of {self.draft_vocab_size}, the target "
                f"{vocab_size}: they do not share a tokenizer. Use a draft of the target's family, or draft='ngram'."
            )

    def _ids_only(self, plan: SamplingPlan) -> bool:
        """Greedy drafting reads ids alone, unless the draft could name an id the target does not have."""
        return not plan.do_sample and self.draft_vocab_size <= self.vocab_size

    def reserve(self, rows: int, capacity: int) -> bool:
        return self.runner.programs.reserve(rows, capacity)

    def forget(self) -> None:
        pass

    def prepare(self, rows: int, plan: SamplingPlan, shape: RoundShape) -> None:
        self.runner.prefill_program(argmax=True)
        for num_tokens in (2, 1):
            self._program(rows, num_tokens, plan)

    def _program(self, rows: int, num_tokens: int, plan: SamplingPlan) -> StageProgram:
        stage = "draft" if num_tokens == 1 else "draft_extend"
        return self.runner.window_program(rows, num_tokens, argmax=self._ids_only(plan), stage=stage)

    def prefill(self, prompts: list[Tensor], page_table: Tensor, states: None, max_tokens: int, first_row: int) -> None:
        known = [p.clamp(max=self.draft_vocab_size - 1) for p in prompts]
        self.runner.prefill(known, page_table, argmax=True, max_tokens=max_tokens)

    def propose(self, state: DecodeState, plan: SamplingPlan, shape: RoundShape, inputs: RoundInputs) -> Proposal:
        rows = state.cache_len.shape[0]
        # Padding rows have cache_len 0; their window starts at slot 0 of the null page.
        start = (state.cache_len - 1).clamp(min=0)  # [B]
        last_two = (start[:, None] + torch.arange(2, device=start.device)).long()
        window = state.tokens.gather(1, last_two)  # [B, 2]
        tokens, probs = [], []
        for step in range(shape.num_steps):
            num_tokens = window.shape[1]
            cache_len = start if step == 0 else (start + (1 + step)).to(torch.int32)
            positions = state.positions(cache_len, num_tokens).clamp(max=self.max_position)
            (result,) = self._program(rows, num_tokens, plan)(
                input_ids=window.clamp(max=self.draft_vocab_size - 1),
                position_ids=positions,
                page_table=state.page_table,
                cache_len=cache_len,
            )
            token, q = self._choose(result[:, -1], cache_len + num_tokens, state, plan)
            tokens.append(token)
            probs.append(q)
            window = token[:, None]
        full = torch.stack(probs, 1) if plan.do_sample else None
        return Proposal(torch.cat([inputs.root, torch.stack(tokens, 1)], 1), full)

    def _choose(self, result: Tensor, position: Tensor, state: DecodeState, plan: SamplingPlan) -> tuple[Tensor, Tensor | None]:
        """The next draft token [B] and, when sampling, the distribution [B, V] it was drawn from."""
        if self._ids_only(plan):
            return result, None
        logits = _fit(result, self.vocab_size)
        if not plan.do_sample:
            return logits.argmax(-1), None
        q = plan.probabilities(logits[:, None], state)[:, 0]
        return torch.ops.spec_compile.sample_token(q, plan.draft_seed(state), position, DRAFT_STREAM), q

    def extend(self, state: DecodeState, verified: Verified) -> None:
        return None

    def catch_up(self, state: DecodeState) -> None:
        pass  # never left out


def _fit(logits: Tensor, vocab_size: int) -> Tensor:
    """Logits over the target's vocabulary: ids the target lacks are dropped, ids the draft lacks get -inf."""
    missing = vocab_size - logits.shape[-1]
    return logits[..., :vocab_size] if missing <= 0 else F.pad(logits.float(), (0, missing), value=float("-inf"))
