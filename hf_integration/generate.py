"""``generate()``: what of a call our decode loop can take, and the call as that loop reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from spec_compile.hf_integration.caches import RESULT_CACHE
from spec_compile.hf_integration.loop_methods import replaced_loop_method
from spec_compile.hf_integration.own_attention import own_attention
from spec_compile.hf_integration.processors import read_processors
from spec_compile.hf_integration.rope import LONGEST_WINDOW, fixed_rope_length
from spec_compile.hf_integration.transformers_private import pad_token
from spec_compile.ops.torch_private import dynamo_switch

_KNOWN_KWARGS = {
    "attention_mask",
    "position_ids",
    "use_cache",
    "logits_to_keep",
    "cache_position",
    "tokenizer",
}
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")


@dataclass
class GenerateCall:
    """One call of ``generate()``, as far as the decode loop needs to know it.

    Attributes:
        input_ids: int64 [B, P], left-padded.
        prompt_lens: tokens of each row that are not padding.
        max_length: padded length at which every row ends.
        min_length: padded length before which no row may end; 0 for none.
        remove_invalid: logits that are not finite become finite before all else (``remove_invalid_values``).
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
    remove_invalid: bool
    exact_order: bool
    per_token: bool
    logits_processor: LogitsProcessorList
    stopping_criteria: StoppingCriteriaList
    generation_config: GenerationConfig
    streamer: BaseStreamer | None

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
    given: Mapping[str, object] | None,
) -> str | None:
    """The reason why a call must run as plain transformers, or None when the decode loop can take it.

    Args:
        model_kwargs: model inputs as transformers prepared them.
        given: the caller's own keyword arguments; None where they are not known.
    """
    if model.config.is_encoder_decoder:
        return "encoder-decoder models are not accelerated"
    if generation_config.is_assistant:
        return "the model is the assistant of another generate() call"
    if synced_gpus:
        return "synced_gpus=True is not accelerated"
    if (switch := dynamo_switch()) is not None:
        return f"{switch} is on, and shapes that were not seen before could not be captured"
    if (reason := own_attention(model)) is not None:
        return reason
    if replaced := replaced_loop_method(model):
        return f"generate() would have called {replaced}, which is not transformers' own, and the accelerated loop would not"
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
    if "inputs_embeds" in model_kwargs:
        return "prompts given as inputs_embeds are not accelerated"
    if input_ids.shape[1] == 0:
        return "empty prompts are not accelerated"
    fixed = fixed_rope_length(model.config.get_text_config(decoder=True))
    if fixed == 0:
        return f"this model's rotary frequencies change within the first {LONGEST_WINDOW} tokens, which a draft window may pass"
    if fixed is not None and generation_config.max_length > fixed:
        return f"texts that may pass {fixed} tokens, near where this model's rotary frequencies change, are not accelerated"
    caches = [value for value in model_kwargs.values() if isinstance(value, Cache)]  # by type: their name has changed before
    if any(cache.get_seq_length() > 0 for cache in caches) or any(isinstance(v, Cache) for v in (given or {}).values()):
        return "a cache given by the caller is not accelerated"
    if unknown := [name for name in unknown_inputs(model_kwargs) if not _all_is_text(model, name, model_kwargs[name])]:
        return f"model inputs {unknown} are not accelerated"
    mask = model_kwargs.get("attention_mask")
    asked = (given or {}).get("attention_mask")  # transformers makes positions of it, and may cut it first
    if mask is not None:
        other_length = isinstance(asked, Tensor) and asked.shape[-1:] != input_ids.shape[-1:]
        if mask.dim() != 2 or mask.shape != input_ids.shape or other_length:
            return "attention masks other than [batch, prompt length] are not accelerated"
        ones = mask.bool().long()  # of any type, as transformers takes them
        if not bool((mask == ones).all()):
            return "attention_mask has other numbers than 0 and 1, and transformers counts positions by them"
        if not bool(ones.any(1).all()):
            return "rows whose attention_mask is all zeros, which have no tokens to read, are not accelerated"
        ordered = ones.cummax(1).values == ones  # zeros, then ones
        if not bool((ordered.all(1) & (ones[:, -1] == 1)).all()):
            return "attention_mask has gaps or right padding; only left padding is accelerated"
    positions = model_kwargs.get("position_ids")
    if positions is not None and not _plain_positions(positions, mask, input_ids):
        return "position_ids other than 0, 1, 2, … are not accelerated"
    return None


