"""Draft kinds, one a file behind the small interface of ``base``."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable

from transformers import AutoModelForCausalLM, PreTrainedModel

from spec_compile.config import SpecConfig
from spec_compile.drafts.base import Draft
from spec_compile.errors import DraftError
from spec_compile.runtime.model_runner import ModelRunner

_NGRAM_STEPS = 7
_CAUSAL_LM_STEPS = 5


def make_draft(
    draft: str | PreTrainedModel | None,
    target: PreTrainedModel,
    config: SpecConfig,
    make_runner: Callable[[PreTrainedModel], ModelRunner],
) -> Draft | None:
    """The draft a user named.

    Args:
        draft: ``"ngram"``, a causal LM, the path or hub id of one, or None for no speculation.
        make_runner: builds the runner of a draft model.

    Raises:
        DraftError: not a draft, or one that cannot serve this target.
    """
    from spec_compile.drafts.causal_lm import CausalLMDraft
    from spec_compile.drafts.ngram import NgramDraft

    if draft is None:
        return None
    if draft == "ngram":
        return NgramDraft(config.num_steps or _NGRAM_STEPS, config.min_ngram, config.max_ngram)
    if isinstance(draft, str | os.PathLike):
        draft = _load(os.fspath(draft), target)
    if not isinstance(draft, PreTrainedModel):
        raise DraftError(
            f"draft={type(draft).__name__} object: pass 'ngram', a transformers causal LM, its path or hub id, or None."
        )
    embedding, wanted = draft.get_input_embeddings().weight, target.get_input_embeddings().weight
    if embedding.device != wanted.device:
        raise DraftError(f"the draft is on {embedding.device}, the target on {wanted.device}; use draft.to('{wanted.device}').")
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    return CausalLMDraft(make_runner(draft), config.num_steps or _CAUSAL_LM_STEPS, vocab_size)


def _load(name: str, target: PreTrainedModel) -> PreTrainedModel:
    if not os.path.isdir(name):
        if os.path.isabs(name) or name.startswith((".", "~")):
            raise DraftError(f"draft={name!r}: there is no such directory.")
        if difflib.get_close_matches(name, ["ngram"], cutoff=0.7):
            raise DraftError(f"draft={name!r}: did you mean 'ngram'?")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=target.dtype)
    except (OSError, ValueError) as error:
        raise DraftError(f"draft={name!r} is neither 'ngram' nor a causal LM that transformers can load: {error}") from error
    return model.to(target.get_input_embeddings().weight.device).eval()
