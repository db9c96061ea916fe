"""What was handed over as a model, and where its weights are: wrappers and placements that no graph can serve, by name.

Asked before anything is traced, because what Dynamo says of them names its own rules and no remedy. Other packages' classes are
known by module and name, so that none of them has to be installed or imported.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from spec_compile.errors import ConfigError
from spec_compile.hf_integration.forward_wrappers import changes_numerics
from spec_compile.hf_integration.quantized_layers import why_not_captured
from spec_compile.ops.torch_private import MODULES, ORIGINAL_MODULE

# Modules that hold another one under this name: torch.compile's OptimizedModule; DistributedDataParallel, DataParallel and
# DeepSpeed's engine; TRL's models with value heads.
_HOLDERS = (ORIGINAL_MODULE, "module", "pretrained_model")


def inside(given: object, name: str) -> str | None:
    """What to do with ``given``, an object that is no transformers model, if there is one inside it; None where there is none.

    Args:
        name: what the caller's argument is called, which the expression to pass begins with.
    """
    path, inner = name, given
    while not isinstance(inner, PreTrainedModel):
        if _is_a(inner, "torch.distributed.fsdp", "FullyShardedDataParallel"):
            return "its weights are sharded over several processes; pass the model as it was before, with all weights."
        if getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False):
            return (
                "its adapter is a learned prompt (prompt tuning, prefix tuning), which stands outside the model's forward and "
                "cannot be captured; use plain generate() for it, or an adapter of weights such as LoRA."
            )
        if hasattr(type(inner), "get_base_model"):  # PEFT; asked of the class, because wrappers pass attributes through
            path, inner = f"{path}.get_base_model()", inner.get_base_model()
            continue
        children = dict(inner.named_children()) if isinstance(inner, nn.Module) else {}
        held = next((n for n in _HOLDERS if n in children), None)
        if held is None:
            return None
        path, inner = f"{path}.{held}", children[held]
    return f"a {type(inner).__name__} is inside it: pass {path}. What wraps it keeps working and shares its weights."


def check_placement(model: PreTrainedModel, what: str = "the model") -> None:
    """That all weights are whole, and always where the forward computes with them.

    Args:
        what: what messages call ``model``.

    Raises:
        ConfigError: weights that are sharded over processes, or that hooks of accelerate bring from elsewhere; adapters whose
            forward reads Python attributes of weights.
    """
    for name, module in model.named_modules():
        place = f"{what}'s {name}" if name else what
        if _is_a(module, "torch.distributed.fsdp", "FSDPModule"):
            raise ConfigError(
                f"{place} is sharded by fully_shard() (FSDP2): its weights are gathered from several processes in every call, "
                "which no graph can hold. Call spec_compile() on a model with all of its weights on one device; a sharded "
                "model's full weights come from torch.distributed.checkpoint.state_dict.get_model_state_dict()."
            )
        hook = module.__dict__.get("_hf_hook")
        if hook is not None:
            raise ConfigError(
                f"{place} has a hook of accelerate ({type(hook).__name__}), which moves tensors between devices in every call: "
                "it was spread over devices or offloaded (device_map, dispatch_model, cpu_offload, disk_offload). spec_compile "
                "needs all weights on one device for good: load with device_map={'': 0} or without device_map, or call "
                "accelerate.hooks.remove_hook_from_submodules() on it and move it with to(device)."
            )
        if reason := changes_numerics(module):
            raise ConfigError(f"{place}: {reason}.")
        if reason := why_not_captured(module):
            raise ConfigError(f"{place}: {reason}.")
        if adapters := _active_dora(module):
            raise ConfigError(
                f"{place} has DoRA adapters {adapters}, whose forward cannot be captured. Merge them into the weights first: "
                "peft_model.merge_adapter() (unmerge_adapter() undoes it), or model = peft_model.merge_and_unload()."
            )
    for name, parameter in model.named_parameters():
        if _is_a(parameter, "torch.distributed", "DTensor"):
            raise ConfigError(
                f"{what}'s {name} is a DTensor: it is sharded over several processes (tp_plan, device_mesh). spec_compile "
                "needs whole weights on one device; load the model without them."
            )


def _is_a(thing: object, package: str, name: str) -> bool:
    return any(kind.__name__ == name and kind.__module__.startswith(package) for kind in type(thing).__mro__)


def _active_dora(module: nn.Module) -> list[str]:
    """Names of DoRA adapters that this layer's forward uses (peft/tuners/lora/layer.py): magnitudes beside the matrices."""
    own = module.__dict__
    magnitudes = own.get(MODULES, {}).get("lora_magnitude_vector")
    if magnitudes is None or own.get("_disable_adapters") or own.get("merged_adapters"):
        return []
    active = own.get("_active_adapter") or []
    return [name for name in ([active] if isinstance(active, str) else active) if name in magnitudes]
