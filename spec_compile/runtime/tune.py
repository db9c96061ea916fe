"""``backend="tune"``: candidates timed on the device, in the shapes of the model, and remembered on disk.

A candidate is timed as it will run: a window inside a CUDA graph, with its plan computed once for all layers; packed prompts
launched from the host. Layers have caches or states of their own, as in a model, so that no kernel reads from L2 what it would
find in memory otherwise. Rows are three quarters full, the mean of a pool that doubles when it is full.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from spec_compile.cache_dir import cache_dir
from spec_compile.hardware import Hardware
from spec_compile.ops import providers
from spec_compile.ops.providers import AttentionNode, DeltaNode, Node, delta_examples, examples
from spec_compile.passes.select_backend import Measured
from spec_compile.runtime.device_time import eager_milliseconds, graph_milliseconds
from spec_compile.runtime.program import source_hash
from spec_compile.runtime.progress import Progress

log = logging.getLogger("spec_compile")

FILE_NAME = "attention-tuning.json"
_MAX_LAYERS = 16
_MAX_DELTA_LAYERS = 128  # a row's states are 2 MiB a layer (Qwen3-Next), little beside an L2 cache
_PROMPT_TOKENS = 2048

TimeCandidate = Callable[[Node, str, torch.device], float]


class AttentionTuner:
    """Times the candidates of attention and delta rule nodes; a ``Tuner`` for ``select_backend``.

    Args:
        show_progress: a bar while something is timed.
        path: the file that remembers; None for the one in the user's cache directory.
        time_candidate: microseconds of (node, provider) on a device; what tests replace.
    """

    def __init__(
        self,
        hardware: Hardware,
        device: torch.device,
        show_progress: bool = True,
        path: Path | None = None,
        time_candidate: TimeCandidate | None = None,
    ) -> None:
        self.hardware, self.device, self.show_progress = hardware, device, show_progress
        self._path = path
        self.time_candidate = time_candidate or microseconds

    @property
    def path(self) -> Path:
        """The file that remembers; a home directory is looked for only by those who tune."""
        return self._path or cache_dir() / FILE_NAME

    def __call__(self, node: Node, names: tuple[str, ...]) -> Measured:
        """Times of every provider in ``names`` for ``node``: remembered ones where nothing that matters has changed."""
        key = self.key(node, names)
        known = _read(self.path).get(key)
        if known is not None:
            return Measured(known["microseconds"], known["failed"], f"measured earlier on this {self.hardware.name}")
        times: dict[str, float] = {}
        failed: dict[str, str] = {}
        with Progress(f"timing {_kind(node)}", len(names), self.show_progress) as progress:
            for name in names:
                progress.advance(name)
                try:
                    times[name] = self.time_candidate(node, name, self.device)
                except torch.OutOfMemoryError:
                    failed[name] = "out of memory while it was timed"
                    torch.cuda.empty_cache()
                except Exception as error:  # one provider's failure must not take the others' measurement with it
                    log.warning("timing %s for %s failed", name, _kind(node), exc_info=True)
                    failed[name] = f"failed while it was timed: {type(error).__name__}: {error}".splitlines()[0]
        if times:  # a provider that failed beside one that did not stays out until something of the key changes
            _remember(self.path, key, {"microseconds": times, "failed": failed})
        return Measured(times, failed, f"measured now on this {self.hardware.name}")

    def key(self, node: Node, names: tuple[str, ...]) -> str:
        """Everything a time depends on, as text: device, versions of what runs, our own sources, the node."""
        return json.dumps(
            {
                "device": self.hardware.name,
                "arch": self.hardware.arch,
                "torch": torch.__version__,
                "triton": _triton_version(),
                "providers": {name: str(providers.load_for(node, name).probe().version) for name in names},
                "sources": source_hash(),
                "node": {name: str(value) for name, value in dataclasses.asdict(node).items()},
            },
            sort_keys=True,
        )


def _kind(node: Node) -> str:
    return f"{node.stage} delta rules" if isinstance(node, DeltaNode) else f"{node.stage} attention"


def _triton_version() -> str:
    """Of whatever distribution provides it; every provider but ``torch`` has kernels in it."""
    if importlib.util.find_spec("triton") is None:
        return "none"
    return importlib.import_module("triton").__version__


# ----------------------------------------------------------------------------------------------------------------------
# One candidate


def microseconds(node: Node, name: str, device: torch.device) -> float:
    """Microseconds of one layer's call of ``node`` by provider ``name``, its share of the plan included."""
    provider = providers.load_for(node, name)
    provider.warm_up(node, device)
    lowered = providers.as_lowered(provider.lower(node))
    layers = example_layers(node, device)

    milliseconds = eager_milliseconds if node.num_tokens is None else graph_milliseconds
    with torch.cuda.device(device), torch.no_grad():
        return milliseconds(functools.partial(lowered.over_layers, layers)) * 1e3 / len(layers)


def example_layers(node: Node, device: torch.device) -> list[tuple]:
    """Arguments of as many layers as it takes to read well past the L2 cache, each with caches or states of its own."""
    if isinstance(node, DeltaNode):
        first = delta_examples.example_arguments(node, device, num_tokens=_PROMPT_TOKENS, live=True)
        places, most = delta_examples.STATE_PLACES[node.op], _MAX_DELTA_LAYERS
    else:
        first, places, most = _attention_layer(node, device), examples.CACHE_PLACES[node.op], _MAX_LAYERS
    layer_bytes = sum(first[place].nbytes for place in places)
    count = num_layers(layer_bytes, *_memory(device), most)
    layers = [first]
    for _ in range(count - 1):
        layers.append(tuple(arg.clone() if place in places else arg for place, arg in enumerate(first)))
    return layers


def _attention_layer(node: AttentionNode, device: torch.device) -> tuple:
    capacity = node.max_context or 4 * _PROMPT_TOKENS
    if node.num_tokens is None:
        tokens = max(1, min(_PROMPT_TOKENS, capacity * 3 // 4))
        return examples.example_arguments(node, device, num_tokens=tokens, context=0)
    return examples.example_arguments(node, device, context=max(0, capacity * 3 // 4 - node.num_tokens))


def num_layers(layer_bytes: int, l2_bytes: int, free_bytes: int, most: int = _MAX_LAYERS) -> int:
    """Layers whose caches together are three times the L2 cache, at most ``most`` and a quarter of the free memory."""
    wanted = min(most, max(4, -(-3 * l2_bytes // layer_bytes)))
    return max(1, min(wanted, free_bytes // 4 // layer_bytes))


def _memory(device: torch.device) -> tuple[int, int]:
    """(bytes of L2 cache, free bytes)"""
    return torch.cuda.get_device_properties(device).L2_cache_size, torch.cuda.mem_get_info(device)[0]


# ----------------------------------------------------------------------------------------------------------------------
# The file


def _read(path: Path) -> dict[str, dict]:
    """Remembered entries; none where the file is missing or not ours (it is then written anew)."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries.values():
            {str(name): float(time) for name, time in entry["microseconds"].items()}
            entry["failed"].items()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        log.warning("%s cannot be read (%s); kernels are timed again", path, error)
        return {}
    return entries


def _remember(path: Path, key: str, entry: Mapping[str, object]) -> None:
    """Add an entry. The file is replaced as a whole, so that a reader never sees half of one; a file that cannot be written
    costs the next process its time, nothing else."""
    entries = {**_read(path), key: entry}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(entries, file, indent=1, sort_keys=True)
            os.replace(scratch, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise
    except OSError as error:
        log.warning("cannot write %s (%s): kernels will be timed again by the next process", path, error)
