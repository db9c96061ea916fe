"""Capture: a Hugging Face causal LM's forward becomes one FX graph with one attention op a layer.

Dynamo does the tracing (``fullgraph=True``), through a ``torch.compile`` backend that keeps the graph and stops before
anything runs. Weights, caches and inputs arrive as placeholders; each is bound by identity to what it is.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import itertools
import re
import threading
import types
from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from transformers import PreTrainedModel

from spec_compile.errors import CaptureError, SpecCompileError
from spec_compile.hf_integration.attention_interface import (
    capture_context,
    check_layer_types,
    recurrent_layers,
)
from spec_compile.hf_integration.caches import cache_argument
from spec_compile.hf_integration.capture_context import CaptureContext
from spec_compile.hf_integration.heads.dflash import DFlashHead
from spec_compile.hf_integration.heads.draft_head import DraftHead
from spec_compile.hf_integration.mask_windows import read_windows
from spec_compile.hf_integration.own_attention import own_attention
from spec_compile.hf_integration.private_copy import ask_for_logits_alone, private_copy
from spec_compile.hf_integration.recurrent_layers import modeling_modules
from spec_compile.hf_integration.rope import follows_every_token
from spec_compile.hf_integration.taps import Tap, tapped
from spec_compile.ops.torch_private import dynamo_switch, forget_traces, mark_dynamic, static_shapes
from spec_compile.passes.graph import Binding, CacheSlot, RuntimeInput, StageGraph, fake, finish, placeholders

# One prompt token would let Dynamo specialise the packed length to 1; any other small number does.
_PREFILL_EXAMPLE_TOKENS = 24
_SUBJECT = "Developer debug context:"
# Ours, as Dynamo retells them: CaptureError('…') in torch 2.13, CaptureError((ConstantVariable(str: '…'),)) in 2.11.
_RAISED = re.compile(
    r"raised exception CaptureError\([\[(]*(?:ConstantVariable\(str: )?(?P<text>'.*'|\".*\")[\]),]*\)", re.DOTALL
)
PLAIN_WORKS = " The model is unchanged and its plain generate() still works; leave spec_compile() out for it."
_one_at_a_time = threading.Lock()  # what transformers calls during capture finds its context in a global


class _Captured(BaseException):
    """Raised in place of compiling the captured graph: only the graph is wanted, no guards and no code. Dynamo would wrap an
    ``Exception``."""


def capture_window(model: PreTrainedModel, batch: int, num_tokens: int, stage: str, taps: tuple[Tap, ...] = ()) -> StageGraph:
    """The forward over windows ``input_ids`` [batch, num_tokens] at explicit ``position_ids``, with static shapes.

    Args:
        taps: hidden states to put out behind the logits.

    Raises:
        CaptureError: the architecture cannot be captured; says why.
    """
    inputs = _token_inputs(model, batch, num_tokens)
    return _capture(model, batch, stage, inputs, _causal_lm(model, taps), dynamic_length=False, taps=taps)


def capture_prefill(model: PreTrainedModel, taps: tuple[Tap, ...] = ()) -> StageGraph:
    """The forward over packed prompts ``input_ids`` [1, T], T dynamic. ``taps`` as in ``capture_window``.

    Raises:
        CaptureError: the architecture cannot be captured; says why.
    """
    inputs = _token_inputs(model, 1, _PREFILL_EXAMPLE_TOKENS)
    return _capture(model, 1, "prefill", inputs, _causal_lm(model, taps), dynamic_length=True, taps=taps)


def capture_prefill_as_it_is(model: PreTrainedModel, taps: tuple[Tap, ...] = ()) -> StageGraph:
    """``capture_prefill`` in the modes that the model's modules are in now. To compare with only: what runs is captured in eval
    mode.

    Raises:
        CaptureError: the model cannot be captured in these modes; says why.
    """
    inputs = _token_inputs(model, 1, _PREFILL_EXAMPLE_TOKENS)
    forward = _causal_lm(model, taps)
    return _capture(model, 1, "prefill", inputs, forward, dynamic_length=True, taps=taps, in_eval_mode=False)


def capture_head_window(
    head: DraftHead, batch: int, num_tokens: int, num_rows: int, stage: str, all_states: bool = False
) -> StageGraph:
    """A draft head over windows, with static shapes; puts out logits [batch, num_rows, Vd] and the next step's states.

    Runtime inputs: ``input_ids``, ``position_ids`` [batch, num_tokens]; ``hidden_states`` [batch, num_tokens, n * Ht] of the
    target in stage ``"draft_extend"``, the head's own [batch, num_tokens, H] in stage ``"draft"``; and, unless every slot is
    wanted, ``slots`` int64 [batch, num_rows], the window slots to put out.

    Args:
        all_states: put out the states of every slot [batch, num_tokens, H]; ``slots`` are then those of the logits alone.

    Raises:
        CaptureError: the head cannot be captured; says why.
    """
    inputs = _token_inputs(head, batch, num_tokens)
    inputs["hidden_states"] = _states_like(head, inputs["input_ids"], of_target=stage == "draft_extend")
    if num_rows < num_tokens:
        inputs["slots"] = torch.zeros(batch, num_rows, dtype=torch.int64, device=inputs["input_ids"].device)

    def forward(head: DraftHead, context: CaptureContext, input_ids, position_ids, hidden_states, slots=None):
        states = head.project(hidden_states) if stage == "draft_extend" else hidden_states
        hidden = head(input_ids, states, position_ids, cache=context.cache)  # [B, N, H]
        kept = hidden if slots is None else hidden.gather(1, slots[:, :, None].expand(-1, -1, hidden.shape[2]))  # [B, R, H]
        return head.logits(kept), head.feedback(hidden if all_states else kept)

    return _capture(head, batch, stage, inputs, forward, dynamic_length=False)


def capture_head_prefill(head: DraftHead) -> StageGraph:
    """A draft head over packed prompts [1, T] and the target's states [1, T, n * Ht], T dynamic: it fills its cache."""
    inputs = _token_inputs(head, 1, _PREFILL_EXAMPLE_TOKENS)
    inputs["hidden_states"] = _states_like(head, inputs["input_ids"], of_target=True)

    def forward(head: DraftHead, context: CaptureContext, input_ids, position_ids, hidden_states):
        return (head(input_ids, head.project(hidden_states), position_ids, cache=context.cache),)

    return _capture(head, 1, "prefill", inputs, forward, dynamic_length=True)


