"""EAGLE-3 checkpoints as SafeAILab and SpecForge publish them (``LlamaForCausalLMEagle3``, tensors ``midlayer.*``).

Names and config keys: SafeAILab/EAGLE eagle/model/cnets.py; sgl-project/SpecForge specforge/modeling/draft/llama3_eagle.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from spec_compile.errors import DraftError
from spec_compile.hf_integration.checkpoints.config import account_for
from spec_compile.hf_integration.checkpoints.tensors import DraftCheckpoint, fill, layer_config, vocabulary
from spec_compile.hf_integration.heads.draft_head import like_target
from spec_compile.hf_integration.heads.eagle3 import Eagle3Head, Eagle3Options, default_taps

_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_READ = (
    "norm_before_residual", "norm_before_fc", "fc_norm", "use_aux_norm", "norm_output", "return_hidden_post_norm",
    "use_aux_hidden_state", _LAYER_IDS,
)  # fmt: skip


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

    account_for(checkpoint.where, config, {"": _READ, "eagle_config": _READ})

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
    """Hidden states a head reads. No ids, or an empty list of them, are the default ones.

    * Ids inside ``eagle_config`` count layer outputs: output of layer i = state i + 1 (SGLang srt/models/llama.py
      set_eagle3_layers_to_capture, SpecForge). Where one of them is the number of layers, behind which there is no layer, all
      count states (nvidia/gpt-oss-120b-Eagle3-v3; SGLang srt/models/gpt_oss.py).
    * Ids at the top count states, as in the speculators format (vLLM's pull request 25961, llama.cpp's 27040).

    Raises:
        DraftError: the head reads no auxiliary states, or its config names two sets of them.
    """
    num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    eagle_config = config.get("eagle_config") or {}
    if False in (config.get("use_aux_hidden_state"), eagle_config.get("use_aux_hidden_state")):
        raise DraftError("use_aux_hidden_state=false: an EAGLE-3 head that reads only the target's last state has no reader.")
    outputs, states = eagle_config.get(_LAYER_IDS) or (), tuple(config.get(_LAYER_IDS) or ())
    taps = tuple(outputs) if num_layers in outputs else tuple(layer + 1 for layer in outputs)
    if taps and states and taps != states:
        raise DraftError(
            f"{_LAYER_IDS} stands twice in the head's config: {list(outputs)} in eagle_config, which means the states "
            f"{list(taps)}, and {list(states)} at the top, which means the states {list(states)}. Remove the wrong one."
        )
    return taps or states or default_taps(num_layers)


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
