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
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel

from spec_compile.errors import DraftError
from spec_compile.hf_integration.draft_head import like_target
from spec_compile.hf_integration.draft_tensors import (
    DraftCheckpoint,
    fill,
    read_index,
    read_names,
    read_tensors,
    vocabulary,
    weight_files,
)
from spec_compile.hf_integration.mtp import MtpHead, MtpLayers


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
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
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
        where, revision = target.name_or_path, getattr(target.config, "_commit_hash", None)
        if not where:
            raise DraftError(
                "draft='mtp' reads the head from the checkpoint that the target was loaded from, but this target was built "
                "from a config. Pass the checkpoint: draft=<directory or hub id with the MTP tensors>."
            )
    where = os.fspath(where)
    files = _files_by_name(where, revision)
    layout = find_mtp(files)
    if layout is None:
        seen = f"{len(files)} tensors ({', '.join(sorted(files)[:3])}, …)" if files else "no .safetensors or .bin file"
        gguf = " GGUF files are not read." if any(Path(where).expanduser().glob("*.gguf")) else ""
        raise DraftError(
            f"draft={where!r} holds no MTP head: looked for {_LOOKED_FOR}; it holds {seen}.{gguf} Many quantised or fine-tuned "
            "copies leave the head out: pass the original's directory or hub id as draft=."
        )
    heads = []
    for number, module in enumerate(layout.modules, 1):
        what = where if len(layout.modules) == 1 else f"{where}, MTP layer {number} of {len(layout.modules)}"
        tensors = _read(where, revision, module, files)
        heads.append(_build(target, what, layout.format, tensors, _block_size(where, revision)))
    if len(heads) == 1:
        return heads[0]
    for name in layout.modules[0].keys() & layout.modules[1].keys():  # stored once
        module, _, what = layout.modules[0][name].rpartition(".")
        if what == "weight":  # not the scales of one
            for head in heads[1:]:
                setattr(head, module, getattr(heads[0], module))
    return MtpLayers(heads)


def holds_mtp_for(where: str | os.PathLike, config: Mapping[str, object], target: PreTrainedModel) -> bool:
    """Whether a checkpoint is to be read as an MTP head for ``target``: it holds one beside a model of the target's sizes, or
    in a directory of its own. Another model with a head of its own (a smaller sibling) is none. What cannot be read may still
    be a causal LM that transformers can load (or says why not): a warning, no error.

    Args:
        config: the checkpoint's ``config.json``.
    """
    text, ours = config.get("text_config") or config, target.config.get_text_config(decoder=True)
    of_target = all(text.get(size) == getattr(ours, size) for size in ("hidden_size", "num_hidden_layers", "vocab_size"))
    if not of_target and not Path(where).expanduser().is_dir():
        return False  # nothing more is fetched of an ordinary draft model
    try:
        files = _files_by_name(os.fspath(where), None)
    except DraftError as error:
        warnings.warn(f"spec_compile: taken for a causal LM, its MTP head could not be looked for: {error}", stacklevel=2)
        return False
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


class _NotFetchedError(DraftError):
    """The hub did not answer and its cache lacks a file: there may be one of that name, or none."""


def _file(where: str, name: str, revision: str | None, cached: bool = False) -> Path | None:
    """A file of a directory or a hub repository (``cached``: of its cache alone); None where there is none of that name."""
    local = Path(where).expanduser()
    if local.is_dir():
        return local / name if (local / name).exists() else None
    try:
        return Path(hf_hub_download(where, name, revision=revision, local_files_only=cached))
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError, but the hub was not heard
        raise _NotFetchedError(
            f"draft={where!r}: {name} cannot be read: it is not in the hub's cache and could not be fetched. Connect once, so "
            "that it is, or pass a directory that holds the whole checkpoint as draft=. The hub's client says: "
            f"{_first_line(error)}"
        ) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # hub, network and cache errors have no common base
        raise DraftError(f"draft={where!r}: {name} cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _first_file(where: str, names: Collection[str], revision: str | None) -> Path | None:
    """The first of ``names`` that there is; None where there is none of them.

    A name that cannot be asked for is passed over while another is at hand: a cache holds the files that were loaded, and
    seldom a word about those that the repository lacks. A hub that does not answer is asked once: its client tries for long.
    """
    unknown = None
    for name in names:
        try:
            if path := _file(where, name, revision, cached=unknown is not None):
                return path
        except _NotFetchedError as error:
            unknown = unknown or error
    if unknown is not None:
        raise unknown
    return None


def _files_by_name(where: str, revision: str | None) -> dict[str, str]:
    """Tensor name -> the file that holds it; empty without weight files."""
    local = Path(where).expanduser()
    first = _first_file(where, _INDEXES if local.is_dir() else (*_INDEXES, *_SINGLE_FILES), revision)
    if first is not None and first.name in _INDEXES:
        return read_index(first)
    files = weight_files(local) if local.is_dir() else [first] if first else []
    return {name: file.name for file in files for name in read_names(file)}


def _read(where: str, revision: str | None, module: Mapping[str, str], files: Mapping[str, str]) -> dict[str, Tensor]:
    """A module's tensors on the CPU under ``MtpHead``'s names."""
    out = {}
    for file in sorted({files[name] for name in module}):
        path = _file(where, file, revision)
        if path is None:
            raise DraftError(f"draft={where!r}: its index says that MTP tensors are in {file}, which is not there.")
        held = read_tensors(path, {name for name in module if files[name] == file})
        out |= {module[name]: value for name, value in held.items()}
    return out


def _renamed(name: str, known: MtpFormat) -> str:
    old, new = next((old, new) for old, new in known.renames.items() if name.startswith(old))
    return new + name.removeprefix(old)


def _block_size(where: str, revision: str | None) -> tuple[int, int]:
    """Rows and columns that one scale of an 8-bit matrix stands for."""
    path = _file(where, "config.json", revision)
    config = json.loads(path.read_text()) if path else {}
    rows, columns = (config.get("quantization_config") or {}).get("weight_block_size") or (128, 128)
    return rows, columns


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


def _dequantise(where: str, tensors: Mapping[str, Tensor], block_size: tuple[int, int]) -> dict[str, Tensor]:
    """DeepSeek's 8-bit matrices, float8_e4m3fn [O, I] with float32 scales a block (``weight_scale_inv``), made bfloat16.

    Source: deepseek-ai/DeepSeek-V3 inference/kernel.py weight_dequant.

    Raises:
        DraftError: another kind of quantisation.
    """
    out = {name: value for name, value in tensors.items() if not name.endswith("_scale_inv")}
    for name, value in out.items():
        scales = tensors.get(f"{name}_scale_inv")
        if scales is not None and value.dtype == torch.float8_e4m3fn:
            rows, columns = value.shape[-2:]
            scales = scales.repeat_interleave(block_size[0], -2)[..., :rows, :].repeat_interleave(block_size[1], -1)
            out[name] = (value.float() * scales[..., :columns]).bfloat16()
        elif scales is not None or not value.is_floating_point() or value.element_size() < 2:
            dtype = str(value.dtype).removeprefix("torch.")
            raise DraftError(
                f"draft={where!r}: MTP tensor {name} is stored as {dtype}, a quantisation that is not read (16 and 32 bits "
                "are, and float8_e4m3fn with weight_scale_inv). Pass the original checkpoint as draft=."
            )
    return out


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
