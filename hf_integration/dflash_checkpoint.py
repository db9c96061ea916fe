"""DFlash checkpoints: z-lab's (``DFlashDraftModel``), speculators' (``DFlashSpeculator``) and transformers' DFlash assistants.

Names and config keys: z-lab/dflash dflash/model.py; vllm-project/speculators src/speculators/models/dflash/config.py;
transformers' models/muse_glimmer_assistant.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import AutoConfig, PreTrainedModel

from spec_compile.errors import DraftError
from spec_compile.hf_integration.dflash import DFlashHead, default_dflash_taps
from spec_compile.hf_integration.draft_head import like_target
from spec_compile.hf_integration.draft_tensors import DraftCheckpoint, check_layers, fill, layer_config, vocabulary
from spec_compile.hf_integration.eagle3 import default_taps

_TRANSFORMERS = "muse_glimmer_assistant"


def read_dflash(checkpoint: DraftCheckpoint, target: PreTrainedModel) -> DFlashHead:
    """A checkpoint of z-lab or of transformers. Its layer ids count outputs: output of layer i = state i + 1.

    Raises:
        DraftError: names what is missing, unknown, of the wrong shape or not supported.
    """
    config = checkpoint.config
    if config.get("model_type") == _TRANSFORMERS:  # saved without what is its class's default
        config = AutoConfig.for_model(**config).to_dict()
    settings = {**config, **(config.get("dflash_config") or {})}
    if settings.get("projector_type"):
        raise DraftError(f"draft={checkpoint.where!r}: projector_type={settings['projector_type']!r} has no reader.")
    ids = settings.get("target_layer_ids")
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    taps = default_dflash_taps(layers, checkpoint.num_layers()) if ids is None else tuple(layer + 1 for layer in ids)
    return _build(checkpoint, config, settings, target, taps)


def read_dflash_speculators(checkpoint: DraftCheckpoint, target: PreTrainedModel) -> DFlashHead:
    """A checkpoint of speculators. Its layer ids are transformers' numbers: id i = state i.

    Raises:
        DraftError: names what is missing, unknown, of the wrong shape or not supported.
    """
    config = checkpoint.config
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        raise DraftError(f"draft={checkpoint.where!r}: a speculators config without transformer_layer_config.")
    ids = config.get("aux_hidden_state_layer_ids")
    taps = tuple(ids) if ids else default_taps(target.config.get_text_config(decoder=True).num_hidden_layers)
    return _build(checkpoint, layer, config, target, taps)


def _build(
    checkpoint: DraftCheckpoint,
    sizes: Mapping[str, object],
    settings: Mapping[str, object],
    target: PreTrainedModel,
    taps: tuple[int, ...],
) -> DFlashHead:
    for name in ("block_size", "mask_token_id"):
        if not isinstance(settings.get(name), int):
            raise DraftError(f"draft={checkpoint.where!r}: a DFlash head whose config has no {name}.")
    check_layers(checkpoint, {**sizes, "model_type": "qwen3"})  # all three build Qwen3's layers, whatever the config calls them
    config = layer_config(checkpoint, sizes, target)
    draft_ids, owned = vocabulary(checkpoint, target)
    first_slot = 0 if settings.get("sample_from_anchor") else 1
    with like_target(target):
        head = DFlashHead(config, target, taps, settings["block_size"], settings["mask_token_id"], draft_ids, owned, first_slot)
    fill(head, checkpoint)
    return head
