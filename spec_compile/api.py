"""``spec_compile()``: from a live Hugging Face model to the same model with a compiled, speculative ``generate()``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from spec_compile.config import SpecConfig
from spec_compile.drafts.make import load_draft, make_draft
from spec_compile.errors import ConfigError
from spec_compile.handle import SpecHandle
from spec_compile.hardware import Hardware, detect_hardware
from spec_compile.hf_integration.given_model import check_placement, inside
from spec_compile.hf_integration.heads.mtp import MtpLayers
from spec_compile.hf_integration.quantized_layers import check_quantized, settle_weights
from spec_compile.passes.backend_option import check_backend, check_draft_stages
from spec_compile.runtime import kv_pool
from spec_compile.runtime.engine import Engine
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler
from spec_compile.runtime.tune import AttentionTuner


@torch.inference_mode(False)  # or parameters that are fused here could never be trained again
def spec_compile(
    model: PreTrainedModel,
    draft: str | PreTrainedModel | MtpLayers | None = "ngram",
    backend: str | Mapping[str, str] = "auto",
    config: SpecConfig | None = None,
    **overrides: Any,
) -> PreTrainedModel:
    """Compile ``model`` and its draft, and put a speculative loop behind ``model.generate()``.

    The same object comes back: weights, ``state_dict()``, plain ``model(...)`` and every argument of ``generate()`` keep
    their meaning; greedy output stays what plain ``generate()`` gives, sampling keeps its distribution. What cannot be
    accelerated runs as plain transformers and says so once (of a model that was changed behind its graphs: after each change).

    Called again it replaces what it made before: wrong options, devices and draft files are found while that still stands, a
    capture that fails, or a draft that does not go with its options, after it is gone (plain ``generate()`` then). Until then
    both drafts are in memory: ``model.spec.remove()`` first where that is too much.

    Args:
        model: a causal language model on a CPU or CUDA device, in eval mode for generation.
        draft: ``"ngram"``; ``"mtp"``, the multi-token-prediction head in the checkpoint that ``model`` was loaded from; a draft
            head (EAGLE, DFlash, MTP, ``MtpLayers``) or a smaller causal LM with the same tokenizer (object, path or hub id); or
            None for compiled decoding without speculation.
        backend: attention kernels: ``"auto"`` (by hardware and need), ``"tune"`` (the fastest, timed once on this device and
            remembered), a provider's name, or a dict of these by stage (``"prefill"``, ``"verify"``, ``"draft"``,
            ``"draft_extend"``): ``{"prefill": "flashinfer", "verify": "fa4"}``. A stage the dict leaves out is automatic. Gated
            delta nets have keys of their own, ``"gdn_verify"`` and ``"gdn_prefill"``.
        config: options; see ``SpecConfig``.
        **overrides: single fields of ``SpecConfig`` by keyword.

    Returns:
        ``model`` itself, with ``model.spec`` (a ``SpecHandle``) attached.

    Raises:
        CaptureError: the architecture cannot be captured, or what was captured does not compute the model's own logits
            (``SpecConfig.self_check``); the model is left as it was.
        BackendError: no provider, or not the named one, runs the model's attention here.
        DraftError: the draft cannot serve this model.
        ConfigError: an argument is out of its domain.
    """
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        what = inside(model, "model") or "pass a transformers causal language model."
        raise ConfigError(f"model={type(model).__name__} object: {what}")
    known = {f.name for f in dataclasses.fields(SpecConfig)}
    unknown = sorted(set(overrides) - known)
    if unknown:
        near = [match for name in unknown for match in difflib.get_close_matches(name, known, n=1)]
        meant = f": did you mean {', '.join(near)}?" if near else ";"
        raise ConfigError(f"unknown options {unknown}{meant} SpecConfig has {', '.join(sorted(known))}.")
    if not isinstance(config, SpecConfig | None):
        raise ConfigError(f"config={type(config).__name__} object: pass a SpecConfig, or its fields by keyword.")
    config = dataclasses.replace(config or SpecConfig(), **overrides)
    if draft is None and config.simulates:
        raise ConfigError(
            "simulate_accept_length and simulate_accept_rates need drafts to accept, and draft=None drafts nothing."
        )
    check_backend(backend)
    if draft is None or draft == "ngram":
        check_draft_stages(backend)
    check_placement(model)
    check_quantized(model)
    device, hardware = _device_of(model)
    with torch.autocast(device.type, enabled=False):
        draft = load_draft(draft, model)
    earlier: SpecHandle | None = getattr(model, "spec", None)
    if earlier is not None:
        earlier.remove("spec_compile() of a compiled model")  # compiling again replaces, it does not stack

    options = RuntimeOptions(
        hardware=hardware,
        compiler=SegmentCompiler(config.compile, hardware),
        backend=backend,
        page_size=config.page_size,
        kv_dtype=kv_pool.kv_dtype(config.kv_cache_dtype),
        tuner=AttentionTuner(hardware, device, config.progress),
        self_check=config.self_check,
    )
    with torch.autocast(device.type, enabled=False):  # it would be traced into graphs that serve calls without it
        settle_weights(model)
        source = make_draft(draft, model, config, options)
        target = ModelRunner(model, "verify", options, () if source is None else source.taps)
    model.spec = SpecHandle(model, Engine(target, source, config))  # type: ignore[assignment]  # modules declare no attributes
    return model


def _device_of(model: PreTrainedModel) -> tuple[torch.device, Hardware]:
    """The one device that all of ``model`` is on, and what it is.

    Raises:
        ConfigError: several devices, one that nothing here runs on, or none at all.
    """
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) > 1:
        raise ConfigError(
            f"the model's parameters are on {sorted(devices)}; spec_compile needs all on one device "
            "(load with device_map={'': 0}, or model.to('cuda'))."
        )
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    if device.type == "meta":
        raise ConfigError(
            "the model is on the meta device: its weights have no values. Load them first, with from_pretrained() or "
            "model.to_empty(device='cpu') and load_state_dict()."
        )
    try:
        return device, detect_hardware(device)
    except ValueError as error:  # a leaf module knows no errors of ours
        raise ConfigError(str(error)) from error
