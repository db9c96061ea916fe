"""Rotary embeddings whose frequencies change with the length of the text."""

from __future__ import annotations

from transformers import PretrainedConfig

# Their frequencies follow the largest position of a forward: Phi-3's longrope switches factors (and generate() recomputes
# the whole cache at that point), dynamic NTK rescales with every token. A verified window looks ahead of the text.
_SWITCHING = ("longrope", "dynamic")
_LOOK_AHEAD = 64  # positions; SpecConfig allows windows of 63 drafts


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
    return max(0, min(lengths) - _LOOK_AHEAD) if lengths else None
