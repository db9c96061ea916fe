"""What ``backend=`` may say, and what it says about a stage."""

from __future__ import annotations

from collections.abc import Mapping

from spec_compile.errors import BackendError
from spec_compile.ops import providers
from spec_compile.ops.providers import DeltaNode
from spec_compile.passes.preference import STAGES

DELTA_OPS = DeltaNode.OPS  # also what the dict calls them
AUTO, TUNE = "auto", "tune"

Backend = str | Mapping[str, str]


def check_backend(backend: Backend) -> None:
    """Look at all of ``backend``, so that a typing error shows before anything is compiled.

    Raises:
        BackendError: an unknown provider or stage name; lists the known ones. Or neither a name nor a dict of names.
    """
    if not isinstance(backend, str | Mapping):
        raise BackendError(f"backend={backend!r}: pass 'auto', 'tune', a provider's name, or a dict of these per stage.")
    if isinstance(backend, Mapping):
        stages = (*STAGES, *DELTA_OPS)
        unknown = sorted(set(backend) - set(stages), key=str)
        if unknown:
            raise BackendError(f"backend={dict(backend)!r}: unknown stages {unknown}; stages are {', '.join(stages)}.")
    for stage, name in backend.items() if isinstance(backend, Mapping) else ((None, backend),):
        known = providers.REGISTRY[DeltaNode.FAMILY] if stage in DELTA_OPS else providers.PROVIDERS
        if isinstance(name, str) and delta_only(name):
            if stage in DELTA_OPS or f"gdn_{stage}" in DELTA_OPS:
                continue
            ways = " or ".join(f"backend={{{op!r}: {name!r}}}" for op in providers.delta_ops(name))
            where = "attention" if stage is None else f"the {stage} stage, which has none of its own"
            raise BackendError(f"backend={name!r} runs gated delta rules, not {where}; say which ones: {ways}.")
        if not isinstance(name, str) or name not in (AUTO, TUNE, *known):
            where = f" for {stage}" if stage in DELTA_OPS else ""
            raise BackendError(
                f"backend={name!r} is not a provider{where}; choose 'auto', 'tune', one of {', '.join(known)}, "
                "or a dict of these per stage."
            )


def check_delta_rules(backend: Backend) -> None:
    """For a model without gated delta nets: what ``backend`` says about them would say nothing.

    Raises:
        BackendError: it names a provider of theirs.
    """
    for stage, name in backend.items() if isinstance(backend, Mapping) else ():
        if stage in DELTA_OPS or delta_only(name):
            raise BackendError(
                f"backend={dict(backend)!r}: {stage!r} names {name!r} for gated delta nets, and this model has none: leave "
                "that entry out."
            )


def check_draft_stages(backend: Backend) -> None:
    """For a call without a draft model or head: what ``backend`` says about their graphs would say nothing.

    Raises:
        BackendError: it names one of their stages.
    """
    for stage, name in backend.items() if isinstance(backend, Mapping) else ():
        if stage in ("draft", "draft_extend"):
            raise BackendError(
                f"backend={dict(backend)!r}: {stage!r} names {name!r} for a draft model or head, and this call has none: leave "
                "that entry out, or pass one as draft=."
            )


def wanted(backend: Backend, stage: str) -> str:
    """What ``backend`` says about ``stage``: a provider's name, ``"auto"`` or ``"tune"``.

    A dict's ``draft`` speaks for ``draft_extend`` too unless that has its own entry; stages it does not name are automatic.
    A bare provider's name speaks of attention: delta rules, a dict's ``gdn_verify`` and ``gdn_prefill``, stay automatic. A name
    that no attention provider has speaks of its stage's delta rules: ``{"prefill": "fla"}`` is ``{"gdn_prefill": "fla"}``.

    Raises:
        BackendError: as ``check_backend``.
    """
    check_backend(backend)
    if isinstance(backend, str):
        return AUTO if stage in DELTA_OPS and backend != TUNE else backend
    if stage in DELTA_OPS:
        name = backend.get(stage.removeprefix("gdn_"), AUTO)
        return backend.get(stage, name if delta_only(name) else AUTO)
    if stage == "draft_extend" and stage not in backend:
        stage = "draft"
    name = backend.get(stage, AUTO)
    return AUTO if delta_only(name) else name


def delta_only(name: str) -> bool:
    """Whether ``name`` is a provider of gated delta rules and of nothing else."""
    return name in providers.REGISTRY[DeltaNode.FAMILY] and name not in providers.PROVIDERS
