"""What Triton 3.9's interpreter gets wrong about bfloat16, put right (triton/runtime/interpreter.py).

It keeps bfloat16 as uint16. ``create_dot`` multiplies these integers, and ``cast_impl`` cuts float32 off instead of rounding
to nearest, as devices do: a bias that adds up over a prompt.
"""

from __future__ import annotations

import numpy as np
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(x: TensorHandle) -> TensorHandle:
    """float32 to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x.data).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(x.data), np.uint16(0x7FC0), nearest), tl.bfloat16)


def install() -> None:
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def cast_impl(self, src, dst_type):
        down = src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16
        return rounded(src) if down else cast(self, src, dst_type)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl
