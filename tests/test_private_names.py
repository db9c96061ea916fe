"""Names that torch and transformers do not promise to keep stand in one file each, and are still there.

A release that renames one fails here, by name, before anything else does.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from tiny import tiny_model
from torch import fx
from transformers import GenerationConfig, GenerationMixin, LlamaConfig, LlamaForCausalLM

from spec_compile.hf_integration import transformers_private
from spec_compile.ops import OPS, torch_private
from spec_compile.ops.attention import attention

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for room in ("spec_compile", "hf_integration", "passes", "ops") for path in sorted((ROOT / room).rglob("*.py"))]
PLACES = {ROOT / "ops" / "torch_private.py", ROOT / "hf_integration" / "transformers_private.py"}
# Attributes that transformers sets on configurations and classes; an object's own underscored names are not meant.
HUGGING_FACE = {
    "_attn_implementation", "_experts_implementation", "_commit_hash", "_pad_token_tensor", "_is_user_defined", "_sample",
    "_assisted_decoding", "_beam_search", *(set(transformers_private.CALLED_BY_THE_LOOP) - {"_prefill"}),
    *transformers_private.PRIVATE_NOTES,
}  # fmt: skip
TABLES = {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}
TORCH = {*TABLES, "_schema", "_init_fn", "_orig_mod", "_compiled_call_impl"}  # attributes of modules and ops


def private_names(source: str) -> list[str]:
    """Private names of torch and transformers that a source takes: by import, as attributes of what it imported under
    whatever name, or as one of ``HUGGING_FACE`` or ``TORCH``, also in a string."""
    found, tree = [], ast.parse(source)
    imported = _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.match(r"(torch|transformers)\b", node.module or ""):
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names if re.match(r"(torch|transformers)\b", alias.name)]
        elif isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            text = f"{imported.get(first, first)}.{rest}"
            of_torch = node.attr in TORCH and first != "self"  # an object's own
            known = re.fullmatch(r"(torch|transformers)(\.\w+)+", text) or node.attr in HUGGING_FACE or of_torch
            dotted = [text] if known else []
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in HUGGING_FACE | TORCH:
            dotted = [node.value]
        else:
            continue
        found += [name for name in dotted if re.search(r"(^|\.)_[a-zA-Z]", name)]
    return found


def _imported(tree: ast.AST) -> dict[str, str]:
    """What names of a source stand for, of torch and transformers: ``{"nn": "torch.nn"}``."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                      for alias in node.names}  # fmt: skip
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: what for name, what in names.items() if re.match(r"(torch|transformers)\b", what)}


def test_private_names_stand_in_one_file_each() -> None:
    taken = {str(path.relative_to(ROOT)): names for path in FILES if (names := private_names(path.read_text()))}
    allowed = {str(path.relative_to(ROOT)) for path in PLACES}
    assert set(taken) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "from torch._guards import tracing",
        "import torch._inductor",
        "def f(gm):\n    return torch._dynamo.explain(gm)",
        "name = config._attn_implementation",
        "name = getattr(config, '_experts_implementation', None)",
        "from torch.nn.modules import module as m\nhooks = m._global_forward_hooks",
        "from torch import nn\nkind = nn.modules.dropout._DropoutNd",
        "import torch.nn as n\nkind = n.modules.dropout._DropoutNd",
        "children = model._modules",
        "children = vars(model)['_modules']",
        "writes = op.default._schema.is_mutable",
    ],
)
def test_the_check_can_fail(source: str) -> None:
    assert private_names(source)


def test_what_is_taken_from_torch_is_there() -> None:
    for name in torch_private.__all__:
        assert getattr(torch_private, name) is not None
    torch_private.mark_dynamic(torch.zeros(2, 3), 1)
    with torch_private.static_shapes():
        assert torch._dynamo.config.assume_static_by_default
    torch_private.forget_traces(lambda: None)
    gm = torch_private.make_graph_module(torch.nn.Module(), fx.Graph())
    with torch_private.use_lazy_graph_module(True):
        assert isinstance(gm, fx.GraphModule)
    assert callable(torch_private.CustomGraphPass.uuid)


def test_what_modules_and_ops_have_is_there() -> None:
    module = torch.nn.Linear(1, 1)
    assert vars(module).keys() >= TABLES
    assert torch_private.ORIGINAL_MODULE in dict(torch.compile(module).named_children())
    assert isinstance(torch.nn.Dropout(), torch_private.DropoutNd)
    handle = torch.nn.modules.module.register_module_forward_hook(print)
    assert print in torch_private.global_hooks()[torch_private.FORWARD_HOOKS].values()
    handle.remove()
    assert torch_private.schema_of(OPS.kv_write.default).is_mutable
    assert torch_private.python_of(attention) is attention._init_fn


@pytest.mark.parametrize("name", [transformers_private.SAMPLE, *transformers_private.PLAIN_LOOPS])
def test_the_loops_of_transformers_are_there(name: str) -> None:
    assert callable(getattr(GenerationMixin, name))


def test_what_the_loop_calls_on_the_model_is_there() -> None:
    optional = {"create_masks_for_generate"}  # some families have one
    missing = {name for name in transformers_private.CALLED_BY_THE_LOOP if not hasattr(LlamaForCausalLM, name)}
    assert missing <= optional


def test_what_is_ignored_on_models_is_there() -> None:
    """By the text of transformers: models have each only after a call that leaves it."""
    folder = Path(transformers.__file__).parent
    files = [folder / "modeling_utils.py", folder / "generation" / "utils.py", folder / "utils" / "output_capturing.py"]
    text = "\n".join(file.read_text() for file in files)
    assert {name for name in transformers_private.PRIVATE_NOTES if not re.search(rf"\b{name}\b", text)} == set()


def test_what_is_read_of_configurations_is_there() -> None:
    model = tiny_model("qwen3_moe")
    assert transformers_private.attention_name(model.config) == "sdpa"
    assert transformers_private.experts_name(model.config) is not None
    assert transformers_private.commit_hash(LlamaConfig()) is None
    prepared = GenerationConfig(pad_token_id=7)
    model._prepare_special_tokens(prepared, device="cpu")
    assert int(transformers_private.pad_token(prepared)) == 7
