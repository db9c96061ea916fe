"""``generate()``: how a model is bound to our decode loop, and what of a call that loop can take.

``generate()`` looks its loop up on the model's class, so the class is swapped for a subclass of the same name. Everything
before the loop (config merging, defaults, checks, ``num_return_sequences``) stays transformers' own.
"""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from spec_compile.hf_integration.caches import RESULT_CACHE
from spec_compile.hf_integration.rope import fixed_rope_length

_PLAIN_LOOPS = {"_assisted_decoding": "assisted generation of transformers", "_beam_search": "beam search"}
_KNOWN_KWARGS = {
    "attention_mask",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "tokenizer",
}


@dataclass
class GenerateCall:
    """One call of ``generate()``, as far as the decode loop needs to know it.

    Attributes:
        input_ids: int64 [B, P], left-padded.
        prompt_lens: tokens of each row that are not padding.
        max_length: padded length at which every row ends.
        min_length: padded length before which no row may end; 0 for none.
        eos_ids: end-of-sequence ids; empty when no criterion ends a row by token.
        pad_id: what finished rows are filled with.
        exact_order: logits processors, scores or logits were asked for: every token must be produced for all rows
            together, as plain ``generate()`` does.
        per_token: a streamer or custom stopping criteria want to see every token.
    """

    input_ids: Tensor
    prompt_lens: list[int]
    max_length: int
    min_length: int
    eos_ids: list[int]
    pad_id: int | None
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    exact_order: bool
    per_token: bool
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    streamer: object | None

    @property
    def has_eos(self) -> bool:
        """Whether finished rows are padded (transformers pads only when an end-of-sequence criterion exists)."""
        return any(hasattr(c, "eos_token_id") for c in self.stopping_criteria)


def why_plain(
    model: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    model_kwargs: dict,
) -> str | None:
    """The reason why a call must run as plain transformers, or None when the decode loop can take it."""
    if model.config.is_encoder_decoder:
        return "encoder-decoder models are not accelerated"
    if synced_gpus:
        return "synced_gpus=True is not accelerated"
    if model.training:
        return "the model is in training mode; call model.eval()"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "output_attentions and output_hidden_states are not accelerated"
    # An offloaded model is on the meta device, of which autocast knows nothing; its inputs are where it computes.
    if any(torch.is_autocast_enabled(kind) for kind in {model.device.type, input_ids.device.type} - {"meta"}):
        return "torch.autocast is on, and graphs compute in the types of the model's weights; load it in that type instead"
    if not model_kwargs.get("use_cache", True):
        return "use_cache=False is not accelerated"
    implementation = generation_config.cache_implementation or ""
    if implementation == "quantized" or "offloaded" in implementation:  # the others differ in speed only
        return f"cache_implementation={implementation!r} is not accelerated"
    if input_ids.shape[1] == 0 or "inputs_embeds" in model_kwargs:
        return "prompts given as inputs_embeds are not accelerated"
    fixed = fixed_rope_length(model.config.get_text_config(decoder=True))
    if fixed is not None and generation_config.max_length > fixed:
        return f"texts that may pass {fixed} tokens, near where this model's rotary frequencies change, are not accelerated"
    caches = [value for value in model_kwargs.values() if isinstance(value, Cache)]  # by type: their name has changed before
    if any(getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0 for cache in caches):
        return "a cache given by the caller is not accelerated"
    given = {k for k, v in model_kwargs.items() if _says_something(v)}
    unknown = sorted(given - set(_KNOWN_KWARGS))
    if unknown:
        return f"model inputs {unknown} are not accelerated"
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        if mask.dim() != 2 or mask.shape != input_ids.shape:
            return "attention masks other than [batch, prompt length] are not accelerated"
        ones = mask.bool().long()  # of any type, as transformers takes them
        ordered = ones.cummax(1).values == ones  # zeros, then ones
        if not bool((ordered.all(1) & (ones[:, -1] == 1)).all()):
            return "attention_mask has gaps or right padding; only left padding is accelerated"
    positions = model_kwargs.get("position_ids")
    if positions is not None and not _plain_positions(positions, mask, input_ids):
        return "position_ids other than 0, 1, 2, … are not accelerated"
    return None


def _says_something(value: object) -> bool:
    """Whether a model input is more than its absence: not None, {} (no images) or a cache, which the pool stands in for."""
    return not (value is None or isinstance(value, Cache) or (isinstance(value, dict) and not value))


def what_differs(generation_config: GenerationConfig) -> list[str]:
    """What of an accelerated call is not as in plain ``generate()``, each with what to do about it."""
    notes = []
    if generation_config.return_dict_in_generate:
        notes.append(
            f"{RESULT_CACHE} of the result is None, because keys and values stay in the model's KV pool; call generate() "
            "within `with model.spec.disable():` where you need them"
        )
    if generation_config.prefill_chunk_size is not None:
        notes.append(
            "prefill_chunk_size is not used: a prompt is prefilled in one piece, several prompts in groups of at most "
            "SpecConfig.max_prefill_tokens tokens"
        )
    return notes


def _plain_positions(positions: Tensor, mask: Tensor | None, input_ids: Tensor) -> bool:
    """Positions [B, N], or several streams of them [S, B, N] as vision-language models have, which are all alike in text."""
    if positions.shape[-1] != input_ids.shape[1] or positions.dim() not in (2, 3):
        return False
    real = torch.ones_like(input_ids) if mask is None else mask.long()
    return bool(((positions == real.cumsum(1) - 1) | (real == 0)).all())


