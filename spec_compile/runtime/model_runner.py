"""One Hugging Face model made runnable: its stage programs, built when first needed, over its KV pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile.errors import BackendError, CaptureError
from spec_compile.hardware import Hardware
from spec_compile.hf_integration.capture import PLAIN_WORKS, capture_prefill, capture_prefill_as_it_is, capture_window
from spec_compile.hf_integration.fingerprint import Fingerprint, fingerprint, what_changed
from spec_compile.hf_integration.mask_windows import longest_text
from spec_compile.hf_integration.self_check import check_capture
from spec_compile.hf_integration.taps import Tap
from spec_compile.hf_integration.training_mode import active_dropout, training_flags, what_differs
from spec_compile.ops import providers
from spec_compile.ops.providers import DeltaNode
from spec_compile.passes.graph import StageGraph, placeholders
from spec_compile.passes.pipeline import choose_kernels, prepare
from spec_compile.passes.positions import num_positions
from spec_compile.passes.select_backend import Backend, Choice, Tuner, check_delta_rules, choose, wanted
from spec_compile.runtime import kv_pool, state_pool
from spec_compile.runtime.program import SegmentCompiler, StageProgram, build_program


class ModelRunner:
    """Captures, lowers and runs one model.

    Kernels are chosen when a program is first used over a pool, and again when a larger pool replaces it, because the choice
    may depend on the most slots a row can have. Segments stay compiled; captured CUDA graphs are void then anyway.

    Args:
        stage: ``"verify"`` for a target, ``"draft"`` for a draft; what ``backend``'s dict is keyed by.
        page_size: slots a page on a GPU; on a CPU a row has one page.
        kv_dtype: type of the caches; None for the model's own.
        tuner: measures providers for ``backend="tune"``.
        taps: hidden states that programs put out behind their logits, for a draft.
        self_check: compare what is captured with the model's own forward, once.

    Attributes:
        num_positions: that the model has a learned (or tabled) one for, ``passes.positions``; None for any.
        pool: keys and values; states: of recurrent layers. None before ``reserve``, the latter also without such layers.
        longest_text: of a target, tokens up to which its graphs compute what plain ``generate()`` does; None for any number.

    Raises:
        CaptureError: the model cannot be captured.
        BackendError: no provider, or not the forced one, can run its attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stage: str,
        hardware: Hardware,
        backend: Backend,
        compiler: SegmentCompiler,
        page_size: int,
        kv_dtype: torch.dtype | None = None,
        tuner: Tuner | None = None,
        taps: tuple[Tap, ...] = (),
        self_check: bool = False,
    ) -> None:
        self.taps = taps
        self.model, self.stage, self.hardware, self.backend, self.compiler = model, stage, hardware, backend, compiler
        self.page_size, self.kv_dtype, self.tuner = page_size, kv_dtype, tuner
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.choices: dict[str, list[Choice]] = {}  # graph name -> providers, for explain()
        self.reports: dict[str, list[str]] = {}
        self.num_positions: int | None = None  # set by the first capture
        self.pool: kv_pool.KVPool | None = None
        self.states: state_pool.StatePool | None = None
        self._captured: dict[tuple, StageGraph] = {}
        self._programs: dict[tuple, StageProgram] = {}
        self._fingerprint = Fingerprint()
        self._training_differs: dict[tuple[int, ...], str | None] = {}  # by what is in training mode
        # Prefill is one graph for every prompt length. On a CPU its segments run as captured: prompts are bound by GEMMs
        # there, and compiling would take longer than it ever saves.
        self._prefill_compiler = compiler if hardware.is_cuda else SegmentCompiler("none", hardware)
        self._layouts = kv_pool.layouts(self._first_choices())
        first = next(iter(self._programs.values()))  # prefill, in a model with recurrent layers
        self._state_layout = state_pool.state_layout(first.graph)
        self.longest_text: int | None = None
        if stage == "verify":
            if self_check:
                check_capture(model, self._captured["prefill",])
            self.longest_text = longest_text(self._captured["prefill",], model.config.get_text_config(decoder=True))
            if not self.recurrent:
                check_delta_rules(backend)

    def _first_choices(self) -> list[Choice]:
        """Providers of every layer in one stage, which tell the layout of the caches. Fails early on a model that cannot be
        captured or has no kernels."""
        self.prefill_program(argmax=False)
        self._check_window_stages()
        return self.choices["prefill"]

    @property
    def recurrent(self) -> bool:
        """Whether some layers keep a recurrent state."""
        return self._state_layout is not None

    def _check_window_stages(self) -> None:
        """Ask for single tokens what can be asked before windows are captured, so that a forced provider fails at once."""
        for stage in ("draft", "draft_extend") if self.stage == "draft" else (self.stage,):
            for choice in self.choices["prefill"]:
                op = "gdn_verify" if isinstance(choice.node, DeltaNode) else choice.node.op.replace("prefill_", "")
                node = dataclasses.replace(choice.node, op=op, stage=stage, batch=1, num_tokens=1)
                choose(node, choice.layers, self.hardware, wanted(self.backend, node.backend_key))

    def prefill_program(self, *, argmax: bool) -> StageProgram:
        """Packed prompts [1, T] -> logits [1, B, V] or ids [1, B] of each prompt's last token, and states [1, T, n * Ht]."""
        return self._program(
            "prefill",
            ("prefill",),
            (argmax,),
            lambda: capture_prefill(self.model, self.taps),
            lambda graph: prepare(graph, argmax=argmax, num_taps=len(self.taps)),
            self._prefill_compiler,
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
        return self._program(
            f"{stage}, {batch} rows × {num_tokens} tokens{', tree' if tree else ''}",
            (stage, batch, num_tokens),
            (argmax, tree),
            lambda: capture_window(self.model, batch, num_tokens, stage, self.taps),
            lambda graph: prepare(graph, argmax=argmax, tree=tree, num_taps=len(self.taps)),
            self.compiler,
        )

    def _program(
        self,
        name: str,
        shape: tuple,
        variant: tuple,
        capture: Callable[[], StageGraph],
        prepare_graph: Callable[[StageGraph], StageGraph],
        compiler: SegmentCompiler,
    ) -> StageProgram:
        """The program of a captured shape, (stage,) or (stage, rows, tokens, …), in one of its variants."""
        key = (*shape, *variant)
        if key not in self._programs:
            with self.compiler.counting():
                if shape not in self._captured:
                    self._captured[shape] = capture()
                    if shape == ("prefill",):
                        self.num_positions = num_positions(self._captured[shape])
                graph = prepare_graph(self._captured[shape].copy())
                self._programs[key] = build_program(graph, compiler)
                self._fingerprint = fingerprint(self.model, self._bound())  # fusing may just have moved its weights
        program = self._programs[key]
        if not program.bound:
            self._choose_kernels(name, program)
        return program

    def _choose_kernels(self, name: str, program: StageProgram) -> None:
        """Choose and install kernels; over a pool also measure, build and warm up, and bind the caches."""
        with self.compiler.counting():
            graph, choices = choose_kernels(
                program.graph,
                hardware=self.hardware,
                backend=self.backend,
                page_size=self.page_size if self.pool is None else self.pool.page_size,
                kv_dtype=self.kv_dtype,
                max_context=None if self.pool is None else self.pool.capacity,
                tuner=None if self.pool is None else self.tuner,
            )
            self.choices[name], self.reports[name] = choices, graph.report
            program.install(graph)
            if self.pool is not None:
                for choice in choices:
                    _warm_up(choice, self.device)
                program.bind(self.pool.caches | ({} if self.states is None else self.states.caches))

    def _bound(self) -> frozenset[int]:
        """Ids of the tensors that captured graphs hold."""
        bindings = (node.meta["binding"] for graph in self._captured.values() for node in placeholders(graph.gm))
        return frozenset(id(binding) for binding in bindings if isinstance(binding, Tensor))

    def what_changed(self) -> Iterator[str]:
        """Names of what of the model is no longer as it was captured."""
        return what_changed(self._fingerprint)

    def training_differs(self) -> str | None:
        """What the model computes otherwise in the modes that its modules are in now than in the graphs, which were captured in
        eval mode; None where training changes nothing. Traces the forward once for each set of modules in training mode."""
        modes = training_flags(self.model)
        if not modes:
            return None
        if (dropout := active_dropout(self.model)) is not None:
            return dropout
        if modes not in self._training_differs:
            with self.compiler.counting():
                try:
                    as_it_is = capture_prefill_as_it_is(self.model, self.taps)
                    self._training_differs[modes] = what_differs(self._captured["prefill",], as_it_is)
                except CaptureError as error:
                    self._training_differs[modes] = str(error).removesuffix(PLAIN_WORKS)
        return self._training_differs[modes]

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
        page_size = self.page_size if self.hardware.is_cuda else capacity
        capacity = -(-capacity // page_size) * page_size
        pool = kv_pool.allocate(self._layouts, rows, capacity, page_size, self.device)
        if self.recurrent:
            self.states = state_pool.allocate(self._state_layout, rows, most_tokens, self.device)
        self.pool = pool  # last: without room for both there is none
        return True

    def drop_pool(self) -> None:
        """Free the pool; programs choose their kernels anew over the next one."""
        self.pool = self.states = None
        for program in self._programs.values():
            program.bound = []
        self.choices.clear()
        self.reports.clear()

    def release(self) -> None:
        """Free the pool and forget every program."""
        self.pool = self.states = None
        self._programs.clear()
        self._captured.clear()

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
