"""The stage programs of one model, built when first needed, over its KV pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile.errors import BackendError
from spec_compile.hf_integration.fingerprint import Fingerprint, fingerprint, what_changed
from spec_compile.ops import providers
from spec_compile.ops.providers import DeltaNode
from spec_compile.passes.backend_option import wanted
from spec_compile.passes.graph import StageGraph, placeholders
from spec_compile.passes.pipeline import choose_kernels
from spec_compile.passes.select_backend import Choice, choose
from spec_compile.runtime import kv_pool, state_pool
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler, StageProgram, build_program


class Programs:
    """Captured graphs of one model, the programs made of them, and the pools that these run over.

    What a model computes in which stage is its runner's business (``ModelRunner``, ``drafts.head_runner.HeadRunner``, …), which
    asks for programs by shape. Kernels are chosen when a program is first used over a pool, and again when a larger pool
    replaces it, because the choice may depend on the most slots a row can have. Segments stay compiled; CUDA graphs that were
    captured over the old pool are void then anyway.

    Attributes:
        captured: by shape, (stage,) or (stage, rows, tokens, …).
        built: programs by shape and variant.
        choices: graph name -> providers, for ``explain()``.
        reports: graph name -> what the passes did to it.
        layouts: of the caches, a layer each; told by the first program, which must hold every layer.
        pool: keys and values; states: of recurrent layers. None before ``reserve``, the latter also without such layers.
    """

    def __init__(self, model: PreTrainedModel, options: RuntimeOptions) -> None:
        self.model, self.options = model, options
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.captured: dict[tuple, StageGraph] = {}
        self.choices: dict[str, list[Choice]] = {}
        self.reports: dict[str, list[str]] = {}
        self.layouts: list[kv_pool.LayerLayout] | None = None
        self.pool: kv_pool.KVPool | None = None
        self.states: state_pool.StatePool | None = None
        self.built: dict[tuple, StageProgram] = {}
        self._state_layout: state_pool.StateLayout | None = None
        self._fingerprint = Fingerprint()
        # Prefill is one graph for every prompt length. On a CPU its segments run as captured: prompts are bound by GEMMs
        # there, and compiling would take longer than it ever saves.
        compiler, hardware = options.compiler, options.hardware
        self._prefill_compiler = compiler if hardware.is_cuda else SegmentCompiler("none", hardware)

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a recurrent state."""
        return self._state_layout is not None

    def check_stages(self, stages: tuple[str, ...]) -> None:
        """Ask for single tokens what can be asked before windows are captured, so that a forced provider fails at once.

        Raises:
            BackendError: no provider, or not the forced one, can run the model's layers in one of ``stages``.
        """
        for stage in stages:
            for choice in next(iter(self.choices.values())):
                op = "gdn_verify" if isinstance(choice.node, DeltaNode) else choice.node.op.replace("prefill_", "")
                node = dataclasses.replace(choice.node, op=op, stage=stage, batch=1, num_tokens=1)
                choose(node, choice.layers, self.options.hardware, wanted(self.options.backend, node.backend_key))

    def get(
        self,
        name: str,
        shape: tuple,
        variant: tuple,
        capture: Callable[[], StageGraph],
        prepare: Callable[[StageGraph], StageGraph],
    ) -> StageProgram:
        """The program of a captured shape in one of its variants.

        Args:
            name: in reports.
            shape: (stage,) or (stage, rows, tokens, …): what is captured once.
            variant: what ``prepare`` makes of it.
            capture: captures the shape when it is first asked for.
            prepare: the passes, over a copy.

        Raises:
            CaptureError: the model cannot be captured.
            BackendError: no provider, or not the forced one, can run its attention.
        """
        key = (*shape, *variant)
        if key not in self.built:
            with self.options.compiler.counting():
                if shape not in self.captured:
                    self.captured[shape] = capture()
                graph = prepare(self.captured[shape].copy())
                compiler = self._prefill_compiler if shape == ("prefill",) else self.options.compiler
                self.built[key] = build_program(graph, compiler)
                self._fingerprint = fingerprint(self.model, self._bound())  # fusing may just have moved its weights
        program = self.built[key]
        if not program.bound:
            self._choose_kernels(name, program)
        return program

    def _choose_kernels(self, name: str, program: StageProgram) -> None:
        """Choose and install kernels; over a pool also measure, build and warm up, and bind the caches."""
        options = self.options
        with options.compiler.counting():
            graph, choices = choose_kernels(
                program.graph,
                hardware=options.hardware,
                backend=options.backend,
                page_size=options.page_size if self.pool is None else self.pool.page_size,
                kv_dtype=options.kv_dtype,
                max_context=None if self.pool is None else self.pool.capacity,
                tuner=None if self.pool is None else options.tuner,
            )
            self.choices[name], self.reports[name] = choices, graph.report
            program.install(graph)
            if self.layouts is None:
                self.layouts, self._state_layout = kv_pool.layouts(choices), state_pool.state_layout(program.graph)
            if self.pool is not None:
                for choice in choices:
                    _warm_up(choice, self.device)
                program.bind(self.pool.caches | ({} if self.states is None else self.states.caches))

    def _bound(self) -> frozenset[int]:
        """Ids of the tensors that captured graphs hold."""
        bindings = (node.meta["binding"] for graph in self.captured.values() for node in placeholders(graph.gm))
        return frozenset(id(binding) for binding in bindings if isinstance(binding, Tensor))

    def what_changed(self) -> Iterator[str]:
        """Names of what of the model is no longer as it was captured."""
        return what_changed(self._fingerprint)

    def reserve(self, rows: int, capacity: int, most_tokens: int = 1) -> bool:
        """Make sure the pool has ``rows`` rows of ``capacity`` slots; True when it was (re)allocated.

        Args:
            most_tokens: of a window, which recurrent layers keep until it is committed.

        A new pool moves every cache, so CUDA graphs captured over the old one are void, and every program chooses its
        kernels anew when it is next used.
        """
        enough = not self.recurrent or (self.states is not None and self.states.most_tokens >= most_tokens)
        if self.pool is not None and self.pool.rows >= rows and self.pool.capacity >= capacity and enough:
            return False
        if self.pool is not None:
            rows, capacity = max(rows, self.pool.rows), max(capacity, self.pool.capacity)
            most_tokens = max(most_tokens, 0 if self.states is None else self.states.most_tokens)
        self.drop_pool()  # free the old one first
        page_size = self.options.page_size if self.options.hardware.is_cuda else capacity
        capacity = -(-capacity // page_size) * page_size
        pool = kv_pool.allocate(self.layouts, rows, capacity, page_size, self.device)
        if self.recurrent:
            self.states = state_pool.allocate(self._state_layout, rows, most_tokens, self.device)
        self.pool = pool  # last: without room for both there is none
        return True

    def drop_pool(self) -> None:
        """Free the pool; programs choose their kernels anew over the next one."""
        self.pool = self.states = None
        for program in self.built.values():
            program.bound = []
        self.choices.clear()
        self.reports.clear()

    def release(self) -> None:
        """Free the pool and forget every program."""
        self.pool = self.states = None
        self.built.clear()
        self.captured.clear()


def _warm_up(choice: Choice, device: torch.device) -> None:
    """Build what a provider needs before graphs are captured; a build that fails says whose it was and what else there is."""
    try:
        providers.load_for(choice.node, choice.provider).warm_up(choice.node, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise BackendError(
            f"{choice.provider} could not be made ready for {choice.node.op} in {choice.stage} graphs: {type(error).__name__}: "
            f"{reason}\nMend its installation (spec-compile doctor), or name another provider: "
            f"backend={{{choice.node.backend_key!r}: 'triton'}}."
        ) from error