def read_call(
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: object | None,
    model_kwargs: dict,
) -> GenerateCall:
    """Translate what ``generate()`` prepared into a ``GenerateCall``."""
    mask = model_kwargs.get("attention_mask")
    batch, padded = input_ids.shape
    prompt_lens = [padded] * batch if mask is None else mask.bool().sum(1).tolist()
    eos_ids: list[int] = []
    custom_criteria = False
    limits = []
    for criterion in stopping_criteria:
        if type(criterion) is MaxLengthCriteria:
            limits.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos_ids += criterion.eos_token_id.flatten().tolist()
        else:
            custom_criteria = True
    warpers = _read_processors(logits_processor, generation_config.do_sample, set(eos_ids), padded)
    wants_scores = generation_config.return_dict_in_generate and (
        generation_config.output_scores or generation_config.output_logits
    )
    pad = generation_config._pad_token_tensor
    settings = warpers or {}
    return GenerateCall(
        input_ids=input_ids,
        prompt_lens=prompt_lens,
        # Criteria are asked behind each token, so one token always comes.
        max_length=max(min(limits, default=generation_config.max_length), padded + 1),
        min_length=int(settings.get("min_length", 0)),
        eos_ids=sorted(set(eos_ids)),
        pad_id=None if pad is None else int(pad),
        do_sample=bool(generation_config.do_sample),
        temperature=float(settings.get("temperature", 1.0)),
        top_k=int(settings.get("top_k", 0)),
        top_p=float(settings.get("top_p", 1.0)),
        min_p=float(settings.get("min_p", 0.0)),
        exact_order=warpers is None or bool(wants_scores),
        per_token=custom_criteria or streamer is not None,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
    )


_WARPER_ORDER = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


def _read_processors(
    processors: LogitsProcessorList, do_sample: bool, eos_ids: set[int], padded: int
) -> dict[str, float] | None:
    """Settings of the processors that run inside the graph, or None when there is any other processor or order."""
    settings: dict[str, float] = {}
    last = -1
    for processor in processors:
        kind = type(processor)
        if kind in (MinNewTokensLengthLogitsProcessor, MinLengthLogitsProcessor):
            if set(processor.eos_token_id.flatten().tolist()) != eos_ids or last >= 0:
                return None
            if kind is MinLengthLogitsProcessor:
                length = processor.min_length
            else:
                length = processor.prompt_length_to_skip + processor.min_new_tokens
            settings["min_length"] = max(settings.get("min_length", 0), length)
            continue
        if kind not in _WARPER_ORDER or not do_sample or _WARPER_ORDER.index(kind) <= last:
            return None
        last = _WARPER_ORDER.index(kind)
        if getattr(processor, "filter_value", -float("inf")) != -float("inf"):
            return None
        if getattr(processor, "min_tokens_to_keep", 1) != 1:
            return None
        if kind is TemperatureLogitsWarper:
            settings["temperature"] = processor.temperature
        elif kind is TopKLogitsWarper:
            settings["top_k"] = processor.top_k
        elif kind is TopPLogitsWarper:
            settings["top_p"] = processor.top_p
        else:
            settings["min_p"] = processor.min_p
    return settings


def bind_generate(
    model: PreTrainedModel, loop: Callable[..., object], on_plain: Callable[[str], None]
) -> type[PreTrainedModel]:
    """Swap ``model``'s class for one whose generation loop is ``loop``; returns the original class.

    The class holds neither method alive: Dynamo's caches keep the classes of captured models for good (torch 2.13), and what
    the class held would stay with them.

    Args:
        loop: a method, called as ``loop(model, plain, input_ids, logits_processor, stopping_criteria, generation_config,
            synced_gpus=…, streamer=…, **model_kwargs)``, where ``plain`` is transformers' own loop.
        on_plain: a method, told once a call that transformers' other loops take (beams, assistants).
    """
    cls = type(model)
    weak_loop, weak_on_plain = weakref.WeakMethod(loop), weakref.WeakMethod(on_plain)

    def _sample(self, *args, **kwargs):
        plain, run = functools.partial(cls._sample, self), weak_loop()
        if run is None:  # removed by another thread when this call was on its way
            return plain(*args, **kwargs)
        return run(self, plain, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        """Pickle the plain model: pools and graphs belong to this process, and no module holds the swapped class."""
        return object.__new__, (cls,), _plain_state(self)

    def __deepcopy__(self, memo):
        """A copy is the plain model too: pools and graphs belong to the original's weights."""
        warnings.warn("spec_compile: a copy of a compiled model is a plain model; call spec_compile() on it.", stacklevel=3)
        twin = memo[id(self)] = cls.__new__(cls)
        twin.__dict__.update(copy.deepcopy(_plain_state(self), memo))
        return twin

    members: dict[str, object] = {"_sample": _sample, "__reduce_ex__": __reduce_ex__, "__deepcopy__": __deepcopy__}
    for name, what in _PLAIN_LOOPS.items():
        members[name] = _plain_loop(cls, name, what, weak_on_plain)
    # Same names: transformers and pipelines look models up by class name, and save_pretrained writes it.
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    model.__class__ = type(cls.__name__, (cls,), members)
    return cls


def _plain_state(model: PreTrainedModel) -> dict[str, object]:
    return {name: value for name, value in model.__dict__.items() if name != "spec"}


def _plain_loop(cls: type, name: str, what: str, weak_on_plain: Callable[[], Callable[[str], None] | None]) -> Callable:
    def method(self, *args, **kwargs):
        on_plain = weak_on_plain()
        if on_plain is not None:
            on_plain(f"{what} is not accelerated")
        return getattr(cls, name)(self, *args, **kwargs)

    method.__name__ = name
    return method
