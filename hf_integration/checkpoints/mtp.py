"""MTP heads from a target's own checkpoint, where transformers leaves them behind when it loads the model.

* Qwen3-Next, Qwen3.5 and its MoE: ``mtp.*``, beside ``model.*`` or ``model.language_model.*`` (vLLM models/qwen3_next_mtp.py,
  SGLang models/qwen3_5_mtp.py). Several ``mtp.layers.{i}`` share everything else (vLLM: layer ``spec_step_idx``).
* DeepSeek-V3, GLM-4.5 and later: ``model.layers.{L}.*`` behind the last layer, ``{L + 1}`` and so on (vLLM
  models/deepseek_mtp.py, transformers modeling_layers.py).
* MiMo-7B: ``model.mtp_layers.{i}.*`` (vLLM models/mimo_mtp.py).

Only the files that hold these tensors are opened, or fetched from the hub.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile.errors import DraftError
from spec_compile.hf_integration.checkpoints.config import account_for
from spec_compile.hf_integration.checkpoints.files import checkpoint_file, files_by_name
from spec_compile.hf_integration.checkpoints.tensors import (
    DraftCheckpoint,
    fill,
    read_tensors,
    vocabulary,
)
from spec_compile.hf_integration.heads.draft_head import like_target
from spec_compile.hf_integration.heads.mtp import MtpHead, MtpLayers
from spec_compile.hf_integration.transformers_private import commit_hash


@dataclass(frozen=True)
class MtpFormat:
    """How one family's checkpoints name an MTP module.

    Attributes:
        name: for messages.
        projection: the projection's name behind the prefix, by which the format is known.
        prefix: pattern of what stands before every name; its group ``module`` counts modules that stand side by side.
        renames: starts of names behind the prefix -> ``MtpHead``'s; the first that fits counts, "" fits all.
        hidden_first: see ``MtpHead``.
    """

    name: str
    projection: str
    prefix: str
    renames: Mapping[str, str]
    hidden_first: bool = False


_FORMATS = (
    MtpFormat(
        "Qwen3-Next",
        "fc.weight",
        r"(?:.*\.)?mtp\.",
        {
            "fc.": "eh_proj.",
            "pre_fc_norm_embedding.": "enorm.",
            "pre_fc_norm_hidden.": "hnorm.",
            "": "",  # layers.0.*, norm.*
        },
    ),
    MtpFormat(
        "DeepSeek-V3",
        "eh_proj.weight",
        r"(?:.*\.)?layers\.(?P<module>\d+)\.",
        {
            "enorm.": "enorm.",
            "hnorm.": "hnorm.",
            "eh_proj.": "eh_proj.",
            "embed_tokens.": "embed_tokens.",
            "shared_head.norm.": "norm.",
            "shared_head.head.": "lm_head.",
            "": "layers.0.",
        },
    ),
    MtpFormat(
        "MiMo",
        "input_proj.weight",
        r"(?:.*\.)?mtp_layers\.(?P<module>\d+)\.",
        {
            "token_layernorm.": "enorm.",
            "hidden_layernorm.": "hnorm.",
            "input_proj.": "eh_proj.",
            "final_layernorm.": "norm.",
            "": "layers.0.",
        },
        hidden_first=True,
    ),
)
_LOOKED_FOR = "mtp.fc.weight, model.layers.<L>.eh_proj.weight, model.mtp_layers.<i>.input_proj.weight"


@dataclass(frozen=True)
class MtpLayout:
    """Where a checkpoint's MTP modules stand.

    Attributes:
        modules: by the step it drafts, each one's tensors: their names in the checkpoint -> ``MtpHead``'s.
    """

    format: MtpFormat
    modules: tuple[Mapping[str, str], ...]


def find_mtp(names: Collection[str]) -> MtpLayout | None:
    """The MTP modules among a checkpoint's tensor names; None without one."""
    for known in _FORMATS:
        pattern = re.compile(rf"(?P<prefix>{known.prefix}){re.escape(known.projection)}")
        found = [match for name in names if (match := pattern.fullmatch(name))]
        if not found:
            continue
        if "module" in pattern.groupindex:
            in_turn = sorted(found, key=lambda match: int(match["module"]))
            return MtpLayout(known, tuple(_module(names, match["prefix"], known) for match in in_turn))
        return MtpLayout(known, _modules_of_layers(_module(names, found[0]["prefix"], known)))
    return None


def _module(names: Collection[str], prefix: str, known: MtpFormat) -> dict[str, str]:
    """Names behind ``prefix`` -> ``MtpHead``'s."""
    return {name: _renamed(name.removeprefix(prefix), known) for name in names if name.startswith(prefix)}


