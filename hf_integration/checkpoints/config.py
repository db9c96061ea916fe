"""What a draft head's config says: every key is accounted for, as every tensor is.

A reader names the keys that it understands, by section. Of the others, those that are known to change what a head computes
are an error, wherever they stand: a head that is run without them drafts badly and nobody is told. What is known to mean
nothing for a head is passed over, and the rest is named in one warning.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping

from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from spec_compile.errors import DraftError

# Keys that change what some head computes. Sources: sglang 0.5.23 srt/models/{llama_eagle3,dflash}.py and
# srt/speculative/dflash_utils.py; speculators 0.9.0 models/*/config.py; dflash 0.1.0 model.py; SpecForge 0.2.0 modeling/draft;
# vLLM model_executor/models/qwen3_dflash.py; transformers 5.24 configurations with MTP layers.
_NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "use_aux_norm", "norm_output", "return_hidden_post_norm")
_STATES = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "target_layer_ids")
_SLOTS = ("sample_from_anchor", "query_zero_predicts_next", "mask_hidden", "ptd_token_id", "pard_token", "parallel_drafting")
_WINDOWS = ("use_swa", "swa_window_size", "is_causal", "causal", "sliding_window_non_causal", "attention_sink_bias")
_SCALES = ("input_embedding_scale", "attention_value_scale", "use_gemma_norm")
_PARTS = (
    "projector_type", "shift_label", "pure_draft_prefix_len", "markov_rank", "enable_confidence_head",
    "conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k", "attention_mode", "hot_vocab_size",
    "parallel_draft_step",
)  # fmt: skip
_MTP = (
    "mtp_hidden_states_first", "mtp_local_layer_ids", "mtp_hybrid_override_pattern", "mtp_layers_block_type",
    "mtp_per_layer_config", "index_share_for_mtp_iteration", "mtp_layer_types",
)  # fmt: skip
_ROTATION = ("is_neox_style", "rope_is_neox_style")
_DECISIVE = frozenset((*_NORMS, *_STATES, *_SLOTS, *_WINDOWS, *_SCALES, *_PARTS, *_MTP, *_ROTATION))
# What such a key says where it changes nothing; the others: None, False, nothing, or a factor or count of 0 or 1.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "is_neox_style": (True, None),
    "rope_is_neox_style": (True, None),
    "attention_mode": ("gqa", "mha", None),  # numbers of heads, which the sizes and tensors say
    "is_causal": (True, None),  # blocks of DFlash are not; all others are
    "causal": (True, None),
}

# transformers' own keys: a layer's sizes and rotation are read by layer_config(), and its biases are told by the tensors.
_TRANSFORMERS = {key for config in (PretrainedConfig, LlamaConfig, Qwen3Config) for key in config().to_dict()}
_HARMLESS = frozenset(_TRANSFORMERS) | {
    "rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings",
    # of older versions, generation settings among them
    "torch_dtype", "_attn_implementation_autoset", "attn_implementation", "gradient_checkpointing",
    "return_dict_in_generate", "output_scores", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder",
    "is_decoder", "decoder_start_token_id", "sep_token_id", "pruned_heads", "prefix", "task_specific_params",
    "tokenizer_class", "torchscript", "use_bfloat16", "tf_legacy_loss", "finetuning_task", "_name_or_path", "auto_map",
    "model_max_length", "tokenizer_model_max_length",
    # told by the tensors
    "bias", "qkv_bias", "qk_layernorm", "use_qk_norm", "draft_vocab_size", "target_hidden_size", "num_aux_hidden_states",
    "intermediate_size_mlp", "use_last_layernorm", "use_input_layernorm_in_first_layer", "use_mtp_layernorm", "has_lm_head",
    "has_embed_tokens", "quantization_config", "compression_config",
    # of the target, and of training
    "num_target_layers", "target_model_type", "target_vocab_size", "mask_token", "embed_requires_grad", "inference_type",
    "has_no_defaults_at_init", "speculators_model_type", "speculators_version", "speculators_config", "ttt_steps",
    "mtp_loss_scaling_factor", "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings", "nextn_is_sparse", "mtp_mlp_layer_types",
    "num_mtp_modules", "vision_config", "audio_config",
}  # fmt: skip
# A head copied from a mixture of experts has none itself, or its tensors say so; token ids and losses are no part of a forward.
_HARMLESS_KINDS = re.compile(
    r".*expert.*|.*router.*|.*moe.*|(n|topk)_group|norm_topk_prob|first_k_dense_replace|.*_token_id|.*loss.*"
)


def account_for(where: str, config: Mapping[str, object], understood: Mapping[str, Collection[str]]) -> None:
    """Account for every key of a head's config.

    Args:
        where: the checkpoint, for messages.
        understood: section -> the keys that the caller reads there; "" is the top.

    Raises:
        DraftError: a key that changes what a head computes and is not read where it stands.
    """
    unknown = []
    for section, key, value in _keys(config, understood):
        if key in understood.get(section, ()) or _says_nothing(key, value):
            continue
        place = f"{section}.{key}" if section else key
        if key in _DECISIVE:
            elsewhere = [f"in {name}" if name else "at the top" for name, keys in understood.items() if key in keys]
            remedy = f"It is read {' and '.join(elsewhere)}: move it there." if elsewhere else (
                "It changes what the head computes and is not supported. If the head was trained without it, remove it from "
                "config.json; otherwise use another draft."
            )  # fmt: skip
            raise DraftError(f"draft={where!r}: its config says {place}={value!r}. {remedy}")
        if key not in _HARMLESS and not _HARMLESS_KINDS.fullmatch(key):
            unknown.append(place)
    if unknown:
        warnings.warn(
            f"spec_compile: draft={where!r}: its config has keys that are not read: {', '.join(unknown)}. If one of them "
            "changes what the head computes, fewer drafts are accepted than should be; the text is the target's either way.",
            stacklevel=2,
        )


def _keys(config: Mapping[str, object], understood: Mapping[str, Collection[str]]) -> Iterator[tuple[str, str, object]]:
    """Section, key and value of everything in a config. An object is a section unless its key is read, or means nothing."""
    for key, value in config.items():
        known = key in understood.get("", ()) or key in _HARMLESS
        if isinstance(value, Mapping) and (key in understood or not known):
            yield from ((key, inner, what) for inner, what in value.items())
        else:
            yield "", key, value


def _says_nothing(key: str, value: object) -> bool:
    if key in _NEUTRAL:
        return value in _NEUTRAL[key]
    return value is not True and (not value or value == 1)
