"""A register vector for numba: `LANES` float32 numbers that kernels add, multiply, load and store as one value.

numba does not vectorise the loops of a rasteriser: their lengths vary and their rows may overlap in memory. This
module registers LLVM's `<LANES x float>` as a numba type, so that a kernel says where the vectors are:

    value = fma(load(image, offset), 2.0, splat(1.0))
    store(image, offset, value)

LLVM turns that into AVX-512, AVX2 or NEON code; no compiler is needed. Arithmetic is exact IEEE: nothing is
reordered, and a multiplication is fused with an addition only where `fma` says so. Two calls with the same numbers
therefore give the same bits wherever they stand, which the renderer's promise about thread counts rests on.

The type and its operators are built on `numba.core`, which is private: see `air.compute.compile`.

This module knows nothing of Gaussians or images. Offsets are in floats from an array's first element; loads and
stores are not bounds-checked.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, overload, register_model

from air.compute.compile import LANES, inline, intrinsic

if LANES not in (8, 16):
    raise ValueError(f"AIR_LANES must be 8 or 16, got {LANES}")


# The polynomial for 2ᶠ on |f| <= ½, highest power first: relative error 2e-9 before rounding. The last is exactly 1.
_EXP2_POLYNOMIAL = (
    1.5345810970757157e-4,
    1.3399930903688073e-3,
    9.618489071726799e-3,
    5.550328642129898e-2,
    2.4022646248340607e-1,
    6.931471824645996e-1,
    1.0,
)

_FLOAT = ir.FloatType()
_INT = ir.IntType(32)
_FLOATS = ir.VectorType(_FLOAT, LANES)
_INTS = ir.VectorType(_INT, LANES)


class VectorType(types.Type):
    """The name in numba for `LANES` float32 numbers in a register."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, front_end_type) -> None:
        super().__init__(manager, front_end_type, _FLOATS)


def constant_vector(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [ir.Constant(_FLOAT, value)] * LANES)


def _int_constant(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [ir.Constant(_INT, value)] * LANES)


def shuffle(builder, first, second, lanes):
    """The vector of the given lanes of `first` followed by `second`."""
    mask = ir.Constant(ir.VectorType(_INT, len(lanes)), [ir.Constant(_INT, lane) for lane in lanes])
    return builder.shuffle_vector(first, second, mask)


def _splat(builder, scalar):
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return shuffle(builder, first, undefined, [0] * LANES)


def _as_vector(context, builder, value, numba_type):
    if isinstance(numba_type, VectorType):
        return value
    return _splat(builder, context.cast(builder, value, numba_type, types.float32))


def _as_vectors(context, builder, signature, values):
    return [_as_vector(context, builder, *pair) for pair in zip(values, signature.args, strict=True)]


def _are_operands(*operands) -> bool:
    """Whether these are numbers and vectors, with at least one vector."""
    numbers = (VectorType, types.Float, types.Integer)
    return any(isinstance(t, VectorType) for t in operands) and all(isinstance(t, numbers) for t in operands)


def call_vector_function(builder, name, *vectors):
    """A call of LLVM's function `name` on vectors."""
    function_type = ir.FunctionType(_FLOATS, [_FLOATS] * len(vectors))
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{LANES}f32")
    return builder.call(function, vectors)


def address_of(context, builder, array_type, array, offset, offset_type, pointee=_FLOATS):
    data = context.make_array(array_type)(context, builder, array).data
    element = builder.gep(data, [context.cast(builder, offset, offset_type, types.intp)])
    return builder.bitcast(element, pointee.as_pointer())


# --- Operators ---------------------------------------------------------------------------------------------------


def _define_operator(instruction: str, *operators) -> None:
    @intrinsic
    def apply(typing_context, left, right):
        def generate(context, builder, signature, values):
            return getattr(builder, instruction)(*_as_vectors(context, builder, signature, values))

        return vector(left, right), generate

    def implementation(left, right):
        if _are_operands(left, right):
            return lambda left, right: apply(left, right)
        return None

    for operation in operators:
        overload(operation)(implementation)


_define_operator("fadd", operator.add, operator.iadd)
_define_operator("fsub", operator.sub, operator.isub)
_define_operator("fmul", operator.mul, operator.imul)
_define_operator("fdiv", operator.truediv)


def _define_extremum(comparison: str):
    @intrinsic
    def extremum(typing_context, left, right):
        def generate(context, builder, signature, values):
            left_value, right_value = _as_vectors(context, builder, signature, values)
            return builder.select(builder.fcmp_ordered(comparison, left_value, right_value), left_value, right_value)

        return vector(left, right), generate

    return extremum


# `right` where `left` is not a number: put the safe value on the right.
minimum = _define_extremum("<")
maximum = _define_extremum(">")


