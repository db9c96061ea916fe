"""Quantised layers of other packages: which of them a graph cannot stand for, and when their weights are what they stay."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from spec_compile.errors import ConfigError
from spec_compile.hf_integration.forward_wrappers import patched_forward


def check_quantized(model: PreTrainedModel) -> None:
    """That no layer's result for a token depends on the other tokens of its forward, which are others in a window.

    Raises:
        ConfigError: it does; says how to load the model.
    """
    for name, module in model.named_modules():
        if _is_8bit(module) and (threshold := module.state.threshold) > 0:  # bitsandbytes/autograd/_functions.py of 0.50
            raise ConfigError(
                f"the model's {name} is an 8-bit layer of bitsandbytes with llm_int8_threshold={threshold}: which columns it "
                "keeps in 16 bits it chooses over all tokens of a forward, so a token's result depends on the others in its "
                "window, and the text would not be plain generate()'s. Load the model with "
                "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), or with load_in_4bit=True."
            )


def _is_8bit(module: nn.Module) -> bool:
    return any(kind.__name__ == "Linear8bitLt" and kind.__module__.startswith("bitsandbytes") for kind in type(module).__mro__)


def why_not_captured(module: nn.Module) -> str | None:
    """Why a quantised layer cannot be captured, and what can be in its place; None for any other layer.

    compressed-tensors decompresses a model in its first forward and then swaps weights within every one
    (compressed_tensors/quantization/lifecycle/forward.py of 0.20).
    """
    patched = patched_forward(module)
    code_of = getattr(getattr(patched, "__func__", patched), "__globals__", {}).get("__name__", "")
    if not code_of.startswith("compressed_tensors."):
        return None
    return (
        "its forward is compressed-tensors', which swaps weights in every call and cannot be captured. Load the model with "
        "quantization_config=CompressedTensorsConfig(dequantize=True): its weights are the same numbers then, and activations "
        "are not quantised"
    )


@torch.no_grad()
def settle_weights(model: PreTrainedModel) -> None:
    """Let the layers of a quantised model lay out their weights, as bitsandbytes' do in their first forward: graphs are made
    over what stays."""
    if getattr(model, "hf_quantizer", None) is not None:
        device = model.get_input_embeddings().weight.device
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
