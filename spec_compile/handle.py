"""``model.spec``: what was chosen and measured, how to switch it off, and which calls of ``generate()`` run accelerated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from spec_compile.draft_tree import DraftTree, read_tree
from spec_compile.errors import SpecCompileError
from spec_compile.explain import explain
from spec_compile.hf_integration.binding import bind_generate
from spec_compile.hf_integration.forward_wrappers import changes_numerics
from spec_compile.hf_integration.generate import GenerateCall, added_inputs, read_call, what_differs, why_plain
from spec_compile.hf_integration.transformers_private import SAMPLE
from spec_compile.runtime.engine import Engine
from spec_compile.runtime.generation import run_call
from spec_compile.runtime.state import MAX_EOS_IDS
from spec_compile.runtime.stats import SpecStats
from spec_compile.runtime.transcript import Transcript
from spec_compile.runtime.turns import PATIENCE, Turns
from spec_compile.user_warning import warn_user
from spec_compile.versions import version_remedy

_NAMED_CHANGES = 3  # of a model that changed behind its graphs
_AWAY = (
    "another thread's call of the same model has been in its stopping criteria, streamer or logits processors for "
    f"{PATIENCE:g} s and may be waiting for this one"
)


class SpecHandle:
    """Attached as ``model.spec`` by ``spec_compile``.

    Buffers and graphs serve one call at a time: calls of other threads wait, and a call from within a call (a criterion or
    streamer that generates with the same model, in its own thread or in one that it waits for) runs plain. Results never
    hold a cache: that field is None.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine) -> None:
        self._model, self._engine = model, engine
        self._enabled = True
        self._stats = SpecStats()
        self._told: set[str] = set()
        self._told_since_rounds: set[str] = set()  # about changes of the model: said again after each
        self._turns = Turns()  # on the buffers
        self._transcript: Transcript | None = None
        self._original_class = bind_generate(model, self._loop, self._say_plain, self._say_unreached, self._forget_last)

    # ------------------------------------------------------------------------------------------------------------------
    # What users call

    def __repr__(self) -> str:
        draft = self._engine.draft
        state = "removed" if not self._bound() else "on" if self._enabled else "off"
        return f"<spec_compile {state}: draft {'none' if draft is None else draft.kind}, {self._engine.hardware.name}>"

    def explain(self) -> str:
        """Which provider runs which layers in which graph, why, and why not the others."""
        return explain(self._engine)

    def stats(self) -> SpecStats:
        """Figures of the last ``generate()`` call."""
        return self._stats

    def last_tree(self) -> DraftTree | None:
        """The tree of drafts that the first row verified last; None if that round verified none, as chains never do.

        In a streamer or stopping criterion the tree of the round that ran last: a look at every round. On a GPU, where rounds
        are launched ahead, it may be one round further than the text, after ``generate()`` too. Waits for the device.
        """
        return read_tree(self._engine.last_round)

    def partial_sequences(self) -> Tensor | None:
        """Tokens of the last call so far, int64 [B, P + n]: what an exception or Ctrl-C left of it."""
        return None if self._transcript is None else self._transcript.sequences()

    def disable(self) -> _Switch:
        """Plain ``generate()`` from now on, or within ``with model.spec.disable():``."""
        return _Switch(self, False)

    def enable(self) -> _Switch:
        """Speculative ``generate()`` from now on, or within ``with model.spec.enable():``."""
        return _Switch(self, True)

    def remove(self, asked: str = "model.spec.remove()") -> None:
        """Give the model its own class back and free pools and graphs. The weights stay where they are.

        Waits for a call that another thread has running.

        Args:
            asked: what the caller wrote, for messages.

        Raises:
            SpecCompileError: from within a running call, whose buffers these are, or while one may be waiting for this thread.
        """
        if self._turns.is_mine():
            raise SpecCompileError(f"{asked} from within generate(): call it when generate() has returned.")
        with self._turns.take() as turn:
            if not turn:
                raise SpecCompileError(f"{asked}: {_AWAY}. Call it when that generate() has returned.")
            if self._bound():
                self._model.__class__ = self._original_class
                del self._model.spec
                self._engine.release()

    def _bound(self) -> bool:
        return self._model.__dict__.get("spec") is self

    def generate_loop(self, model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> object:
        """The loop as a callable for ``generate(custom_generate=model.spec.generate_loop)``.

        transformers hands no streamer to a custom loop; plain ``model.generate(streamer=…)`` does.
        """
        return getattr(type(model), SAMPLE)(model, input_ids, **kwargs)

    # ------------------------------------------------------------------------------------------------------------------
    # The loop

    def _why_not_now(self) -> str | None:
        if not self._bound():
            return "model.spec.remove() came first, or model.spec was deleted; call spec_compile(model, ...) again"
        if reason := changes_numerics(self._model):
            return reason
        changed = list(itertools.islice(self._engine.what_changed(), _NAMED_CHANGES + 1))
        if changed:
            named = ", ".join(changed[:_NAMED_CHANGES]) + (" and more" if len(changed) > _NAMED_CHANGES else "")
            return (
                f"graphs hold the model as they found it, and these were moved, replaced or changed since: {named}. "
                "Undo that, or call spec_compile(model, ...) again for the model as it is now"
            )
        with torch.inference_mode(False), self._engine.on_device():  # what a trace makes is kept
            differs = self._engine.target.training_differs()
        if differs is not None:
            return f"the model is in training mode, in which this computes otherwise: {differs}; call model.eval()"
        return None

    def _say_plain(self, reason: str, told: set[str] | None = None) -> None:
        self._stats = SpecStats(mode="plain", plain_because=reason)
        if self._enabled:
            self._say_once(f"this generate() call runs as plain transformers: {reason}.", told)

    def _say_once(self, text: str, told: set[str] | None = None) -> None:
        told = self._told if told is None else told
        if text not in told:
            told.add(text)
            warn_user(text)

    def _say_incompatible(self, what: str) -> None:
        """What the installed transformers does otherwise than any release that was tested: said in every call."""
        self._stats = SpecStats(mode="plain", plain_because=what)
        if self._enabled:
            warn_user(f"{what}, so this generate() call runs as plain transformers. {version_remedy(transformers.__version__)}")

    def _say_unreached(self, given: Mapping[str, object]) -> None:
        """A public call came back without any of the loops that the model's class has."""
        if given.get("custom_generate") is not None:
            self._say_plain("custom_generate is not accelerated")
        elif given.get("cache_implementation") == "paged":
            self._say_plain("cache_implementation='paged' is not accelerated")
        else:
            self._say_incompatible(f"generate() of transformers {transformers.__version__} did not use the loop it used to")

    def _forget_last(self) -> None:
        """A public call raised before it came to a loop: what is known of the call before it is no figure of this one."""
        if not self._turns.is_mine():  # else it was made within a call, whose text is still growing
            self._transcript = None
        self._stats = SpecStats(mode="plain", plain_because="generate() raised before it came to a loop")

    def _loop(
        self,
        model: PreTrainedModel,
        plain: Callable[..., object],
        given: Mapping[str, object] | None,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> object:
        def run_plain() -> object:
            return plain(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                synced_gpus=synced_gpus,
                streamer=streamer,
                **model_kwargs,
            )

        if not self._enabled:
            self._stats = SpecStats(mode="plain")
            return run_plain()
        if self._turns.is_mine():
            self._say_plain("another call of the same model is running around it")
            return run_plain()
        if added := added_inputs(model_kwargs, given):
            self._say_incompatible(
                f"transformers {transformers.__version__} gives the model inputs {added}, which nobody asked for"
            )
            return run_plain()
        reason = why_plain(model, input_ids, generation_config, synced_gpus, model_kwargs, given)
        if reason is None:
            call = read_call(input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
            if len(call.eos_ids) > MAX_EOS_IDS:
                reason = f"more than {MAX_EOS_IDS} eos_token_id values are not accelerated"
            elif (limit := self._engine.target.longest_text) is not None and call.max_length > limit:
                reason = (
                    f"texts of more than {limit} tokens are not accelerated: the cache that this model's configuration makes "
                    f"keeps no more, while its attention mask reaches further back"
                )
            elif call.exact_order and call.max_length > (self._engine.target.num_positions or call.max_length) + 1:
                reason = (
                    f"texts that may pass the model's {self._engine.target.num_positions} positions are not accelerated with "
                    "logits processors, scores or logits"
                )
        told = self._told
        if reason is None:
            with self._turns.take() as turn:
                reason = self._why_not_now() if turn else _AWAY
                told = self._told_since_rounds if turn else self._told
                if reason is None:
                    told.clear()
                    for note in what_differs(generation_config):
                        self._say_once(f"{note}.")
                    # Buffers outlive the call: they must not be inference tensors even if the caller is in inference mode.
                    with torch.inference_mode(False), torch.no_grad(), self._engine.on_device():
                        return self._run(call)
        self._say_plain(reason, told)
        return run_plain()

    def _run(self, call: GenerateCall) -> object:
        engine, compiled_before = self._engine, self._engine.compile_seconds
        transcript = Transcript(call, lambda: engine.compile_seconds - compiled_before, self._turns.away)
        self._transcript = transcript
        if call.exact_order and engine.config.simulates:
            self._say_once("a call with logits processors, scores or logits accepts drafts for real: nothing is SIMULATED.")
        generated = run_call(engine, transcript)
        self._stats = generated.stats
        sequences = transcript.sequences()
        if not call.generation_config.return_dict_in_generate:
            return sequences
        fields: dict[str, Any] = {"sequences": sequences, "scores": generated.scores, "logits": generated.logits}
        return GenerateDecoderOnlyOutput(**fields)


class _Switch:
    """Sets the loop on or off at once; as a context manager, puts it back afterwards."""

    def __init__(self, handle: SpecHandle, enabled: bool) -> None:
        self._handle, self._before = handle, handle._enabled
        handle._enabled = enabled

    def __enter__(self) -> SpecHandle:
        return self._handle

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._handle._enabled = self._before
