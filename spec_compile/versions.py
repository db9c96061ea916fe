"""The releases of torch and transformers with which the whole test suite passed. A leaf: imports nothing of the project.

``pyproject.toml`` has the ranges that pip accepts; constraints.txt the exact set that the README's commands install; a test
holds the three together.
"""

from __future__ import annotations

TESTED = {
    "torch": ("2.11.0", "2.13.0", "2.14.1", "2.15.0"),
    "transformers": ("5.17.0", "5.23.0", "5.24.0"),
}


def is_tested(name: str, version: str) -> bool:
    """Whether ``version`` of ``name`` is a tested one, patch releases and local builds (``+cpu``) aside."""
    return _minor(version) in {_minor(tested) for tested in TESTED[name]}


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.partition("+")[0].split(".")[:2])


def version_remedy(installed: str) -> str:
    """What to do about transformers ``installed``, which behaves otherwise than the tested releases."""
    if is_tested("transformers", installed):
        return (
            "This spec_compile was tested with that release, so something else changes its generate() here: a library or line "
            "that patches the model, its class or transformers. Take that out, or call generate() within "
            "`with model.spec.disable():`."
        )
    tested = " and ".join((", ".join(TESTED["transformers"][:-1]), TESTED["transformers"][-1]))
    newest = TESTED["transformers"][-1]
    return (
        f"This spec_compile was tested with transformers {tested}: pip install 'transformers=={newest}', or a newer "
        "spec_compile."
    )
