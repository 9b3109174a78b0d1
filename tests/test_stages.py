"""A function in stages: which weights are in which, that they give what the function gives, and what they hand on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal

import jaxquant as jq
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.tracing.stages import Stages

K = 16
NAMES = ("q", "k", "o", "gate", "up", "down")


def params(*lead):
    return {name: normal(*lead, K, K, seed=i) / 4 for i, name in enumerate(NAMES)} | {"norm": normal(*lead, K)}


def block(p, x):
    h = jax.nn.standardize(x) * p["norm"]
    x = x + jax.nn.softmax((h @ p["q"]) * (h @ p["k"])) @ p["o"]
    return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def in_a_loop(p, x):
    return jax.lax.scan(lambda x, p: (block(p, x), None), x, p)[0]


def apart(names=NAMES):
    return {name: name for name in names}


def traced(fn, p, *xs, groups=None):
    stages = Stages(fn, groups or apart())
    for x in xs:
        stages.trace(p, x)
    return stages


def through(stages, p, x):
    for stage in range(len(stages.weights)):
        x, _ = stages.run(stage, p, x)
    return stages.result(p, x)


@pytest.mark.parametrize(
    ("fn", "lead"),
    [
        (block, ()),
        (jax.jit(block), ()),
        (jax.checkpoint(block), ()),
        (in_a_loop, (1,)),
        (jax.jit(in_a_loop), (1,)),
        (lambda p, x: block(jax.tree.map(lambda a: a[0], p), x), (1,)),
    ],
)
def test_stages_end_where_a_product_feeds_another(fn, lead):
    p, x = params(*lead), normal(8, K, seed=9)
    stages = traced(fn, p, x)
    assert stages.weights == [{"q", "k"}, {"o"}, {"gate", "up"}, {"down"}]
    np.testing.assert_allclose(through(stages, p, x), fn(p, x), rtol=1e-5, atol=1e-6)
    assert jax.jit(lambda p, x: through(stages, p, x))(p, x).shape == x.shape


def test_products_of_a_stage_are_those_of_its_weights():
    p, x = params(), normal(8, K, seed=9)
    stages = traced(block, p, x)
    held, products = stages.run(0, p, x)
    h = jax.nn.standardize(x) * p["norm"]
    for got, name in zip(products, ("q", "k"), strict=True):
        np.testing.assert_allclose(got, h @ p[name], rtol=1e-5, atol=1e-6)
    _, products = stages.run(1, {**p, "q": jnp.zeros((K, K))}, held)
    np.testing.assert_allclose(products[0], jnp.full((8, K), 1 / K) @ p["o"], rtol=1e-5, atol=1e-6)


def test_quantized_weights_take_part_as_in_the_whole_function():
    p, x = params(1), normal(8, K, seed=9)
    stages = traced(in_a_loop, p, x)
    q, _ = jq.quantize_params(p, None, [("q|o|down", jq.RTN(jq.int4(group_size=8)))])
    got = quantized(lambda p, x: through(stages, p, x))(q, x)
    np.testing.assert_allclose(got, quantized(in_a_loop)(q, x), rtol=1e-5, atol=1e-6)


def test_inputs_of_several_shapes_and_pytrees():
    p, xs = params(), [{"x": normal(8, K)}, {"x": normal(2, 3, K)}]
    stages = traced(lambda p, x: {"x": block(p, x["x"])}, p, *xs)
    for x in xs:
        np.testing.assert_allclose(through(stages, p, x)["x"], block(p, x["x"]), rtol=1e-5, atol=1e-6)


def test_order_must_not_depend_on_the_shape():
    def either(p, x):
        return x @ p["q"] @ p["k"] if x.ndim == 2 else x @ p["k"] @ p["q"]

    with pytest.raises(ValueError, match="weights in another order for inputs of other shapes"):
        traced(either, params(), normal(8, K), normal(2, 3, K))


@pytest.mark.parametrize("lead", [2, 3])
def test_a_loop_over_layers_is_one_stage(lead):
    p, x = params(lead), normal(8, K)
    stages = traced(in_a_loop, p, x)
    assert stages.weights == [set(NAMES)]
    np.testing.assert_allclose(through(stages, p, x), in_a_loop(p, x), rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_used_twice_keeps_what_is_between_in_one_stage():
    def tied(p, x):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ p["q"]) @ p["k"]) @ p["q"]) @ p["o"]

    p, x = params(), normal(8, K)
    stages = traced(tied, p, x)
    assert stages.weights == [{"q", "k"}, {"o"}]
    held, products = stages.run(0, p, x)
    assert len(products) == 3
    np.testing.assert_array_equal(held[0], x)  # all of it is computed again, when they are quantized
    np.testing.assert_allclose(through(stages, p, x), tied(p, x), rtol=1e-5, atol=1e-6)


def test_a_group_is_one_stage():
    stages = traced(block, params(), normal(8, K), groups=apart() | {"o": "both", "up": "both"})
    assert stages.weights == [{"q", "k"}, {"o", "gate", "up"}, {"down"}]


def test_weights_that_are_not_quantized_end_no_stage():
    stages = traced(block, params(), normal(8, K), groups=apart(("q", "down")))
    assert stages.weights == [{"q"}, {"down"}]


def test_no_more_is_handed_on_than_what_cannot_be_made_again_cheaply():
    """Of an input in half precision, neither its copies in float32 nor transposed ones."""

    def cast(p, x):
        wide = x.astype(jnp.float32)
        return jnp.tanh(jnp.tanh(wide @ p["q"]) @ p["o"]).astype(x.dtype) + (wide.T.T @ p["down"]).astype(x.dtype)

    p, x = params(), normal(8, K).astype(jnp.bfloat16)
    stages = traced(cast, p, x)
    held, _ = stages.run(0, p, x)
    assert [(a.shape, a.dtype.name) for a in held] == [((8, K), "bfloat16")]
    assert stages.held[0] == x.nbytes
    assert stages.weights == [{"q", "down"}, {"o"}]


def test_memory_of_a_stage_is_that_of_its_values():
    """Two at a time, of the widest: an equation's input, made in the stage, and its result."""

    def wide(p, x):
        return jnp.sum(jnp.exp(jnp.exp(x[:, :, None] * p["norm"])), 2) @ p["q"]

    stages = traced(wide, params(), normal(64, K), groups=apart(("q",)))
    assert 2 * 4 * 64 * K * K <= stages.peaks[0] < 3 * 4 * 64 * K * K
