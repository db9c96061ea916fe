"""Where a checkpoint's files are, in a directory or a hub repository, and which tensors each of them holds.

Of a repository no more is fetched than what is asked for: an index before shards, one file before all.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from spec_compile.errors import DraftError
from spec_compile.hf_integration.checkpoints.tensors import read_index, read_names, weight_files

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


class _NotFetchedError(DraftError):
    """The hub did not answer and its cache lacks a file: there may be one of that name, or none."""


def checkpoint_file(where: str, name: str, revision: str | None, cached: bool = False) -> Path | None:
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
            if path := checkpoint_file(where, name, revision, cached=unknown is not None):
                return path
        except _NotFetchedError as error:
            unknown = unknown or error
    if unknown is not None:
        raise unknown
    return None


def files_by_name(where: str, revision: str | None = None) -> dict[str, str]:
    """Tensor name -> the file that holds it; empty without weight files."""
    local = Path(where).expanduser()
    first = _first_file(where, _INDEXES if local.is_dir() else (*_INDEXES, *_SINGLE_FILES), revision)
    if first is not None and first.name in _INDEXES:
        return read_index(first)
    files = weight_files(local) if local.is_dir() else [first] if first else []
    return {name: file.name for file in files for name in read_names(file)}
