"""Checkpoints of draft heads: files to tensors, tensors to a head, every name accounted for.

A variant that shows in the tensor names (biases, norms, layers, an embedding or language-model head of its own, a draft
vocabulary) is taken from the names; the config decides what does not show. What is missing or unknown is an error.
"""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, Qwen3Config

from spec_compile.errors import DraftError
from spec_compile.hf_integration.heads.draft_head import DraftHead
from spec_compile.hf_integration.rope import published_rope

# What checkpoints carry besides a head's own parameters: the other half of the vocabulary map (checked by vocabulary()),
# copies of the target's that speculators trains with, and rotary frequencies, which follow from the config.
_BESIDES = re.compile(r"d2t|t2d|verifier_(norm|lm_head)\.weight|(.*\.)?rotary_emb\.inv_freq")
# SafeAILab and SpecForge call the first layer midlayer; SGLang's names for the norms before fc are older than fc_norm;
# transformers keeps a DFlash head's projection in an encoder.
_RENAMED = {
    "midlayer.": "layers.0.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
    "encoder.fc.": "fc.",
    "encoder.output_norm_enc.": "hidden_norm.",
}
_LAYER_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "max_position_embeddings", "rms_norm_eps",
)  # fmt: skip
_QWEN3_SIZES = ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")


@dataclass(frozen=True)
class DraftCheckpoint:
    """A checkpoint that was read: where from, its config, and its tensors under the names of ``Eagle3Head`` and its kind."""

    where: str
    config: Mapping[str, object]
    tensors: Mapping[str, Tensor]

    def num_layers(self) -> int:
        numbers = [int(match[1]) for name in self.tensors if (match := re.match(r"layers\.(\d+)\.", name))]
        return max(numbers, default=-1) + 1


