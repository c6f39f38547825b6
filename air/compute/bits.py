"""Bit lengths and bare pointers for kernels that work bit by bit; numba has no fast way to either."""

from __future__ import annotations

from llvmlite import ir
from numba.core import types

from air.compute.compile import inline, intrinsic


@intrinsic
def _leading_zeros(typing_context, value):
    def generate(context, builder, signature, values):
        return builder.ctlz(values[0], ir.Constant(ir.IntType(1), 0))  # 0: defined for zero, too

    return types.int64(types.int64), generate


@inline
def bit_length(value):
    """The number of bits of |value|, as `int.bit_length`."""
    return 64 - _leading_zeros(abs(value))


@intrinsic
def pointer_to(typing_context, array):
    """The address of an array's first element, which can be indexed.

    Kernels that pass arrays on count references, which costs time where a call takes nanoseconds; pointers are not
    counted. Nothing checks the index, and the caller keeps the array alive.
    """

    def generate(context, builder, signature, values):
        return context.make_array(signature.args[0])(context, builder, values[0]).data

    return types.CPointer(array.dtype)(array), generate
