"""What transformers does not promise to keep, taken here and nowhere else; read in transformers 5.17, 5.23 and 5.24.

``tests/test_private_names.py`` looks for each of these names in the installed release, and for private names that a file takes
past this one.
"""

from __future__ import annotations

from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

# Loops of generation/utils.py, which generate() looks up on the class alone: getattr(type(self), "_sample").
SAMPLE = "_sample"
PLAIN_LOOPS = {"_assisted_decoding": "assisted generation of transformers", "_beam_search": "beam search"}

# What ``_sample`` and ``_prefill`` call on the instance, in generation/utils.py, beside its forward.
CALLED_BY_THE_LOOP = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "create_masks_for_generate",
    "_prefill",
    "_has_unfinished_sequences",
    "_optimize_model_for_decode",
    "_valid_auto_compile_criteria",
    "get_compiled_call",
)

# Attributes of configurations that no forward reads: where one came from, and what the properties without underscore stand on.
PRIVATE_SETTINGS = (
    "_commit_hash",
    "_name_or_path",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "_output_attentions",
    "_output_hidden_states",
)

# What transformers leaves on models in calls of generate() and in training, and no forward in eval mode reads.
PRIVATE_NOTES = (
    "_compiled_call",
    "_gradient_checkpointing_func",
    "_is_hf_initialized",
    "_last_compile_config",
    "_loss_function",
    "_output_capturing_hooks_installed",
    "_previous_max_cache_length",
    "_require_grads_hook",
    "_require_grads_hooks",
)


def attention_name(config: PretrainedConfig) -> str | None:
    """The attention implementation that a configuration names."""
    return config._attn_implementation


def experts_name(config: PretrainedConfig) -> str | None:
    """The implementation of mixtures of experts that a configuration names; None where a release or family has no choice."""
    return getattr(config, "_experts_implementation", None)


def commit_hash(config: PretrainedConfig) -> str | None:
    """The hub's revision that a configuration was read from; None for one of a folder."""
    return getattr(config, "_commit_hash", None)


def pad_token(generation_config: GenerationConfig) -> Tensor | None:
    """The padding id, int64 [], of a configuration that ``generate()`` has prepared."""
    return generation_config._pad_token_tensor
