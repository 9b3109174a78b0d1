"""How a function of one matrix runs on a stack of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def one_by_one_on_cpu(fn: Callable) -> Callable:
    """Returns `fn`, whose `vmap` runs one matrix after another on a CPU, and all at once elsewhere.

    An accelerator is kept busy by many matrices at once. A CPU is busy with one, and a whole stack leaves its caches.
    `fn` maps pytrees of arrays to a pytree of arrays, and is not differentiated.
    """
    fn = jax.jit(fn)  # traced once for all that follows

    @jax.custom_batching.custom_vmap
    def call(*args):
        return fn(*args)

    @call.def_vmap
    def over_stack(size, batched, *args):
        if size == 1:
            one = jax.tree.map(lambda a, b: a[0] if b else a, args, tuple(batched))
            out = jax.tree.map(lambda a: a[None], call(*one))
            return out, jax.tree.map(lambda _: True, out)
        args = jax.tree.map(lambda a, b: a if b else jnp.broadcast_to(a, (size, *jnp.shape(a))), args, tuple(batched))
        in_turn = lambda *stacks: lax.map(lambda one: call(*one), stacks)  # noqa: E731
        out = lax.platform_dependent(*args, cpu=in_turn, default=jax.vmap(fn))
        return out, jax.tree.map(lambda _: True, out)

    return call
