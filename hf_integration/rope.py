"""Rotary embeddings: whose frequencies change with the length of the text, and what a draft head's config means."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from spec_compile.errors import DraftError

# Their frequencies follow the largest position of a forward: Phi-3's longrope switches factors (and generate() recomputes
# the whole cache at that point), dynamic NTK rescales with every token. A verified window looks ahead of the text.
_SWITCHING = ("longrope", "dynamic")
LONGEST_WINDOW = 64  # tokens: the root and 63 drafts, the most that SpecConfig allows
_BASE = 10000.0  # of a config that names none, in every engine


def fixed_rope_length(config: PretrainedConfig) -> int | None:
    """Tokens up to which a text's rotary frequencies are sure not to change while it is generated; None: at any length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [p for p in parameters.values() if isinstance(p, dict)]
    lengths = [
        p.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
        for p in per_layer_type or [parameters]
        if p.get("rope_type") in _SWITCHING
    ]
    return max(0, min(lengths) - LONGEST_WINDOW) if lengths else None


def follows_every_token(model: nn.Module) -> str | None:
    """The first module of ``model`` whose rotary frequencies are computed from each forward's largest position, which no graph
    can decide; None without one. Read in transformers 5.17 to 5.24: ``dynamic_rope_update`` in modeling_rope_utils.py asks
    whether "dynamic" is in the module's ``rope_type``, which is a dict where layer types differ."""
    for name, module in model.named_modules():
        kinds = module.__dict__.get("rope_type")
        if any("dynamic" in str(kind) for kind in (kinds.values() if isinstance(kinds, Mapping) else (kinds,))):
            return name
    return None


def head_rotary(config: PretrainedConfig) -> LlamaRotaryEmbedding:
    """The rotary embedding of a draft head's layers.

    Raises:
        DraftError: names the type that cannot be built, or not captured.
    """
    rope = config.rope_parameters
    rope_type = rope.get("rope_type")
    if rope_type == "dynamic":
        raise DraftError(
            "the draft head's rotary embedding is of type 'dynamic': its frequencies follow the length of the text, and cannot "
            "be compiled. Use a head with another type, or another draft."
        )
    if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
        raise DraftError(_unknown(rope_type))
    try:
        return LlamaRotaryEmbedding(config)
    except Exception as error:  # a parameter that the type needs
        raise DraftError(
            f"the draft head's rotary embedding of type {rope_type!r} cannot be built from {rope}: {error!r}"
        ) from error


def published_rope(sizes: Mapping[str, object], layer_types: Collection[str]) -> dict[str, object]:
    """transformers' ``rope_parameters`` from a published config: in it, in ``rope_scaling`` or at the top (``rope_theta``).

    Args:
        layer_types: of the head's layers, where the config has an entry for each type.

    Raises:
        DraftError: an unknown type, settings that contradict each other, or layers that rotate differently.
    """
    spellings = {name: _of_layers(name, sizes.get(name), layer_types) for name in ("rope_scaling", "rope_parameters")}
    named = {name: rope["rope_type"] for name, rope in spellings.items() if "rope_type" in rope}
    if len(set(named.values())) > 1:
        raise DraftError(f"the draft head's config names two rotary embeddings: {named}. Remove the wrong one.")
    rope = {"rope_theta": sizes.get("rope_theta") or _BASE, "rope_type": "default"}
    rope |= {key: value for given in spellings.values() for key, value in given.items() if value is not None}
    if rope["rope_type"] != "default" and sizes.get("original_max_position_embeddings"):
        rope.setdefault("original_max_position_embeddings", sizes["original_max_position_embeddings"])
    if rope["rope_type"] != "proportional":
        # Copied from targets that rotate a part of each head (Qwen3.5, GLM-4): the modules that heads are trained with rotate
        # all of it. Sources: speculators' issue 613, DeepSpec's pull request 72 (accepted lengths of both readings);
        # transformers models/{llama,qwen3}; SafeAILab/EAGLE eagle/model/cnets.py, SpecForge modeling/draft/llama3_eagle.py.
        rope.pop("partial_rotary_factor", None)
    return rope


def _of_layers(name: str, given: object, layer_types: Collection[str]) -> dict[str, object]:
    """One spelling's settings, with the names of today; empty where it says nothing."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise DraftError(f"the draft head's config has {name}={given!r}, which must be an object of settings.")
    if any(isinstance(value, Mapping) for value in given.values()):
        kinds = [given.get(kind) for kind in sorted(set(layer_types))]
        if any(kind != kinds[0] or not isinstance(kind, Mapping) for kind in kinds):
            raise DraftError(
                f"the draft head's config has {name} by layer type, {dict(given)}, but its layers ({', '.join(layer_types)}) "
                "need the same one."
            )
        given = kinds[0]
    # On text the three position streams of multimodal rotary embeddings are the same.
    rope = {key: value for key, value in given.items() if key not in ("type", "mrope_section", "mrope_interleaved")}
    rope_type = given.get("rope_type") or given.get("type")
    rope_type = "default" if rope_type == "mrope" else rope_type
    if rope_type is not None:
        if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
            raise DraftError(_unknown(rope_type))
        rope["rope_type"] = rope_type
    return rope


def _unknown(rope_type: object) -> str:
    return (
        f"the draft head's rotary embedding is of type {rope_type!r}, which transformers does not know. It knows default, "
        f"mrope, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}: if one of them means the same, write it into the head's config."
    )
