"""Loops that are not scans, branches, and functions that call functions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

from functions.cases import SQUARE, B, D, L, T, case, floats, layer, normal, simple_reference
from functions.stacks import (
    LIST_SHARED,
    STACK_NOTED,
    STACKED,
    block,
    list_of,
    list_reference,
    scan,
    stack_of,
    stack_reference,
)


@case(stack_of, stack_reference, **STACKED)
def fori_loop_over_layers(params, x):
    return lax.fori_loop(0, L, lambda i, x: block(layer(params, i), x), x)


@case(stack_of, stack_reference, **STACKED)
def while_loop_over_layers(params, x):
    def body(state):
        i, x = state
        return i + 1, block(jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, i, keepdims=False), params), x)

    return lax.while_loop(lambda s: s[0] < L, body, (0, x))[1]


@case(stack_of, stack_reference, shared=(("gate", "up"),), lookups=STACK_NOTED)
def take_layers(params, x):
    return lax.fori_loop(0, L, lambda i, x: block(jax.tree.map(lambda a: jnp.take(a, i, axis=0), params), x), x)


def repeated_reference(params, x, see):
    steps = 0
    while float(jnp.mean(x * x)) < 4:
        see("w", x, at=steps * B * T + np.arange(B * T))
        x, steps = x + jnp.abs(x @ params["w"]), steps + 1
    return x


@case(SQUARE, repeated_reference)
def while_loop_until(params, x):
    """The number of iterations depends on the data; the weight is a constant of the loop."""
    return lax.while_loop(lambda x: jnp.mean(x * x) < 4, lambda x: x + jnp.abs(x @ params["w"]), x)


@case(SQUARE, lambda p, x, see: simple_reference(p, x, see, lambda y: x + 4 * y))
def loop_with_one_input(params, x):
    """Each of four iterations multiplies the same input, which counts once; the fourth tokens are no new ones."""
    y = lax.fori_loop(0, 4, lambda i, y: y + x.astype("float32") @ params["w"], jnp.zeros_like(x))
    return x + y


def started_late_reference(params, x, see):
    see("w", x, at=B * T + np.arange(B * T))
    return x @ params["w"]


@case(SQUARE, started_late_reference)
def inner_loop_that_starts_late(params, x):
    """The inner loop does not run in the first iteration of the outer one, whose tokens are taken for others."""
    inner = lambda i, y: lax.fori_loop(0, i, lambda _, y: y + x @ params["w"], y)  # noqa: E731
    return lax.fori_loop(0, 2, inner, jnp.zeros_like(x))


def branches_reference(params, x, see):
    if float(jnp.sum(x)) > 0:
        see("a", x)
        y = x @ params["a"]
    else:
        see("b", x)
        y = x @ params["b"]
    see("c", y)
    y = y @ params["c"]
    return jnp.where(jnp.sum(x) > 0, y, -y)


def signed_floats():
    x = floats(1)[0]
    return [x - jnp.mean(x) + 1, x - jnp.mean(x) - 1, x - jnp.mean(x) + 2]


@case(
    lambda: {"a": normal(D, D), "b": normal(D, D, seed=1), "c": normal(D, D, seed=2)},
    branches_reference,
    batches=signed_floats,
)
def cond(params, x):
    p = jnp.sum(x) > 0
    y = lax.cond(p, lambda: x @ params["a"], lambda: x @ params["b"])
    return lax.cond(p, lambda y: y, lambda y: -y, y @ params["c"])


def switch_reference(params, x, see):
    i = int(jnp.clip(jnp.argmax(x[0, 0, :3]), 0, 2))
    if i < 2:
        see("w", x, i)
        return x @ params["w"][i]
    return x


@case(lambda: {"w": normal(2, D, D)}, switch_reference, batches=lambda: floats(4))
def switch(params, x):
    w = params["w"]
    return lax.switch(jnp.argmax(x[0, 0, :3]), [lambda: x @ w[0], lambda: x @ w[1], lambda: x])


@case(stack_of, stack_reference, **STACKED)
def scan_with_cond(params, x):
    def step(x, wi):
        w, i = wi
        return lax.cond(i >= 0, lambda: block(w, x), lambda: x), None

    return lax.scan(step, x, (params, jnp.arange(L)))[0]


@case(stack_of, stack_reference, **STACKED)
def remat_in_scan_in_jit(params, x):
    step = jax.checkpoint(block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable, prevent_cse=False)
    return jax.jit(lambda p, x: lax.scan(lambda x, w: (step(w, x), None), x, p))(params, x)[0]


@case(list_of, list_reference, shared=LIST_SHARED)
def checkpointed(params, x):
    for w in params["layers"]:
        x = jax.checkpoint(block)(w, checkpoint_name(x, "block"))
    return x @ params["head"]


@case(stack_of, stack_reference, **STACKED)
def vmap_over_inputs(params, x):
    return jax.vmap(lambda x: scan(params, x))(x)


@case(SQUARE, simple_reference)
def callbacks(params, x):
    y = x @ params["w"]
    jax.debug.callback(lambda _: None, jnp.sum(y))
    shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
    y = lax.stop_gradient(y)
    y = jax.pure_callback(lambda a: np.asarray(a), shape, y, vmap_method="sequential")
    return io_callback(lambda a: np.asarray(a), shape, y, ordered=True)


@jax.custom_vjp
def reversed_gradient(x):
    return x * 1.0


reversed_gradient.defvjp(lambda x: (x * 1.0, None), lambda _, g: (-3 * g,))


@jax.custom_jvp
def odd_derivative(x):
    return x * x


odd_derivative.defjvp(lambda p, t: (p[0] * p[0], 7 * t[0]))


@case(SQUARE, partial(simple_reference, then=lambda y: odd_derivative(reversed_gradient(y))))
def custom_derivatives_downstream(params, x):
    return odd_derivative(reversed_gradient(x @ params["w"]))


@jax.custom_vjp
def vjp_dot(x, w):
    return x @ w


vjp_dot.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, jnp.einsum("btd,bte->de", r[0], g)))


@jax.custom_jvp
def jvp_dot(x, w):
    return x @ w


jvp_dot.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))


def chain_reference(params, x, see):
    for name in ("a", "b"):
        see(name, x)
        x = x @ params[name]
    return x


@case(lambda: {"a": normal(D, D), "b": normal(D, D, seed=1)}, chain_reference)
def weights_in_custom_derivatives(params, x):
    return jvp_dot(vjp_dot(x, params["a"]), params["b"])