def capture_block(head: DFlashHead, batch: int, num_drafts: int) -> StageGraph:
    """A DFlash head over blocks ``input_ids``, ``position_ids`` [batch, block_size] behind a context: logits
    [batch, num_drafts, Vd] of the first drafts. Its attention is meant for a tree mask of ones.

    Raises:
        CaptureError: the head cannot be captured; says why.
    """
    drafts = slice(head.first_slot, head.first_slot + num_drafts)

    def forward(head: DFlashHead, context: CaptureContext, input_ids, position_ids):
        return (head.logits(head(input_ids, position_ids, cache=context.cache)[:, drafts]),)

    return _capture(head, batch, "draft", _token_inputs(head, batch, head.block_size), forward, dynamic_length=False)


def capture_dflash_context(head: DFlashHead, batch: int, num_tokens: int | None) -> StageGraph:
    """Keys and values of committed tokens, from the target's states ``hidden_states`` [batch, num_tokens, n * Ht] at
    ``position_ids`` into the caches; puts nothing out. ``num_tokens=None`` is stage ``"prefill"``: packed prompts [1, T].
    """
    inputs = _token_inputs(head, batch, num_tokens or _PREFILL_EXAMPLE_TOKENS)
    inputs["hidden_states"] = _states_like(head, inputs.pop("input_ids"), of_target=True)

    def forward(head: DFlashHead, context: CaptureContext, position_ids, hidden_states):
        for layer, (keys, values) in enumerate(head.context_kv(head.project(hidden_states), position_ids)):
            caches = context.slot(layer, "k"), context.slot(layer, "v")
            torch.ops.spec_compile.kv_write(keys, values, *caches, context.page_table, context.cache_len)
        return ()

    stage = "prefill" if num_tokens is None else "draft_extend"
    return _capture(head, batch, stage, inputs, forward, dynamic_length=num_tokens is None)


def _token_inputs(model: PreTrainedModel, batch: int, num_tokens: int) -> dict[str, Tensor]:
    device = model.get_input_embeddings().weight.device
    return {
        "input_ids": torch.zeros(batch, num_tokens, dtype=torch.int64, device=device),
        "position_ids": torch.arange(num_tokens, device=device).expand(batch, -1).contiguous(),
    }


def _states_like(head: DraftHead, input_ids: Tensor, *, of_target: bool) -> Tensor:
    width = head.target_width if of_target else head.config.hidden_size
    return torch.zeros(*input_ids.shape, width, dtype=head.dtype, device=input_ids.device)


