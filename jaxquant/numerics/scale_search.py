"""Scales that clip: smaller than the extremes ask for, where that brings the rounded weights closer.

With few bits the steps are wide, and it pays to cut off the largest weights so that all others get narrower ones. The
search is that of GPTQ's original code (`mse` there): shrink the range of each group step by step and keep the best.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.numerics.affine import choose_qparams, decode, encode, per_code
from jaxquant.numerics.spec import QuantSpec

SHRINKS = 32  # ranges that are tried, the whole one first
SMALLEST = 0.4  # beyond the last of them


def search_qparams(w: jax.Array, spec: QuantSpec) -> tuple[jax.Array, jax.Array | None]:
    """Scales and zero points of `w` `[K, N]` with the smallest squared error of rounding to nearest."""

    def error(qparams):
        scale, zero_point = per_code(qparams[0], qparams[1], w.shape, 1)
        delta = jnp.square(decode(encode(w, scale, zero_point, spec), scale, zero_point, w.dtype) - w)
        groups, columns = qparams[0].shape
        by_group = jnp.sum(delta.reshape(groups, -1, w.shape[1]), 1)
        return by_group if columns == w.shape[1] else jnp.sum(by_group, 1, keepdims=True)

    def shrink(i, best):
        share = 1 - i.astype(w.dtype) * ((1 - SMALLEST) / SHRINKS)
        qparams = choose_qparams(w * share, spec)
        found = error(qparams)
        return jax.tree.map(lambda new, old: jnp.where(found < best[0], new, old), (found, qparams), best)

    whole = choose_qparams(w, spec)
    return lax.fori_loop(1, SHRINKS, shrink, (error(whole), whole))[1]
