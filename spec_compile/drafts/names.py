"""What a name given as ``draft=`` cannot be, said before the hub is asked: its client tries for long."""

from __future__ import annotations

import difflib
import os

from spec_compile.errors import DraftError

_KINDS = ("ngram", "mtp")
_NOTHING = ("", "none", "null", "off")
# What SGLang (speculative_algorithm) and vLLM (speculative_config's method) call drafts that need a checkpoint.
_NEED_A_CHECKPOINT = {
    "eagle": "an EAGLE head", "eagle2": "an EAGLE head", "eagle3": "an EAGLE-3 head", "dflash": "a DFlash head",
    "draft_model": "a smaller causal LM", "standalone": "a smaller causal LM",
}  # fmt: skip
_NO_READER = ("medusa", "mlp_speculator", "suffix", "p-eagle", "peagle")


def check_name(name: str) -> None:
    """Refuse what is neither a directory nor may be a repository of the hub.

    Raises:
        DraftError: nothing, another engine's word for a kind of draft, a typing error, a directory that is not there or empty.
    """
    lower = name.strip().lower()
    if os.path.isdir(name):
        if not os.listdir(name):
            raise DraftError(f"draft={name!r}: the directory is empty; looked for config.json and .safetensors or .bin files.")
        return
    if os.path.isfile(name):
        raise DraftError(f"draft={name!r} is a file: pass the directory that holds it and its config.json.")
    if lower in _NOTHING:
        raise DraftError(f"draft={name!r}: pass draft=None to draft nothing, or 'ngram', 'mtp', a path or a hub id.")
    if lower in _NEED_A_CHECKPOINT:
        raise DraftError(f"draft={name!r}: pass the path or hub id of {_NEED_A_CHECKPOINT[lower]} for this model as draft=.")
    if lower in _NO_READER:
        raise DraftError(
            f"draft={name!r} drafts are not supported; use 'ngram', 'mtp', or the path or hub id of an EAGLE head."
        )
    if lower == "nextn" or (lower.endswith("_mtp") and "/" not in lower):  # vLLM's methods; a repository has an owner
        raise DraftError(f"draft={name!r}: did you mean 'mtp'?")
    if is_path(name):
        raise DraftError(f"draft={name!r}: there is no such directory.")
    if "/" not in lower and (near := difflib.get_close_matches(lower, _KINDS, cutoff=0.7)):
        raise DraftError(f"draft={name!r}: did you mean {near[0]!r}?")


def is_path(name: str) -> bool:
    """Whether ``name`` can only be a path: hub ids have one slash at most, and none of these beginnings."""
    return os.path.isabs(name) or name.startswith((".", "~")) or name.rstrip("/").count("/") > 1 or name.endswith("/")