def _causal_lm(model: PreTrainedModel, taps: tuple[Tap, ...]) -> Callable[..., tuple[Tensor, ...]]:
    """A forward that returns the logits and the tapped states [B, N, Ht], which hooks put into the context."""
    cache = cache_argument(model.forward)

    def forward(model: PreTrainedModel, context: CaptureContext, input_ids, position_ids):
        out = model(input_ids=input_ids, position_ids=position_ids, use_cache=True, **{cache: context.cache})
        states = context.states
        # A graph puts no tensor out twice; small targets have heads that read one state in two places.
        return (out.logits, *(states[tap].clone() if tap in taps[:i] else states[tap] for i, tap in enumerate(taps)))

    return forward


def _capture(
    model: PreTrainedModel,
    batch: int,
    stage: str,
    inputs: dict[str, Tensor],
    forward: Callable[..., tuple[Tensor, ...]],
    *,
    dynamic_length: bool,
    taps: tuple[Tap, ...] = (),
    in_eval_mode: bool = True,
) -> StageGraph:
    """Trace ``forward(model, context, **inputs)``; the second dimension of every input is dynamic if ``dynamic_length``.

    What is traced is a private copy of the model's modules, over the model's own tensors: other threads may run it meanwhile.
    """
    captured: list[StageGraph] = []
    try:
        if model.config.is_encoder_decoder:
            raise CaptureError("it has an encoder beside its decoder; only decoder-only models can be captured.")
        if (switch := dynamo_switch()) is not None:
            raise CaptureError(f"tracing is switched off by {switch}; leave that out while models are compiled.")
        if any(tensor.is_inference() for tensor in itertools.chain(model.parameters(), model.buffers())):
            raise CaptureError(
                "its weights were made within torch.inference_mode(), and no graph can be traced over such tensors; make or "
                "load the model outside of it (torch.no_grad() does no harm)."
            )
        if (reason := own_attention(model)) is not None:
            raise CaptureError(f"{reason}.")
        if (rotary := follows_every_token(model)) is not None:
            raise CaptureError(
                f"its rotary embedding {rotary} is of type 'dynamic': frequencies follow the length of the text token by token."
            )
        config = model.config.get_text_config(decoder=True)
        check_layer_types(config)
        modeling_modules(model, recurrent_layers(config))
    except CaptureError as error:
        raise CaptureError(refusal(model, str(error))) from error
    twin = private_copy(model, in_eval_mode=in_eval_mode)
    ask_for_logits_alone(twin)
    with (
        torch.no_grad(),
        _one_at_a_time,
        capture_context(twin, batch) as context,
        tapped(twin, taps) as context.states,
    ):
        names = {id(value): name for name, value in inputs.items()}
        rows = ("page_table", "cache_len", "state_slot")
        names |= {id(getattr(context, name)): name for name in rows}

        def backend(gm: fx.GraphModule, example_inputs: list):
            captured.append(StageGraph(_bind(gm, example_inputs, names, context), stage))
            raise _Captured

        def step(*args):
            return forward(twin, context, **dict(zip(inputs, args, strict=True)))

        if dynamic_length:
            for value in inputs.values():
                mark_dynamic(value, 1)
        _trace(model, step, backend, tuple(inputs.values()))
    if not captured:
        raise CaptureError(refusal(model, "its forward computes nothing from its inputs."))
    if dynamic_length:
        _check_length(model, captured[0], inputs)
    try:
        if context.positions is not None:
            read_windows(captured[0].gm, context.positions)
    except CaptureError as error:
        raise CaptureError(refusal(model, str(error))) from error
    graph = finish(captured[0])
    _check(model, graph)
    _check_positions(model, inputs)
    return graph


