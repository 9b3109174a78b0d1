"""Weights on the border of two codes, kept from going back and forth between them.

Straight through, the gradient of a weight whose best value lies between two codes points to the border from either
side: it is drawn there, goes back and forth, and ends on one side by chance (Nagel et al. 2022, "Overcoming
Oscillations in Quantization-Aware Training", arXiv:2203.08086). After some hundred steps so many weights do so that the
noise outweighs what is learned. A pull towards the codes holds those whose gradient has no lasting direction; and where
a code is left half a step from its middle, but taken up in the middle, there is no border to go back and forth across.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.affine import decode, per_code
from jaxquant.numerics.layout import from_canonical
from jaxquant.transforms.tracing import compat
from jaxquant.transforms.tracing.interpreter import named_leaves
from jaxquant.transforms.training.ranges import coded, codes_of
from jaxquant.transforms.training.state import QATState, at
from jaxquant.transforms.training.taken import Taken


def dampened(before: Any, params: Any, state: QATState, share: jax.Array) -> Any:
    """The parameters after a step, each rounded weight nearer to what its code stands for.

    Args:
      before, params: the parameters before and after a step.
      state: after it.
      share: float `[]`, the share of its distance that a weight goes; all of it, where its code is not that of before.
    """
    old, named = dict(named_leaves(before)), dict(named_leaves(params))
    for t in state.weights:
        w = named[t.path]

        def run(w, old, own, t=t):
            return _dampened(w, old, own, t, share.astype(w.dtype))

        run = compat.compiler_sharded(run, w, jax.typeof(w).sharding.spec)
        named[t.path] = run(w, old[t.path], at(state.ranges, t.path))
    return jax.tree.unflatten(jax.tree.structure(params), list(named.values()))


def _dampened(w: jax.Array, old: jax.Array, own: dict, t: Taken, share: jax.Array) -> jax.Array:
    codes, scale, zero_point = coded(w, t, own)
    stays = codes == codes_of(old, t, scale, zero_point)
    center = decode(codes, *per_code(scale, zero_point, codes.shape, len(t.out)))
    in_shape = tuple(w.shape[a] for a in t.contract)
    stays, center = (from_canonical(a, t.contract, t.out, in_shape) for a in (stays, center.astype(w.dtype)))
    return jnp.where(stays, w + share * (center - w), center)
