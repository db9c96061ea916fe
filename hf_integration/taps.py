"""Hidden states of chosen layers, read while a forward runs: what EAGLE-3, DFlash and MTP drafts are fed with.

transformers' own ``output_hidden_states=[i, j]`` would do, but its numbering changed between 5.17 and 5.23 and its first call
takes a lock that Dynamo cannot trace. Hooks on the decoder layers are the same in both, and Dynamo inlines them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from spec_compile.errors import CaptureError

NORMED = "normed"
# A hidden state of a target of L layers. i from 0 to L: the state that enters layer i, which is what layer i - 1 puts out; L is
# what the last layer puts out. NORMED: the same behind the final norm, what the language-model head reads. (transformers'
# own list of hidden states ends with that one, and has no L.)
Tap = int | Literal["normed"]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a causal LM.

    Raises:
        CaptureError: there is no list of ``num_hidden_layers`` modules.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and any(hasattr(m, "layer_idx") for m in module.modules())
        ):
            return module
    raise CaptureError(
        f"{type(model).__name__}: no list of {count} decoder layers was found, so its hidden states cannot be read. "
        "Use a draft that needs none: draft='ngram' or a small causal LM."
    )


@contextlib.contextmanager
def tapped(model: PreTrainedModel, taps: tuple[Tap, ...]) -> Iterator[dict[Tap, Tensor]]:
    """Collect hidden states of forwards in the block, by tap.

    Args:
        taps: see ``Tap``.

    Raises:
        CaptureError: a tap past the last layer, or layers that cannot be found.
    """
    states: dict[Tap, Tensor] = {}
    handles = []
    layers = decoder_layers(model) if taps else ()
    for tap in taps:
        if tap != NORMED and not 0 <= tap <= len(layers):
            raise CaptureError(f"{type(model).__name__} has {len(layers)} layers; the draft asks for hidden state {tap}.")

        def keep_input(_module, args, kwargs, tap=tap):
            states[tap] = args[0] if args else kwargs["hidden_states"]

        def keep_output(_module, _args, out, tap=tap):
            states[tap] = out if isinstance(out, Tensor) else out[0]

        if tap == len(layers):  # no layer reads it
            handles.append(layers[-1].register_forward_hook(keep_output))
        else:
            module = model.get_output_embeddings() if tap == NORMED else layers[tap]
            handles.append(module.register_forward_pre_hook(keep_input, with_kwargs=True))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
