"""Checkpoints of EAGLE-1 and EAGLE-2 heads, as SafeAILab publishes them."""

from __future__ import annotations

from transformers import PreTrainedModel

from spec_compile.hf_integration.checkpoints.config import account_for
from spec_compile.hf_integration.checkpoints.tensors import DraftCheckpoint, fill, layer_config, vocabulary
from spec_compile.hf_integration.heads.draft_head import like_target
from spec_compile.hf_integration.heads.eagle import EagleHead


def read_eagle(checkpoint: DraftCheckpoint, target: PreTrainedModel) -> EagleHead:
    """A SafeAILab EAGLE-1 or EAGLE-2 checkpoint (also SGLang's ``LlamaForCausalLMEagle``).

    Raises:
        DraftError: names what is missing, unknown, of the wrong shape or not supported.
    """
    account_for(checkpoint.where, checkpoint.config, {})
    config = layer_config(checkpoint, checkpoint.config, target)
    draft_ids, owned = vocabulary(checkpoint, target)
    with like_target(target):
        head = EagleHead(config, target, "fc.bias" in checkpoint.tensors, draft_ids, owned)
    fill(head, checkpoint)
    return head
