"""Layers one by one, stacked, and over time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from functions.cases import B, D, F, L, T, V, act, case, layer, norm, normal


def stack_of(layers=L):
    return {
        "up": normal(layers, D, F),
        "gate": normal(layers, D, F, seed=1),
        "down": normal(layers, F, D),
        "bias": normal(layers, F, seed=3),
        "scale": 1 + normal(layers, D, seed=4),
    }


def list_of():
    layers = [jax.tree.map(lambda a, i=i: a[i], stack_of()) for i in range(L)]
    return {"layers": layers, "head": normal(D, V)}


def block(w, x):
    h = norm(x, w["scale"])
    return x + (act(h @ w["gate"]) * (h @ w["up"] + w["bias"])) @ w["down"]


def block_reference(w, x, see, path, lead=()):
    h = norm(x, w["scale"])
    see(path + "gate", h, lead)
    see(path + "up", h, lead)
    m = act(h @ w["gate"]) * (h @ w["up"] + w["bias"])
    see(path + "down", m, lead)
    return x + m @ w["down"]


def list_reference(params, x, see):
    for i, w in enumerate(params["layers"]):
        x = block_reference(w, x, see, f"layers/{i}/")
    see("head", x)
    return x @ params["head"]


def stack_reference(params, x, see, step=1):
    for i in range(len(params["up"]))[::step]:
        x = block_reference(layer(params, i), x, see, "", i)
    return x


LIST_SHARED = tuple((f"layers/{i}/gate", f"layers/{i}/up") for i in range(L))


@case(list_of, list_reference, shared=LIST_SHARED)
def list_of_layers(params, x):
    for w in params["layers"]:
        x = block(w, x)
    return x @ params["head"]


@case(list_of, list_reference, shared=LIST_SHARED)
def jitted_pieces(params, x):
    """Every product stands in a jitted function of its own."""
    dot = jax.jit(lambda x, w: jnp.einsum("btd,df->btf", x, w))

    @jax.jit
    def step(w, x):
        h = norm(x, w["scale"])
        return x + dot(act(dot(h, w["gate"])) * (dot(h, w["up"]) + w["bias"]), w["down"])

    for w in params["layers"]:
        x = step(w, x)
    return dot(x, params["head"])


STACK_NOTED = frozenset({"bias", "scale"})  # two axes, so they are followed, and no product
STACKED = {"shared": (("gate", "up"),), "noted": STACK_NOTED}


@case(stack_of, stack_reference, **STACKED)
def scan(params, x):
    return lax.scan(lambda x, w: (block(w, x), None), x, params)[0]


@case(stack_of, partial(stack_reference, step=-1), **STACKED)
def scan_reverse(params, x):
    return lax.scan(lambda x, w: (block(w, x), None), x, params, reverse=True, unroll=2)[0]


@case(lambda: stack_of(1), stack_reference, **STACKED)
def scan_one_layer(params, x):
    return lax.scan(lambda x, w: (block(w, x), None), x, params)[0]


@case(lambda: stack_of(1), stack_reference, **STACKED)
def index_one_layer(params, x):
    return block(layer(params, 0), x)


@case(stack_of, stack_reference, **STACKED)
def stack_indexed(params, x):
    for i in range(L):
        x = block(layer(params, i - L), x)
    return x


@case(stack_of, stack_reference, **STACKED)
def stack_unstacked(params, x):
    for w in zip(*(jnp.unstack(params[k]) for k in sorted(params)), strict=True):
        x = block(dict(zip(sorted(params), w, strict=True)), x)
    return x


@case(stack_of, stack_reference, **STACKED)
def first_layer_apart(params, x):
    """The first layer by index, and the others in a scan over a part of the stack."""
    x = block(layer(params, 0), x)
    return lax.scan(lambda x, w: (block(w, x), None), x, jax.tree.map(lambda a: a[1:], params))[0]


def nested_reference(params, x, see):
    for i in range(2):
        for j in range(3):
            x = block_reference(layer(params, i, j), x, see, "", (i, j))
    return x


NESTED_AXES = {k: ((2,), (3,)) for k in ("gate", "up", "down")}


@case(
    lambda: jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), stack_of(6)),
    nested_reference,
    axes=NESTED_AXES,
    **STACKED,
)
def nested_scan(params, x):
    inner = lambda x, w: (block(w, x), None)  # noqa: E731
    return lax.scan(lambda x, w: lax.scan(inner, x, w), x, params)[0]


@case(lambda: stack_of(6), stack_reference, **STACKED)
def scan_of_blocks(params, x):
    """The stack is cut into blocks of layers, as people do to checkpoint every few layers."""
    blocks = jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), params)
    inner = lambda x, w: (block(w, x), None)  # noqa: E731
    return lax.scan(jax.checkpoint(lambda x, w: lax.scan(inner, x, w)), x, blocks)[0]


def middle_stack():
    return {k: jnp.moveaxis(a, 0, 1) if k in ("gate", "up", "down") else a for k, a in stack_of().items()}


def middle_reference(params, x, see):
    return stack_reference({k: jnp.moveaxis(a, 1, 0) if k in NESTED_AXES else a for k, a in params.items()}, x, see)


@case(middle_stack, middle_reference, axes={k: ((0,), (2,)) for k in NESTED_AXES}, **STACKED)
def layer_axis_in_the_middle(params, x):
    """MaxText keeps `[in, layers, out]` and moves the axis to the front before it scans."""
    fronted = {k: jnp.moveaxis(a, 1, 0) if k in ("gate", "up", "down") else a for k, a in params.items()}
    return lax.scan(lambda x, w: (block(w, x), None), x, fronted)[0]


def rnn_params():
    return {"x": normal(D, D), "h": normal(D, D, seed=1), "out": normal(D, D, seed=2)}


def rnn_reference(params, x, see):
    h, outs = jnp.zeros((B, D)), []
    for t in range(T):
        at = t * B + np.arange(B)  # iterations of a loop over time count on
        see("x", x[:, t], at=at)
        see("h", h, at=at)
        h = act(x[:, t] @ params["x"] + h @ params["h"])
        outs.append(h)
    h = jnp.stack(outs, 1)
    see("out", h)
    return h @ params["out"]


@case(rnn_params, rnn_reference)
def scan_over_time(params, x):
    step = lambda h, x: 2 * (act(x @ params["x"] + h @ params["h"]),)  # noqa: E731
    _, h = lax.scan(step, jnp.zeros((B, D)), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(h, 0, 1) @ params["out"]


def recurrent_layers_reference(params, x, see):
    for i in range(L):
        h, outs = jnp.zeros((B, D)), []
        for t in range(T):
            see("h", h, i, t * B + np.arange(B))
            h = act(x[:, t] + h @ params["h"][i])
            outs.append(h)
        x = jnp.stack(outs, 1)
    return x


@case(lambda: {"h": normal(L, D, D)}, recurrent_layers_reference)
def scan_over_time_in_scan_over_layers(params, x):
    def one(x, w):
        step = lambda h, x: 2 * (act(x + h @ w),)  # noqa: E731
        return lax.scan(step, jnp.zeros((B, D)), x)[1], None

    return jnp.swapaxes(lax.scan(one, jnp.swapaxes(x, 0, 1), params["h"])[0], 0, 1)


def first_state_reference(params, x, see):
    h, outs = params["init"], []
    for t in range(T):
        see("h", h, at=t * B + np.arange(B))
        h = act(x[:, t] + h @ params["h"])
        outs.append(h)
    return jnp.stack(outs)


@case(
    lambda: {"h": normal(D, D), "init": normal(B, D)},
    first_state_reference,
    noted=frozenset({"init"}),
)
def learned_first_state(params, x):
    """A parameter of two axes is carried by the loop; that must not hide the weight in the loop."""
    return lax.scan(lambda h, x: 2 * (act(x + h @ params["h"]),), params["init"], jnp.swapaxes(x, 0, 1))[1]
