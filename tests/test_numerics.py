"""Specs and the quantization formulas, against float64 NumPy loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxquant.numerics.affine import choose_qparams, dequantize, fake_quantize, quantize
from jaxquant.numerics.spec import QuantSpec, int3, int4, int8

GRANULARITIES = {"per_tensor": None, "per_channel": None, "per_group": 8}


def spec_of(bits, symmetric=True, granularity="per_channel", narrow_range=False, scale_dtype=None):
    return QuantSpec(bits, GRANULARITIES[granularity], symmetric, granularity, narrow_range, scale_dtype)


def weights(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("narrow_range", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_formulas_equal_the_oracle(bits, symmetric, granularity, narrow_range):
    spec = spec_of(bits, symmetric, granularity, narrow_range)
    x = weights(24, 6, seed=bits, dtype=np.float64) + 0.3
    codes, scale, zero = oracles.rtn(x, bits, symmetric, granularity, spec.group_size, narrow_range)
    q = quantize(jnp.asarray(x), spec)
    q.validate()
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(q.scale, scale)
    if not symmetric:
        np.testing.assert_array_equal(q.zero_point, zero)
    rows, columns = oracles.groups_of(x.shape, granularity, spec.group_size)
    np.testing.assert_array_equal(dequantize(q), (codes - zero[rows, columns]) * scale[rows, columns])


def test_the_ranges_of_the_codes():
    ranges = {(s.bits, s.narrow_range): (s.min_code, s.max_code, s.steps) for s in [int8(), int4(), int3(), spec_of(2)]}
    assert ranges == {
        (8, False): (-128, 127, 255),
        (4, False): (-8, 7, 15),
        (3, False): (-4, 3, 7),
        (2, False): (-2, 1, 3),
    }
    narrow = int8(narrow_range=True)
    assert (narrow.min_code, narrow.max_code, narrow.steps) == (-127, 127, 254)


def test_the_documented_scales():
    x = jnp.asarray([[-3.0], [1.5], [2.0]])
    assert quantize(x, int4()).scale == pytest.approx(3 / 7.5)
    assert quantize(x, int8(narrow_range=True)).scale == pytest.approx(3 / 127)
    q = quantize(x, int4(symmetric=False))
    assert q.scale == pytest.approx(5 / 15)
    assert q.zero_point == -8 + 9
    np.testing.assert_array_equal(q.unsigned_codes, [[0], [13], [15]])
    assert q.unsigned_zero_point == 9


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0, 1e-30])
def test_zero_is_represented_exactly(bits, symmetric, offset):
    x = np.abs(weights(16, 4)) * np.sign(offset) + offset if offset else weights(16, 4)
    x[3] = 0
    back = dequantize(quantize(jnp.asarray(x, jnp.float32), spec_of(bits, symmetric)))
    np.testing.assert_array_equal(back[3], 0)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ranges_of_one_sign_and_of_one_number(bits, symmetric):
    x = np.stack([np.full(16, 0.7), np.full(16, -0.7), np.linspace(0.1, 2, 16), -np.linspace(0.1, 2, 16)], 1)
    q = quantize(jnp.asarray(x, jnp.float32), spec_of(bits, symmetric))
    error = np.abs(dequantize(q) - x)
    assert np.all(error <= 0.5001 * q.scale)
    if not symmetric:  # a range of one sign is widened to reach zero, and its far end is a code
        np.testing.assert_allclose(error[:, :2], 0, atol=1e-6)
        np.testing.assert_array_equal(q.zero_point[0], np.where([1, 0, 1, 0], q.spec.min_code, q.spec.max_code))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("fill", [0.0, 1e-44, -1e-39])
def test_ranges_of_zero_or_next_to_nothing_become_zero(fill, symmetric):
    x = jnp.full((8, 2), fill).at[:, 1].set(jnp.arange(8.0))
    q = quantize(x, int4(symmetric=symmetric))
    assert q.scale[0, 0] == 1
    np.testing.assert_array_equal(dequantize(q)[:, 0], 0)


def test_a_scale_beyond_its_storage_dtype_saturates():
    q = quantize(jnp.full((8, 1), 1e9), int4(scale_dtype="float16"))
    assert q.scale == np.finfo(np.float16).max
    assert np.all(np.isfinite(dequantize(q)))


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
def test_codes_are_chosen_for_the_scale_that_is_stored(scale_dtype):
    x = weights(64, 32)
    for symmetric in (True, False):
        q = quantize(jnp.asarray(x), spec_of(8, symmetric, scale_dtype=scale_dtype))
        assert q.scale.dtype == scale_dtype
        scale = np.asarray(q.scale, np.float64)
        zero = 0 if symmetric else np.asarray(q.zero_point, np.float64)
        codes = np.clip(np.round(x / scale) + zero, -128, 127)
        exact = quantize(jnp.asarray(x), spec_of(8, symmetric))
        assert np.mean(np.asarray(q.codes) == codes) > 0.999  # ties
        assert np.any(np.asarray(exact.codes) != codes)


@pytest.mark.parametrize("spec", [int4(group_size=8), int8(symmetric=False), int4(scale_dtype="bfloat16")])
def test_compiled_codes_are_the_uncompiled_ones(spec):
    """In the full symmetric range the extreme of every column is a tie: how the division is rounded decides it."""
    x = jnp.asarray(weights(32, 4096))
    jax.tree.map(np.testing.assert_array_equal, quantize(x, spec), jax.jit(quantize, static_argnums=1)(x, spec))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize(("symmetric", "narrow_range"), [(False, False), (False, True), (True, True)])
def test_quantizing_again_changes_nothing(bits, symmetric, narrow_range):
    """The extremes of these ranges are codes, so the second scale is the first."""
    spec = spec_of(bits, symmetric, "per_group", narrow_range)
    once = dequantize(quantize(jnp.asarray(weights(32, 8)), spec))
    twice = dequantize(quantize(once, spec))
    np.testing.assert_allclose(twice, once, rtol=1e-6)


def test_each_granularity_gives_another_error():
    size = np.repeat([1, 4, 16, 64], 8)[:, None] * 3.0 ** np.arange(8)
    x = jnp.asarray(weights(32, 8) * size, jnp.float32)
    specs = [int4(granularity="per_tensor"), int4(), int4(group_size=16), int4(group_size=8)]
    errors = [np.mean(np.abs(dequantize(quantize(x, s)) - x) / size) for s in specs]
    assert all(coarse > 1.2 * fine for coarse, fine in itertools.pairwise(errors)), errors
    rows = quantize(x, QuantSpec(bits=4, granularity="per_token"))
    assert rows.scale.shape == (32, 1)
    assert not np.allclose(dequantize(rows), dequantize(quantize(x, int4())))


def test_tokens_have_their_own_scales():
    x = weights(2, 5, 16)
    q = quantize(jnp.asarray(x), QuantSpec(bits=8, granularity="per_token", symmetric=False))
    assert (q.shape, q.scale.shape) == ((2, 5, 16), (2, 5, 1))
    for row in np.ndindex(2, 5):
        codes, scale, _ = oracles.rtn(x[row][:, None], 8, False, "per_channel", scale_dtype=np.float32)
        assert np.max(np.abs(np.asarray(q.codes[row], int) - codes[:, 0])) <= 1
        np.testing.assert_allclose(q.scale[row], scale[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_are_computed_in_float32(dtype):
    x = jnp.asarray(weights(64, 16)).astype(dtype)
    q, wide = quantize(x, int8(scale_dtype="float32")), quantize(x.astype(jnp.float32), int8())
    jax.tree.map(np.testing.assert_array_equal, (q.values, q.scale), (wide.values, wide.scale))
    assert dequantize(q).dtype == dtype
    np.testing.assert_array_equal(dequantize(q, jnp.float32), dequantize(wide))


FAKE_SPECS = {
    "4-bit": int4(),
    "4-bit asymmetric group": int4(group_size=8, symmetric=False),
    "8-bit narrow tensor": QuantSpec(8, granularity="per_tensor", narrow_range=True),
    "8-bit, bfloat16 scales": int8(scale_dtype="bfloat16"),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("spec", FAKE_SPECS.values(), ids=FAKE_SPECS)
def test_fake_quantized_weights_are_the_quantized_ones(spec, compiled):
    fake = jax.jit(fake_quantize, static_argnums=1) if compiled else fake_quantize
    halves = np.round(weights(16, 64) * 4) / 4  # multiples of a quarter: many ties
    for x in (weights(16, 64), halves):
        x = jnp.asarray(x, jnp.float32)
        np.testing.assert_array_equal(fake(x, spec), dequantize(quantize(x, spec)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("spec", [s for s in FAKE_SPECS.values() if s.scale_dtype is None], ids=str)
def test_the_straight_through_gradient_is_that_of_its_surrogate(spec):
    """With codes and zero points held, x ↦ (codes + (x / S(x) - x₀ / S₀) - Z) · S(x) by central differences."""
    x0 = jnp.asarray(weights(16, 3, dtype=np.float64))
    weight, direction = weights(2, 16, 3, seed=1, dtype=np.float64)

    def scale_of(x):
        return jnp.repeat(choose_qparams(x, spec)[0], 16 // choose_qparams(x, spec)[0].shape[0], 0)

    s0, offset = scale_of(x0), quantize(x0, spec)
    zero = 0 if spec.symmetric else jnp.repeat(offset.zero_point, 2, 0).repeat(4, 0).astype(float)

    @jax.jit
    def surrogate(x):
        s = scale_of(x)
        return jnp.sum(weight * (offset.codes.astype(float) + (x / s - x0 / s0) - zero) * s)

    slope = (surrogate(x0 + 1e-6 * direction) - surrogate(x0 - 1e-6 * direction)) / 2e-6
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(weight * fake_quantize(x, spec))))(x0)
    np.testing.assert_allclose(jnp.sum(gradient * direction), slope, rtol=1e-6)
    assert not np.allclose(gradient, weight)  # some of it comes through the scale


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", [None, "bfloat16"])
def test_every_weight_keeps_its_own_gradient(symmetric, scale_dtype):
    """∂y_i/∂x_j = δ_ij + (codes_i - Z - x_i / S) ∂S/∂x_j, also for weights that a rounded scale leaves out of range."""
    spec, x = spec_of(4, symmetric, scale_dtype=scale_dtype), weights(16, 40)
    q = quantize(jnp.asarray(x), spec)
    codes, scale = np.asarray(q.codes, np.float64), np.asarray(q.scale, np.float64)
    zero = 0 if symmetric else np.asarray(q.zero_point, np.float64)
    size = np.abs(x)
    slope = (size == size.max(0)) * np.sign(x) * 2 / 15 if symmetric else ((x == x.max(0)) * 1.0 - (x == x.min(0))) / 15
    columns = jax.vmap(lambda x: jax.jacrev(lambda x: fake_quantize(x, spec))(x), 1, 2)
    gradient = jax.jit(columns)(jnp.asarray(x))
    expected = np.eye(16)[:, :, None] + (codes - zero - x / scale)[:, None] * slope
    np.testing.assert_allclose(gradient, expected, atol=5e-4 if scale_dtype else 1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "bits=1 is not supported; choose a whole number from 2 to 8"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 4.0}, "bits=4.0"),
        ({"group_size": 0}, "group_size=0 must be a positive whole number, or None"),
        ({"group_size": -1}, "group_size=-1"),
        ({"granularity": "per_row"}, "granularity='per_row' is not one of per_tensor, per_channel, per_group"),
        ({"granularity": "per_group"}, "per_group needs a group_size"),
        ({"granularity": "per_channel", "group_size": 8}, "every other granularity takes group_size=None"),
        ({"scale_dtype": "int8"}, "scale_dtype='int8' is not one of bfloat16, float16"),
    ],
)
def test_spec_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**fields)


def test_specs_are_static_arguments():
    assert hash(int4(group_size=8)) == hash(QuantSpec(4, 8, granularity="per_group"))
    assert int4(group_size=8) == QuantSpec(4, 8, granularity="per_group")
    assert int8() != int8(narrow_range=True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"spec": int4(group_size=32)},
            "group_size=32 does not divide the contracting dimension 48; choose one of 16, 48",
        ),
        ({"spec": int8(), "contract": (0,)}, "expected different negative axes of the array's 2"),
        ({"spec": int8(), "contract": (-1,), "out": (-1,)}, "expected different negative axes"),
        ({"spec": int8(), "contract": (-3,)}, "expected different negative axes"),
        ({"spec": int8(), "contract": (-1, -2), "out": ()}, "give the axes in ascending order"),
    ],
)
def test_call_errors(args, message):
    with pytest.raises(ValueError, match=message):
        quantize(jnp.ones((48, 8)), **args)


def test_only_floats_are_quantized():
    with pytest.raises(TypeError, match=r"only floating arrays can be quantized, not int32\[4, 8\]"):
        quantize(jnp.ones((4, 8), jnp.int32), int8())
