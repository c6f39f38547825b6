"""Symmetric convolutions of image planes with register vectors: building blocks of kernels.

They emit LLVM code, since they are unrolled over the window's weights.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from air.compute.compile import LANES, intrinsic
from air.compute.simd import address_of, call_vector_function, constant_vector, shuffle, vector


def _symmetric_sum(builder, taps, weights):
    """Σ weights[k] · taps[k] for weights that read the same backwards; `taps` has an odd number of vectors."""
    half = len(taps) // 2
    total = builder.fmul(taps[half], constant_vector(weights[half]))
    for k in range(half):
        pair = builder.fadd(taps[k], taps[-1 - k])
        total = call_vector_function(builder, "fmuladd", pair, constant_vector(weights[k]), total)
    return total


def define_row_loader(count: int):
    """An intrinsic that loads `count` vectors, `stride` floats apart, as a tuple."""

    @intrinsic
    def load_rows(typing_context, array, offset, stride):
        result: Any = types.UniTuple(vector, count)

        def generate(context, builder, signature, values):
            array_value, offset_value, stride_value = values
            array_type, offset_type, stride_type = signature.args
            position = context.cast(builder, offset_value, offset_type, types.intp)
            step = context.cast(builder, stride_value, stride_type, types.intp)
            rows = []
            for _ in range(count):
                address = address_of(context, builder, array_type, array_value, position, types.intp)
                rows.append(builder.load(address, align=4))
                position = builder.add(position, step)
            return context.make_tuple(builder, result, rows)

        return result(array, offset, stride), generate

    return load_rows


@intrinsic
def multiply_rows(typing_context, left, right):
    """Elementwise product of two tuples of vectors."""

    def generate(context, builder, signature, values):
        count = signature.return_type.count
        products = [
            builder.fmul(builder.extract_value(values[0], k), builder.extract_value(values[1], k)) for k in range(count)
        ]
        return context.make_tuple(builder, signature.return_type, products)

    return left(left, right), generate


def define_column_convolution(weights: tuple[float, ...]):
    """An intrinsic that convolves down the rows of a tuple and stores every result that has all its rows in the tuple.

    `store_convolved(array, offset, stride, rows)` stores len(rows) - len(weights) + 1 vectors, `stride` floats apart.
    """

    @intrinsic
    def store_convolved(typing_context, array, offset, stride, rows):
        def generate(context, builder, signature, values):
            array_value, offset_value, stride_value, rows_value = values
            array_type, offset_type, stride_type, rows_type = signature.args
            inputs = [builder.extract_value(rows_value, k) for k in range(rows_type.count)]
            position = context.cast(builder, offset_value, offset_type, types.intp)
            step = context.cast(builder, stride_value, stride_type, types.intp)
            for first in range(len(inputs) - len(weights) + 1):
                result = _symmetric_sum(builder, inputs[first : first + len(weights)], weights)
                address = address_of(context, builder, array_type, array_value, position, types.intp)
                builder.store(result, address, align=4)
                position = builder.add(position, step)
            return context.get_dummy_value()

        return types.none(array, offset, stride, rows), generate

    return store_convolved


def define_row_convolution(weights: tuple[float, ...], shuffled: int):
    """An intrinsic `convolve(array, offset)`: convolution along a row, for the vector at an aligned offset.

    The `shuffled` nearest neighbours on each side are cut out of registers; those farther away are loaded.
    A load that straddles two cache lines occupies the load ports twice, a shuffle one of the arithmetic ports once:
    sharing the work keeps both busy.
    """
    half = len(weights) // 2

    @intrinsic
    def convolve(typing_context, array, offset):
        def generate(context, builder, signature, values):
            array_value, offset_value = values
            array_type, offset_type = signature.args
            origin = context.cast(builder, offset_value, offset_type, types.intp)

            def load_at(shift):
                position = builder.add(origin, ir.Constant(origin.type, shift))
                address = address_of(context, builder, array_type, array_value, position, types.intp)
                return builder.load(address, align=4)

            middle = load_at(0)
            before, after = load_at(-LANES), load_at(LANES)

            def neighbour(shift):
                if abs(shift) > shuffled:
                    return load_at(shift)
                if shift < 0:
                    return shuffle(builder, before, middle, range(LANES + shift, 2 * LANES + shift))
                return shuffle(builder, middle, after, range(shift, LANES + shift)) if shift else middle

            taps = [neighbour(shift) for shift in range(-half, half + 1)]
            return _symmetric_sum(builder, taps, weights)

        return vector(array, offset), generate

    return convolve
