"""Which attention a model runs by its configuration: transformers' own, which capture expresses, or somebody's."""

from __future__ import annotations

from collections.abc import Callable

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, flash_attention_mask, flex_attention_mask, sdpa_mask

from spec_compile.hf_integration.private_copy import configurations
from spec_compile.hf_integration.transformers_private import attention_name

_ATTENTIONS, _MASKS = AttentionInterface(), AttentionMaskInterface()  # instances share what is registered
_REMEDY = "choose a built-in one, e.g. model.set_attn_implementation('sdpa')"


def own_attention(model: PreTrainedModel) -> str | None:
    """Why ``model``'s attention is not one that capture expresses; None if it is.

    Functions that a user registered, under a name of their own or over a built-in one, may compute anything.
    """
    names = {attention_name(config) for config in configurations(model.config)} - {None}
    for name in sorted(names):
        if "/" in name:  # a kernel of the hub, which transformers itself registers
            continue
        attention, mask = _ATTENTIONS.get(name), _MASKS.get(name)
        if attention is not None and getattr(attention, "__module__", "").partition(".")[0] != "transformers":
            return f"its attention implementation {name!r} is {_called(attention)}, which somebody registered; {_REMEDY}"
        if mask not in (None, sdpa_mask, eager_mask, flex_attention_mask, flash_attention_mask):
            return f"its attention implementation {name!r} has masks of {_called(mask)}, which somebody registered; {_REMEDY}"
    return None


def masks_hold_windows(model: PreTrainedModel) -> bool:
    """Whether the model's attention knows its sliding windows from masks; flash attention reads them from its call."""
    return _MASKS.get(attention_name(model.config.get_text_config(decoder=True))) is not flash_attention_mask


def _called(function: Callable) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
