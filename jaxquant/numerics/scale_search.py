"""Scales that clip: smaller than the extremes ask for, where that brings the rounded weights closer.

With few bits the steps are wide, and it pays to cut off the largest weights so that all others get narrower ones. The
search is that of GPTQ's original code (`mse` there): shrink the range of each group step by step and keep the best.
What is the best can be measured in three ways:

    mse       Σ_k δ_k²            the weights themselves
    diagonal  Σ_k H_kk δ_k²       each weight by the mean square of its input
    output    Σ_jk δ_j H_jk δ_k   the output, as far as the group itself makes it (as AWQ's clip search does; per
                                  channel, all of it)
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics.affine import Qparams, choose_qparams, decode, encode, per_code
from jaxquant.numerics.qtensor import QTensor
from jaxquant.numerics.spec import QuantSpec, compute_dtype, with_scale_dtype

Clip = Literal["mse", "diagonal", "output"]

SHRINKS = 32  # ranges that are tried, the whole one first
SMALLEST = 0.4  # beyond the last of them


def check_clip(clip: str | None) -> None:
    """Raises ValueError unless it is one of `Clip`, or None."""
    if clip is not None and clip not in get_args(Clip):
        raise ValueError(f"clip={clip!r} is not one of {', '.join(get_args(Clip))}, or None for none")


def find_qparams(w: jax.Array, spec: QuantSpec, clip: Clip | None, gram: jax.Array | None) -> Qparams:
    """Scales and zero points of rounding to nearest.

    Args:
      w: float `[K, N]`.
      spec: of the codes.
      clip: how the error is measured that they make smallest; None takes the extremes.
      gram: H, `[K, K]`; not read without `clip`, nor for "mse".
    """
    if clip is None:
        return choose_qparams(w, spec)

    def error(qparams):
        scale, zero_point = per_code(qparams[0], qparams[1], w.shape, 1)
        delta = decode(encode(w, scale, zero_point, spec), scale, zero_point, w.dtype) - w
        groups, columns = qparams[0].shape
        by_group = _group_errors(delta, groups, clip, gram)
        return by_group if columns == w.shape[1] else jnp.sum(by_group, 1, keepdims=True)

    def shrink(i, best):
        share = 1 - i.astype(w.dtype) * ((1 - SMALLEST) / SHRINKS)
        qparams = choose_qparams(w * share, spec)
        found = error(qparams)
        return jax.tree.map(lambda new, old: jnp.where(found < best[0], new, old), (found, qparams), best)

    whole = choose_qparams(w, spec)
    return lax.fori_loop(1, SHRINKS, shrink, (error(whole), whole))[1]


def clipped(w: jax.Array, spec: QuantSpec, clip: Clip | None, gram: jax.Array | None) -> QTensor:
    """`w` `[K, N]` rounded to nearest, with the scales of `find_qparams`; computes in the dtype of `gram`, if given."""
    wide = w.astype(compute_dtype(w.dtype) if gram is None else gram.dtype)
    full = with_scale_dtype(spec, w.dtype)
    scale, zero_point = find_qparams(wide, full, clip, gram)
    codes = encode(wide, *per_code(scale, zero_point, w.shape, 1), full)
    return QTensor.from_codes(codes, scale, zero_point, spec, dtype=w.dtype)


def _group_errors(delta: jax.Array, groups: int, clip: Clip, gram: jax.Array | None) -> jax.Array:
    """The error `[groups, N]` of each group."""
    grouped = delta.reshape(groups, -1, delta.shape[1])
    size = grouped.shape[1]
    if clip == "mse" or gram is None:
        return jnp.sum(jnp.square(grouped), 1)
    if clip == "diagonal":
        return jnp.sum(jnp.square(grouped) * jnp.diagonal(gram).reshape(groups, size, 1), 1)
    blocks = jnp.diagonal(gram.reshape(groups, size, groups, size), axis1=0, axis2=2)  # [size, size, groups]
    images = jnp.einsum("ijg,gjn->gin", blocks, grouped, precision=lax.Precision.HIGHEST)
    return jnp.sum(grouped * images, 1)