def read_config(directory: Path) -> dict[str, object]:
    """``config.json`` of a checkpoint.

    Raises:
        DraftError: it cannot be read.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DraftError(f"draft={str(directory)!r}: {path.name} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise DraftError(f"draft={str(directory)!r}: {path.name} holds a {type(config).__name__}, not an object of settings.")
    return config


def read_checkpoint(directory: Path, config: Mapping[str, object]) -> DraftCheckpoint:
    """All tensors of a checkpoint on the CPU, renamed.

    Raises:
        DraftError: no weight files, or one that cannot be read.
    """
    files = weight_files(directory)
    if not files:
        raise DraftError(f"draft={str(directory)!r} holds no .safetensors or .bin file.")
    tensors = {_renamed(name): tensor for file in files for name, tensor in read_tensors(file).items()}
    return DraftCheckpoint(str(directory), config, tensors)


def weight_files(directory: Path) -> list[Path]:
    """safetensors if there are any, else .bin; what an index names, else all of a kind."""
    for pattern, index in (
        ("*.safetensors", "model.safetensors.index.json"),
        ("*.bin", "pytorch_model.bin.index.json"),
    ):
        if (directory / index).exists():
            return [directory / shard for shard in sorted(set(read_index(directory / index).values()))]
        if files := sorted(file for file in directory.glob(pattern) if file.name != "training_args.bin"):
            return files
    return []


def read_index(file: Path) -> dict[str, str]:
    """Tensor name -> the file that holds it, from the index of a checkpoint of several files.

    Raises:
        DraftError: it cannot be read.
    """
    with _readable(file):
        return dict(json.loads(file.read_text())["weight_map"])


def read_names(file: Path) -> list[str]:
    """Names of a weight file's tensors.

    Raises:
        DraftError: it cannot be read.
    """
    with _readable(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt", device="cpu") as opened:
                return list(opened.keys())
        # Files from before PyTorch 1.6, or saved with _use_new_zipfile_serialization=False, are no zip archives: torch.load
        # refuses to map them into memory.
        return list(torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)))


def read_tensors(file: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a weight file on the CPU, by name: all of them, or ``names``, of which a .safetensors file reads no more.

    Raises:
        DraftError: it cannot be read, or does not hold ``names``.
    """
    with _readable(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt", device="cpu") as opened:
                return {name: opened.get_tensor(name) for name in (opened.keys() if names is None else names)}
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        return tensors if names is None else {name: tensors[name] for name in names}


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors and pickle raise kinds of their own
        raise DraftError(f"draft={str(file.parent)!r}: {file.name} cannot be read: {error}") from error


def _renamed(name: str) -> str:
    name = name.removeprefix("model.")
    for old, new in _RENAMED.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def layer_config(
    checkpoint: DraftCheckpoint, sizes: Mapping[str, object], target: PreTrainedModel
) -> LlamaConfig | Qwen3Config:
    """The config of a head's decoder layers from a published config and the tensor names.

    Args:
        sizes: the published config, or the part of it that describes the layers.

    Raises:
        DraftError: a size or a rotary embedding that cannot be built.
    """
    names = checkpoint.tensors
    qwen3 = "layers.0.self_attn.q_norm.weight" in names
    known = {name: sizes[name] for name in (*_LAYER_SIZES, *(_QWEN3_SIZES if qwen3 else ())) if sizes.get(name) is not None}
    layer_types = list(sizes.get("layer_types") or ())[: checkpoint.num_layers()] or ["full_attention"]
    if not qwen3 and ("sliding_attention" in layer_types or (sizes.get("use_sliding_window") and sizes.get("sliding_window"))):
        raise DraftError(
            f"draft={checkpoint.where!r}: llama layers with a sliding window, which no known head has been run with."
        )
    if "layer_types" in known:  # exporters leave the target's
        known["layer_types"] = layer_types
    known["rope_parameters"] = published_rope(sizes, layer_types)
    embedding = names.get("embed_tokens.weight")
    known["vocab_size"] = target.get_input_embeddings().weight.shape[0] if embedding is None else embedding.shape[0]
    known["num_hidden_layers"] = checkpoint.num_layers()
    known["attention_bias"] = "layers.0.self_attn.q_proj.bias" in names
    if not qwen3:
        known["mlp_bias"] = "layers.0.mlp.up_proj.bias" in names
    try:
        return (Qwen3Config if qwen3 else LlamaConfig)(**known, pad_token_id=None)
    except Exception as error:  # transformers' validators raise kinds of their own
        raise DraftError(f"draft={checkpoint.where!r}: its config describes no decoder layer: {error}") from error


def check_layers(checkpoint: DraftCheckpoint, sizes: Mapping[str, object]) -> None:
    """Compare what the names say of the layers with a config that describes them exactly (speculators', z-lab's).

    SafeAILab's and SpecForge's do not: their modules build one layer without biases whatever the config says.

    Raises:
        DraftError: they disagree.
    """
    names = checkpoint.tensors
    biases = [f"layers.0.self_attn.{part}_proj.bias" in names for part in "qkvo"]
    found = {
        "num_hidden_layers": checkpoint.num_layers(),
        "attention_bias": all(biases) if any(biases) == all(biases) else "of some projections",
        "norms on queries and keys": "layers.0.self_attn.q_norm.weight" in names,
    }
    said = {
        "num_hidden_layers": sizes.get("num_hidden_layers", found["num_hidden_layers"]),
        "attention_bias": bool(sizes.get("attention_bias")),
        "norms on queries and keys": sizes.get("model_type", "qwen3") == "qwen3",
    }
    differ = [
        f"{what} is {found[what]} by its tensors and {said[what]} by its config" for what in found if found[what] != said[what]
    ]
    if differ:
        raise DraftError(f"draft={checkpoint.where!r}: {'; '.join(differ)}.")


def vocabulary(checkpoint: DraftCheckpoint, target: PreTrainedModel) -> tuple[Tensor | None, tuple[str, ...]]:
    """The draft vocabulary and the modules that are the head's own.

    A published matrix that equals the target's is not owned: the target's is shared.

    Returns:
        draft_ids: int64 [Vd] on the target's device, or None when the draft's vocabulary is the target's.
        owned: as ``DraftHead.owned``.

    Raises:
        DraftError: the maps contradict each other, or there is none and one is needed.
    """
    tensors, where = checkpoint.tensors, checkpoint.where
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    shared = {"embed_tokens": target.get_input_embeddings(), "lm_head": target.get_output_embeddings()}
    owned = tuple(
        name
        for name, module in shared.items()
        if f"{name}.weight" in tensors and not _equal(tensors[f"{name}.weight"], module.weight)
    )
    if "embed_tokens" in owned and len(tensors["embed_tokens.weight"]) < vocab_size:
        rows = len(tensors["embed_tokens.weight"])
        raise DraftError(
            f"draft={where!r} embeds {rows} tokens, the target has {vocab_size}. Was it trained for another target?"
        )
    if "d2t" not in tensors:
        wanted = len(shared["lm_head"].weight)
        rows = len(tensors["lm_head.weight"]) if "lm_head.weight" in tensors else wanted
        if rows != wanted:
            raise DraftError(
                f"draft={where!r}: its lm_head has {rows} rows, the target's {wanted}, and no tensor d2t maps one to the other."
            )
        return None, owned
    d2t = tensors["d2t"].to(torch.int64)
    draft_ids = torch.arange(len(d2t)) + d2t  # offsets, not ids
    if len(draft_ids) == vocab_size and not d2t.any():  # some exports leave t2d empty then
        return None, owned
    if len(draft_ids.unique()) != len(draft_ids):
        raise DraftError(
            f"draft={where!r}: d2t maps two draft ids to one target id; it must hold offsets (target id - draft id)."
        )
    if "t2d" in tensors:
        t2d = tensors["t2d"].bool()
        inside = draft_ids[(draft_ids >= 0) & (draft_ids < len(t2d))]
        if len(inside) != len(draft_ids) or int(t2d.sum()) != len(draft_ids) or not bool(t2d[draft_ids].all()):
            raise DraftError(f"draft={where!r}: d2t and t2d name different draft vocabularies.")
    return draft_ids.to(shared["embed_tokens"].weight.device), owned


def _equal(published: Tensor, weight: Tensor) -> bool:
    return published.shape == weight.shape and torch.equal(published.to(weight.device, weight.dtype), weight)


def fill(head: DraftHead, checkpoint: DraftCheckpoint) -> None:
    """Copy a checkpoint's tensors into ``head``, casting to the head's dtype.

    Raises:
        DraftError: names every tensor that is missing, unknown or of another shape.
    """
    for name, module in head.named_modules():  # Qwen2's attention: biases on q, k and v, none on o
        if name.endswith("self_attn.o_proj") and module.bias is not None and f"{name}.bias" not in checkpoint.tensors:
            module.bias = None
    own = head.own_tensors()
    shared = {f"{name}.weight" for name in ("embed_tokens", "lm_head") if name not in head.owned}
    found = {name: value for name, value in checkpoint.tensors.items() if not _BESIDES.fullmatch(name) and name not in shared}
    problems = {
        "missing": sorted(own.keys() - found.keys()),
        "unknown": sorted(found.keys() - own.keys()),
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(own[name].shape)}"
            for name in sorted(own.keys() & found.keys())
            if own[name].shape != found[name].shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names)
        raise DraftError(f"draft={checkpoint.where!r} was read as a {head.kind} head, but its tensors do not fit: {text}.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(found[name])
    head.eval()