def _modules_of_layers(module: Mapping[str, str]) -> tuple[dict[str, str], ...]:
    """A module with several ``layers.{i}`` as one for each of them, which share all other tensors."""
    layers = {name: int(match[1]) for name, new in module.items() if (match := re.match(r"layers\.(\d+)\.", new))}
    return tuple(
        {name: re.sub(r"^layers\.\d+\.", "layers.0.", new) for name, new in module.items() if layers.get(name, layer) == layer}
        for layer in sorted(set(layers.values())) or [0]
    )


def load_mtp_head(target: PreTrainedModel, where: str | os.PathLike | None = None) -> MtpHead | MtpLayers:
    """Load the MTP head that a target's checkpoint holds, in the target's dtype and on its device; several, if it was trained
    to draft with them in turn.

    Args:
        where: a directory or hub id that holds the tensors; None for what the target was loaded from.

    Raises:
        DraftError: no MTP tensors, or such that do not fit; says what was looked for and what was seen.
    """
    revision = None
    if where is None:
        where, revision = target.name_or_path, commit_hash(target.config)
        if not where:
            raise DraftError(
                "draft='mtp' reads the head from the checkpoint that the target was loaded from, but this target was built "
                "from a config. Pass the checkpoint: draft=<directory or hub id with the MTP tensors>."
            )
    where = os.fspath(where)
    files = files_by_name(where, revision)
    layout = find_mtp(files)
    if layout is None:
        seen = f"{len(files)} tensors ({', '.join(sorted(files)[:3])}, …)" if files else "no .safetensors or .bin file"
        gguf = " GGUF files are not read." if any(Path(where).expanduser().glob("*.gguf")) else ""
        raise DraftError(
            f"draft={where!r} holds no MTP head: looked for {_LOOKED_FOR}; it holds {seen}.{gguf} Many quantised or fine-tuned "
            "copies leave the head out: pass the original's directory or hub id as draft=."
        )
    modules = [_read(where, revision, module, files) for module in layout.modules]
    config = _config(where, revision)
    _check_config(where, config, layout.format)
    heads = []
    for number, tensors in enumerate(modules, 1):
        what = where if len(modules) == 1 else f"{where}, MTP layer {number} of {len(modules)}"
        heads.append(_build(target, what, layout.format, tensors, _block_size(config)))
    if len(heads) == 1:
        return heads[0]
    for name in layout.modules[0].keys() & layout.modules[1].keys():  # stored once
        module, _, what = layout.modules[0][name].rpartition(".")
        if what == "weight":  # not the scales of one
            for head in heads[1:]:
                setattr(head, module, getattr(heads[0], module))
    return MtpLayers(heads)


def holds_mtp_for(files: Collection[str], config: Mapping[str, object], target: PreTrainedModel) -> bool:
    """Whether a checkpoint is to be read as an MTP head for ``target``: it holds one beside a model of the target's sizes, or
    alone. Another model with a head of its own (a smaller sibling) is none.

    Args:
        files: the names of the checkpoint's tensors.
        config: its ``config.json``.
    """
    text, ours = config.get("text_config") or config, target.config.get_text_config(decoder=True)
    of_target = all(text.get(size) == getattr(ours, size) for size in ("hidden_size", "num_hidden_layers", "vocab_size"))
    layout = find_mtp(files)
    return layout is not None and (of_target or set(files) == {name for module in layout.modules for name in module})


def _build(
    target: PreTrainedModel, where: str, known: MtpFormat, tensors: dict[str, Tensor], block_size: tuple[int, int]
) -> MtpHead:
    tensors = _stack_experts(_dequantise(where, tensors, block_size))
    checkpoint = DraftCheckpoint(where, {}, tensors)
    _, owned = vocabulary(checkpoint, target)
    sparse = any(name.startswith("layers.0.mlp.experts.") for name in tensors)
    with like_target(target):
        head = MtpHead(target, sparse=sparse, hidden_first=known.hidden_first, owned=owned)
    fill(head, checkpoint)
    return head


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _read(where: str, revision: str | None, module: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Tensor]:
    """A module's tensors on the CPU under ``MtpHead``'s names."""
    out = {}
    for file in sorted({files[name] for name in module}):
        path = checkpoint_file(where, file, revision)
        if path is None:
            raise DraftError(f"draft={where!r}: its index says that MTP tensors are in {file}, which is not there.")
        held = read_tensors(path, {name for name in module if files[name] == file})
        out |= {module[name]: value for name, value in held.items()}
    return out


def _renamed(name: str, known: MtpFormat) -> str:
    old, new = next((old, new) for old, new in known.renames.items() if name.startswith(old))
    return new + name.removeprefix(old)


