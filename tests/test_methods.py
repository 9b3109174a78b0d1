"""Laws that every method obeys, over a table of methods and specs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import correlated, output_error, statistics_of, weights

from jaxquant.methods.awq import AWQ
from jaxquant.methods.chain import Chain
from jaxquant.methods.gptq import GPTQ
from jaxquant.methods.rtn import RTN
from jaxquant.methods.smoothquant import SmoothQuant
from jaxquant.numerics.affine import dequantize, encode, per_code, scaled_dense
from jaxquant.numerics.spec import QuantSpec, int3, int4, int8

K, N = 48, 16
METHODS = {
    "rtn": RTN,
    "rtn, clipped": functools.partial(RTN, clip="output"),
    "gptq": GPTQ,
    "gptq in order": functools.partial(GPTQ, act_order=False),
    "awq": functools.partial(AWQ, grid=4),
    "smoothquant": functools.partial(SmoothQuant, 0.5),
    "smoothquant and gptq": lambda spec: Chain(SmoothQuant(0.5), GPTQ(spec)),
}
SPECS = {
    "int8": int8(),
    "int4 group": int4(group_size=16),
    "int4 asymmetric group": int4(group_size=16, symmetric=False),
    "int3 asymmetric, float16 scales": int3(symmetric=False, scale_dtype="float16"),
    "int2 narrow tensor": QuantSpec(bits=2, granularity="per_tensor", narrow_range=True),
}
every_method = pytest.mark.parametrize("method", METHODS)
every_spec = pytest.mark.parametrize("spec", SPECS)


@functools.partial(jax.jit, static_argnums=2)
def run(w, stats, config):
    return config.quantize(w, stats)


def given(dtype=np.float32):
    return jnp.asarray(weights(K, N)).astype(dtype), statistics_of(correlated(K, 4 * K))


@pytest.mark.parametrize(("spec", "dtype"), [*((s, "float32") for s in SPECS), ("int4 asymmetric group", "bfloat16")])
@every_method
def test_structure_dtypes_and_range_of_the_codes(method, spec, dtype):
    config = METHODS[method](SPECS[spec])
    w, stats = given(dtype)
    q, info = run(w, stats, config)
    q.validate()
    assert (q.shape, q.dtype, q.contract, q.out) == ((K, N), dtype, (-2,), (-1,))
    assert q.spec == config.spec
    assert q.scale.dtype == (config.spec.scale_dtype or dtype)
    assert q.codes.min() >= config.spec.min_code
    assert q.codes.max() <= config.spec.max_code
    assert all(fact.shape == () for fact in info.values())
    assert dequantize(q).dtype == w.dtype


@every_spec
@every_method
def test_dequantized_weights_quantize_to_the_same_codes(method, spec):
    q, _ = run(*given(), METHODS[method](SPECS[spec]))
    scale, zero_point = per_code(q.scale, q.zero_point, q.shape, 1)
    np.testing.assert_array_equal(encode(scaled_dense(q), scale, zero_point, q.spec), q.codes)


@every_method
def test_compiled_and_uncompiled_agree(method):
    """Bit by bit where rounding is all there is; sums of products may flip ties."""
    config = METHODS[method](SPECS["int4 asymmetric group"])
    compiled, eager = run(*given(), config)[0], config.quantize(*given())[0]
    if config.needs_statistics:
        assert np.mean(compiled.codes == eager.codes) > 0.98
    else:
        jax.tree.map(np.testing.assert_array_equal, compiled, eager)


@every_method
def test_stacked_matrices_are_quantized_one_by_one(method):
    config = METHODS[method](SPECS["int4 group"])
    w = weights(3, K, N)
    stats = statistics_of(np.stack([correlated(K, 4 * K, seed=s) for s in range(3)]))
    stacked, info = jax.jit(jax.vmap(config.quantize))(w, stats)
    for i in range(3):
        single, facts = run(w[i], jax.tree.map(lambda a, i=i: a[i], stats), config)
        assert np.mean(stacked.codes[i] == single.codes) > 0.98
        assert jax.tree.map(lambda a, i=i: a[i].shape, stacked) == jax.tree.map(jnp.shape, single)
        assert {k: v[i] for k, v in info.items()} == facts


@every_method
def test_equal_configs_and_shapes_compile_once(method):
    traces = []

    @functools.partial(jax.jit, static_argnums=2)
    def traced(w, stats, config):
        traces.append(config)
        return config.quantize(w, stats)

    w, stats = given()
    for factor in (1, 2):
        traced(factor * w, jax.tree.map(lambda a, f=factor: f * a, stats), METHODS[method](int4(group_size=16)))
    assert len(traces) == 1


@every_spec
@every_method
def test_degenerate_weights_and_inputs_stay_finite(method, spec):
    config = METHODS[method](SPECS[spec])
    w, x = jnp.asarray(weights(K, N)), correlated(K, 4 * K)
    x[:, ::3] = 0  # dead channels
    x[:, 1] = x[:, 2]  # a singular Gram matrix
    constants = jnp.float32([0, 0.7, -3e-39, 2e37])  # the third is no normal number
    w = w.at[:, :4].set(constants).at[:16, 4].set(0)
    for weight in (w, jnp.zeros_like(w)):
        q, info = run(weight, statistics_of(x), config)
        back = dequantize(q)
        assert np.all(np.isfinite(back))
        assert np.all(np.isfinite(q.scale))
        assert all(np.isfinite(fact) for fact in info.values())
    np.testing.assert_array_equal(back, 0)


@every_spec
@pytest.mark.parametrize("method", ["gptq", "gptq in order", "awq", "smoothquant and gptq"])
def test_output_error_is_below_rounding_to_nearest(method, spec):
    config = METHODS[method](SPECS[spec])
    w, stats = given()
    (q, _), (nearest, _) = run(w, stats, config), run(w, stats, RTN(config.spec))
    assert output_error(w, q, stats.gram) < 0.8 * output_error(w, nearest, stats.gram)


def test_a_spec_for_activations_is_refused():
    with pytest.raises(ValueError, match="per_token is for activations"):
        RTN(QuantSpec(granularity="per_token"))
    with pytest.raises(ValueError, match="spec='int4' is not a QuantSpec"):
        RTN("int4")