def _define_function(name: str):
    @intrinsic
    def function(typing_context, x):
        return vector(x), lambda context, builder, signature, values: call_vector_function(builder, name, *values)

    return function


sqrt = _define_function("sqrt")
floor = _define_function("floor")
ceil = _define_function("ceil")
round_even = _define_function("rint")
absolute = _define_function("fabs")


@intrinsic
def fma(typing_context, a, b, c):
    """The value a · b + c, rounded once where the CPU can."""

    def generate(context, builder, signature, values):
        return call_vector_function(builder, "fmuladd", *_as_vectors(context, builder, signature, values))

    return vector(a, b, c), generate


@intrinsic
def splat(typing_context, scalar):
    """The same number in every lane."""

    def generate(context, builder, signature, values):
        return _as_vector(context, builder, values[0], signature.args[0])

    return vector(scalar), generate


@intrinsic
def lane_numbers(typing_context):
    """0, 1, 2, ..."""

    def generate(context, builder, signature, values):
        return ir.Constant(_FLOATS, [ir.Constant(_FLOAT, float(lane)) for lane in range(LANES)])

    return vector(), generate


@intrinsic
def where_ge(typing_context, key, threshold, x, y):
    """Takes x in the lanes where key >= threshold, else y (also where the key is not a number)."""

    def generate(context, builder, signature, values):
        key_value, bound, yes, no = _as_vectors(context, builder, signature, values)
        return builder.select(builder.fcmp_ordered(">=", key_value, bound), yes, no)

    return vector(key, threshold, x, y), generate


@intrinsic
def exp(typing_context, x):
    """The exponential of x, to about 1e-7 relative; x is clipped to [-87, 87]."""

    def generate(context, builder, signature, values):
        x_value = values[0]
        low, high = constant_vector(-87.0), constant_vector(87.0)
        x_value = builder.select(builder.fcmp_ordered(">", x_value, low), x_value, low)
        x_value = builder.select(builder.fcmp_ordered("<", x_value, high), x_value, high)

        def multiply_add(a, b, c):
            return call_vector_function(builder, "fmuladd", a, b, c)

        # x = n·ln 2 + f. Adding 1.5·2²³ leaves no bits for a fraction, so it rounds to the integer n. ln 2 is
        # subtracted in two parts, the first of which has few enough bits to make n times it exact.
        rounder = constant_vector(12582912.0)
        rounded = multiply_add(x_value, constant_vector(1.44269504088896), rounder)
        n = builder.fsub(rounded, rounder)
        f = multiply_add(n, constant_vector(-0.693359375), x_value)
        f = multiply_add(n, constant_vector(2.12194440e-4), f)
        # exp(f) on |f| <= ln(2)/2: the polynomial of the Cephes library.
        polynomial = constant_vector(1.9875691500e-4)
        for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            polynomial = multiply_add(polynomial, f, constant_vector(coefficient))
        fraction = builder.fadd(multiply_add(builder.fmul(polynomial, f), f, f), constant_vector(1.0))
        # Times 2ⁿ: the last bits of rounder + n are those of n, and are added to the fraction's exponent field.
        power = builder.shl(builder.bitcast(rounded, _INTS), _int_constant(23))
        return builder.bitcast(builder.add(builder.bitcast(fraction, _INTS), power), _FLOATS)

    return vector(x), generate


@intrinsic
def exp2_unclipped(typing_context, x):
    """Two to the power x, to about 1e-7 relative, for x within ±126; an arbitrary number for other x."""

    def generate(context, builder, signature, values):
        # x = n + f with |f| <= ½, by adding a number that leaves no bits for a fraction; see `exp`.
        rounder = constant_vector(12582912.0)
        rounded = builder.fadd(values[0], rounder)
        f = builder.fsub(values[0], builder.fsub(rounded, rounder))
        polynomial = constant_vector(_EXP2_POLYNOMIAL[0])
        for coefficient in _EXP2_POLYNOMIAL[1:]:
            polynomial = call_vector_function(builder, "fmuladd", polynomial, f, constant_vector(coefficient))
        power = builder.shl(builder.bitcast(rounded, _INTS), _int_constant(23))
        return builder.bitcast(builder.add(builder.bitcast(polynomial, _INTS), power), _FLOATS)

    return vector(x), generate


# --- Memory ------------------------------------------------------------------------------------------------------


@intrinsic
def load(typing_context, array, offset):
    """The vector at `offset` floats from the start of a float32 array."""

    def generate(context, builder, signature, values):
        return builder.load(
            address_of(context, builder, signature.args[0], values[0], values[1], signature.args[1]), align=4
        )

    return vector(array, offset), generate


