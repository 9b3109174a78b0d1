"""Weights on the border of two codes, kept from going back and forth between them.

Straight through, the gradient of a weight whose best value lies between two codes points to the border from either
side: it is drawn there, goes back and forth, and ends on one side by chance (Nagel et al. 2022, "Overcoming
Oscillations in Quantization-Aware Training", arXiv:2203.08086). After some hundred steps so many weights do so that the
noise outweighs what is learned.

Two things keep them from it. After each step a weight is pulled towards its code, so that only a gradient with a
lasting direction takes it to the border. (In the paper the pull is a term of the loss; here it stands beside the
optimizer, as decoupled weight decay does, and weights beyond the last code are pulled too.) And a weight that has
crossed a border goes on to the middle of its new code at once, half a step away from it: hysteresis. (The paper freezes
weights that have gone back and forth too often.)
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.numerics.affine import decode, per_code
from jaxquant.numerics.layout import from_canonical
from jaxquant.numerics.spec import compute_dtype
from jaxquant.transforms.tracing import compat
from jaxquant.transforms.tracing.interpreter import named_leaves
from jaxquant.transforms.training.ranges import coded, codes_of
from jaxquant.transforms.training.state import QATState, at
from jaxquant.transforms.training.taken import Taken


def dampened(before: Any, params: Any, state: QATState, share: jax.Array) -> Any:
    """The parameters after a step, each rounded weight that it has moved nearer to what its code stands for.

    Args:
      before, params: the parameters before and after a step.
      state: before it, with the ranges after it; until the ranges are settled, the parameters stay as they are.
      share: float `[]`, the share of its distance that a weight goes; all of it, where its code is not that of before.

    Raises:
      ValueError: a weight has no learned ranges.
    """
    old, named = dict(named_leaves(before)), dict(named_leaves(params))
    begun = state.step >= state.settled
    for t in state.weights:
        if not t.learned:
            raise ValueError(
                f"dampening: the range of '{t.path}' is that of its own extremes, which may not move by themselves; "
                "use jq.LSQ"
            )
        w = named[t.path]

        def run(w, old, own, share, begun, t=t):
            return jnp.where((w != old) & begun, _nearer(w, old, own, share, t), w)

        run = compat.compiler_sharded(run, w, jax.typeof(w).sharding.spec)
        named[t.path] = run(w, old[t.path], at(state.ranges, t.path), share, begun)
    return jax.tree.unflatten(jax.tree.structure(params), list(named.values()))


def _nearer(w: jax.Array, old: jax.Array, own: dict, share: jax.Array, t: Taken) -> jax.Array:
    codes, scale, zero_point = coded(w, t, own)
    stays = codes == codes_of(old, t, scale, zero_point)  # with the same scales: those that have moved cross no border
    center = decode(codes, *per_code(scale, zero_point, codes.shape, len(t.out)), compute_dtype(w.dtype))
    stays, center = (from_canonical(a, t.contract, t.out, t.in_shape) for a in (stays, center))
    wide = w.astype(center.dtype)
    return jnp.where(stays, wide + share.astype(wide.dtype) * (center - wide), center).astype(w.dtype)