def _config(where: str, revision: str | None) -> Mapping[str, object]:
    """``config.json`` of the checkpoint; empty without one."""
    path = checkpoint_file(where, "config.json", revision)
    return json.loads(path.read_text()) if path else {}


def _check_config(where: str, config: Mapping[str, object], known: MtpFormat) -> None:
    """Account for what a model's config says of its MTP layers; the rest of it is the target's.

    Raises:
        DraftError: a layer that is not as ``MtpHead`` builds it.
    """
    said = {key: value for key, value in {**config, **(config.get("text_config") or {})}.items() if re.search("mtp|nextn", key)}
    if set(said.get("mtp_layer_types") or ()) <= {"full_attention"}:
        said.pop("mtp_layer_types", None)
    account_for(where, said, {"": ("mtp_hidden_states_first",) if known.hidden_first else ()})


def _block_size(config: Mapping[str, object]) -> tuple[int, int]:
    """Rows and columns that one scale of an 8-bit matrix stands for."""
    rows, columns = (config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    return rows, columns


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


def _dequantise(where: str, tensors: Mapping[str, Tensor], block_size: tuple[int, int]) -> dict[str, Tensor]:
    """DeepSeek's 8-bit matrices, float8_e4m3fn [O, I] with a scale a block (``weight_scale_inv``), made bfloat16.

    Source: deepseek-ai/DeepSeek-V3 inference/kernel.py weight_dequant.

    Raises:
        DraftError: another kind of quantisation.
    """
    out = {name: value for name, value in tensors.items() if not name.endswith("_scale_inv")}
    for name, value in out.items():
        scales = tensors.get(f"{name}_scale_inv")
        if scales is not None and value.dtype == torch.float8_e4m3fn:
            rows, columns = value.shape[-2:]
            scales = _factors(where, name, value, scales, block_size)
            scales = scales.repeat_interleave(block_size[0], -2)[..., :rows, :].repeat_interleave(block_size[1], -1)
            out[name] = (value.float() * scales[..., :columns]).bfloat16()
        elif scales is not None or not value.is_floating_point() or value.element_size() < 2:
            dtype = str(value.dtype).removeprefix("torch.")
            raise DraftError(
                f"draft={where!r}: MTP tensor {name} is stored as {dtype}, a quantisation that is not read (16 and 32 bits "
                "are, and float8_e4m3fn with weight_scale_inv). Pass the original checkpoint as draft=."
            )
    return out


def _factors(where: str, name: str, value: Tensor, scales: Tensor, block_size: tuple[int, int]) -> Tensor:
    """A matrix's scales [.., blocks of rows, blocks of columns] as float32 numbers.

    They are numbers, or powers of two (UE8M0) stored as float8_e8m0fnu or as its bytes (``scale_fmt: ue8m0`` in the config).

    Raises:
        DraftError: another type, or as many as do not cover the matrix.
    """
    blocks = [*value.shape[:-2], *(-(-size // block) for size, block in zip(value.shape[-2:], block_size, strict=True))]
    if list(scales.shape) != blocks:
        raise DraftError(
            f"draft={where!r}: MTP tensor {name} {list(value.shape)} has scales {list(scales.shape)}; with one for "
            f"{block_size[0]} x {block_size[1]} numbers (weight_block_size in its config) they are {blocks}."
        )
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    if scales.dtype != torch.float8_e8m0fnu and not (scales.is_floating_point() and scales.element_size() > 1):
        raise DraftError(
            f"draft={where!r}: the scales of MTP tensor {name} are stored as {str(scales.dtype).removeprefix('torch.')}, which "
            "is not read (16 and 32 bits are, and powers of two as float8_e8m0fnu or uint8). Pass the original checkpoint as "
            "draft=."
        )
    return scales.float()


def _stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of every expert -> transformers' two of all: ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I]."""
    pattern = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")
    out, parts = {}, {}
    for name, value in tensors.items():
        if match := pattern.fullmatch(name):
            parts.setdefault(match["experts"], {}).setdefault(match["part"], {})[int(match["number"])] = value
        else:
            out[name] = value
    for experts, by_part in parts.items():
        counts = {part: len(by_part.get(part, ())) for part in ("gate", "up", "down")}
        if len(set(counts.values())) > 1:
            raise DraftError(f"MTP tensors {experts}.*: {counts} matrices of these projections, which must be as many.")
        stacked = {part: torch.stack([by_number[i] for i in sorted(by_number)]) for part, by_number in by_part.items()}
        out[f"{experts}.gate_up_proj"] = torch.cat([stacked["gate"], stacked["up"]], 1)
        out[f"{experts}.down_proj"] = stacked["down"]
    return out
