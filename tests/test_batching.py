"""Functions that run one by one on a CPU give what `vmap` gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import weights

from jaxquant.numerics.batching import one_by_one_on_cpu


def product(a, pair):
    return {"sum": a + pair[0], "product": a @ pair[1], "none": None}


@pytest.mark.parametrize("axes", [(0, (0, 0)), (0, (None, 0)), (None, (0, None)), (1, (0, 0))])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_it_is_vmap(axes, wrap):
    a, b, c = (jnp.asarray(weights(3, 3, 3, seed=s)) for s in range(3))
    args = tuple(jax.tree.map(lambda axis, x: x if axis is not None else x[0], axes, (a, (b, c)),
                              is_leaf=lambda x: x is None))  # fmt: skip
    found = wrap(jax.vmap(one_by_one_on_cpu(product), in_axes=axes))(*args)
    jax.tree.map(np.testing.assert_array_equal, found, jax.vmap(product, in_axes=axes)(*args))


def test_stacks_of_stacks():
    a, b, c = (jnp.asarray(weights(2, 4, 3, 3, seed=s)) for s in range(3))
    found = jax.vmap(jax.vmap(one_by_one_on_cpu(product)))(a, (b, c))
    jax.tree.map(np.testing.assert_array_equal, found, jax.vmap(jax.vmap(product))(a, (b, c)))


def test_a_cpu_runs_a_loop():
    a = jnp.ones((5, 3, 3))
    compiled = jax.jit(jax.vmap(one_by_one_on_cpu(product))).lower(a, (a, a)).compile()
    assert "while" in compiled.as_text()