@intrinsic
def store(typing_context, array, offset, x):
    """Writes a vector at `offset` floats from the start of a float32 array."""

    def generate(context, builder, signature, values):
        array_value, offset_value, x_value = values
        address = address_of(context, builder, signature.args[0], array_value, offset_value, signature.args[1])
        builder.store(x_value, address, align=4)
        return context.get_dummy_value()

    return types.none(array, offset, x), generate


@intrinsic
def store_as_int(typing_context, array, offset, x):
    """Writes whole numbers, which must fit, at `offset` elements from the start of an int32 array."""

    def generate(context, builder, signature, values):
        array_value, offset_value, x_value = values
        address = address_of(context, builder, signature.args[0], array_value, offset_value, signature.args[1], _INTS)
        builder.store(builder.fptosi(x_value, _INTS), address, align=4)
        return context.get_dummy_value()

    return types.none(array, offset, x), generate


@intrinsic
def store_bytes_in_turn(typing_context, array, offset, x0, x1, x2):
    """Writes x0[0], x1[0], x2[0], x0[1], ... of whole numbers from 0 to 255 at `offset` of a uint8 array."""

    def generate(context, builder, signature, values):
        byte = ir.IntType(8)
        first, second, third = (builder.fptoui(vector, ir.VectorType(byte, LANES)) for vector in values[2:])
        pairs = shuffle(builder, first, second, range(2 * LANES))
        thirds = shuffle(builder, third, third, range(2 * LANES))
        lanes = [lane + start for lane in range(LANES) for start in (0, LANES, 2 * LANES)]
        address = address_of(
            context, builder, signature.args[0], values[0], values[1], signature.args[1], ir.VectorType(byte, 3 * LANES)
        )
        builder.store(shuffle(builder, pairs, thirds, lanes), address, align=1)
        return context.get_dummy_value()

    return types.none(array, offset, x0, x1, x2), generate


@intrinsic
def opaque(typing_context, number):
    """The same integer, hidden from LLVM's analysis.

    A loop whose counter has passed through here is compiled as it is written. LLVM would otherwise unroll it and give
    every address its own counter, which suits long loops; a loop over a dozen rows would end before those counters are
    set up.
    """

    def generate(context, builder, signature, values):
        integer = values[0].type
        return builder.asm(ir.FunctionType(integer, [integer]), "", "=r,0", values, side_effect=False)

    return number(number), generate


@inline
def aligned_scratch(size):
    """A float32 array of zeros that starts a 64-byte cache line, so that whole vectors never straddle two."""
    buffer = np.zeros(size + 16, np.float32)
    start = (-(buffer.ctypes.data >> 2)) & 15
    return buffer[start : start + size]


# --- Across lanes ------------------------------------------------------------------------------------------------


@intrinsic
def lane_sum(typing_context, x):
    """The sum of all lanes, a float32."""

    def generate(context, builder, signature, values):
        total = values[0]
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            low = shuffle(builder, total, total, range(lanes))
            high = shuffle(builder, total, total, range(lanes, 2 * lanes))
            total = builder.fadd(low, high)
        return builder.extract_element(total, ir.Constant(_INT, 0))

    return types.float32(x), generate


@intrinsic
def any_positive(typing_context, x):
    """Whether a lane is above zero."""

    def generate(context, builder, signature, values):
        lanes = builder.fcmp_ordered(">", values[0], constant_vector(0.0))
        mask = builder.bitcast(lanes, ir.IntType(LANES))
        return builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))

    return types.boolean(x), generate


@intrinsic
def add_lane_sums(typing_context, array, offset, x0, x1, x2, x3, x4, x5, x6, x7):
    """Adds the lane sums of eight vectors to array[offset : offset + 8]."""

    def generate(context, builder, signature, values):
        vectors = list(values[2:])
        # Each round adds neighbouring blocks of `width` lanes of two vectors into one vector, halving their number.
        width = 1
        while len(vectors) > 1:
            even = [i if not (i // width) & 1 else LANES + i - width for i in range(LANES)]
            odd = [i + width if not (i // width) & 1 else LANES + i for i in range(LANES)]
            vectors = [
                builder.fadd(shuffle(builder, a, b, even), shuffle(builder, a, b, odd))
                for a, b in zip(vectors[0::2], vectors[1::2], strict=True)
            ]
            width *= 2
        if LANES == 16:
            low = shuffle(builder, vectors[0], vectors[0], range(8))
            high = shuffle(builder, vectors[0], vectors[0], range(8, 16))
            vectors = [builder.fadd(low, high)]
        eight = ir.VectorType(_FLOAT, 8)
        address = address_of(context, builder, signature.args[0], values[0], values[1], signature.args[1], eight)
        builder.store(builder.fadd(builder.load(address, align=4), vectors[0]), address, align=4)
        return context.get_dummy_value()

    return types.none(array, offset, x0, x1, x2, x3, x4, x5, x6, x7), generate
