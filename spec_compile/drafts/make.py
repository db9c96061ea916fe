"""Which draft ``draft=`` means, and what it is made of."""

from __future__ import annotations

import logging
import os

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from spec_compile.config import RoundShape, SpecConfig
from spec_compile.drafts.causal_lm import CausalLMDraft
from spec_compile.drafts.dflash import DFlashDraft
from spec_compile.drafts.dflash_runner import DFlashRunner
from spec_compile.drafts.eagle import EagleDraft
from spec_compile.drafts.head_runner import HeadRunner
from spec_compile.drafts.mtp_layers import MtpLayersDraft
from spec_compile.drafts.names import check_name
from spec_compile.drafts.ngram import NgramDraft
from spec_compile.errors import CaptureError, ConfigError, DraftError
from spec_compile.hf_integration.capture import PLAIN_WORKS
from spec_compile.hf_integration.given_model import check_placement, inside
from spec_compile.hf_integration.heads.dflash import DFlashHead
from spec_compile.hf_integration.heads.draft_head import DraftHead, check_fits
from spec_compile.hf_integration.heads.mtp import MtpLayers
from spec_compile.runtime.draft import Draft
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions

log = logging.getLogger("spec_compile")

_NGRAM_STEPS = 7
_STEPS = 5
_MOST_PADDING = 16  # two vocabularies of one tokenizer differ by less than this part of the larger one
_MOST_SLOTS = 64  # of a window, see SpecConfig.num_draft_tokens


def load_draft(
    draft: str | os.PathLike | PreTrainedModel | MtpLayers | None, target: PreTrainedModel
) -> str | PreTrainedModel | MtpLayers | None:
    """What ``draft=`` names: ``"ngram"`` and None themselves, else the object, read from its files where it is named.

    Args:
        draft: ``"ngram"``, ``"mtp"`` (the head in the target's own checkpoint), a draft head (EAGLE, DFlash, MTP, or several
            MTP layers), a causal LM, the path or hub id of one, or None for no speculation.

    Raises:
        DraftError: not a draft, or none that can be read.
    """
    from spec_compile.hf_integration.checkpoints.detect import refuse_unread

    if draft is None or draft == "ngram":
        return draft
    if draft == "mtp":
        from spec_compile.hf_integration.checkpoints.mtp import load_mtp_head

        return load_mtp_head(target)
    if isinstance(draft, str | os.PathLike):
        return _load(os.fspath(draft), target)
    if isinstance(draft, MtpLayers):
        return draft
    if not isinstance(draft, PreTrainedModel):
        kinds = "pass 'ngram', 'mtp', a draft head, a transformers causal LM, the path or hub id of one, or None."
        raise DraftError(f"draft={type(draft).__name__} object: {inside(draft, 'draft') or kinds}")
    refuse_unread(f"draft={type(draft).__name__} object", type(draft).__name__)
    try:
        check_placement(draft, "the draft")
    except ConfigError as error:
        raise DraftError(str(error)) from error
    return draft


def make_draft(
    draft: str | PreTrainedModel | MtpLayers | None, target: PreTrainedModel, config: SpecConfig, options: RuntimeOptions
) -> Draft | None:
    """What proposes tokens, of what ``load_draft`` gave.

    Args:
        draft: ``"ngram"``, a draft head (EAGLE, DFlash, MTP, or several MTP layers), a causal LM, or None for no speculation.
        options: what the draft's models are compiled with.

    Raises:
        DraftError: one that cannot serve this target, or not with these options.
    """
    if draft is None:
        return None
    if draft == "ngram":
        return NgramDraft(_chain_only(config, "ngram", _NGRAM_STEPS), config.min_ngram, config.max_ngram)
    if isinstance(draft, MtpLayers):
        return _mtp_layers(draft, target, config, options)
    _check_device(draft, target)
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    if isinstance(draft, DraftHead):
        _check_head(draft, target)
        if isinstance(draft, DFlashHead):
            return DFlashDraft(DFlashRunner(draft, options), _block_shape(config, draft), vocab_size)
        return EagleDraft(HeadRunner(draft, options), config.round_shape(_STEPS), vocab_size)
    return _causal_lm(draft, vocab_size, config, options)


def _causal_lm(draft: PreTrainedModel, vocab_size: int, config: SpecConfig, options: RuntimeOptions) -> Draft:
    """A draft model. What it cannot do is the draft's fault and not the target's."""
    what, others = f"draft={type(draft).__name__} object", "Use 'ngram', a head trained for the target, or another causal LM."
    shape = _chain_only(config, "a causal LM", _STEPS)
    if draft.config.is_encoder_decoder or not draft.can_generate():
        raise DraftError(f"{what} is no causal language model. {others}")
    try:
        runner = ModelRunner(draft, "draft", options)
    except CaptureError as error:
        raise DraftError(f"{what}: {str(error).removesuffix(PLAIN_WORKS)} {others}") from error
    made = CausalLMDraft(runner, shape, vocab_size)
    own = made.draft_vocab_size
    if abs(own - vocab_size) > max(own, vocab_size) / _MOST_PADDING:
        log.warning("%s has a vocabulary of %d tokens, the target of %d: do they share a tokenizer?", what, own, vocab_size)
    return made


