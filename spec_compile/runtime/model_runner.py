"""One Hugging Face model made runnable: its stage programs, built when first needed, over its KV pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile.hardware import Hardware
from spec_compile.hf_integration.capture import capture_prefill, capture_window
from spec_compile.ops import providers
from spec_compile.passes.graph import StageGraph
from spec_compile.passes.pipeline import run_passes
from spec_compile.passes.select_backend import Choice
from spec_compile.runtime import kv_pool
from spec_compile.runtime.program import SegmentCompiler, StageProgram, build_program


class ModelRunner:
    """Captures, lowers and runs one model.

    Args:
        stage: ``"verify"`` for a target, ``"draft"`` for a draft; what ``backend``'s dict is keyed by.
        page_size: slots a page on a GPU; on a CPU a row has one page.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stage: str,
        hardware: Hardware,
        backend: str | Mapping[str, str],
        compiler: SegmentCompiler,
        page_size: int,
    ) -> None:
        self.model, self.stage, self.hardware, self.backend, self.compiler = model, stage, hardware, backend, compiler
        self.page_size = page_size
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.choices: dict[str, list[Choice]] = {}  # graph name -> providers, for explain()
        self.reports: dict[str, list[str]] = {}
        self.pool: kv_pool.KVPool | None = None
        self._captured: dict[tuple, StageGraph] = {}
        self._programs: dict[tuple, StageProgram] = {}
        self._weights: list[int] = []
        self._layouts: list[kv_pool.LayerLayout] | None = None
        # Prefill is one graph for every prompt length. On a CPU its segments run as captured: prompts are bound by GEMMs
        # there, and compiling would take longer than it ever saves.
        self._prefill_compiler = compiler if hardware.is_cuda else SegmentCompiler("none", hardware)
        self.prefill_program(argmax=False)  # fails early on a model that cannot be captured, and tells the KV layout

    def prefill_program(self, *, argmax: bool) -> StageProgram:
        """Packed prompts [1, T] -> logits [1, B, V] or ids [1, B] of each prompt's last token."""
        return self._program(("prefill",), lambda: capture_prefill(self.model), argmax, self._prefill_compiler)

    def window_program(self, batch: int, num_tokens: int, *, argmax: bool) -> StageProgram:
        """Windows [batch, num_tokens] -> logits [batch, num_tokens, V] or ids [batch, num_tokens]."""
        return self._program(
            (self.stage, batch, num_tokens),
            lambda: capture_window(self.model, batch, num_tokens, self.stage),
            argmax,
            self.compiler,
        )

    def _program(
        self, shape: tuple, capture: Callable[[], StageGraph], argmax: bool, compiler: SegmentCompiler
    ) -> StageProgram:
        key = (*shape, argmax)
        if key not in self._programs:
            if shape not in self._captured:
                self._captured[shape] = capture()
            graph, choices = run_passes(
                self._captured[shape].copy(),
                hardware=self.hardware,
                backend=self.backend,
                page_size=self.page_size,
                argmax=argmax,
            )
            for choice in choices:
                providers.load(choice.provider).warm_up(choice.node, self.device)
            name = shape[0] if shape[0] == "prefill" else f"{shape[0]}, {shape[1]} rows × {shape[2]} tokens"
            self.choices[name], self.reports[name] = choices, graph.report
            self._layouts = self._layouts or kv_pool.layouts(choices)
            self._programs[key] = build_program(graph, compiler, single_token=shape[1:] == (1, 1))
            if self.pool is not None:
                self._programs[key].bind(self.pool.caches)
            self._weights = self._weight_addresses()  # fusing may just have moved them
        return self._programs[key]

    def _weight_addresses(self) -> list[int]:
        return [p.data_ptr() for p in self.model.parameters()]

    def weights_moved(self) -> bool:
        """Whether the model's parameters are no longer the tensors the programs are bound to (``.to()``, replaced layers)."""
        return self._weights != self._weight_addresses()

    def reserve(self, rows: int, capacity: int) -> bool:
        """Make sure the pool has ``rows`` rows of ``capacity`` slots; True when it was (re)allocated.

        A new pool moves every cache, so CUDA graphs captured over the old one are void.
        """
        if self.pool is not None and self.pool.rows >= rows and self.pool.capacity >= capacity:
            return False
        if self.pool is not None:
            rows, capacity = max(rows, self.pool.rows), max(capacity, self.pool.capacity)
        self.pool = None  # free the old one first
        for program in self._programs.values():
            program.bound = []
        page_size = self.page_size if self.hardware.is_cuda else capacity
        capacity = -(-capacity // page_size) * page_size
        self.pool = kv_pool.allocate(self._layouts, rows, capacity, page_size, self.device)
        for program in self._programs.values():
            program.bind(self.pool.caches)
        return True

    def release(self) -> None:
        """Free the pool and forget every program."""
        self.pool = None
        self._programs.clear()
        self._captured.clear()

    def prefill(self, prompts: list[Tensor], page_table: Tensor, *, argmax: bool, max_tokens: int) -> Tensor:
        """Fill the caches with ``prompts`` (int64 [len] each, row by row) and return the last tokens' logits or ids.

        Args:
            page_table: int32 [rows, M], row i for prompt i.
            max_tokens: rows go in groups of at most this many tokens (one row at least).

        Returns:
            [len(prompts), V] logits, or int64 [len(prompts)] ids.
        """
        program = self.prefill_program(argmax=argmax)
        out = []
        for first, group in _groups(prompts, max_tokens):
            lengths = torch.tensor([len(p) for p in group])
            cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            packed = torch.cat(group)[None]  # [1, T]
            positions = torch.cat([torch.arange(n) for n in lengths.tolist()])[None]
            result = program(
                input_ids=packed.to(self.device),
                position_ids=positions.to(self.device),
                page_table=page_table[first : first + len(group)],
                cu_seqlens=cu_seqlens.to(self.device, torch.int32),
                logit_index=(cu_seqlens[1:] - 1).to(self.device),
                num_tokens=packed.shape[1],
            )
            out.append(result[0])
        return torch.cat(out)


def _groups(prompts: list[Tensor], max_tokens: int) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (index of the first row, rows) with at most ``max_tokens`` tokens a group, one row at least."""
    first, group, size = 0, [], 0
    for i, prompt in enumerate(prompts):
        if group and size + len(prompt) > max_tokens:
            yield first, group
            first, group, size = i, [], 0
        group.append(prompt)
        size += len(prompt)
    yield first, group
