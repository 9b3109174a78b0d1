"""The Mosaic TPU program of `kernels.mosaic_tpu`: floats, which it may round, times int4 or int8 weights.

A tile of the result is summed over K in chunks, whose codes enter the matrix unit as they are:

    per channel    the sum is scaled once, when it is complete
    per group      post-scaled: a chunk is a group, and its sum is scaled
                   pre-scaled: weights are scaled before they are multiplied, and a chunk is several groups

The input's rows stay in fast memory, with all of K, for all tiles of outputs. Where they are to be rounded, that is
done for the first of these tiles, and the codes are kept: integers, or the same numbers as bfloat16 if they are
multiplied with weights that were scaled.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxquant.kernels.tuning import TPU_LANES, TpuTiles
from jaxquant.numerics.affine import encode, half_range_to_scale
from jaxquant.numerics.spec import QuantSpec

CHUNK = 512  # channels that are multiplied at a time, at most, unless a group is longer
UNROLLED = 32  # chunks, at most
UNROLLED_ROWS = 2048  # tokens of all unrolled chunks together, beyond a single one: the program's size grows with them


def product(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    tiles: TpuTiles,
    dtype,
    *,
    rounded: QuantSpec | None = None,
    pre_scaled: bool = False,
    interpret=False,
) -> jax.Array:
    """`x · ((values - zero) · scale)`, summed in float32; in int32 within a scale if x is rounded.

    Args:
      x: bfloat16 `[S, M, K]`, or float32 if it is rounded; S stacks independent products.
      values: int4 or int8 `[S, K, N]`.
      scale: bfloat16 or float32 `[S, G, N]`, for groups that are multiples of 128.
      zero: int8 `[S, G, N]`, or None.
      tiles: how the product is cut; `tile_k` divides K, and holds whole groups unless there is one for all of K.
      dtype: of the result, bfloat16 or float32.
      rounded: how rows of x are rounded, symmetrically, each in a range of its own; None leaves them as they are.
      pre_scaled: whether weights are scaled, and rounded to the dtype of x, before they are multiplied.
      interpret: an `InterpretParams` for tests; False compiles.

    Returns:
      `[S, M, N]`.
    """
    (stack, m, k), (_, groups, n) = x.shape, scale.shape
    x = jnp.pad(x, ((0, 0), (0, -m % tiles.tile_m), (0, 0)))
    rows, bits = x.shape[1], jnp.iinfo(values.dtype).bits
    plan = _Plan(tiles, k, groups, zero is not None, rounded, pre_scaled)
    qparams = [a.reshape(stack, -1, plan.scales, n) for a in (scale, zero) if a is not None]
    of_step = pl.BlockSpec(
        (None, None, plan.scales, tiles.tile_n), lambda s, i, j, step: (s, 0 if groups == 1 else step, 0, j)
    )
    out = pl.pallas_call(
        functools.partial(_tile, plan),
        grid=(stack, rows // tiles.tile_m, pl.cdiv(n, tiles.tile_n), plan.steps),
        in_specs=[
            pl.BlockSpec((None, tiles.tile_m, k), lambda s, i, j, step: (s, i, 0)),
            pl.BlockSpec((None, tiles.tile_k, tiles.tile_n), lambda s, i, j, step: (s, step, j)),
            *[of_step] * len(qparams),
        ],
        out_specs=pl.BlockSpec((None, tiles.tile_m, tiles.tile_n), lambda s, i, j, step: (s, i, j)),
        out_shape=jax.ShapeDtypeStruct((stack, rows, n), dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        scratch_shapes=plan.scratch(),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary" if rounded else "parallel", "arbitrary"),
            vmem_limit_bytes=tiles.memory,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * stack * rows * k * n,
            bytes_accessed=values.size * bits // 8 + sum(a.nbytes for a in (x, *qparams)) + 4 * stack * rows * n,
            transcendentals=0,
        ),
        name=f"jaxquant_w{bits}a{16 if rounded is None else rounded.bits}",
        interpret=interpret,
    )(x, values, *qparams)
    return out[:, :m]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a program's text depends on."""

    tiles: TpuTiles
    k: int
    groups: int
    has_zero: bool
    rounded: QuantSpec | None
    pre_scaled: bool

    @property
    def steps(self) -> int:
        """Along K, of a tile of the result."""
        return self.k // self.tiles.tile_k

    @property
    def scales(self) -> int:
        """Groups of one step."""
        return max(1, self.groups // self.steps)

    @property
    def chunk(self) -> int:
        """Channels that are multiplied at a time."""
        group = self.k // self.groups
        if self.groups > 1 and not self.pre_scaled:
            return group
        unit = TPU_LANES if self.groups == 1 else group
        return max((c for c in range(unit, CHUNK + 1, unit) if self.tiles.tile_k % c == 0), default=unit)

    def scratch(self) -> list:
        """Sums, scales, zero points if there are any, and if inputs are rounded their codes and scales."""
        tile_m, tile_n = self.tiles.tile_m, self.tiles.tile_n
        total = pltpu.VMEM((tile_m, tile_n), jnp.int32 if self.rounded and self.groups == 1 else jnp.float32)
        qparams = pltpu.VMEM((self.scales, 1, tile_n), jnp.float32)  # indexed in a loop: only leading axes may be
        integers = jnp.bfloat16 if self.pre_scaled else jnp.int8  # both hold codes
        codes = [pltpu.VMEM((tile_m, self.k), integers), pltpu.VMEM((tile_m, TPU_LANES), jnp.float32)]
        return [total, qparams, *[qparams] * self.has_zero, *(codes if self.rounded else [])]


def _tile(plan: _Plan, x_ref, w_ref, s_ref, *refs) -> None:
    """One step along K of one tile."""
    given, (out_ref, total, *kept) = refs[: plan.has_zero], refs[plan.has_zero :]
    qparams, rounded_rows = kept[: 1 + plan.has_zero], kept[1 + plan.has_zero :]
    outputs, step = pl.program_id(2), pl.program_id(3)
    if plan.rounded is not None:
        pl.when((outputs == 0) & (step == 0))(functools.partial(_round_rows, plan.rounded, x_ref, *rounded_rows))
    rows = rounded_rows[0] if rounded_rows else x_ref

    @pl.when(step == 0)
    def _start():
        total[...] = jnp.zeros_like(total)

    for ref, source in zip(qparams, (s_ref, *given), strict=True):
        ref[...] = source[...].astype(ref.dtype)[:, None]

    def add(i):
        total[...] += _chunk(plan, rows, w_ref, qparams, step * plan.tiles.tile_k, i)

    _repeat(plan.tiles.tile_k // plan.chunk, max(1, min(UNROLLED, UNROLLED_ROWS // plan.tiles.tile_m)), add)

    @pl.when(step == plan.steps - 1)
    def _end():
        y = total[...].astype(jnp.float32)
        if plan.groups == 1:
            y *= qparams[0][0]
        if rounded_rows:
            y *= rounded_rows[1][:, :1]
        out_ref[...] = y.astype(out_ref.dtype)


def _chunk(plan: _Plan, rows, w_ref, qparams, start, i):
    """The product of chunk i of the step that begins at channel `start`; scaled, but where that is done at the end."""
    x = rows[:, pl.ds(pl.multiple_of(start + i * plan.chunk, plan.chunk), plan.chunk)]
    w = w_ref[pl.ds(pl.multiple_of(i * plan.chunk, plan.chunk), plan.chunk), :]
    groups = 1 if plan.groups == 1 else plan.chunk * plan.groups // plan.k
    at = pl.ds(i * groups if plan.groups > 1 else 0, groups)
    scale, *zero = [ref[at] for ref in qparams]  # [groups, 1, N]
    if plan.pre_scaled:
        steps = w.astype(jnp.float32).reshape(groups, -1, w.shape[1])
        if zero:
            steps -= zero[0]
        w = (steps * scale).reshape(w.shape).astype(x.dtype)
    elif plan.rounded is not None:
        w = w.astype(jnp.int8)
    summed = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    part = lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=summed)
    if plan.pre_scaled:
        return part
    if zero:
        part -= jnp.sum(x.astype(summed), 1, keepdims=True) * zero[0][0].astype(summed)
    return part if plan.groups == 1 else part.astype(jnp.float32) * scale[0]


def _round_rows(spec: QuantSpec, x_ref, codes, unit) -> None:
    """The codes of rows, and what they are multiples of: NaN for a row with an input that no code stands for."""
    x = x_ref[...].astype(jnp.float32)
    scale = half_range_to_scale(jnp.max(jnp.abs(x), 1, keepdims=True), spec, x_ref.dtype)
    codes[...] = encode(x, scale, None, spec).astype(codes.dtype)
    finite = jnp.min(jnp.where(jnp.isfinite(x), 1.0, 0.0), 1, keepdims=True)
    unit[...] = jnp.broadcast_to(jnp.where(finite > 0, scale.astype(jnp.float32), jnp.nan), unit.shape)


def _repeat(count: int, unrolled: int, body) -> None:
    """Runs `body(i)` for each i, in a loop over as many of them at a time as divide `count`, at most `unrolled`."""
    unrolled = max(u for u in range(1, unrolled + 1) if count % u == 0)

    def some(i, _):
        for u in range(unrolled):
            body(i * unrolled + u)
        return ()

    if unrolled == count:
        some(0, ())
    else:
        lax.fori_loop(0, count // unrolled, some, ())
