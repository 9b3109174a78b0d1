"""A function in stages: which weights are in which, that they give what the function gives, and what they hand on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functions import normal

import jaxquant as jq
from jaxquant.numerics.qtensor import is_qtensor
from jaxquant.transforms.quantized import quantized
from jaxquant.transforms.tracing.stages import Held, Stages

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


def through(stages, p, x, until=None):
    """The function's result, or what is held after some stages, and their last products."""
    kind, given = stages.trace(params_like(p), x), []
    held = stages.begin(kind, x)
    for stage in range(len(stages.weights) if until is None else until):
        arrays, given = stages.run(stage, p, held)
        held = Held(kind, arrays)
    return stages.result(p, held) if until is None else (held, given)


def params_like(p):
    """Float parameters in place of quantized ones: such calls are known by those."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype) if is_qtensor(a) else a, p, is_leaf=is_qtensor)


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
    held, products = through(stages, p, x, until=1)
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


def test_what_is_handed_on_belongs_to_its_input():
    """Of inputs whose rows are alike, and which the function tells apart."""

    def fn(p, x):
        return {key: (jnp.tanh(a.reshape(-1, K) @ p["q"]) @ p["o"]).reshape(a.shape) / len(a) for key, a in x.items()}

    p, xs = params(), [{"a": normal(2, 8, K)}, {"a": normal(4, 4, K)}, {"b": normal(2, 8, K)}]
    stages = traced(fn, p, *xs, groups=apart(("q", "o")))
    for x in xs:
        (key, want), (got_key, got) = *fn(p, x).items(), *through(stages, p, x).items()
        assert key == got_key
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_inputs_that_are_no_arrays_are_static():
    def fn(p, x):
        return jnp.tanh(x["x"] @ p["q"]) @ p["o"] if x["forwards"] else (x["x"] @ p["q"]) @ p["o"]

    p = params()
    for forwards in (True, False):
        x = {"x": normal(8, K), "forwards": forwards}
        stages = traced(fn, p, x, groups=apart(("q", "o")))
        np.testing.assert_allclose(through(stages, p, x), fn(p, x), rtol=1e-5, atol=1e-6)


def test_products_without_an_input_are_of_the_first_stage():
    """As learned queries: what they give is no part of a weight."""

    def fn(p, x):
        return x @ p["q"] + jnp.tanh(p["norm"][None] @ p["o"]) @ p["k"]

    p, x = params(), normal(8, K)
    stages = traced(fn, p, x, groups=apart(("q", "o", "k")))
    assert stages.weights == [{"q", "o"}, {"k"}]
    np.testing.assert_allclose(through(stages, p, x), fn(p, x), rtol=1e-5, atol=1e-6)


def test_a_position_that_an_input_decides_is_no_product():
    def fn(p, x):
        return jnp.tanh(x["x"] @ p["q"][x["layer"]]) @ p["o"][x["layer"]]

    p, x = params(3), {"x": normal(8, K), "layer": jnp.int32(1)}
    stages = traced(fn, p, x, groups=apart(("q", "o")))
    assert stages.weights == [{"q"}, {"o"}]
    np.testing.assert_allclose(through(stages, p, x), fn(p, x), rtol=1e-5, atol=1e-6)


def prints(p, x):
    jax.debug.print("{}", x[0, 0])
    return block(p, x)


def writes(p, x):
    ref = jax.new_ref(x @ p["q"])
    ref[...] = jnp.tanh(ref[...])
    return jax.freeze(ref) @ p["o"]


def drops(p, x):
    return block(p, jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x, 0.0))


@pytest.mark.parametrize("fn", [prints, writes, drops, jax.jit(writes), jax.jit(drops)])
def test_what_cannot_be_split_is_not(fn):
    assert Stages(fn, apart()).trace(params(), normal(8, K)) is None


def test_a_weight_that_no_product_takes_is_not_lost():
    assert Stages(lambda p, x: x @ p["q"] * p["o"][0], apart(("q", "o"))).trace(params(), normal(8, K)) is None


def test_quantized_parameters_are_not_split():
    q, _ = jq.quantize_params(params(), None, [("q", jq.RTN(jq.int8()))])
    assert Stages(quantized(block), apart(("o",))).trace(q, normal(8, K)) is None


def test_order_must_not_depend_on_the_shape():
    def either(p, x):
        return x @ p["q"] @ p["k"] if x.ndim == 2 else x @ p["k"] @ p["q"]

    with pytest.raises(ValueError, match="weights in another order for inputs of other shapes"):
        traced(either, params(), normal(8, K), normal(2, 3, K), groups=apart(("q", "k")))


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
    stages = traced(tied, p, x, groups=apart(("q", "k", "o")))
    assert stages.weights == [{"q", "k"}, {"o"}]
    held, products = through(stages, p, x, until=1)
    assert len(products) == 3
    np.testing.assert_array_equal(held.arrays[0], x)  # all of it is computed again, when they are quantized
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
    stages = traced(cast, p, x, groups=apart(("q", "o", "down")))
    held, _ = through(stages, p, x, until=1)
    assert [(a.shape, a.dtype.name) for a in held.arrays] == [((8, K), "bfloat16")]
    assert stages.handed_on[0] == x.nbytes
    assert stages.weights == [{"q", "down"}, {"o"}]


def test_what_is_narrowed_is_handed_on_narrow():
    """A norm in float32 of an input in half precision."""

    def fn(p, x):
        h = jax.nn.standardize(x.astype(jnp.float32)).astype(x.dtype)
        return jnp.tanh(h @ p["q"]) @ p["o"] + h

    p, x = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params()), normal(8, K).astype(jnp.bfloat16)
    stages = traced(fn, p, x, groups=apart(("q", "o")))
    held, _ = through(stages, p, x, until=1)
    assert [a.dtype.name for a in held.arrays] == ["bfloat16"]


def test_memory_within_loops_counts():
    def looped(p, x):
        return jax.lax.map(lambda row: jnp.sum(row[:, None] * jnp.ones((K, 1000)), 1), x) @ p["q"]

    stages = traced(looped, params(), normal(8, K), groups=apart(("q",)))
    assert stages.peaks[0] >= 4 * K * 1000


def test_memory_of_a_stage_is_that_of_its_values():
    """Two at a time, of the widest: an equation's input, made in the stage, and its result."""

    def wide(p, x):
        return jnp.sum(jnp.exp(jnp.exp(x[:, :, None] * p["norm"])), 2) @ p["q"]

    stages = traced(wide, params(), normal(64, K), groups=apart(("q",)))
    assert 2 * 4 * 64 * K * K <= stages.peaks[0] < 3 * 4 * 64 * K * K
