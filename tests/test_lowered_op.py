"""``lowered_op``: an op that takes a generic op's place has its schema, writes what it writes, and has its fake."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import CustomOpDef, opcheck

from spec_compile.ops import attention, linear_attention
from spec_compile.ops.providers import AttentionNode, DeltaNode, lowered_op
from spec_compile.ops.providers.delta_examples import example_arguments as delta_arguments
from spec_compile.ops.providers.examples import example_arguments
from spec_compile.ops.torch_private import overload_of, python_of, schema_of

SHAPES = {"page_size": 16, "window": 0, "softcap": 0.0, "has_sinks": False, "is_tree": False, "dtype": torch.float32}
ATTENTION = AttentionNode("attention", "verify", 2, 3, 4, 2, 8, 6, kv_dtype=torch.float32, **SHAPES)
LATENT = AttentionNode("mla_attention", "verify", 2, 3, 4, 1, 8, 6, kv_dtype=torch.float32, **SHAPES)
GENERIC = [
    *(getattr(attention, name) for name in AttentionNode.OPS),
    *(getattr(linear_attention, name) for name in DeltaNode.OPS),
]


def schema(op: CustomOpDef) -> torch.FunctionSchema:
    return schema_of(overload_of(op))


def planned(generic: CustomOpDef, provider: str) -> tuple[CustomOpDef, list[tuple]]:
    """An op with a plan's output behind the generic op's arguments, and what it was called with."""
    calls = []

    def impl(*args):
        calls.append(args)
        return python_of(generic)(*args[:-1]) * args[-1]

    return lowered_op(generic, provider, impl, extra=("factor",)), calls


@pytest.mark.parametrize("generic", GENERIC, ids=lambda op: schema(op).name)
def test_the_schema_is_the_generic_ops_with_the_plans_outputs_behind(generic: CustomOpDef) -> None:
    name = schema(generic).name
    plain, two = lowered_op(generic, "of_ours", python_of(generic)), planned(generic, "of_ours_planned")[0]
    assert str(schema(plain)) == str(schema(generic)).replace(name, f"{name}_of_ours", 1)
    expected = str(schema(generic)).replace(name, f"{name}_of_ours_planned", 1).replace(") ->", ", Tensor factor) ->")
    assert str(schema(two)) == expected


@pytest.mark.parametrize("node", [ATTENTION, LATENT], ids=lambda node: node.op)
def test_it_runs_the_function_and_is_a_well_formed_op(node: AttentionNode) -> None:
    generic = getattr(attention, node.op)
    op, calls = planned(generic, "checked")
    args, other = (example_arguments(node, torch.device("cpu"), context=20) for _ in range(2))
    out = op(*args, torch.tensor(2.0))
    assert torch.equal(out, 2 * generic(*other)) and len(calls[0]) == len(args) + 1
    for ours, theirs in zip(args, other, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    opcheck(op, (*args, torch.tensor(2.0)))


def test_the_fake_is_the_generic_ops() -> None:
    op = planned(attention.attention, "faked")[0]
    rule = lowered_op(linear_attention.gdn_verify, "faked", linear_attention.verify_reference)
    delta = DeltaNode("gdn_verify", "verify", 2, 3, 2, 4, 8, 6, is_tree=False, dtype=torch.float32)
    with FakeTensorMode() as mode:
        to_fake = lambda args: [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]  # noqa: E731
        args = to_fake(example_arguments(ATTENTION, torch.device("cpu")))
        out = op(*args, mode.from_tensor(torch.tensor(2.0)))
        assert out.shape == (2, 3, 4, 6) and out.is_contiguous()
        assert rule(*to_fake(delta_arguments(delta, torch.device("cpu")))).shape == (2, 3, 4, 6)
