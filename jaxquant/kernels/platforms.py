"""Products by a kernel of one platform, inside the transformations of any program."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.kernels import reference
from jaxquant.numerics.qtensor import QTensor


def matmul(
    x: jax.Array,
    q: QTensor,
    preferred_element_type,
    precision,
    *,
    platform: str,
    kernel: Callable,
    declines: Callable[[jax.Array, QTensor], str | None],
    stacked: bool,
) -> jax.Array:
    """As `reference.matmul`, whose derivative it has, by `kernel(x, q, dtype=...)` on one platform.

    Any other platform runs the definition, and `precision` is that of the definition and of the derivative.

    Args:
      x, q, preferred_element_type, precision: as for `reference.matmul`.
      platform: as `lax.platform_dependent` calls it.
      kernel: of `[*lead, M, K]` and a weight, both of which it does not decline.
      declines: of the kernel's module.
      stacked: whether the kernel takes leading axes; otherwise weights that are batched are taken one after the other.
    """
    definition = functools.partial(reference.matmul, preferred_element_type=preferred_element_type, precision=precision)

    @jax.custom_batching.custom_vmap
    def batchable(x, q):
        run = functools.partial(kernel, dtype=preferred_element_type or x.dtype)
        return lax.platform_dependent(x, q, **{platform: run}, default=definition)

    @batchable.def_vmap
    def batched(size, is_batched, x, q):
        if is_batched[0] and not any(jax.tree.leaves(is_batched[1])):  # more tokens for the same weight
            lead, tokens = x.ndim - 3, x.shape[-2]
            rows = jnp.moveaxis(x, 0, lead).reshape(*x.shape[1:-2], size * tokens, x.shape[-1])
            out = (batchable if declines(rows, q) is None else definition)(rows, q)
            return jnp.moveaxis(out.reshape(*x.shape[1:-2], size, tokens, *out.shape[lead + 1 :]), lead, 0), True
        whole = jax.tree.map(
            lambda a, has: a if has else jnp.broadcast_to(a, (size, *a.shape)), (x, q), tuple(is_batched)
        )
        return batchable(*whole) if stacked else lax.map(lambda both: batchable(*both), whole), True

    return reference.with_derivative(lambda x, q, _: batchable(x, q), x, q, preferred_element_type, precision)
