"""Logits processors of a call that the graphs compute themselves, or that change nothing there."""

from __future__ import annotations

from transformers import (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

_WARPER_ORDER = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


def read_processors(
    processors: LogitsProcessorList, do_sample: bool, eos_ids: set[int], padded: int
) -> dict[str, float] | None:
    """Settings of the processors that run inside the graph, or None when there is any other processor or order.

    Args:
        eos_ids: every id that ends a row.
        padded: prompt length with padding.
    """
    settings: dict[str, float] = {}
    last, normalized = -1, False
    for processor in processors:
        kind = type(processor)
        if _is_idle(processor):
            normalized |= kind is LogitNormalization
            continue
        if kind is InfNanRemoveLogitsProcessor:
            if last >= 0 or normalized:  # one number that is not finite has spread over the row by now
                return None
            settings["remove_invalid"] = True
            continue
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


def _is_idle(processor: LogitsProcessor) -> bool:
    """Whether it changes neither which token is the likeliest nor the distribution of a sample: a log-softmax (what follows it
    makes probabilities of logits anyway), a penalty that divides by 1."""
    kind = type(processor)
    return kind is LogitNormalization or (kind is RepetitionPenaltyLogitsProcessor and processor.penalty == 1.0)
