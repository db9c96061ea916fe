"""Which format a draft checkpoint has, and loading it.

The order, from the surest sign to the weakest:

1. ``speculators_model_type`` in the config.
2. ``architectures`` in the config.
3. MTP tensors, with nothing beside them or beside a model of the target's sizes: its MTP head.
4. Tensor names: ``fc`` with a ``hidden_norm`` beside it is DFlash; ``d2t``, ``midlayer.*`` or a ``hidden_norm`` in layer 0 is
   EAGLE-3; ``fc`` without a final norm is EAGLE-1/2. (Official repositories call both ``LlamaForCausalLM``, and many exporters
   leave the target's number of layers in the config.)
5. None of these: not a draft head, but perhaps a causal LM.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from transformers import PreTrainedModel

from spec_compile.errors import DraftError
from spec_compile.hf_integration.checkpoints.dflash import read_dflash, read_dflash_speculators
from spec_compile.hf_integration.checkpoints.eagle import read_eagle
from spec_compile.hf_integration.checkpoints.eagle3_safeailab import read_eagle3_safeailab
from spec_compile.hf_integration.checkpoints.eagle3_speculators import read_eagle3_speculators
from spec_compile.hf_integration.checkpoints.files import files_by_name
from spec_compile.hf_integration.checkpoints.mtp import holds_mtp_for, load_mtp_head
from spec_compile.hf_integration.checkpoints.tensors import DraftCheckpoint, read_checkpoint, read_config, read_names
from spec_compile.hf_integration.heads.draft_head import DraftHead
from spec_compile.hf_integration.heads.mtp import MtpLayers

Reader = Callable[[DraftCheckpoint, PreTrainedModel], DraftHead]

_SPECULATORS: dict[str, Reader] = {"eagle3": read_eagle3_speculators, "dflash": read_dflash_speculators}
_ARCHITECTURES: dict[str, Reader] = {
    "LlamaForCausalLMEagle3": read_eagle3_safeailab,
    "Eagle3LlamaForCausalLM": read_eagle3_safeailab,
    "LlamaForCausalLMEagle": read_eagle,
    "Qwen2ForCausalLMEagle": read_eagle,
    "EagleLlamaForCausalLM": read_eagle,
    "DFlashDraftModel": read_dflash,
    "MuseGlimmerAssistantModel": read_dflash,
}
# Engines' names for MTP modules that were cut out of their model.
_MTP = (
    "DeepseekV3ForCausalLMNextN", "Glm4MoeForCausalLMNextN", "Qwen3NextForCausalLMMTP", "Qwen3_5ForCausalLMMTP",
    "Qwen3_5MoeForCausalLMMTP", "MiMoMTP",
)  # fmt: skip
# Draft models of other kinds: known by name, so that nobody waits for a causal LM of that name to load.
_SHARED_KV = ("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM")
_NOT_READ = (
    "Eagle3DeepseekV2ForCausalLM", "PEagleDraftModel", "PEagleSpeculator", "DSparkDraftModel", "DSparkSpeculator",
    "EagleSpeculator", "MLPSpeculatorPreTrainedModel", *_SHARED_KV,
)  # fmt: skip
_HINTS = ("draft_vocab_size", "eagle_config", "target_hidden_size", "dflash_config")  # config keys that no causal LM has
_READ = "EAGLE-1/2, EAGLE-3 (SafeAILab, SpecForge, speculators), DFlash (z-lab, speculators, transformers), MTP modules"


def load_draft_head(name: str | os.PathLike, target: PreTrainedModel) -> DraftHead | MtpLayers | None:
    """Load a draft head for ``target``, in its dtype and on its device.

    Args:
        name: a directory with ``config.json`` and .safetensors or .bin files, or a hub id.

    Returns:
        The head, or several that draft in turn; None when this is no draft head (an ordinary model, or a directory without a
        config).

    Raises:
        DraftError: a head that is broken, of a kind that has no reader, or does not fit ``target``; or nothing was found.
    """
    name = os.fspath(name)
    local = Path(name).expanduser()  # all files, once it is a directory
    with_config = local if local.is_dir() else _config_from_hub(name)
    if not (with_config / "config.json").exists():
        return None
    config = read_config(with_config)
    reader = _reader_by_config(name, config)
    if reader is None:
        if set(config.get("architectures") or ()) & set(_MTP):
            return load_mtp_head(target, name)
        hints = [hint for hint in _HINTS if hint in config]
        if (hints or config.get("num_hidden_layers") == 1) and not local.is_dir():
            local = _from_hub(name)
        where = str(local) if local.is_dir() else name
        files = files_by_name(where) if hints else _files_of_any_model(where)
        if holds_mtp_for(files, config, target):
            return load_mtp_head(target, name)
        reader = _reader_by_names(set(files))
        if reader is None and hints:
            raise DraftError(
                f"draft={name!r}: its config has {', '.join(hints)}, as draft heads do, but its architectures are "
                f"{config.get('architectures')} and its tensors {', '.join(sorted(files)[:8])}, …. What can be read: {_READ}."
            )
        if reader is None:
            return None
    return reader(read_checkpoint(local if local.is_dir() else _from_hub(name), config), target)


def _files_of_any_model(name: str) -> Mapping[str, str]:
    """``files_by_name``; empty where they cannot be read, because transformers may still load a causal LM (or says why not)."""
    try:
        return files_by_name(name)
    except DraftError as error:
        whole = [file for known in ("model.safetensors", "pytorch_model.bin") if (file := Path(name) / known).is_file()]
        if whole:
            read_names(whole[0])  # transformers would read this very file: if it is the damaged one, that is the answer
        warnings.warn(f"spec_compile: taken for a causal LM, its tensors could not be looked at: {error}", stacklevel=2)
        return {}


def _reader_by_config(name: str, config: Mapping[str, object]) -> Reader | None:
    speculators = config.get("speculators_model_type")
    architectures = config.get("architectures") or []
    if speculators is not None and speculators not in _SPECULATORS:
        raise DraftError(f"draft={name!r}: speculators_model_type={speculators!r} has no reader. What can be read: {_READ}.")
    if speculators is not None:
        return _SPECULATORS[speculators]
    for architecture in architectures:
        refuse_unread(f"draft={name!r}: architecture {architecture!r}", architecture)
    if "medusa_num_heads" in config:
        raise DraftError(f"draft={name!r}: Medusa heads have no reader. What can be read: {_READ}.")
    return next((_ARCHITECTURES[architecture] for architecture in architectures if architecture in _ARCHITECTURES), None)


def refuse_unread(what: str, architecture: str) -> None:
    """Raise if ``architecture`` is a known kind of draft model that cannot draft here.

    Args:
        what: how the message begins.

    Raises:
        DraftError: it is.
    """
    if architecture in _SHARED_KV:
        raise DraftError(
            f"{what} is an assistant without keys and values of its own: its layers read the target's caches, which is not "
            "supported (docs/drafts.md says what is missing). Use draft='ngram', a causal LM, or an EAGLE head for this target."
        )
    if architecture in _NOT_READ:
        raise DraftError(f"{what} has no reader. What can be read: {_READ}.")


def _reader_by_names(names: set[str]) -> Reader | None:
    names = {name.removeprefix("model.") for name in names}
    if {"fc.weight", "hidden_norm.weight"} <= names:
        return read_dflash
    if {"d2t", "layers.0.hidden_norm.weight"} & names or any(name.startswith("midlayer.") for name in names):
        return read_eagle3_safeailab
    if "fc.weight" in names and "layers.0.self_attn.q_proj.weight" in names and "norm.weight" not in names:
        return read_eagle
    return None


def _config_from_hub(name: str) -> Path:
    return Path(_download(name, lambda: hf_hub_download(name, "config.json"))).parent


def _from_hub(name: str) -> Path:
    return Path(_download(name, lambda: snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin"])))


def _download(name: str, download: Callable[[], str]) -> str:
    try:
        return download()
    except Exception as error:  # hub, network and cache errors have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DraftError(
            f"draft={name!r} is none of 'ngram', 'mtp' and None, no directory and no repository that the Hugging Face hub can "
            f"give: {reason}"
        ) from error
