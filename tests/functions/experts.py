"""Experts: matrices of one layer, each of which reads other tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from functions.cases import D, E, F, act, case, normal


def expert_inputs(x):
    return jnp.stack([x * (e + 1) for e in range(E)])


def experts_reference(params, x, see):
    outs = []
    for e in range(E):
        y = x.reshape(-1, D) * (e + 1)
        see("up", y, e)
        y = act(y @ params["up"][e])
        see("down", y, e)
        outs.append(y @ params["down"][e])
    return jnp.stack(outs)


EXPERTS = lambda: {"up": normal(E, D, F), "down": normal(E, F, D)}  # noqa: E731


@case(EXPERTS, experts_reference)
def experts_vmapped(params, x):
    """Which is the program that an einsum over experts makes, too."""
    expert = lambda w, y: act(y @ w["up"]) @ w["down"]  # noqa: E731
    return jax.vmap(expert)(params, expert_inputs(x.reshape(-1, D)))


@case(EXPERTS, experts_reference)
def experts_scanned(params, x):
    step = lambda _, wy: (None, act(wy[1] @ wy[0]["up"]) @ wy[0]["down"])  # noqa: E731
    return lax.scan(step, None, (params, expert_inputs(x.reshape(-1, D))))[1]


def dense_experts_reference(params, x, see):
    x = x.reshape(-1, D)
    see("w", x)
    return jnp.stack([x @ params["w"][e] for e in range(E)], 1)


@case(lambda: {"w": normal(E, D, F)}, dense_experts_reference, axes={"w": ((1,), (0, 2))})
def experts_with_one_input(params, x):
    """Every expert reads the same tokens, so the experts are outputs, and there is one Gram matrix."""
    return jnp.einsum("td,edf->tef", x.reshape(-1, D), params["w"])


def routed(params, x):
    """Tokens in the order of their experts, the last few of none, and the number of each expert's."""
    x = x.reshape(-1, D)
    expert = jnp.argmax(x[:, : E - 1], -1)  # the last expert sees no token
    order = jnp.argsort(expert)
    return x[order], jnp.bincount(expert, length=E).at[E - 2].add(-2)


def ragged_reference(params, x, see):
    x, groups = routed(params, x)
    outs, start = [], 0
    for e, n in enumerate(np.asarray(groups)):
        rows, at = x[start : start + n], np.arange(start, start + n)
        see("up", rows, e, at)
        y = act(rows @ params["up"][e])
        see("down", y, e, at)
        outs.append(y @ params["down"][e])
        start += n
    return jnp.pad(jnp.concatenate(outs), [(0, len(x) - start), (0, 0)])


@case(EXPERTS, ragged_reference)
def experts_ragged(params, x):
    x, groups = routed(params, x)
    return lax.ragged_dot(act(lax.ragged_dot(x, params["up"], groups)), params["down"], groups)
