"""Between a weight's own axes and the one layout that quantization works in.

A weight has contracting axes (summed over by the product that uses it), output axes, and leading axes, which stack
independent weights (layers, experts). The canonical layout is `[*lead, K, *out]`: the leading axes in their own order,
the contracting axes flattened into one, the output axes. `contract` and `out` are negative axes, ascending.
"""

import math

import jax
import jax.numpy as jnp

Axes = tuple[int, ...]


def check_layout(ndim: int, contract: Axes, out: Axes) -> None:
    """Raises ValueError unless `contract` and `out` are disjoint, ascending, negative axes of `ndim` of them."""
    named = contract + out
    if not contract or len(set(named)) < len(named) or any(not -ndim <= a < 0 for a in named):
        raise ValueError(
            f"contract={contract}, out={out}: expected different negative axes of the array's {ndim}, "
            "at least one of them contracting"
        )
    if list(contract) != sorted(contract) or list(out) != sorted(out):
        raise ValueError(f"contract={contract}, out={out}: give the axes in ascending order")


def canonical_order(ndim: int, contract: Axes, out: Axes) -> list[int]:
    """The weight's axes in canonical order: leading, contracting, output."""
    named = contract + out
    return [i for i in range(ndim) if i - ndim not in named] + [a + ndim for a in named]


def to_canonical(x: jax.Array, contract: Axes, out: Axes) -> jax.Array:
    """`x` with its own axes -> `[*lead, K, *out]`."""
    lead = x.ndim - len(contract) - len(out)
    x = jnp.transpose(x, canonical_order(x.ndim, contract, out))
    k = math.prod(x.shape[lead : lead + len(contract)])
    return x.reshape(*x.shape[:lead], k, *x.shape[lead + len(contract) :])


def from_canonical(x: jax.Array, contract: Axes, out: Axes, in_shape: Axes) -> jax.Array:
    """`[*lead, K, *out]` -> the weight's own axes, where the contracting axes have sizes `in_shape`."""
    lead = x.ndim - 1 - len(out)
    x = x.reshape(*x.shape[:lead], *in_shape, *x.shape[lead + 1 :])
    order = canonical_order(x.ndim, contract, out)
    return jnp.transpose(x, [order.index(i) for i in range(x.ndim)])


def logical_shape(lead: Axes, in_shape: Axes, out_shape: Axes, contract: Axes, out: Axes) -> Axes:
    """The shape of the weight with its own axes."""
    sizes = lead + in_shape + out_shape
    order = canonical_order(len(sizes), contract, out)
    return tuple(sizes[order.index(i)] for i in range(len(sizes)))
