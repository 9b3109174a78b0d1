"""Better codes and scales for a weight that is quantized already, by the output error tr((Ŵ - W)ᵀ H (Ŵ - W)).

Two steps take turns. Given the codes, the error of an output column is a quadratic function of the scales of all its
groups, and its minimum solves a small linear system (that is the scale of one group in LDLQ-like methods, here for all
of them jointly). Given the scales, coordinate descent goes once over the input rows and moves each code to where it is
best with all others fixed (as in Behdin et al. 2023, "QuantEase", arXiv:2309.01885). Neither step can raise the error,
apart from the rounding of the scales to their storage dtype, which is checked for.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics.affine import Qparams, decode, encode, per_code
from jaxquant.numerics.spec import QuantSpec

RIDGE = 1e-6  # of the mean diagonal; groups whose inputs are always zero make the system singular
ROWS = 64  # whose residual is computed at once
COLUMNS = 128  # whose systems are set up at once


def refine(
    w: jax.Array, gram: jax.Array, codes: jax.Array, qparams: Qparams, spec: QuantSpec, rounds: int
) -> tuple[jax.Array, Qparams]:
    """Improves codes and scales.

    Args:
      w: float `[K, N]`.
      gram: H, `[K, K]`, in the dtype of w.
      codes: int8 `[K, N]`.
      qparams: scales and zero points `[G, N]`, one per channel or group; zero points stay as they are.
      spec: of the codes.
      rounds: how often both steps are taken.

    Returns:
      codes and qparams with no larger an error in any column.
    """

    def round_of(_, state):
        codes, scale = state
        scale = refit_scales(w, gram, codes, (scale, qparams[1]))
        return descend(w, gram, codes, (scale, qparams[1]), spec), scale

    codes, scale = lax.fori_loop(0, rounds, round_of, (codes, qparams[0]))
    return codes, (scale, qparams[1])


def refit_scales(w: jax.Array, gram: jax.Array, codes: jax.Array, qparams: Qparams) -> jax.Array:
    """The scales `[G, N]` with the smallest output error for given codes; a column keeps its own if that is no better.

    With a_g the codes of group g (less the zero point, and zero elsewhere), ŵ = Σ_g s_g a_g, so that
    Σ_h (a_gᵀ H a_h) s_h = a_gᵀ H w. Where a scale of that solution is not positive, a column goes a part of the way.
    """
    scale, zero_point = qparams
    groups, k = scale.shape[0], len(w)
    ones = jnp.ones_like(scale, w.dtype)
    steps = decode(codes, *per_code(ones, zero_point, codes.shape, 1), w.dtype)
    target = _product(gram, w)

    def best(args):  # [K, n] columns
        steps, target, old = args
        grouped = steps.reshape(groups, k // groups, -1)
        images = jnp.einsum("kgi,gin->kgn", gram.reshape(k, groups, -1), grouped, precision=lax.Precision.HIGHEST)
        images = images.reshape(groups, k // groups, groups, -1)
        matrix = jnp.einsum("gin,gihn->ngh", grouped, images, precision=lax.Precision.HIGHEST)
        right = jnp.einsum("gin,gin->ng", grouped, target.reshape(grouped.shape), precision=lax.Precision.HIGHEST)
        ridge = (
            RIDGE * jnp.mean(jnp.diagonal(matrix, axis1=1, axis2=2), -1)[:, None, None] * jnp.eye(groups, dtype=w.dtype)
        )
        # the ridge pulls towards the old scales, not towards zero
        right = right - jnp.einsum("ngh,hn->ng", matrix, old, precision=lax.Precision.HIGHEST)
        change = jnp.linalg.solve(matrix + ridge, right[..., None])[..., 0].T
        reach = jnp.min(jnp.where(change < 0, -0.9 * old / change, 1), 0)  # as far as all scales stay positive
        new = (old + jnp.minimum(reach, 1) * change).astype(scale.dtype).astype(w.dtype)

        def error(s):  # up to a constant
            both = jnp.einsum("gn,ngh,hn->n", s, matrix, s, precision=lax.Precision.HIGHEST)
            return both - 2 * jnp.einsum("gn,gin,gin->n", s, grouped, target.reshape(grouped.shape))

        return jnp.where(error(new) < error(old), new, old)

    new = _by_columns(best, (steps, target, scale.astype(w.dtype)))
    return new.astype(scale.dtype)


def descend(w: jax.Array, gram: jax.Array, codes: jax.Array, qparams: Qparams, spec: QuantSpec) -> jax.Array:
    """Codes after each row of them was moved, in order, to where the output error is smallest with all others fixed."""
    scale, zero_point = per_code(*qparams, codes.shape, 1)
    rows = min(ROWS, len(w))
    pad = -len(w) % rows  # rows of padding have no input, and stay as they are
    gram = jnp.pad(gram, (0, pad))
    padded = jax.tree.map(lambda a: jnp.pad(a, ((0, pad), (0, 0)), mode="edge"), (w, codes, scale, zero_point))
    w, codes, scale, zero_point = padded
    error = decode(codes, scale, zero_point, w.dtype) - w

    def block(b, state):
        error, codes = state
        take = functools.partial(lax.dynamic_slice_in_dim, start_index=b * rows, slice_size=rows)
        inputs = take(gram)
        own = lax.dynamic_slice_in_dim(inputs, b * rows, rows, 1)
        parts = jax.tree.map(take, (w, scale, zero_point))

        def row(i, state):
            gradient, error, codes = state
            at = functools.partial(lax.dynamic_index_in_dim, index=i, keepdims=False)
            wi, si, zi = jax.tree.map(at, parts)
            slope = at(own)[i]
            move = jnp.where(slope > 0, at(gradient) / jnp.where(slope > 0, slope, 1), 0)
            code = jnp.where(slope > 0, encode(wi + at(error) - move, si, zi, spec), at(codes))
            new = decode(code, si, zi, w.dtype) - wi
            gradient += at(own)[:, None] * (new - at(error))
            return gradient, error.at[i].set(new), codes.at[i].set(code)

        state = _product(inputs, error), take(error), take(codes)
        _, new_error, new_codes = lax.fori_loop(0, rows, row, state)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=b * rows, axis=0)
        return put(error, new_error), put(codes, new_codes)

    _, codes = lax.fori_loop(0, len(w) // rows, block, (error, codes))
    return codes[: len(codes) - pad]


def _by_columns(fn, arrays):
    """`fn` of arrays `[·, N]`, COLUMNS of them at a time."""
    n = arrays[0].shape[1]
    width = min(COLUMNS, n)
    pad = -n % width
    stacked = jax.tree.map(
        lambda a: jnp.moveaxis(jnp.pad(a, ((0, 0), (0, pad)), mode="edge").reshape(len(a), -1, width), 1, 0), arrays
    )
    out = jnp.moveaxis(lax.map(fn, stacked), 0, 1)
    return out.reshape(len(out), -1)[:, :n]


def _product(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
