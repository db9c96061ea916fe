"""Draft checkpoints written to disk as their formats publish them, from the reference weights in tests/data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from spec_compile.hf_integration.heads.draft_head import DraftHead

DATA = Path(__file__).parents[1] / "data"
HIDDEN, VOCAB, LAYERS = 32, 64, 8


def reference(name: str) -> dict[str, Tensor]:
    """A file of tests/data, weights in float32."""
    tensors = load_file(DATA / name)
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def target_for(weights: Mapping[str, Tensor], hidden: int = HIDDEN) -> PreTrainedModel:
    """A target of eight layers with the reference's embedding (and language-model head, where it has the target's)."""
    sizes = {"vocab_size": VOCAB, "hidden_size": hidden, "num_hidden_layers": LAYERS, "head_dim": 8}
    target = tiny_model("llama", **sizes)
    with torch.no_grad():
        if hidden == HIDDEN:
            target.get_input_embeddings().weight.copy_(weights["embed_tokens.weight"])
        if hidden == HIDDEN and "target_lm_head.weight" in weights:
            target.get_output_embeddings().weight.copy_(weights["target_lm_head.weight"])
    return target


def write(directory: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "model.safetensors")
    return directory


def draft_logits(head: DraftHead, weights: Mapping[str, Tensor], states: str = "states") -> list[Tensor]:
    """Logits of the prefill [1, T, Vd] and of two draft steps [1, 1, Vd], the way tests/data made them."""
    ids, given = weights["input_ids"], weights[states]
    length = ids.shape[1] - 2
    cache, outs = DynamicCache(config=head.config), []
    positions = torch.arange(length + 2)[None]
    with torch.no_grad():
        hidden = head(ids[:, :length], head.project(given[:, :length]), positions[:, :length], cache)
        outs.append(head.logits(hidden))
        for step in range(length, length + 2):
            fed = head.feedback(hidden[:, -1:])
            hidden = head(ids[:, step : step + 1], fed, positions[:, step : step + 1], cache)
            outs.append(head.logits(hidden))
    return outs


def expected(weights: Mapping[str, Tensor], case: str) -> list[Tensor]:
    """What the published module returned; a case may hold the prefill only."""
    names = [f"expected.{case}.{step}" for step in range(3)]
    return [weights[name] for name in names if name in weights]


def largest_difference(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of the steps that ``wanted`` has, as a part of its largest number."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, wanted, strict=False))
