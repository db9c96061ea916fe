"""EAGLE-3 checkpoints as SafeAILab and SpecForge publish them (``LlamaForCausalLMEagle3``, tensors ``midlayer.*``).

Names and config keys: SafeAILab/EAGLE eagle/model/cnets.py; sgl-project/SpecForge specforge/modeling/draft/llama3_eagle.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from spec_compile.errors import DraftError
from spec_compile.hf_integration.draft_head import like_target
from spec_compile.hf_integration.draft_tensors import DraftCheckpoint, fill, layer_config, vocabulary
from spec_compile.hf_integration.eagle3 import Eagle3Head, Eagle3Options, default_taps


def read_eagle3_safeailab(checkpoint: DraftCheckpoint, target: PreTrainedModel) -> Eagle3Head:
    """Build the head.

    ``norm_output`` feeds the next step with the state after the norm, as SGLang, vLLM and TensorRT-LLM read it. SpecForge's own
    trainer fed the state before the norm whatever the flag said until its pull request 879 (September 2026): a head trained
    before that with ``norm_output: true`` drafts better with the flag removed from its config.

    Raises:
        DraftError: names what is missing, unknown, of the wrong shape or not supported.
    """
    config = checkpoint.config
    eagle_config = config.get("eagle_config") or {}

    def flag(*names: str) -> bool:
        return any(config.get(name) or eagle_config.get(name) for name in names)

    flags = {
        "norm_before_residual": flag("norm_before_residual"),
        "norm_before_fc": "input_norm.weight" in checkpoint.tensors or flag("norm_before_fc"),
        "fc_norm": "fc_norm.0.weight" in checkpoint.tensors or flag("fc_norm", "use_aux_norm"),
        "norm_output": flag("norm_output", "return_hidden_post_norm"),
    }
    return build_eagle3(checkpoint, config, target, safeailab_taps(config, target), flags)


def safeailab_taps(config: Mapping[str, object], target: PreTrainedModel) -> tuple[int, ...]:
    """Hidden states a head reads. Ids inside ``eagle_config`` count layer outputs: output of layer i = state i + 1.

    Source: SGLang srt/models/llama.py set_eagle3_layers_to_capture (it captures val + 1); SpecForge trains with the same.

    Raises:
        DraftError: the head reads no auxiliary states.
    """
    eagle_config = config.get("eagle_config") or {}
    if eagle_config.get("use_aux_hidden_state") is False:
        raise DraftError("use_aux_hidden_state=false: an EAGLE-3 head that reads only the target's last state has no reader.")
    ids = eagle_config.get("eagle_aux_hidden_state_layer_ids")
    if ids is not None:
        return tuple(layer + 1 for layer in ids)
    return default_taps(target.config.get_text_config(decoder=True).num_hidden_layers)


def build_eagle3(
    checkpoint: DraftCheckpoint,
    sizes: Mapping[str, object],
    target: PreTrainedModel,
    taps: tuple[int, ...],
    flags: Mapping[str, bool],
) -> Eagle3Head:
    """A head from what a format's reader found out: shared by all EAGLE-3 formats."""
    options = Eagle3Options(**flags, fc_bias="fc.bias" in checkpoint.tensors)
    layers = layer_config(checkpoint, sizes, target)
    draft_ids, owned = vocabulary(checkpoint, target)
    with like_target(target):
        head = Eagle3Head(layers, target, taps, options, draft_ids, owned, checkpoint.config.get("target_hidden_size"))
    fill(head, checkpoint)
    return head