def unknown_inputs(model_kwargs: Mapping[str, object]) -> list[str]:
    """Names of the model inputs that the decode loop does not know, in order."""
    return sorted(name for name, value in model_kwargs.items() if name not in _KNOWN_KWARGS and _says_something(value))


def added_inputs(model_kwargs: Mapping[str, object], given: Mapping[str, object] | None) -> list[str]:
    """Those unknown inputs that the caller did not give, under this or another name: transformers added them."""
    if given is None:
        return []
    values = {id(value) for value in given.values()}
    return [name for name in unknown_inputs(model_kwargs) if name not in given and id(model_kwargs[name]) not in values]


def _says_something(value: object) -> bool:
    """Whether a model input is more than its absence: not None, {} (no images) or a cache, which the pool stands in for."""
    return not (value is None or isinstance(value, Cache) or (isinstance(value, dict) and not value))


def _all_is_text(model: PreTrainedModel, name: str, value: object) -> bool:
    """Whether a model input only says, by zeros, that no token of the prompt stands for an image: what processors of
    vision-language models add to every call. A text model's ``token_type_ids`` are another thing: GPT-2 adds their embeddings.
    """
    multimodal = name != "token_type_ids" or model.config.get_text_config(decoder=True) is not model.config
    return name in _TOKEN_TYPES and multimodal and isinstance(value, Tensor) and not bool(value.any())


def what_differs(generation_config: GenerationConfig) -> list[str]:
    """What of an accelerated call is not as in plain ``generate()``, each with what to do about it."""
    notes = []
    if generation_config.return_dict_in_generate:
        notes.append(
            f"{RESULT_CACHE} of the result is None: keys and values stay in the model's KV pool. A next turn needs none: "
            f"give it the whole conversation as input_ids and no {RESULT_CACHE} (None is fine), and it is prefilled again. "
            "Where you need the cache itself, call generate() within `with model.spec.disable():`"
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
    streamer: BaseStreamer | None,
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
    warpers = read_processors(logits_processor, generation_config.do_sample, set(eos_ids), padded)
    wants_scores = generation_config.return_dict_in_generate and (
        generation_config.output_scores or generation_config.output_logits
    )
    pad = pad_token(generation_config)
    settings = warpers or {}
    return GenerateCall(
        input_ids=input_ids,
        prompt_lens=prompt_lens,
        # Criteria are asked behind each token, so one token always comes.
        max_length=max(_whole(min(limits, default=generation_config.max_length)), padded + 1),
        min_length=int(settings.get("min_length", 0)),
        eos_ids=sorted(set(eos_ids)),
        pad_id=None if pad is None else int(pad),
        do_sample=bool(generation_config.do_sample),
        temperature=float(settings.get("temperature", 1.0)),
        top_k=min(int(settings.get("top_k", 0)), _ANY_TOP_K),
        top_p=float(settings.get("top_p", 1.0)),
        min_p=float(settings.get("min_p", 0.0)),
        remove_invalid=bool(settings.get("remove_invalid", False)),
        exact_order=warpers is None or bool(wants_scores),
        per_token=custom_criteria or streamer is not None,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
    )


_ANY_TOP_K = 2**31 - 1  # larger than any vocabulary


def _whole(length: float | Tensor) -> int:
    """A length of any type of number, as users compute them: a text reaches 15.5 tokens with the sixteenth."""
    return math.ceil(float(length))
