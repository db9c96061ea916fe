"""A causal language model made runnable: its prompt and window programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile.errors import CaptureError
from spec_compile.hf_integration.capture import PLAIN_WORKS, capture_prefill, capture_prefill_as_it_is, capture_window
from spec_compile.hf_integration.mask_windows import longest_text
from spec_compile.hf_integration.self_check import check_capture
from spec_compile.hf_integration.taps import Tap
from spec_compile.hf_integration.training_mode import active_dropout, training_flags, what_differs
from spec_compile.passes.backend_option import check_delta_rules
from spec_compile.passes.pipeline import prepare
from spec_compile.passes.positions import num_positions
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import StageProgram
from spec_compile.runtime.programs import Programs


class ModelRunner:
    """Runs a target or a draft model.

    Args:
        stage: ``"verify"`` for a target, ``"draft"`` for a draft; what ``backend``'s dict is keyed by.
        taps: hidden states that programs put out behind their logits, for a draft.

    Attributes:
        programs: captured, compiled, and over which pools.
        num_positions: that the model has a learned (or tabled) one for, ``passes.positions``; None for any.
        longest_text: of a target, tokens up to which its graphs compute what plain ``generate()`` does; None for any number.

    Raises:
        CaptureError: the model cannot be captured, or not so that its graphs compute what it does.
        BackendError: no provider, or not the forced one, can run its attention.
    """

    def __init__(self, model: PreTrainedModel, stage: str, options: RuntimeOptions, taps: tuple[Tap, ...] = ()) -> None:
        self.model, self.stage, self.options, self.taps = model, stage, options, taps
        self.programs = Programs(model, options)
        self.device = self.programs.device
        self._training_differs: dict[tuple[int, ...], str | None] = {}  # by what is in training mode
        self.prefill_program(argmax=False)  # fails early on a model that cannot be captured or has no kernels
        self.programs.check_stages(("draft", "draft_extend") if stage == "draft" else (stage,))
        captured = self.programs.captured["prefill",]
        self.num_positions: int | None = num_positions(captured)
        self.longest_text: int | None = None
        if stage == "verify":
            if options.self_check:
                check_capture(model, captured)
            self.longest_text = longest_text(captured, model.config.get_text_config(decoder=True))
            if not self.programs.recurrent:
                check_delta_rules(options.backend)

    def prefill_program(self, *, argmax: bool) -> StageProgram:
        """Packed prompts [1, T] -> logits [1, B, V] or ids [1, B] of each prompt's last token, and states [1, T, n * Ht]."""
        return self.programs.get(
            "prefill",
            ("prefill",),
            (argmax,),
            lambda: capture_prefill(self.model, self.taps),
            lambda graph: prepare(graph, argmax=argmax, num_taps=len(self.taps)),
        )

    def window_program(
        self, batch: int, num_tokens: int, *, argmax: bool, stage: str | None = None, tree: bool = False
    ) -> StageProgram:
        """Windows [batch, num_tokens] -> logits [batch, num_tokens, V] or ids [batch, num_tokens], and tapped states.

        Args:
            stage: None for the runner's own; a draft also has ``"draft_extend"``, known tokens that its cache lacks.
            tree: the window is a tree: the program takes ``tree_mask`` int32 [batch, num_tokens, W].
        """
        stage = stage or self.stage
        return self.programs.get(
            f"{stage}, {batch} rows × {num_tokens} tokens{', tree' if tree else ''}",
            (stage, batch, num_tokens),
            (argmax, tree),
            lambda: capture_window(self.model, batch, num_tokens, stage, self.taps),
            lambda graph: prepare(graph, argmax=argmax, tree=tree, num_taps=len(self.taps)),
        )

    def training_differs(self) -> str | None:
        """What the model computes otherwise in the modes that its modules are in now than in the graphs, which were captured in
        eval mode; None where training changes nothing. Traces the forward once for each set of modules in training mode."""
        modes = training_flags(self.model)
        if not modes:
            return None
        if (dropout := active_dropout(self.model)) is not None:
            return dropout
        if modes not in self._training_differs:
            with self.options.compiler.counting():
                try:
                    as_it_is = capture_prefill_as_it_is(self.model, self.taps)
                    self._training_differs[modes] = what_differs(self.programs.captured["prefill",], as_it_is)
                except CaptureError as error:
                    self._training_differs[modes] = str(error).removesuffix(PLAIN_WORKS)
        return self._training_differs[modes]

    def prefill(
        self,
        prompts: list[Tensor],
        page_table: Tensor,
        *,
        argmax: bool,
        max_tokens: int,
        on_group: Callable[[int, list[Tensor], Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Fill the caches with ``prompts`` (int64 [len] each, row by row).

        Args:
            page_table: int32 [rows, M], row i for prompt i, whose recurrent states have slot i + 1.
            max_tokens: rows go in groups of at most this many tokens (one row at least).
            on_group: called with the first row, the prompts and the tapped states [T, n * Ht] of each group.

        Returns:
            Of the last tokens: [len(prompts), V] logits or int64 [len(prompts)] ids; the tapped states [len(prompts), n * Ht],
            None without taps.
        """
        program = self.prefill_program(argmax=argmax)
        out, last_states = [], []
        for first, group in groups(prompts, max_tokens):
            packed = pack(group, self.device, self.num_positions)
            last = packed.cu_seqlens[1:].long() - 1
            result, *states = program(
                input_ids=torch.cat(group)[None].to(self.device),
                position_ids=packed.position_ids,
                page_table=page_table[first : first + len(group)],
                state_slot=torch.arange(first + 1, first + 1 + len(group), dtype=torch.int32, device=self.device),
                cu_seqlens=packed.cu_seqlens,
                logit_index=last,
                num_tokens=packed.num_tokens,
            )
            out.append(result[0])
            if states:
                last_states.append(states[0][0].index_select(0, last))
                on_group(first, group, states[0][0])
        return torch.cat(out), torch.cat(last_states) if last_states else None


@dataclasses.dataclass(frozen=True)
class Packed:
    """Where packed prompts begin and which positions their tokens have.

    Attributes:
        cu_seqlens: int32 [B + 1].
        position_ids: int64 [1, T].
        num_tokens: T.
    """

    cu_seqlens: Tensor
    position_ids: Tensor
    num_tokens: int


def pack(prompts: list[Tensor], device: torch.device, num_positions: int | None = None) -> Packed:
    """The layout of ``prompts`` [len] each, one behind the other, on ``device``. What is longer than ``num_positions`` repeats
    the last: a draft model may have fewer than the target."""
    lengths = torch.tensor([0] + [len(p) for p in prompts], device="cpu")  # a default device may be set
    positions = torch.cat([torch.arange(len(p), device="cpu") for p in prompts])[None]
    if num_positions is not None:
        positions = positions.clamp(max=num_positions - 1)
    cu_seqlens = lengths.cumsum(0)
    return Packed(cu_seqlens.to(device, torch.int32), positions.to(device), positions.shape[1])


def groups(prompts: list[Tensor], max_tokens: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (index of the first row, rows) with at most ``max_tokens`` tokens a group, one row at least."""
    first, group, size = 0, [], 0
    for i, prompt in enumerate(prompts):
        if group and size + len(prompt) > max_tokens:
            yield first, group
            first, group, size = i, [], 0
        group.append(prompt)
        size += len(prompt)
    yield first, group
