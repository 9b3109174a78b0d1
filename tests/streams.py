"""A small model, and a stream of tokens for it."""

import jax.numpy as jnp
import numpy as np
from checks import check
from functions import Seen, normal


def mlp(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def mlp_params():
    return {"a": normal(16, 24), "b": normal(24, 8)}


def mlp_reference(params, x, see):
    see("a", x)
    y = jnp.tanh(x @ params["a"])
    see("b", y)
    return y @ params["b"]


def check_mlp(stats, rows, position, dropped=0):
    """Compares statistics of `mlp` with those of the given input rows at the given positions of the stream."""
    seen = Seen()
    mlp_reference(mlp_params(), rows, seen)
    for path, k in (("a", 16), ("b", 24)):
        x = seen.inputs[path][()][0][0]
        check(stats.products[path].inputs, {(): (x, position)}, (), k)


def stream(n=24, t=10):
    return np.array(normal(n, t, 16, seed=7))
