"""DFlash checkpoints: z-lab's (``DFlashDraftModel``), speculators' (``DFlashSpeculator``) and transformers' DFlash assistants.

Names and config keys: z-lab/dflash dflash/model.py; vllm-project/speculators src/speculators/models/dflash/config.py;
transformers' models/muse_glimmer_assistant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import AutoConfig, PreTrainedModel

from spec_compile.errors import DraftError
from spec_compile.hf_integration.checkpoints.config import account_for
from spec_compile.hf_integration.checkpoints.tensors import DraftCheckpoint, check_layers, fill, layer_config, vocabulary
from spec_compile.hf_integration.heads.dflash import DFlashHead, default_dflash_taps
from spec_compile.hf_integration.heads.draft_head import like_target
from spec_compile.hf_integration.heads.eagle3 import default_taps
from spec_compile.hf_integration.taps import NORMED, Tap

_TRANSFORMERS = "muse_glimmer_assistant"
_FIRST_SLOT = ("sample_from_anchor", "query_zero_predicts_next")  # speculators' and vLLM's spelling; SGLang's other one
_WINDOWS = ("use_swa", "swa_window_size")
_CAUSAL = ("is_causal", "causal", "sliding_window_non_causal")
_BLOCK = ("block_size", "mask_token_id", *_FIRST_SLOT, *_WINDOWS, *_CAUSAL)
_STATES = "eagle_aux_hidden_state_layer_ids"  # beside the ids of outputs in some of z-lab's format


def read_dflash(checkpoint: DraftCheckpoint, target: PreTrainedModel) -> DFlashHead:
    """A checkpoint of z-lab or of transformers. Its layer ids count outputs: output of layer i = state i + 1.

    The last layer's id is the state behind the final norm: both read transformers' list of hidden states, which ends with it
    (z-lab's dflash 0.1.0 extract_context_feature, transformers' DFlashTokenCandidateGenerator).

    Raises:
        DraftError: names what is missing, unknown, of the wrong shape or not supported.
    """
    config = checkpoint.config
    if config.get("model_type") == _TRANSFORMERS:  # saved without what is its class's default
        config = AutoConfig.for_model(**config).to_dict()
    settings = {**config, **(config.get("dflash_config") or {})}
    if settings.get("projector_type"):
        raise DraftError(f"draft={checkpoint.where!r}: projector_type={settings['projector_type']!r} has no reader.")
    read = (*_BLOCK, "target_layer_ids", "projector_type", _STATES)
    account_for(checkpoint.where, checkpoint.config, {"": read, "dflash_config": read})
    ids, states = settings.get("target_layer_ids"), tuple(settings.get(_STATES) or ())
    layers = target.config.get_text_config(decoder=True).num_hidden_layers
    taps = tuple(layer + 1 for layer in ids or ())
    if taps and states and taps != states:
        raise DraftError(
            f"draft={checkpoint.where!r}: target_layer_ids={list(ids)} are the states {list(taps)}, and {_STATES} says "
            f"{list(states)}. Remove the wrong ones from its config."
        )
    taps = tuple(NORMED if tap == layers else tap for tap in taps) or states
    return _build(checkpoint, config, settings, target, taps or default_dflash_taps(layers, checkpoint.num_layers()))


def read_dflash_speculators(checkpoint: DraftCheckpoint, target: PreTrainedModel) -> DFlashHead:
    """A checkpoint of speculators. Its layer ids are transformers' numbers: id i = state i.

    Raises:
        DraftError: names what is missing, unknown, of the wrong shape or not supported.
    """
    config = checkpoint.config
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        raise DraftError(f"draft={checkpoint.where!r}: a speculators config without transformer_layer_config.")
    read = {"": (*_BLOCK, "aux_hidden_state_layer_ids"), "transformer_layer_config": (*_WINDOWS, *_CAUSAL)}
    account_for(checkpoint.where, config, read)
    ids = config.get("aux_hidden_state_layer_ids")
    taps = tuple(ids) if ids else default_taps(target.config.get_text_config(decoder=True).num_hidden_layers)
    return _build(checkpoint, layer, {**layer, **config}, target, taps)


def _build(
    checkpoint: DraftCheckpoint,
    sizes: Mapping[str, object],
    settings: Mapping[str, object],
    target: PreTrainedModel,
    taps: tuple[Tap, ...],
) -> DFlashHead:
    for name in ("block_size", "mask_token_id"):
        if not isinstance(settings.get(name), int):
            raise DraftError(f"draft={checkpoint.where!r}: a DFlash head whose config has no {name}.")
    check_layers(checkpoint, {**sizes, "model_type": "qwen3"})  # all three build Qwen3's layers, whatever the config calls them
    config = layer_config(checkpoint, sizes, target)
    _check_attention(checkpoint.where, settings, config.layer_types)
    draft_ids, owned = vocabulary(checkpoint, target)
    first_slot = _first_slot(checkpoint)
    with like_target(target):
        head = DFlashHead(config, target, taps, settings["block_size"], settings["mask_token_id"], draft_ids, owned, first_slot)
    fill(head, checkpoint)
    return head


def _check_attention(where: str, settings: Mapping[str, object], layer_types: Sequence[str]) -> None:
    """Every layer must attend to the whole context and to all of the block.

    Sliding are the layers that ``layer_types`` says, or all with ``use_swa``; causal are those that ``is_causal`` or ``causal``
    says, otherwise the sliding ones (vLLM model_executor/models/qwen3_dflash.py, z-lab's dflash 0.1.0 model.py).

    Raises:
        DraftError: one does not; names the settings.
    """
    declared = [f"{name}={settings[name]}" for name in ("use_swa", "is_causal", "causal") if settings.get(name)]
    if "sliding_attention" in layer_types:
        declared.append(f"layer_types={list(layer_types)}")
    if declared:
        raise DraftError(
            f"draft={where!r}: a DFlash head with {', '.join(declared)}: sliding-window layers and causal blocks are not read, "
            "only full attention in both directions."
        )


def _first_slot(checkpoint: DraftCheckpoint) -> int:
    """0 for heads that draft from the root's slot too, in every spelling; else 1.

    Raises:
        DraftError: the spellings disagree.
    """
    config = checkpoint.config
    sections = {"": config, "dflash_config.": config.get("dflash_config") or {}}
    said = {
        f"{place}{name}": keys[name] for place, keys in sections.items() for name in _FIRST_SLOT if keys.get(name) is not None
    }
    if len({bool(value) for value in said.values()}) > 1:
        raise DraftError(f"draft={checkpoint.where!r}: whether a block's first slot is a draft: its config says both, {said}.")
    return 0 if any(said.values()) else 1