def _mtp_layers(draft: MtpLayers, target: PreTrainedModel, config: SpecConfig, options: RuntimeOptions) -> Draft:
    """The first ``num_steps`` of several heads, in turn. One of them alone is a head as any other."""
    vocab_size, steps = target.config.get_text_config(decoder=True).vocab_size, config.num_steps or len(draft.heads)
    if steps > len(draft.heads):
        raise DraftError(
            f"num_steps={steps}: this draft has {len(draft.heads)} MTP layers, one a step. Leave num_steps out, or let its "
            "first layer draft every step: spec_compile.hf_integration.checkpoints.mtp.load_mtp_head() gives it as heads[0]."
        )
    if config.topk > 1 and steps > 1:
        raise DraftError(
            f"topk={config.topk}: MTP layers that draft in turn draft chains only, because the entries of a later layer differ "
            "between the branches of a tree. Leave topk out, or draft with an EAGLE head or an MTP head of one layer."
        )
    heads = draft.heads[:steps]
    for head in heads:
        _check_device(head, target)
        _check_head(head, target)
    shape = config.round_shape(steps)
    if steps == 1:
        return EagleDraft(HeadRunner(heads[0], options), shape, vocab_size)
    return MtpLayersDraft(tuple(HeadRunner(head, options) for head in heads), shape, vocab_size)


def _check_device(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    embedding, wanted = draft.get_input_embeddings().weight, target.get_input_embeddings().weight
    if embedding.device != wanted.device:
        raise DraftError(f"the draft is on {embedding.device}, the target on {wanted.device}; use draft.to('{wanted.device}').")


def _check_head(head: DraftHead, target: PreTrainedModel) -> None:
    """A head object may have been made for another model than this."""
    check_fits(head.config, target, head.taps, head.draft_ids, head.owned)
    width = len(head.taps) * target.config.get_text_config(decoder=True).hidden_size
    if head.target_width != width or head.dtype != target.dtype:
        raise DraftError(
            f"the draft head reads states of {head.target_width} features in {head.dtype}, the target's have {width} in "
            f"{target.dtype}. Load the head for this target: draft=<its path or hub id>."
        )
    ours = {"embed_tokens": target.get_input_embeddings().weight, "lm_head": target.get_output_embeddings().weight}
    foreign = [
        name
        for name, weight in ours.items()
        if name not in head.owned
        and getattr(head, name).weight is not weight
        and not torch.equal(getattr(head, name).weight, weight)
    ]
    if foreign:
        raise DraftError(
            f"the draft head reads the {' and '.join(foreign)} of another model than this target, and would draft badly. Load "
            "the head for this target: draft=<its path or hub id>."
        )


def _block_shape(config: SpecConfig, head: DFlashHead) -> RoundShape:
    """All drafts of a block, or the first ones."""
    if head.block_size > _MOST_SLOTS:
        raise DraftError(f"a DFlash head with blocks of {head.block_size} slots; at most {_MOST_SLOTS} are drafted at once.")
    shape = _chain_only(config, "a DFlash head", min(head.num_drafts, _MOST_SLOTS - 1))
    if shape.num_steps > head.num_drafts:
        raise DraftError(f"num_steps={shape.num_steps}: a block of this DFlash head drafts {head.num_drafts} tokens.")
    return shape


def _chain_only(config: SpecConfig, what: str, default_steps: int) -> RoundShape:
    if config.topk > 1:
        raise DraftError(f"topk={config.topk}: {what} drafts chains only; leave topk out, or draft with an EAGLE or MTP head.")
    return config.round_shape(default_steps)


def _load(name: str, target: PreTrainedModel) -> PreTrainedModel | MtpLayers:
    name = os.path.expanduser(name)
    check_name(name)
    from spec_compile.hf_integration.checkpoints.detect import load_draft_head

    head = load_draft_head(name, target)
    if head is not None:
        return head
    try:
        model, found = AutoModelForCausalLM.from_pretrained(name, dtype=target.dtype, output_loading_info=True)
    except Exception as error:  # weights of other shapes, damaged files: safetensors and pickle raise kinds of their own
        raise DraftError(
            f"draft={name!r} is none of 'ngram', 'mtp' and None, and no causal LM that transformers can load: {error}"
        ) from error
    if missing := sorted(found["missing_keys"]):  # transformers makes them up
        raise DraftError(
            f"draft={name!r}: its config describes a {type(model).__name__}, but {len(missing)} of its weights are not in its "
            f"files: {', '.join(missing[:4])}, …. It is no causal LM, no head of a known kind, or no whole copy."
        )
    return model.to(target.get_input_embeddings().weight.device).eval()
