"""EAGLE-3 checkpoints in the speculators format (``Eagle3Speculator``, ``Eagle3DraftModel``): read and write.

Names and config keys: vllm-project/speculators src/speculators/models/eagle3/{config,core}.py and model.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile.errors import DraftError
from spec_compile.hf_integration.checkpoints.config import account_for
from spec_compile.hf_integration.checkpoints.eagle3_safeailab import build_eagle3
from spec_compile.hf_integration.checkpoints.tensors import DraftCheckpoint, check_layers
from spec_compile.hf_integration.heads.eagle3 import Eagle3Head, default_taps

_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_FLAGS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def read_eagle3_speculators(checkpoint: DraftCheckpoint, target: PreTrainedModel) -> Eagle3Head:
    """Build the head.

    Raises:
        DraftError: names what is missing, unknown, of the wrong shape or not supported.
    """
    config = checkpoint.config
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        raise DraftError(f"draft={checkpoint.where!r}: a speculators config without transformer_layer_config.")
    account_for(checkpoint.where, config, {"": (*_FLAGS, _LAYER_IDS), "transformer_layer_config": ()})
    check_layers(checkpoint, layer)
    flags = {name: bool(config.get(name)) for name in _FLAGS}
    return build_eagle3(checkpoint, layer, target, speculators_taps(config, target), flags)


def speculators_taps(config: Mapping[str, object], target: PreTrainedModel) -> tuple[int, ...]:
    """Hidden states a head reads: its ids are transformers' own numbers, id i = state i (as vLLM reads them)."""
    ids = config.get(_LAYER_IDS)
    return tuple(ids) if ids else default_taps(target.config.get_text_config(decoder=True).num_hidden_layers)


def save_speculators_eagle3(
    head: Eagle3Head, directory: str | os.PathLike, verifier_name: str | None = None, num_speculative_tokens: int = 5
) -> None:
    """Write ``head`` so that ``load_draft_head``, speculators and vLLM read it: ``config.json`` and ``model.safetensors``.

    Shared modules are not written, except for a shared language-model head: the format has no tied one.

    Args:
        verifier_name: hub id or path of the target, for readers that look it up.
    """
    config, target_vocab = head.config, head.embed_tokens.weight.shape[0]
    tensors = {name: value.detach() for name, value in head.own_tensors().items()}
    tensors["lm_head.weight"] = head.lm_head.weight.detach()
    if head.draft_ids is not None:
        ids = head.draft_ids.cpu()
        tensors["d2t"] = ids - torch.arange(len(ids))
        tensors["t2d"] = torch.zeros(target_vocab, dtype=torch.bool).index_fill(0, ids, True)
    layer = {key: value for key, value in config.to_diff_dict().items() if key not in ("transformers_version", "architectures")}
    layer |= {"model_type": config.model_type, "vocab_size": target_vocab, "rope_parameters": config.rope_parameters}
    published = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "transformer_layer_config": layer,
        "draft_vocab_size": tensors["lm_head.weight"].shape[0],
        "target_hidden_size": None if head.target_width == len(head.taps) * config.hidden_size else _width(head),
        _LAYER_IDS: list(head.taps),
        **{name: getattr(head.options, name) for name in _FLAGS},
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_speculative_tokens}],
            "verifier": {"name_or_path": verifier_name, "architectures": []},
        },
        "torch_dtype": str(head.fc.weight.dtype).removeprefix("torch."),
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: _contiguous(value) for name, value in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(published, indent=2) + "\n")


def _width(head: Eagle3Head) -> int:
    return head.target_width // len(head.taps)


def _contiguous(value: Tensor) -> Tensor:
    return value.cpu().contiguous()