def _check_positions(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Decoders of encoder-decoder families take no positions: BartForCausalLM counts from the cache's length, which is none
    here, and WhisperForCausalLM passes on what it is given, which ``generate()``, going by its signature, never does."""
    if "position_ids" in inputs and "position_ids" not in inspect.signature(model.forward).parameters:
        raise CaptureError(refusal(model, "its forward takes no position_ids, so tokens cannot be told where they stand."))


def _check_length(model: PreTrainedModel, graph: StageGraph, inputs: dict[str, Tensor]) -> None:
    """The length of packed prompts has to stay open. Dynamo says so itself only where it makes guards."""
    lengths = {
        node.meta["binding"].name: fake(node).shape[1]
        for node in placeholders(graph.gm)
        if isinstance(node.meta["binding"], RuntimeInput) and node.meta["binding"].name in inputs
    }
    fixed = [name for name, length in lengths.items() if not free_symbols(length)]
    if fixed:
        raise CaptureError(
            refusal(model, f"its code makes a constant of the prompts' length (of {fixed[0]}), so one graph cannot serve all.")
        )


def _trace(model: PreTrainedModel, forward, backend, args: tuple[Tensor, ...]) -> None:
    # A code object of its own: Dynamo's recompile limit counts per code object, and every capture is its own function.
    fresh = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    # Only what is marked dynamic is: left to itself, Dynamo would compare this trace with an earlier one of another model.
    try:
        with static_shapes():
            torch.compile(fresh, backend=backend, fullgraph=True)(*args)
    except _Captured:
        pass
    except SpecCompileError as error:
        raise CaptureError(refusal(model, str(error))) from error
    except Exception as error:
        cause = next((e for e in _chain(error) if isinstance(e, SpecCompileError)), error)
        raise CaptureError(refusal(model, _reason(cause))) from error
    finally:
        forget_traces(fresh)


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str:
    """Dynamo's reports run to dozens of lines; what happened is in the first, its subject and place stand further down."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    subject = [line.removeprefix(_SUBJECT).strip() for line in lines if line.startswith(_SUBJECT)]
    if ours := _RAISED.fullmatch("".join(subject[:1])):
        with contextlib.suppress(ValueError, SyntaxError):  # no literal: Dynamo did not know the text
            return ast.literal_eval(ours["text"])
    places = [line for line in lines if line.startswith("File ")]
    return ". ".join([": ".join([lines[0].rstrip("."), *subject[:1]]), *places[-1:]]) + "."


def refusal(model: PreTrainedModel, reason: str) -> str:
    """The text of a ``CaptureError``: which model, why, and what still works."""
    return f"{type(model).__name__} (model_type {model.config.model_type!r}) cannot be captured: {reason}{PLAIN_WORKS}"


def _bind(gm: fx.GraphModule, example_inputs: list, inputs: dict[int, str], context: CaptureContext) -> fx.GraphModule:
    """Give every placeholder ``meta["binding"]``; constants that Dynamo stored as attributes become placeholders too."""
    slots = {id(tensor): CacheSlot(*key) for key, tensor in context.slots.items()}
    gm = copy.copy(gm)
    for node, value in zip(placeholders(gm), example_inputs, strict=True):
        node.meta["binding"] = _binding(value, inputs, slots)
    last = placeholders(gm)[-1]
    for node in [n for n in gm.graph.nodes if n.op == "get_attr"]:
        value = _attribute(gm, node.target)
        if not isinstance(value, Tensor):
            continue
        with gm.graph.inserting_after(last):
            constant = gm.graph.placeholder(f"constant_{str(node.target).replace('.', '_')}")
        constant.meta = {**node.meta, "binding": value.detach()}
        node.replace_all_uses_with(constant)
        gm.graph.erase_node(node)
        last = constant
    gm.recompile()
    return gm


def _binding(value: object, inputs: dict[int, str], slots: dict[int, CacheSlot]) -> Binding:
    if id(value) in inputs:
        return RuntimeInput(inputs[id(value)])
    if id(value) in slots:
        return slots[id(value)]
    if isinstance(value, Tensor):
        return value
    return RuntimeInput("num_tokens")  # the symbolic packed length


def _attribute(gm: fx.GraphModule, target: str) -> object:
    value: object = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _check(model: PreTrainedModel, graph: StageGraph) -> None:
    """One attention op or delta rule for each layer, each on its own layer's cache or state."""
    caches = [
        node
        for node in placeholders(graph.gm)
        if isinstance(node.meta["binding"], CacheSlot) and node.meta["binding"].part in ("k", "kv", "state")
    ]
    layers = sorted(node.meta["binding"].layer for node in caches)
    expected = list(range(model.config.get_text_config(decoder=True).num_hidden_layers))
    if layers != expected:
        raise CaptureError(refusal(model, f"it has {len(expected)} layers but layers {layers} reach the attention interface."))
    again = sorted(node.meta["binding"].layer for node in caches if len(node.users) > 1)
    if again:
        raise CaptureError(
            refusal(
                model,
                f"layers {again} reach the attention interface more than once in a forward (layers run in a loop, or several "
                "attentions in one), and a layer has one cache.",
            )
        )
