"""Products on a CPU with weights `[*out, K]` that are prepared for it: sums of integers, for rounded and float inputs.

XLA multiplies 8-bit integers fast on a CPU (four rows and more, both operands with K last), and floats with dequantized
codes slowly, because the dequantized weight goes to memory and back. So few rows of floats are written as fixed-point
numbers, whose digits are 8-bit integers,

    x ≈ u (d₀ + d₁ / 254 + d₂ / 254²),    u = max|x| / 127 of a row (in a group),    |d| ≤ 127,

and the digits are multiplied as more rows of one product of integers, which is exact. What is rounded is x, after its
last digit, by at most half of u / 254²: about 2⁻²⁴ of the largest entry, or 2⁻¹⁶ with the two digits that bfloat16 is
given. (Splitting floats into slices whose products are exact: Ozaki et al. 2012, "Error-free transformations of matrix
multiplication by using fast routines of matrix multiplication and its applications".)

For many rows a block of outputs after the other is dequantized, and multiplied while it is in the cache.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels import int8, reference
from jaxquant.numerics.activations import encode_input
from jaxquant.numerics.affine import decode
from jaxquant.numerics.prepared import RUN, both_halves
from jaxquant.numerics.qtensor import QTensor

BASE = 254  # between digits: the remainder of one, at most half, is at most 127 of the next
DIGITS = {"float32": 3, "float16": 3, "bfloat16": 2}
FEWEST_ROWS = 4  # of integers: XLA takes longer for one, two or three
MOST_ROWS = 24  # of float inputs that are split into digits
OUTPUTS = 256  # that are dequantized at once


def declines(x: jax.Array, q: QTensor) -> str | None:
    """Why this implementation cannot run, or None."""
    activations, size = q.spec.activations, math.prod(q.in_shape)
    if q.prepared is None or q.prepared.platform != "cpu":
        return "the weight is not prepared for a CPU"
    if q.outlier_weight is not None:
        return "outliers are not told apart"
    if activations is not None and not activations.symmetric:
        return "the inputs have zero points"
    if x.dtype.name not in DIGITS:
        return f"{x.dtype.name} has no digits"
    group = size // q.spec.num_groups(size)
    if group % q.prepared.run(q.spec.bits):
        return f"groups of {group} are no whole runs of {RUN}"
    if group > int8.LARGEST_GROUP:
        return f"int32 does not hold sums of more than {int8.LARGEST_GROUP} products"
    return None


def matmul(x: jax.Array, q: QTensor, preferred_element_type, precision) -> jax.Array:
    """As `reference.matmul`, whose derivative it has; `precision` is that of the derivative."""
    return reference.with_derivative(_matmul, x, q, preferred_element_type, precision)


def _matmul(x: jax.Array, q: QTensor, preferred_element_type) -> jax.Array:
    lead = x.shape[:-2]
    x, static = reference.prepared(x, q)
    t, z = jax.tree.map(lambda a: a.reshape(*lead, a.shape[len(lead)], -1), (q.scale, q.zero_point))
    w = q.values.reshape(*lead, -1, q.values.shape[-1])
    layout = _Layout(q.spec.bits, q.prepared)
    if q.spec.activations is not None:
        a, unit, _ = encode_input(x, static, q.spec.activations)
        unit = jnp.broadcast_to(unit, (*x.shape[:-1], 1)).astype(jnp.float32)
        y = _each(functools.partial(_integers, layout), lead)(a, unit, w, t, z)
    else:
        call = _by_digits if x.shape[-2] <= MOST_ROWS else _by_blocks
        y = _each(functools.partial(call, layout), lead)(x, w, t, z)
    finite = jnp.all(jnp.isfinite(x), -1, keepdims=True)  # no digit stands for NaN or infinity
    y = jnp.where(finite, y, jnp.nan).astype(preferred_element_type or x.dtype)
    return y.reshape(*x.shape[:-1], *q.values.shape[len(lead) : -1])


class _Layout(NamedTuple):
    """How the codes of a weight lie."""

    bits: int
    prepared: Any

    @property
    def halves(self) -> bool:
        return self.prepared.shares_bytes(self.bits)


def _each(fn: Callable, lead: tuple[int, ...]) -> Callable:
    """`fn` of matrices, for stacks of them: one after the other, as XLA has no fast product of stacks of integers."""
    for _ in lead:
        fn = functools.partial(lambda inner, *stacks: lax.map(lambda one: inner(*one), stacks), fn)
    return fn


def _integers(layout: _Layout, a, unit, w, t, z) -> jax.Array:
    """Σ_g u t_g Σ_k a_k (c_k - z_g), float32 `[R, N]`: the sum over the channels of each group, and over groups.

    Args:
      a: int8 `[R, K]`.
      unit: u, float32 `[R, G]`, or `[R, 1]` for all groups.
      w: codes `[N, K]`, or `[N, K/2]` where they share bytes.
      t, z: scales and zero points `[G, N]`, or `[1, 1]`; z is None if symmetric.
    """
    if len(a) < FEWEST_ROWS:
        a, unit, rows = *(jnp.pad(b, ((0, FEWEST_ROWS - len(b)), (0, 0))) for b in (a, unit)), len(a)
        return _integers(layout, a, unit, w, t, z)[:rows]
    halves, groups = layout.halves, len(t)
    size = a.shape[1] // groups

    def group(g):
        ag = lax.dynamic_slice_in_dim(a, g * size, size, 1)
        width = size // 2 if halves else size
        total = _dot(ag, lax.dynamic_slice_in_dim(w, g * width, width, 1), halves)
        if z is not None:
            total -= z[g].astype(jnp.int32) * jnp.sum(ag, 1, keepdims=True, dtype=jnp.int32)
        u = unit[:, g] if unit.shape[1] > 1 else unit[:, 0]
        return total.astype(jnp.float32) * (u[:, None] * t[g].astype(jnp.float32))

    if groups == 1:
        return group(0)
    return lax.fori_loop(1, groups, lambda g, y: y + group(g), group(0))


def _dot(a, w, halves: bool) -> jax.Array:
    if not halves:
        return _contract_last(a, w)
    runs = a.reshape(len(a), -1, 2, RUN // 2)
    low, high = (runs[:, :, i].reshape(len(a), -1) for i in (0, 1))
    return _contract_last(low, both_halves(w)[0]) + _contract_last(high, both_halves(w)[1])


def _contract_last(a, b) -> jax.Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def _by_digits(layout: _Layout, x, w, t, z) -> jax.Array:
    groups, count = len(t), DIGITS[x.dtype.name]
    rest = x.astype(jnp.float32).reshape(len(x), groups, -1)
    largest = jnp.max(jnp.abs(rest), -1, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1) / 127
    rest, digits, units = rest / unit, [], []
    for i in range(count):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.int8).reshape(x.shape))
        units.append(unit[..., 0] / float(BASE) ** i)
        rest = (rest - digit) * BASE
    y = _integers(layout, jnp.concatenate(digits), jnp.concatenate(units), w, t, z)
    return jnp.sum(y.reshape(count, *x.shape[:1], -1), 0)


def _by_blocks(layout: _Layout, x, w, t, z) -> jax.Array:
    n = len(w)
    size = OUTPUTS if n % OUTPUTS == 0 else n
    t, z = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(a), n)), (t, z))

    def block(start):
        codes = layout.prepared.codes(lax.dynamic_slice_in_dim(w, start, size), layout.bits, 1)
        qparams = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, size, 1).T[:, :, None], (t, z))
        dense = decode(codes.reshape(size, len(t), -1), *qparams).reshape(size, -1).astype(x.dtype)
        return lax.dot_general(x, dense, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    y = lax.map(block, jnp.arange(0, n, size))  # [blocks, T, size]
    return jnp.moveaxis(y, 0, 1).reshape(len(x), n)
