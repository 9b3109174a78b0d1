"""Weights of odd shapes and kinds, and weights that are used again."""

import jax
import jax.numpy as jnp
import numpy as np

from functions.cases import B, D, F, T, act, case, normal


def thin_reference(params, x, see):
    see("narrow", x)
    y = x @ params["narrow"]
    see("wide", y)
    y = act(y @ params["wide"][0])
    see("heads", y)
    y = y @ params["heads"][:, 0]
    see("expert", y, 0)
    y = (y @ params["expert"][0])[..., None]
    see("last", y[..., 0])
    return y[..., 0] @ params["last"][:, 0]


@case(
    lambda: {
        "narrow": normal(D, 1),
        "wide": normal(1, 1, D),
        "heads": normal(D, 1, D),
        "expert": normal(1, D, D, seed=1),
        "last": normal(D, 1, seed=2),
    },
    thin_reference,
    axes={"wide": ((0,), (1, 2)), "heads": ((0,), (1, 2))},
    group=1,
)
def axes_of_size_one(params, x):
    y = x.reshape(-1, D) @ params["narrow"]
    y = act(y @ params["wide"].reshape(1, D))
    y = y @ params["heads"].reshape(D, D)
    y = jnp.einsum("ecd,edf->ecf", y[None], params["expert"])[0]
    return (y @ params["last"].reshape(D)).reshape(B, T)


def used_again_reference(params, x, see):
    see("w", x)
    y = act(x @ params["w"])
    see("w", y)
    z = y @ params["w"] + x @ params["w"]
    see("v", y)
    return z + y @ params["v"]


@case(lambda: {"w": normal(D, D), "v": normal(D, D, seed=1)}, used_again_reference)
def used_again(params, x):
    """One weight reads two inputs, one of them twice."""
    dot = jax.jit(lambda x: x @ params["w"])
    y = act(dot(x))
    return dot(y) + dot(x) + y @ params["v"]


def odd_leaves():
    return {
        "w": normal(D, D),
        "unused": normal(D, D, seed=1),
        "steps": jnp.arange(6).reshape(2, 3),
        "flag": jnp.asarray([[True]]),
        "none": None,
        "key": jax.random.split(jax.random.key(0), (2, 2)),
        "scalar": jnp.float32(2.0),
        "number": 3.0,
        "empty": jnp.zeros((0, D)),
        "numpy": np.ones((D, D), np.float32),
    }


def odd_leaves_reference(params, x, see):
    see("w", x)
    see("numpy", x)
    y = x @ params["w"] * params["scalar"] + x @ jnp.asarray(params["numpy"]) * params["number"]
    return {"y": y + jax.random.uniform(params["key"][1, 0], ()), "n": params["steps"].sum(), "flag": params["flag"]}


@case(odd_leaves, odd_leaves_reference, shared=(("w", "numpy"),))
def leaves_of_every_kind(params, x):
    y = x @ params["w"] * params["scalar"] + x @ jnp.asarray(params["numpy"]) * params["number"]
    return {"y": y + jax.random.uniform(params["key"][1, 0], ()), "n": params["steps"].sum(), "flag": params["flag"]}


def bare_reference(params, x, see):
    see("", x)
    return x @ params


@case(lambda: normal(D, F), bare_reference)
def bare_array(w, x):
    return x @ w
