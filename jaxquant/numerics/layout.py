"""Between a weight's own axes and the one layout that quantization works in.

A weight has contracting axes (summed over by the product that uses it), output axes, and any other axes, which stack
independent weights (layers, experts) and come first. The canonical layout is `[*lead, K, *out]`: the contracting axes
flattened into one, in their own order, in front of the output axes. `contract` and `out` are negative axes, ascending.
"""

import math

import jax
import jax.numpy as jnp

Axes = tuple[int, ...]


def check_layout(ndim: int, contract: Axes, out: Axes) -> None:
    """Raises ValueError unless the layout covers exactly the last axes of an array with `ndim` axes."""
    core = len(contract) + len(out)
    if sorted(contract + out) != list(range(-core, 0)) or not contract:
        raise ValueError(
            f"contract={contract}, out={out} must together be the last {core} axes, negative, each once, with at least "
            "one contracting axis; axes that stack layers or experts come first"
        )
    if list(contract) != sorted(contract) or list(out) != sorted(out):
        raise ValueError(f"contract={contract}, out={out}: give the axes in ascending order")
    if core > ndim:
        raise ValueError(f"contract={contract}, out={out} name {core} axes, but the array has {ndim}")


def to_canonical(x: jax.Array, contract: Axes, out: Axes) -> jax.Array:
    """`x` with its own axes -> `[*lead, K, *out]`."""
    lead = x.ndim - len(contract) - len(out)
    x = jnp.transpose(x, [*range(lead), *(a + x.ndim for a in contract), *(a + x.ndim for a in out)])
    k = math.prod(x.shape[lead : lead + len(contract)])
    return x.reshape(*x.shape[:lead], k, *x.shape[lead + len(contract) :])


def from_canonical(x: jax.Array, contract: Axes, out: Axes, in_shape: Axes) -> jax.Array:
    """`[*lead, K, *out]` -> the weight's own axes, where the contracting axes have sizes `in_shape`."""
    lead = x.ndim - 1 - len(out)
    x = x.reshape(*x.shape[:lead], *in_shape, *x.shape[lead + 1 :])
    order = [a + x.ndim for a in contract + out]
    return jnp.transpose(x, [*range(lead), *(lead + order.index(lead + i) for i in range(len(order)))])


def logical_shape(lead: Axes, in_shape: Axes, out_shape: Axes, contract: Axes, out: Axes) -> Axes:
    """The shape of the weight with its own axes."""
    core = dict(zip(contract + out, in_shape + out_shape, strict=True))
    return (*lead, *(core[a] for a in range(-len(core), 0)))
