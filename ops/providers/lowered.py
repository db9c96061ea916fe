"""What takes a generic op's place in a graph: a provider's op, and what is planned once for all layers that call it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.library import CustomOpDef, custom_op

from spec_compile.ops.torch_private import OpOverload, fake_of, overload_of, schema_of

# The arguments of an attention op that belong to the rows of the batch, not to a layer.
ROW_ARGUMENTS = ("page_table", "cache_len", "cu_seqlens", "tree_mask")


@dataclass(frozen=True)
class Lowered:
    """What takes a generic attention op's place.

    Attributes:
        op: the generic op's arguments, then the plan's outputs.
        plan: called as ``plan(*row_arguments, *plan_args)`` before the first layer that needs it; layers of equal ``plan``,
            ``plan_args`` and row arguments share its outputs, one tensor or a tuple of tensors. Functional, without host
            sync where its graph is captured. Row arguments, in this order: ``page_table, cache_len, tree_mask`` of a window
            op (``tree_mask`` None for a chain), ``page_table, cu_seqlens`` of a prefill op.
        plan_args: ints, floats and bools.
    """

    op: OpOverload
    plan: OpOverload | None = None
    plan_args: tuple[int | float | bool, ...] = ()

    def row_arguments(self, args: tuple) -> tuple:
        """Those of the generic op's ``args`` that the plan takes."""
        names = [argument.name for argument in schema_of(self.op).arguments]
        return tuple(arg for name, arg in zip(names, args, strict=False) if name in ROW_ARGUMENTS)

    def __call__(self, *args: object) -> Tensor:
        """One call of the generic op, planned for itself alone: for warming up, testing and timing."""
        return self.op(*args, *self._planned(args))

    def over_layers(self, layers: Sequence[tuple]) -> None:
        """A call for every layer's arguments, planned once for all: what a graph does."""
        planned = self._planned(layers[0])
        for args in layers:
            self.op(*args, *planned)

    def _planned(self, args: tuple) -> tuple[Tensor, ...]:
        if self.plan is None:
            return ()
        planned = self.plan(*self.row_arguments(args), *self.plan_args)
        return (planned,) if isinstance(planned, Tensor) else tuple(planned)


def as_lowered(result: OpOverload | Lowered) -> Lowered:
    """What ``Provider.lower`` returned, with a bare op as ``Lowered``."""
    return result if isinstance(result, Lowered) else Lowered(result)


def lowered_op(generic: CustomOpDef, provider: str, impl: Callable[..., Tensor], extra: Sequence[str] = ()) -> CustomOpDef:
    """Register ``spec_compile::<generic>_<provider>``, an op that takes the place of ``generic``.

    What it takes, what of that it writes and its fake are the generic op's, so a provider says none of it again.

    Args:
        generic: such as ``ops.attention.attention``.
        provider: the provider's name.
        impl: called with the generic op's arguments in their order, then with the plan's outputs. Returns what the generic op
            returns, in the same shape and strides.
        extra: names of the plan's outputs, tensors that follow the generic op's arguments.

    Returns:
        The op; ``torch.ops.spec_compile.<generic>_<provider>.default`` is what ``Provider.lower`` hands over.
    """
    schema = schema_of(overload_of(generic))
    # "spec_compile::attention(Tensor q, …, Tensor? sinks) -> Tensor"
    arguments, result = str(schema).removeprefix(schema.name).rsplit(") -> ", 1)
    op = custom_op(
        f"{schema.name}_{provider}",
        impl,
        mutates_args=[x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write],
        schema=f"{', '.join([arguments, *(f'Tensor {name}' for name in extra)])}) -> {result}",
    )
    count, fake = len(schema.arguments), fake_of(generic)
    op.register_fake(lambda *args: fake(*args[:count]))
    return op
